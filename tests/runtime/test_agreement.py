"""What differs between processes, in words."""

import jax
import jax.numpy as jnp

from shardlm.runtime.agreement import agree, differences, words


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
