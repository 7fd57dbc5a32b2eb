"""What a pipelined step costs: memory by the schedule, communication and compilation not by the microbatches."""

import dataclasses
import re
from collections import defaultdict

import jax
import numpy as np
import optax
import pytest

import shardlm as sl
from shardlm.inspect import assert_uniform_branches, hlo, memory
from shardlm.parallel.pipeline import Kind, Operation, execute, make_table

CONFIG = sl.TransformerConfig(vocab_size=64, num_layers=4, d_model=64, num_heads=4, d_ff=128)
STAGES, SEQUENCE = 4, 64


def trainer(schedule, microbatches: int) -> sl.Trainer:
    """Four layers on four stages, or on two of two chunks."""
    chunks = 2 if schedule == "interleaved" else 1
    pipeline = sl.Pipeline(schedule=schedule, microbatches=microbatches, chunks=chunks)
    layout = sl.Layout(pipe=STAGES // chunks, pipeline=pipeline)
    return sl.Trainer(CONFIG, layout, optax.sgd(1e-3), devices=jax.devices()[: layout.pipe])


def compiled(schedule, microbatches: int):
    """The step on two rows per microbatch."""
    made = trainer(schedule, microbatches)
    rows = np.ones((2 * microbatches, SEQUENCE), np.int32)
    batch = made.abstract_batch({"tokens": rows, "targets": rows})
    return made._step.lower(made.abstract_state, batch).compile()


@pytest.fixture(scope="module")
def programs() -> dict:
    counts = {"1f1b": (8, 16, 32, 64), "interleaved": (8, 64), "gpipe": (8, 32)}
    return {(name, m): compiled(name, m) for name in counts for m in counts[name]}


def temporaries(program) -> int:
    return program.memory_analysis().temp_size_in_bytes


def test_memory_of_1f1b_does_not_grow_with_the_microbatches_and_of_gpipe_does(programs):
    for schedule, counts in {"1f1b": (8, 16, 32, 64), "interleaved": (8, 64)}.items():
        found = [temporaries(programs[schedule, m]) for m in counts]
        # What does grow is the batch of integers itself, cut into microbatches.
        assert max(found) <= 1.03 * min(found), (schedule, found)
    more = temporaries(programs["gpipe", 32]) - temporaries(programs["gpipe", 8])
    one = 2 * SEQUENCE * CONFIG.d_model * 4
    assert more >= 24 * one  # a stashed input and more for each further microbatch


@pytest.mark.parametrize(("schedule", "microbatches"), [("1f1b", 8), ("gpipe", 8), ("gpipe", 32)])
def test_the_peak_is_predicted_within_a_tenth(programs, schedule: str, microbatches: int):
    predicted = trainer(schedule, microbatches).explain(2 * microbatches, SEQUENCE).memory
    compilers = memory.with_compiled(predicted, programs[schedule, microbatches]).compiled
    assert predicted.peak == pytest.approx(compilers, rel=0.10)


def test_the_program_does_not_grow_with_the_microbatches(programs):
    kinds = r"(all-reduce|all-gather|reduce-scatter|collective-permute)(?:-start)?\("
    for schedule, counts in {"1f1b": (8, 16, 32, 64), "interleaved": (8, 64)}.items():
        found = [re.findall(kinds, programs[schedule, m].as_text()) for m in counts]
        assert found[0] and all(sorted(one) == sorted(found[0]) for one in found)
        assert found[0].count("collective-permute") == 2  # one each way
        lengths = [len(programs[schedule, m].as_text()) for m in counts]
        assert lengths[-1] < 1.08 * lengths[0]  # the table of ticks is in it


def test_a_users_schedule_runs_and_gives_the_same_numbers():
    def one_at_a_time(stages, microbatches, chunks):
        both = (Kind.FORWARD, Kind.BACKWARD)
        return [[Operation(kind, i) for i in range(microbatches) for kind in both] for _ in range(stages)]

    rows = np.random.default_rng(0).integers(0, 64, (4, SEQUENCE))
    batch = {"tokens": rows, "targets": np.roll(rows, -1, 1)}
    own, plain = trainer(one_at_a_time, 2), sl.Trainer(CONFIG, sl.Layout(), optax.sgd(1e-3), devices=jax.devices()[:1])
    (loss, grads), (expected, wanted) = (t.loss_and_grads(t.init(), batch) for t in (own, plain))
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(np.asarray(b), np.asarray(a), rtol=0, atol=1e-5 * float(np.abs(a).max()))


FOUR = {
    "plain": sl.Layout(fsdp=2),
    "1f1b": sl.Layout(pipe=4, pipeline=sl.Pipeline(microbatches=2)),
    "interleaved": sl.Layout(pipe=2, tensor=2, pipeline=sl.Pipeline(schedule="interleaved", microbatches=2, chunks=2)),
    "uneven": sl.Layout(pipe=2, pipeline=sl.Pipeline(microbatches=2, layers=[1, 3])),
    "otherwise uneven": sl.Layout(pipe=2, pipeline=sl.Pipeline(microbatches=2, layers=[3, 1])),
    "uneven chunks": sl.Layout(
        pipe=2, fsdp=2, pipeline=sl.Pipeline(schedule="interleaved", microbatches=2, chunks=2, layers=[0, 2, 1, 1])
    ),
}


def test_a_checkpoint_moves_between_pipelines_and_none(tmp_path):
    made = {
        name: sl.Trainer(CONFIG, layout, optax.adam(1e-3), devices=jax.devices()[: layout.num_devices])
        for name, layout in FOUR.items()
    }
    # Moments unlike the parameters, and every layer unlike the others.
    start = made["plain"].init()
    start = dataclasses.replace(start, opt_state=jax.tree.map(lambda x: x + 2, start.opt_state))
    expected, before = jax.tree.leaves(start), "plain"
    sl.save(tmp_path / before, start)
    for name in ("interleaved", "uneven", "otherwise uneven", "uneven chunks", "1f1b", "plain"):
        trainer = made[name]
        state = sl.restore(tmp_path / before, trainer)
        assert jax.tree.structure(state) == jax.tree.structure(trainer.abstract_state)
        for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(trainer.abstract_state), strict=True):
            assert (leaf.shape, leaf.sharding) == (like.shape, like.sharding)
        for a, b in zip(expected, jax.tree.leaves(trainer.in_order(state)), strict=True):
            np.testing.assert_array_equal(np.asarray(b), np.asarray(a), err_msg=name)
        before = f"from {name}"
        sl.save(tmp_path / before, state)


