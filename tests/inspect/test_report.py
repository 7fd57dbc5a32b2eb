"""What a report says: as text, HTML, data; against hardware; beside another; and what it advises."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

import shardlm as sl
from shardlm.inspect import Hardware, compare

CONFIG = sl.TransformerConfig(vocab_size=512, num_layers=4, d_model=64, num_heads=8, num_kv_heads=4, d_ff=192)
SMALL = Hardware(
    name="small", flops={"float32": 1e12}, memory=20e6, memory_bandwidth=1e11, fast_bandwidth=1e10, domain=4,
    slow_bandwidth=1e9,
)  # fmt: skip


@pytest.fixture(scope="module")
def report() -> sl.Report:
    trainer = sl.Trainer(CONFIG, sl.Layout(data=4, fsdp=2, tensor=2), devices=16)
    return trainer.explain(batch_size=32, sequence=64, hardware=SMALL)


def test_the_text_holds_what_is_asked_for(report):
    text = str(report)
    for part in (
        "4 layers, d_model 64, 8 heads (4 kv) of 8, d_ff 192, vocabulary 512",
        "data=4 x fsdp=2 x tensor=2 = 16 devices",
        "32 x 64 tokens a step", "parameters", "optimizer state", "gradients", "activations kept for backward", "peak",
        "what remat would change", "none (this one)", "dots", "full", "theory", "1.000", "models/attention.py:",
        "forward", "backward", "matrix products", "time on small", "FLOP per byte", "model FLOPs utilisation",
    ):  # fmt: skip
        assert part in text, part
    assert max(map(len, text.splitlines())) <= 118


def test_html_holds_the_same_tables_and_escapes(report):
    page = report._repr_html_()
    assert page.count("<table>") == page.count("</table>") == 6
    assert "<script" not in page
    odd = dataclasses.replace(report, model="<b>&", notes=("1 < 2",))
    assert "&lt;b&gt;&amp;" in odd._repr_html_() and "1 &lt; 2" in odd._repr_html_()


def test_data_is_json_and_complete(report):
    data = json.loads(report.to_json())
    assert data == json.loads(json.dumps(report.to_dict()))
    assert data["devices"] == 16 and data["sizes"]["tensor"] == 2
    assert data["memory"]["peak"] == report.memory.peak
    assert data["flops"]["total"] == report.flops.total
    assert len(data["ledger"]) == len(report.ledger.entries)
    assert math.isclose(sum(e["bytes"] for e in data["ledger"]), report.ledger.bytes())
    assert {v["ratio"] for v in data["communication"].values()} == {1.0}
    assert data["timeline"]["overlapped"] == report.timeline.overlapped
    assert data["parameters"]["layers/mlp/up/kernel"] == {
        "shape": [4, 64, 192], "dtype": "float32", "axes": [[], ["fsdp"], ["tensor"]]
    }  # fmt: skip


def test_times_are_sums_over_bandwidths(report):
    line = report.timeline
    assert line.arithmetic == report.flops.total / 1e12
    tensor = report.ledger.bytes(axis="tensor") - report.ledger.bytes(axis="data") * 0
    only = sum(e.bytes for e in report.ledger if e.axes == ("tensor",))
    assert only <= tensor
    assert line.communication[("tensor",)] == pytest.approx(only / 1e10)
    assert line.links[("tensor",)] == "fast" and line.links[("data",)] == "slow"
    assert line.overlapped <= line.serial
    assert line.serial == pytest.approx(max(line.arithmetic, line.memory) + sum(line.communication.values()))
    assert line.bound.startswith("communication over data")


def test_faster_links_change_what_bounds(report):
    fast = dataclasses.replace(SMALL, fast_bandwidth=1e15, slow_bandwidth=1e15)
    found = sl.Trainer(CONFIG, sl.Layout(data=4, fsdp=2, tensor=2), devices=16).explain(32, 64, hardware=fast)
    assert found.timeline.bound == "memory"  # a narrow model: few FLOPs per byte
    assert found.timeline.intensity < found.timeline.ridge
    slow = dataclasses.replace(fast, flops={"float32": 1e9})
    found = sl.Trainer(CONFIG, sl.Layout(data=4, fsdp=2, tensor=2), devices=16).explain(32, 64, hardware=slow)
    assert found.timeline.bound == "arithmetic"


def test_utilisation_of_a_measured_step(report):
    seconds = 0.5
    assert report.utilisation(seconds) == report.flops.model / (seconds * 1e12)
    for wrong in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="a step time of .* s; it is above 0"):
            report.utilisation(wrong)
    bare = sl.Trainer(CONFIG, sl.Layout(), devices=1).explain(2, 16)
    with pytest.raises(ValueError, match=r"needs a peak: make the report with explain\(\.\.\., hardware="):
        bare.utilisation(1.0)
    assert bare.fits is None and bare.timeline is None and "time on" not in str(bare)


def test_advice_names_changes_that_make_it_fit_and_they_do():
    trainer = sl.Trainer(CONFIG, sl.Layout(fsdp=2, tensor=2), devices=4)
    report = trainer.explain(batch_size=32, sequence=128, hardware=SMALL)
    assert report.fits is False
    [line] = report.advice
    assert "sequence_parallel" in line and "would bring it to" in line
    layout, _, attention = line.partition("--layout ")[2].partition(" --attention ")
    changed = dataclasses.replace(CONFIG, attention=sl.Attention(implementation=attention)) if attention else CONFIG
    better = sl.Trainer(changed, sl.Layout.parse(layout), devices=4).explain(32, 128, hardware=SMALL)
    assert better.fits and better.peak <= 0.75 * SMALL.memory


def test_advice_where_nothing_helps_says_what_the_state_takes():
    tiny = dataclasses.replace(SMALL, memory=1e5)
    report = sl.Trainer(CONFIG, sl.Layout(data=2), devices=2).explain(4, 16, hardware=tiny)
    assert report.fits is False
    assert any("together are not enough" in line for line in report.advice)
    assert any("parameters and optimizer state take" in line for line in report.advice)


def test_advice_on_a_state_that_is_held_many_times_says_what_splitting_it_over_all_devices_would_take():
    nothing = dataclasses.replace(SMALL, memory=1e3)
    trainer = sl.Trainer(CONFIG, sl.Layout(data=4, fsdp=2, tensor=2), devices=16)
    report = trainer.explain(32, 64, hardware=nothing)
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(trainer.abstract_state))
    assert report.memory.state > 3 * whole / 16
    size = sl.inspect.render.size
    assert any(
        f"take {size(report.memory.state)} on each of 16 devices. Split over all, by fsdp and tensor, they would take "
        f"{size(whole / 16)};" in line
        for line in report.advice
    )


def test_enough_memory_needs_no_advice_and_a_tight_fit_says_so():
    trainer = sl.Trainer(CONFIG, sl.Layout(), devices=1)
    peak = trainer.explain(4, 64).peak
    roomy = dataclasses.replace(SMALL, memory=peak * 2)
    assert trainer.explain(4, 64, hardware=roomy).advice == ()
    tight = trainer.explain(4, 64, hardware=dataclasses.replace(SMALL, memory=peak * 1.02))
    assert tight.fits
    assert tight.advice[0].startswith("tight: a compiler may need 25% more than predicted")


def test_two_reports_side_by_side():
    a = sl.Trainer(CONFIG, sl.Layout(data=4), devices=4).explain(8, 32)
    b = sl.Trainer(CONFIG, sl.Layout(fsdp=4), devices=4).explain(8, 32)
    both = a.diff(b)
    rows = both.to_dict()
    assert rows["parameters"] == {"data=4": a.memory.parameters, "fsdp=4": b.memory.parameters}
    assert rows["  over fsdp"] == {"data=4": 0, "fsdp=4": b.ledger.bytes()}
    assert "data=4" in str(both) and "over fsdp" in both._repr_html_()
    assert json.loads(both.to_json())["peak"] == rows["peak"]
    assert list(a.diff(a).reports) == ["data=4", "other"]
    with pytest.raises(ValueError, match="1 reports to compare; give at least two"):
        compare({"a": a})


def test_bad_questions_are_errors():
    trainer = sl.Trainer(CONFIG, sl.Layout(data=4), devices=4)
    with pytest.raises(ValueError, match="unknown hardware 'h10'"):
        trainer.explain(8, 32, hardware="h10")
    with pytest.raises(sl.LayoutError, match="batch_size=6 is not a positive multiple of data=4"):
        trainer.explain(6, 32)
    with pytest.raises(ValueError, match="batch_size=0 is not a positive integer"):
        trainer.explain(0, 32)
    with pytest.raises(ValueError, match="sequence=2.5 is not a positive integer"):
        trainer.explain(4, 2.5)
    with pytest.raises(ValueError, match="the 4 devices of this mesh do not exist, so nothing can be compiled"):
        trainer.explain(4, 8, compile=True)
    with pytest.raises(ValueError, match="the 4 devices of this Trainer do not exist"):
        trainer.init()
    rows = np.ones((4, 8), np.int32)
    batch = {"tokens": rows, "targets": rows}
    for call in (
        lambda: trainer.step(trainer.abstract_state, batch),
        lambda: sl.sample(trainer, trainer.abstract_state, rows[0], tokens=2, window=8),
        lambda: sl.verify(trainer),
    ):
        with pytest.raises(ValueError, match="the 4 devices of this Trainer do not exist"):
            call()
    for wrong in (0, -4, True):
        with pytest.raises(ValueError, match=f"devices={wrong}: give devices, or a positive number of devices"):
            sl.Trainer(CONFIG, sl.Layout(), devices=wrong)
    learned = dataclasses.replace(CONFIG, positions=sl.LearnedPositions(length=16))
    with pytest.raises(ValueError, match="a sequence of 32 tokens; the model has 16 learned positions"):
        sl.Trainer(learned, sl.Layout(), devices=1).explain(2, 32)


def test_fused_attention_has_a_stand_in_where_cudnn_is_not():
    fused = dataclasses.replace(CONFIG, dtype="bfloat16", attention=sl.Attention(implementation="cudnn"))
    report = sl.Trainer(fused, sl.Layout(tensor=2), devices=2).explain(4, 64)
    assert any("cuDNN is not here" in note for note in report.notes)
    chunked = dataclasses.replace(fused, attention=sl.Attention(implementation="chunked"))
    assert report.peak == sl.Trainer(chunked, sl.Layout(tensor=2), devices=2).explain(4, 64).peak


def test_the_compiler_adds_only_the_norms_scalars():
    trainer = sl.Trainer(CONFIG, sl.Layout(fsdp=2), devices=jax.devices()[:2])
    report = trainer.explain(4, 16, compile=True)
    assert {entry.elements for entry in report.ledger.added} == {1}
    assert "the compiler adds" in str(report)
    assert report.against_theory()[("fsdp",)][0] == pytest.approx(report.against_theory()[("fsdp",)][1])
