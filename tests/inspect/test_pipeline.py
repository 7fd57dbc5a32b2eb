"""What a report says of a pipeline: bubble, stash, traffic by purpose, useful work; and the advice on it."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest

import shardlm as sl
from shardlm.inspect import Hardware, PipelineCost, flops
from shardlm.parallel.pipeline import Kind, Operation

CONFIG = sl.TransformerConfig(vocab_size=128, num_layers=4, d_model=32, num_heads=4, d_ff=48)
BATCH, SEQUENCE = 16, 64
SMALL = Hardware(
    name="small", flops={"float32": 1e12}, memory=2.6e6, memory_bandwidth=1e11, fast_bandwidth=1e10, domain=4,
    slow_bandwidth=1e9,
)  # fmt: skip


def make(layout: str | sl.Layout, config: sl.TransformerConfig = CONFIG, batch: int = BATCH, **options) -> sl.Report:
    layout = sl.Layout.parse(layout) if isinstance(layout, str) else layout
    return sl.Trainer(config, layout, devices=layout.num_devices).explain(batch, SEQUENCE, **options)


report = functools.cache(make)


def one_at_a_time(stages, microbatches, chunks):
    both = (Kind.FORWARD, Kind.BACKWARD)
    return [[Operation(kind, i) for i in range(microbatches) for kind in both]] * stages


@pytest.fixture(scope="module")
def found() -> sl.Report:
    return make("pipe=4,pipeline=1f1b:8", hardware="h100")


@pytest.fixture(scope="module")
def cost(found) -> PipelineCost:
    return found.pipeline


def test_ticks_and_stash_are_the_tables(cost):
    assert (cost.schedule, cost.stages, cost.microbatches, cost.chunks) == ("1f1b:8", 4, 8, 1)
    assert (cost.ticks, cost.forward_ticks, cost.backward_ticks) == (15, 11, 11)
    assert cost.stashed == (7, 5, 3, 1) and cost.slots == 7
    assert cost.stashed_alone == (4, 3, 2, 1)  # min(p - s, m)
    assert cost.input_bytes == BATCH // 8 * SEQUENCE * CONFIG.d_model * 4


def test_the_bubble_is_lost_ticks_over_useful_ones(cost):
    both, head = cost.times["forward"] + cost.times["backward"], cost.times["head"]
    tokens = BATCH // 8 * SEQUENCE
    assert head == 3 * 2 * tokens * CONFIG.d_model * CONFIG.vocab_size
    assert cost.bubble == pytest.approx(3 * both / (8 * (both + head / 4)), rel=1e-12)
    # On their own the stages wait for the last, which has the head: (p - 1)(F + B) before and after its 8 turns.
    assert cost.bubble_alone == pytest.approx(3 * both / (8 * (both + head)), rel=1e-12)


def test_what_is_sent_over_pipe_is_told_by_purpose(found, cost):
    one, ring = cost.input_bytes, 2 * 3 / 4
    assert cost.sent == {
        "embedding": 8 * one * ring,
        "gradient of the embedding, to all": 8 * one * ring,
        "last stage's output, to all": 8 * one * ring,
        "gradient of the head's input": 8 * one * ring,
        "cross-entropy": 3 * BATCH * SEQUENCE * 4 * ring,
        "activations to the next stage": 10 * one,
        "gradients to the one before": 10 * one,
    }
    assert sum(cost.sent.values()) == found.ledger.bytes(axis="pipe")
    assert found.against_theory() == {("pipe",): (sum(cost.sent.values()),) * 2}


def test_text_html_and_data_hold_it(found, cost):
    text, page, data = str(found), found._repr_html_(), json.loads(found.to_json())
    for part in (
        "pipeline 1f1b:8: 4 stages, 8 microbatches, 15 ticks", "7, 5, 3, 1", "4, 3, 2, 1",
        "room for 7 inputs of 16.4 kB",
        "a forward in 8 of the 11 ticks", "gradients to the one before", "on masked arrays", f"{cost.bubble:.1%}",
    ):  # fmt: skip
        assert part in text, part
    assert max(map(len, text.splitlines())) <= 118
    assert page.count("<table>") == page.count("</table>") == 8 and "7, 5, 3, 1" in page
    assert data["pipeline"]["stashed"] == [7, 5, 3, 1] and data["pipeline"]["bubble"] == cost.bubble
    assert data["flops"]["masked"] == found.flops.masked
    beside = found.diff(report("remat=none"))
    assert beside.to_dict()["bubble, of the ideal time"] == {"pipe=4,pipeline=1f1b:8": cost.bubble, "data=1": None}


def test_a_layout_without_a_schedule_has_none():
    assert report("remat=none").pipeline is None
    with pytest.warns(UserWarning, match="runs no schedule"):
        auto = sl.Trainer(CONFIG, sl.Layout(pipe=2), devices=2, engine="auto").explain(BATCH, SEQUENCE)
    assert auto.pipeline is None and auto.flops.masked == 0


OWN = sl.Layout(pipe=2, pipeline=sl.Pipeline(schedule=one_at_a_time, microbatches=4))


@pytest.mark.parametrize(
    ("layout", "same"),
    [
        (None, "remat=none"),
        ("pipe=2,tensor=2,pipeline=gpipe:4,remat=full", "tensor=2,remat=full"),
        (OWN, "remat=none"),
        ("pipe=2,pipeline=interleaved:4:2:0+2+1+1", "remat=none"),
    ],
)
def test_useful_flops_are_those_without_a_pipeline(layout: str | sl.Layout | None, same: str, found):
    piped, plain = report(layout) if layout else found, report(same)
    assert plain.flops.masked == 0
    for kind in ("forward", "backward", "model"):
        useful = getattr(piped.flops, kind) * piped.num_devices
        assert useful == pytest.approx(getattr(plain.flops, kind) * plain.num_devices, rel=1e-12)
    # Of the layers, all that is computed is what is useful, times ticks over microbatches and times rows over layers
    # where some are padding; the head has no idle ticks.
    cost, stages = piped.pipeline, piped.pipeline.stages
    forward = cost.times["forward"] * cost.forward_ticks
    backward = cost.times["backward"] * cost.backward_ticks
    head = cost.times["head"] / stages * cost.microbatches
    assert piped.flops.total == pytest.approx(forward + backward + head, rel=1e-12)
    turns = cost.microbatches * cost.chunks * CONFIG.num_layers / (CONFIG.num_layers + cost.padding)
    useful = turns * (cost.times["forward"] + cost.times["backward"]) + head
    assert piped.flops.total - piped.flops.masked == pytest.approx(useful, rel=1e-12)
    assert piped.flops.forward == pytest.approx(turns * cost.times["forward"] + head / 3, rel=1e-12)


def test_of_a_schedule_of_ones_own_there_is_no_ratio():
    found = report(OWN)
    assert found.against_theory() == {("pipe",): (found.ledger.bytes(axis="pipe"), None)}
    assert found.to_dict()["communication"]["pipe"]["ratio"] is None
    [line] = [line.split() for line in str(found).splitlines() if line.split()[:2] == ["pipe", "2"]]
    assert line[-2:] == ["-", "-"]
    assert sum(found.pipeline.sent.values()) == found.ledger.bytes(axis="pipe")


def test_chunks_and_padding_are_said():
    found = report("pipe=2,pipeline=interleaved:4:2:0+2+1+1")
    cost, both = found.pipeline, found.pipeline.times["forward"] + found.pipeline.times["backward"]
    assert (cost.chunks, cost.padding, cost.ticks, cost.forward_ticks) == (2, 4, 13, 9)
    assert cost.bubble == pytest.approx(both / (8 * both + 4 * cost.times["head"] / 2), rel=1e-12)
    assert "2 stages, 2 chunks each, 4 microbatches" in str(found)
    assert "in the others and in 4 rows of padding it computes on masked arrays" in " ".join(str(found).split())
    assert str(cost.stashed)[1:-1] in str(found) and cost.slots == max(cost.stashed)


def test_counting_masked_ticks_as_useful_would_be_seen(found):
    """Negative control: without the table, a stage's idle ticks count."""
    trainer = sl.Trainer(CONFIG, sl.Layout.parse("pipe=4,pipeline=1f1b:8"), devices=4)
    rows = jax.ShapeDtypeStruct((BATCH, SEQUENCE), jnp.int32)
    batch = trainer.abstract_batch({"tokens": rows, "targets": rows})
    naive = flops.count_flops(trainer.step_function, trainer.abstract_state, batch, num_devices=4)
    assert naive.total == found.flops.total and naive.masked == 0
    assert naive.model > 1.3 * found.flops.model