def test_a_checkpoint_of_other_layers_is_refused(tmp_path):
    sl.save(tmp_path / "four", sl.Trainer(CONFIG, FOUR["uneven"], devices=jax.devices()[:2]).init())
    five = dataclasses.replace(CONFIG, num_layers=5)
    layout = sl.Layout(pipe=2, pipeline=sl.Pipeline(microbatches=2, layers=[2, 3]))
    for other, found in ((layout, r"\(6, 64, 128\)"), (sl.Layout(fsdp=2), r"\(5, 64, 128\)")):
        text = rf"params/layers/mlp/up/kernel: shape expected {found} of 5 layers, found \(6, 64, 128\) of 4 layers"
        with pytest.raises(ValueError, match=text):
            sl.restore(tmp_path / "four", sl.Trainer(five, other, devices=jax.devices()[:2]))


def test_every_stage_holds_its_layers_and_padding_is_zero():
    trainer = sl.Trainer(CONFIG, FOUR["uneven chunks"], devices=jax.devices()[:4])
    plain = sl.Trainer(CONFIG, FOUR["plain"], devices=jax.devices()[:2])
    state = trainer.init()
    kernel, whole = (x.params["layers"]["mlp"]["up"]["kernel"] for x in (state, plain.init()))
    assert state.layer_rows == ((-1, -1, 0, 1), (2, -1, 3, -1))
    assert kernel.shape == (2, 4, 64, 128) and tuple(kernel.sharding.spec) == (None, "pipe", "fsdp")
    for chunk, rows in enumerate(state.layer_rows):
        for row, layer in enumerate(rows):
            np.testing.assert_array_equal(kernel[chunk, row], whole[layer] if layer >= 0 else 0)
    assert trainer.num_parameters == plain.num_parameters
    assert "4 of 8 rows of layers are padding" in trainer.describe()


