"""What a stage keeps and what it makes again: memory and matrix products of each way from forward to backward."""

from collections import Counter

import jax
import numpy as np
import optax
import pytest

import shardlm as sl
from shardlm.inspect import flops
from shardlm.inspect.walk import equations
from shardlm.parallel.pipeline import Kind, Operation, make_table

CONFIG = sl.TransformerConfig(vocab_size=64, num_layers=4, d_model=64, num_heads=4, d_ff=128)
STAGES, SEQUENCE, ROWS = 4, 64, 2
TICKS = {m: m + STAGES - 1 for m in (8, 16, 32)}  # with forwards, and as many with backwards
# Of one layer on one microbatch, FLOPs of the forward: products with weights, and with scores.
TOKENS = ROWS * SEQUENCE
WEIGHTS = 2 * TOKENS * (4 * 64 * 64 + 3 * 64 * 128)
SCORES = 2 * 2 * TOKENS * SEQUENCE * 64
HEAD = 2 * TOKENS * 64 * CONFIG.padded_vocab_size / STAGES


def trainer(pipeline: sl.Pipeline, **settings) -> sl.Trainer:
    layout = sl.Layout(pipe=STAGES, pipeline=pipeline, **settings)
    return sl.Trainer(CONFIG, layout, optax.sgd(1e-3), devices=jax.devices()[:STAGES])


def batch(made: sl.Trainer, microbatches: int):
    rows = np.ones((ROWS * microbatches, SEQUENCE), np.int32)
    return made.abstract_batch({"tokens": rows, "targets": rows})


def traced(schedule: str = "1f1b", recompute: bool = False, **settings):
    """The step on 8 microbatches."""
    made = trainer(sl.Pipeline(schedule=schedule, recompute=recompute), **settings)
    return jax.make_jaxpr(made.step_function)(made.abstract_state, batch(made, 8))


def products(program, phase: str) -> Counter:
    """The shapes of every product of a phase, with how often a step makes it."""
    found = [(e, place) for e, place in equations(program) if e.primitive.name == "dot_general"]
    return Counter(
        (*(v.aval.shape for v in e.invars), place.times)
        for e, place in found
        if place.phase == phase and "te" not in str(e.source_info.name_stack)  # the head's
    )


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_memory_does_not_grow_with_the_microbatches(schedule):
    found = []
    for m in TICKS:
        made = trainer(sl.Pipeline(schedule=schedule, microbatches=m, recompute=False))
        program = made._step.lower(made.abstract_state, batch(made, m)).compile()
        found.append(program.memory_analysis().temp_size_in_bytes)
    assert max(found) <= 1.03 * min(found)
    # Every slot holds more than ten arrays of the size of a layer's input.
    assert min(found) > make_table(schedule, STAGES, 8).stash_slots * 10 * TOKENS * CONFIG.d_model * 4


def test_stored_residuals_leave_nothing_to_be_made_again():
    forward, ticks = WEIGHTS + SCORES, TICKS[8]
    again, stored, full = (flops.of(traced(**k), STAGES) for k in ({"recompute": True}, {}, {"remat": "full"}))
    for found in (again, stored, full):
        assert found.forward == ticks * forward + 8 * HEAD
        assert found.backward == 2 * found.forward
    assert stored.recomputed == 0
    assert again.recomputed > full.recomputed > 0.8 * ticks * forward


def test_split_backward_makes_exactly_the_products_of_a_whole_one():
    whole, split = (products(traced(schedule), "backward") for schedule in ("1f1b", "zb-h1"))
    ticks = TICKS[8]
    assert {times for *_, times in whole} == {ticks}
    without_times = [Counter({}), Counter({})]
    for counts, found in zip(without_times, (whole, split), strict=True):
        for (left, right, _), count in found.items():
            counts[left, right] += count
    assert without_times[0] == without_times[1] and sum(whole.values()) == 2 * 9
    # The weights' half has one product for each of the seven weights, and runs once per microbatch.
    assert sum(count for (*_, times), count in split.items() if times == 8) == 7
    assert sum(count for (*_, times), count in split.items() if times == ticks) == 7 + 4
    found = flops.of(traced("zb-h1"), STAGES)
    assert found.recomputed == 0
    assert found.backward == ticks * (WEIGHTS + 2 * SCORES) + 8 * WEIGHTS + 2 * 8 * HEAD


def split_at_once(stages, microbatches, chunks):
    kinds = (Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)
    return [[Operation(kind, i) for i in range(microbatches) for kind in kinds] for _ in range(stages)]


def test_a_report_knows_stored_residuals():
    found = {}
    for name, pipeline in {
        "again": sl.Pipeline(),
        "stored": sl.Pipeline(recompute=False),
        "split": sl.Pipeline(schedule="zb-h1", recompute=False),
    }.items():
        found[name] = trainer(pipeline).explain(batch_size=16, sequence=SEQUENCE, compile=False)
    assert found["again"].flops.recomputed > 0 and found["stored"].flops.recomputed == 0
    assert found["split"].flops.total < found["stored"].flops.total < found["again"].flops.total
    assert found["again"].memory.peak < found["stored"].memory.peak < found["split"].memory.peak
    assert any("5 weight;" in note or "weight" in note for note in found["split"].notes)
    assert set(found["stored"].remat) == {"none", "dots", "full"} and set(found["split"].remat) == {"none"}


@pytest.mark.parametrize("settings", [{"recompute": True}, {"remat": "full"}])
def test_a_users_split_backward_makes_nothing_again(settings):
    with pytest.raises(sl.LayoutError, match="splits backwards .* set recompute=False and remat='none'"):
        traced(split_at_once, **settings)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"schedule": "zb-h1"}, "schedule='zb-h1' with recompute=True: .* set recompute=False, or take '1f1b'"),
        ({"recompute": 0}, "recompute=0 is not True or False"),
        ({"schedule": "zb-h1", "recompute": False, "chunks": 2}, "'zb-h1' has one chunk per stage"),
    ],
)
def test_pipelines_that_cannot_be_are_refused(settings, text):
    with pytest.raises(sl.LayoutError, match=text):
        sl.Pipeline(**settings)


def test_zb_h1_is_refused_on_a_layout_that_rematerialises():
    with pytest.raises(sl.LayoutError, match="remat='dots' with schedule 'zb-h1'"):
        sl.Layout.parse("pipe=2,remat=dots,pipeline=zb-h1:4:stored")


def test_what_is_kept_is_read_from_text_and_written_to_it():
    for text in ("pipe=4,pipeline=1f1b:8:stored", "pipe=4,pipeline=zb-h1:6:1:1+1+1+2:ends:stored"):
        layout = sl.Layout.parse(text)
        assert layout.pipeline is not None and not layout.pipeline.recompute and str(layout) == text
    assert sl.Pipeline.parse("gpipe:stored") == sl.Pipeline(schedule="gpipe", recompute=False)
    assert sl.Pipeline.parse("1f1b").recompute