def test_time_is_of_all_that_is_computed_and_utilisation_of_what_is_useful(found):
    line = found.timeline
    assert line.arithmetic == found.flops.total / line.hardware.peak("float32")
    assert line.model_flops == found.flops.model


@pytest.mark.parametrize("layout", [None, "pipe=4,pipeline=zb-h1:8:stored"])
def test_the_bubble_is_in_the_time(layout: str | None, found):
    """Both times are those of the simulated schedule: the ideal time and the bubble's part of it on top."""
    found = report(layout, hardware="h100") if layout else found
    line, share = found.timeline, found.pipeline.bubble
    ideal = (found.flops.total - found.flops.masked) / line.hardware.peak("float32")
    assert share > 0.05
    assert line.arithmetic == pytest.approx((1 + share) * ideal, rel=1e-12)
    assert line.bubble == pytest.approx(share * ideal, rel=1e-12)
    assert line.serial >= line.overlapped >= (1 + share) * ideal
    assert "of it on masked arrays" in str(found)


def test_advice_on_the_bubble_is_what_the_better_layout_has(found):
    [line] = found.pipeline.advice
    assert f"a bubble of {found.pipeline.bubble:.1%} of the ideal time with microbatches of 2 rows" in line
    better = report(line.partition("--layout ")[2]).pipeline
    assert better.microbatches == 16 and f": 16 of 1 would make it {better.bubble:.1%}: " in line
    [line] = better.advice  # every row is a microbatch already
    assert "microbatches of 1 row: more rows in the batch, in more microbatches, or fewer stages" in line
    [line] = report(OWN).pipeline.advice
    assert "16 of 1 would make it 5." in line


def test_a_pipeline_that_does_not_fit_is_told_how_many_microbatches_would():
    config = dataclasses.replace(CONFIG, attention=sl.Attention(implementation="chunked"))
    worse = make("pipe=2,pipeline=1f1b:4,remat=full", config, batch=32, hardware=SMALL)
    [line] = worse.advice
    assert worse.fits is False and line.startswith("microbatches=8 would bring it to ")
    better = make(line.partition("--layout ")[2], config, batch=32, hardware=SMALL)
    assert better.fits and better.peak <= 0.75 * SMALL.memory