def test_a_state_whose_layers_are_elsewhere_is_refused():
    one, two = (sl.Trainer(CONFIG, FOUR[name], devices=jax.devices()[:2]) for name in ("uneven", "otherwise uneven"))
    rows = np.ones((2, SEQUENCE), np.int32)
    with pytest.raises(ValueError, match=r"stored for another pipeline: \(0, -1, -1, 1, 2, 3\), and here \(0, 1, 2, 3"):
        two.step(one.init(), {"tokens": rows, "targets": rows})


def products(text: str) -> dict[str, set[tuple[str, str]]]:
    """By conditional of a compiled program, the matrix products in it: how often it is taken, and their direction."""
    bodies, found = hlo._computations(text), defaultdict(set)

    def walk(name: str, within: str) -> None:
        for instruction in bodies[name].instructions.values():
            if instruction.opcode == "dot":
                [place] = re.findall(r'op_name="([^"]*)"', instruction.line)
                back = "transpose(" in place or "/backward/" in place
                found[within].add((re.findall(r"taken_\d+_of_\d+", place)[0], "backward" if back else "forward"))
            for called in instruction.called:
                walk(called, within or (instruction.name if instruction.opcode == "conditional" else ""))

    walk(next(name for name, body in bodies.items() if body.entry), "")
    return dict(found)


@pytest.mark.parametrize(("schedule", "ticks"), [("1f1b", (11, 15)), ("gpipe", (11, 22)), ("interleaved", (17, 21))])
def test_ticks_without_a_backward_or_a_forward_do_not_compute_one(programs, schedule: str, ticks: tuple[int, int]):
    taken, total = ticks
    pipeline = trainer(schedule, 8).layout.pipeline
    stages, steps = STAGES // pipeline.chunks, make_table(schedule, STAGES // pipeline.chunks, 8, pipeline.chunks)
    assert (steps.has_forward.sum(), steps.has_backward.sum(), steps.ticks) == (taken, taken, total)
    assert not steps.has_backward[:stages].any() and not steps.has_forward[-stages:].any()
    # Three conditionals hold all products: the layers' backward with the forward that it repeats, their forward, and
    # the head, which is both.
    layers, head = f"taken_{taken}_of_{total}", f"taken_8_of_{total}"
    found = products(programs[schedule, 8].as_text())
    assert "" not in found
    assert sorted(map(sorted, found.values())) == [
        [(layers, "backward")], [(layers, "forward")], [(head, "backward"), (head, "forward")]
    ]  # fmt: skip


def traced(made: sl.Trainer):
    rows = jax.ShapeDtypeStruct((4, SEQUENCE), np.int32)
    return jax.make_jaxpr(made.step_function)(
        made.abstract_state, made.abstract_batch({"tokens": rows, "targets": rows})
    )


@pytest.mark.parametrize("name", ["1f1b", "uneven chunks"])
def test_all_devices_take_the_same_branches(name: str):
    assert_uniform_branches(traced(sl.Trainer(CONFIG, FOUR[name], devices=4)))


