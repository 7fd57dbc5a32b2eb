"""What a pipelined step costs: memory by the schedule, communication and compilation not by the microbatches."""

import dataclasses
import re

import jax
import numpy as np
import optax
import pytest

import shardlm as sl
from shardlm.parallel.pipeline import Kind, Operation

CONFIG = sl.TransformerConfig(vocab_size=64, num_layers=4, d_model=64, num_heads=4, d_ff=128)
STAGES, SEQUENCE = 4, 64


def trainer(schedule, microbatches: int) -> sl.Trainer:
    layout = sl.Layout(pipe=STAGES, pipeline=sl.Pipeline(schedule=schedule, microbatches=microbatches))
    return sl.Trainer(CONFIG, layout, optax.sgd(1e-3), devices=jax.devices()[:STAGES])


def compiled(schedule, microbatches: int):
    """The step on two rows per microbatch."""
    made = trainer(schedule, microbatches)
    rows = np.ones((2 * microbatches, SEQUENCE), np.int32)
    batch = made.abstract_batch({"tokens": rows, "targets": rows})
    return made._step.lower(made.abstract_state, batch).compile()


@pytest.fixture(scope="module")
def programs() -> dict:
    return {
        (name, m): compiled(name, m) for name, counts in {"1f1b": (8, 16, 32), "gpipe": (8, 32)}.items() for m in counts
    }


def temporaries(program) -> int:
    return program.memory_analysis().temp_size_in_bytes


def test_memory_of_1f1b_does_not_grow_with_the_microbatches_and_of_gpipe_does(programs):
    found = [temporaries(programs["1f1b", m]) for m in (8, 16, 32)]
    # What does grow is the batch of integers itself, cut into microbatches.
    assert max(found) <= 1.03 * min(found)
    more = temporaries(programs["gpipe", 32]) - temporaries(programs["gpipe", 8])
    one = 2 * SEQUENCE * CONFIG.d_model * 4
    assert more >= 24 * one  # a stashed input and more for each further microbatch


def test_the_program_does_not_grow_with_the_microbatches(programs):
    kinds = r"(all-reduce|all-gather|reduce-scatter|collective-permute)(?:-start)?\("
    found = [re.findall(kinds, programs["1f1b", m].as_text()) for m in (8, 16, 32)]
    assert found[0] and all(sorted(one) == sorted(found[0]) for one in found)
    assert found[0].count("collective-permute") == 2  # one each way
    lengths = [len(programs["1f1b", m].as_text()) for m in (8, 32)]
    assert lengths[1] < 1.05 * lengths[0]


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


def test_a_checkpoint_moves_between_a_pipeline_and_none(tmp_path):
    piped, plain = trainer("1f1b", 2), sl.Trainer(CONFIG, sl.Layout(fsdp=2), optax.sgd(1e-3), devices=jax.devices()[:2])
    state = piped.init()
    sl.save(tmp_path / "piped", state)
    there = sl.restore(tmp_path / "piped", plain)
    sl.save(tmp_path / "plain", there)
    back = sl.restore(tmp_path / "plain", piped)
    for a, b, c in zip(*map(jax.tree.leaves, (state, there, back)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        np.testing.assert_array_equal(np.asarray(a), np.asarray(c))
    table = back.params["layers"]["mlp"]["up"]["kernel"]
    assert table.sharding.spec[0] == "pipe" and table.sharding.shard_shape(table.shape)[0] == 1


def test_a_report_says_what_the_bubble_is():
    report = trainer("1f1b", 8).explain(batch_size=16, sequence=SEQUENCE)
    assert any("a stage has a forward in 8 of 11 ticks that have any; in the others, 27.3%" in n for n in report.notes)
    [there] = report.ledger.select("collective-permute", "pipe", "forward")[:1]
    # Ticks in which some stage has an activation to send: all with forwards but the last.
    assert there.count == 10 and there.elements == 2 * SEQUENCE * CONFIG.d_model


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"pipe": 3}, "num_layers=4"),
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
        ({"schedule": "2f2b"}, "schedule='2f2b' is not '1f1b' or 'gpipe', nor a function"),
        ({"schedule": "interleaved"}, "schedule='interleaved' is not run yet; '1f1b' and 'gpipe' are"),
        ({"schedule": "zb-h1"}, "'zb-h1' is not run yet"),
        ({"microbatches": 0}, "microbatches=0 is not a positive integer"),
        ({"chunks": 2}, "chunks=2: several chunks per stage are not available yet"),
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
    with pytest.raises(sl.LayoutError, match="after the colon goes the number of microbatches"):
        sl.Layout.parse("pipe=4,pipeline=1f1b:many")
