"""Budgets hold or name what broke them."""

import pytest

import shardlm as sl
from shardlm.inspect import assert_at_most, assert_fits, assert_no

CONFIG = sl.presets.tiny(num_layers=2, d_model=16, d_ff=24, num_heads=2, num_kv_heads=2, vocab_size=16)


@pytest.fixture(scope="module")
def report() -> sl.Report:
    return sl.Trainer(CONFIG, sl.Layout(data=2, tensor=2), devices=4).explain(4, 8, hardware="h100")


def test_budgets_that_hold(report):
    assert_no(report, "all-gather", "tensor")
    assert_no(report.ledger, "all-to-all")
    assert_at_most(report, report.ledger.bytes(axis="data"), axis="data")
    assert_fits(report)
    assert_fits(report, report.peak)


def test_a_forbidden_collective_is_named_with_its_line(report):
    with pytest.raises(AssertionError, match=r"no all-reduce over tensor is allowed, and there are \d+:\n  - 2 x all-"):
        assert_no(report, "all-reduce", "tensor")
    with pytest.raises(AssertionError, match=r"models/mlp\.py:\d+"):
        assert_no(report, "all-reduce", "tensor", smallest=100)


def test_too_many_bytes_are_counted(report):
    sent = report.ledger.bytes(axis="data")
    with pytest.raises(AssertionError, match=f"collective over data may send 10 bytes a step and send {sent:,.0f}"):
        assert_at_most(report, 10, axis="data")


def test_too_little_memory_says_how_much_is_missing(report):
    with pytest.raises(AssertionError, match=r"needs [\d,]+ bytes on each device at .*, [\d,]+ more than the 1,000"):
        assert_fits(report, 1000)


def test_questions_that_cannot_be_answered(report):
    with pytest.raises(ValueError, match="kind='allreduce'; it is one of all-reduce, all-gather"):
        assert_no(report, "allreduce")
    with pytest.raises(ValueError, match="axis='model'; the mesh has pipe, data, fsdp"):
        assert_no(report, axis="model")
    bare = sl.Trainer(CONFIG, sl.Layout(), devices=1).explain(2, 8)
    with pytest.raises(ValueError, match="how much memory is there"):
        assert_fits(bare)
    auto = sl.Trainer(CONFIG, sl.Layout(data=2), devices=2, engine="auto").explain(2, 8)
    with pytest.raises(ValueError, match="this report has no peak: make it with compile=True"):
        assert_fits(auto, 1e9)