def test_a_branch_that_stages_take_alone_is_seen(monkeypatch: pytest.MonkeyPatch):
    together = execute._Tick._if

    def alone(self, what, function, otherwise):
        row = self.row | {"sends_gradient": self.row["sends_gradient"] & (self.row["backward_microbatch"] >= 0)}
        return together(dataclasses.replace(self, row=row), what, function, otherwise)

    monkeypatch.setattr(execute._Tick, "_if", alone)
    with pytest.raises(AssertionError, match="collective-permute in a cond whose predicate varies over pipe"):
        assert_uniform_branches(traced(sl.Trainer(CONFIG, FOUR["1f1b"], devices=4)))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"pipe": 2, "pipeline": sl.Pipeline(layers=[3, 2])},
            r"layers=\(3, 2\) are 5 layers in 2 pieces, but there are num_layers=4 and pipe=2 x chunks=1 = 2 pieces: "
            r"the default is layers=\(2, 2\)",
        ),
        ({"pipe": 2, "pipeline": sl.Pipeline(layers=[1, 1, 2])}, "are 4 layers in 3 pieces, but there are"),
        (
            {"pipe": 4, "pipeline": sl.Pipeline(schedule="interleaved", microbatches=6, chunks=2)},
            "microbatches=6 is not a positive multiple of pipe=4: pipe can be 1, 2, 3, 6, or microbatches 4 or 8",
        ),
        ({"pipe": 2, "batch": 12}, r"batch_size=12 is not a positive multiple of microbatches=8"),
        ({"pipe": 2, "accumulate": 2}, "a pipeline accumulates over its own microbatches"),
        ({"pipe": 2, "reduce_gradients": "layer"}, "sums gradients once, after its last tick"),
        ({"pipe": 1, "pipeline": sl.Pipeline()}, r"pipeline=1f1b:8 has no effect on pipe=1"),
        ({"pipe": 2, "pipeline": "1f1b"}, "pipeline='1f1b' is not a Pipeline"),
    ],
)
def test_layouts_that_cannot_be_are_refused(settings, text):
    settings = dict(settings)
    rows = settings.pop("batch", 16)
    with pytest.raises(sl.LayoutError, match=text):
        sl.Layout(**settings).check(CONFIG, batch_size=rows, sequence=SEQUENCE)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"schedule": "2f2b"}, "schedule='2f2b' is not one of '1f1b', 'gpipe', 'interleaved', 'zb-h1', nor a function"),
        ({"microbatches": 0}, "microbatches=0 is not a positive integer"),
        ({"chunks": 2}, "chunks=2: schedule '1f1b' has one chunk per stage; 'interleaved' has several"),
        ({"layers": "3+1"}, "layers='3\\+1' is not a list of how many layers each piece has"),
        ({"layers": [3, -1]}, "is not a list of how many layers each piece has"),
        ({"layers": [0, 0]}, "is not a list of how many layers each piece has"),
    ],
)
def test_pipelines_that_cannot_be_are_refused(settings, text):
    with pytest.raises(sl.LayoutError, match=text):
        sl.Pipeline(**settings)


def test_a_pipeline_is_read_from_text_and_written_to_it():
    layout = sl.Layout.parse("pipe=4,data=2,pipeline=gpipe:6")
    assert layout == sl.Layout(pipe=4, data=2, pipeline=sl.Pipeline(schedule="gpipe", microbatches=6))
    assert sl.Layout.parse(str(layout)) == layout
    assert sl.Layout(pipe=2).pipeline == sl.Pipeline() and sl.Layout(pipe=2) == sl.Layout.parse("pipe=2")
    assert dataclasses.replace(layout, data=1).microbatches == 6
    piped = sl.Pipeline(schedule="interleaved", microbatches=4, chunks=2, layers=(1, 2, 2, 1))
    assert sl.Layout.parse("pipe=2,pipeline=interleaved:4:2:1+2+2+1").pipeline == piped
    assert sl.Layout.parse(str(sl.Layout(pipe=2, pipeline=piped))).pipeline == piped
    assert hash(sl.Pipeline(layers=[1, 2])) == hash(sl.Pipeline(layers=(1, 2)))
    for text in ("1f1b:many", "1f1b:2+2", "1f1b:8:1:3+x", "1f1b:8:1:4:4"):
        with pytest.raises(
            sl.LayoutError, match="after the schedule go the numbers of microbatches, of chunks, and of"
        ):
            sl.Layout.parse(f"pipe=4,pipeline={text}")
