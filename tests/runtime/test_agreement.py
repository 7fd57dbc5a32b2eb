"""What differs between processes, in words."""

import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from shardlm.runtime import agreement, begin
from shardlm.runtime.agreement import Round, agree, differences, words


def test_alone_all_agree():
    agree("step", {"seed": object()})  # not even looked at


def test_differences_name_process_fact_and_both_values():
    facts = [{"seed": 0, "layout": "data=2"}, {"seed": 0, "layout": "data=2"}, {"seed": 1, "layout": "data=2", "x": 3}]
    assert differences(facts) == ["seed: 1 on process 2, 0 on process 0", "x: 3 on process 2, null on process 0"]
    assert differences(facts[:2]) == []


def test_programs_are_compared_by_what_is_in_them():
    def program(rate):
        return words(jax.make_jaxpr(lambda x: x * rate + jnp.sum(x))(jnp.ones(3)))

    assert program(0.5) == program(0.5)
    [line] = differences([{"program": program(0.5)}, {"program": program(0.25)}])
    assert "0.25" in line and "0.5" in line and "mul" not in line


def test_another_program_is_told_of_where_nothing_else_differs():
    facts = [{"program": {"a": 1}, "seed": 0}, {"program": {"a": 2}, "seed": 1}]
    assert differences(facts) == ["seed: 1 on process 1, 0 on process 0"]


def test_what_is_long_is_cut():
    [line] = differences([{"a": "x" * 1000}, {"a": "y" * 1000}])
    assert len(line) < 500


class Store:
    """Plays JAX's key-value store among threads."""

    def __init__(self):
        self._values, self._changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self._changed:
            assert key not in self._values
            self._values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._values, milliseconds / 1000):
                raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {key}")
            return self._values[key]

    def key_value_dir_get(self, prefix):
        with self._changed:
            return [item for item in self._values.items() if item[0].startswith(f"{prefix}/")]


def rounds(*processes: tuple, count: int | None = None, limit: float = 5.0) -> list[str]:
    """What each of (index, facts, seconds until it comes) raises."""
    store, found = Store(), [""] * len(processes)

    def run(place: int, index: int, facts: dict, late: float = 0.0):
        time.sleep(late)
        try:
            Round(store, index, count or len(processes), 7, "step", "tokens int32[6, 8]", limit).agree(facts)
        except ValueError as error:
            found[place] = str(error)

    threads = [threading.Thread(target=run, args=(place, *process)) for place, process in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
        assert not thread.is_alive()
    return found


def test_those_who_do_the_same_go_on():
    assert rounds((0, {"a": 1}), (1, {"a": 1}), (2, {"a": 1}, 0.2)) == ["", "", ""]
    assert rounds((0, {}, 0.2), (1, {})) == ["", ""]


def test_those_who_do_not_say_so_on_every_process():
    found = rounds((0, {"rows": 4}), (1, {"rows": 4}), (2, {"rows": 2}), (3, {"rows": 6}))
    assert set(found) == {
        "step: the processes do not do the same:\n  - rows: 2 on process 2, 4 on process 0\n"
        "  - rows: 6 on process 3, 4 on process 0"
    }


@pytest.mark.parametrize("here", [[0], [1], [0, 2], [1, 2]])
def test_who_does_not_come_is_named_by_those_who_did_and_nobody_waits_for_ever(here, monkeypatch, capfd):
    """As where one process has a batch of a new shape, and the others step on with an old one."""
    monkeypatch.setattr(agreement, "_NOTICE", 0.1)
    monkeypatch.setattr(agreement, "_SLICE", 0.05)
    absent = [i for i in range(3) if i not in here]
    began = time.monotonic()
    found = rounds(*((i, {"rows": 6}) for i in here), count=3, limit=0.6)
    assert time.monotonic() - began < 2.0
    named = f"process{'es' if len(absent) > 1 else ''} {', '.join(map(str, absent))}"
    for text in found:
        assert text.startswith(f"step: {named} did not begin this within 0.6 s, and process ")
        assert "(tokens int32[6, 8])" in text and "global batches of the same shapes" in text
        assert "SHARDLM_PATIENCE=SECONDS" in text
    said = capfd.readouterr().err
    assert f"process {here[0]} of 3 waits for {named} to begin: step (tokens int32[6, 8]); for " in said


def test_a_program_is_agreed_on_once_for_every_shape_and_compiled_before_it_is_run(monkeypatch):
    """The wait after compiling is what gives slow compilers their time: no collective has begun by then."""
    seen = []
    compiled = []
    monkeypatch.setattr(
        begin, "agree", lambda what, facts, **options: seen.append((what, facts, options, len(compiled)))
    )

    def compile_of(function):
        class Function:
            def trace(self, *arguments):
                traced = function.trace(*arguments)
                return SimpleNamespace(
                    jaxpr=traced.jaxpr, lower=lambda: SimpleNamespace(compile=lambda: compiled.append(1))
                )

        return Function()

    function = compile_of(jax.jit(lambda state, batch: state + batch["x"].sum()))
    for rows in (4, 4, 6, 4, 6, 4):
        begin.begin("step", function, (jnp.ones(3), {"x": jnp.ones((rows, 2))}), lambda: {"seed": 1})
    assert [(what, "program" in facts, done) for what, facts, _, done in seen] == [
        ("step", True, 0), ("step", False, 1), ("step", True, 1), ("step", False, 2),
    ]  # fmt: skip
    assert [facts.get("shape of x") for _, facts, _, _ in seen] == ["float32[4, 2]", None, "float32[6, 2]", None]
    assert seen[2][2] == {
        "detail": "with shapes that it has not had before: x float32[6, 2]", "limit": agreement.AGAIN,
    }  # fmt: skip
    assert seen[0][2]["limit"] == seen[1][2]["limit"] == agreement.FIRST
    other = compile_of(jax.jit(lambda state, batch: batch))
    begin.begin("step", other, (jnp.ones(3), {"x": jnp.ones((4, 2))}), dict)  # another program asks for itself
    assert len(seen) == 6
