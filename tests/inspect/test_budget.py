"""Budgets hold or name what broke them."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import shardlm as sl
from shardlm.inspect import assert_at_most, assert_fits, assert_no, assert_uniform_branches

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


def send(x):
    return lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)])


def where(flag, branch=send):
    return lambda x: lax.cond(flag(x), branch, lambda x: x, x)


def repeat(times):
    return lambda x: lax.while_loop(lambda c: c[1] < times(x), lambda c: (send(c[0]), c[1] + 1), (x, 0))[0]


def program(function, **options):
    mesh, spec = sl.Layout(data=4, tensor=2).abstract_mesh(), P("data")
    return jax.make_jaxpr(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, **options))(
        jnp.ones((8, 4))
    )


@pytest.mark.parametrize(
    "function",
    [
        where(lambda x: lax.psum(x.sum(), "data") > 0),
        where(lambda x: lax.axis_index("fsdp") > 0),  # an axis of one device
        where(lambda x: lax.axis_index("data") > 0, lambda x: x + 1),  # nothing is sent
        repeat(lambda x: 3),
    ],
)
def test_branches_that_all_devices_take_together(function):
    assert_uniform_branches(program(function))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (where(lambda x: lax.axis_index("data") > 0), "collective-permute in a cond whose predicate varies over data"),
        (where(lambda x: lax.axis_index("tensor") > 0), "in a cond whose predicate varies over tensor"),
        (where(lambda x: x.sum() > 0), r"test_budget\.py:\d+: collective-permute in a cond .* varies over data"),
        (repeat(lambda x: lax.axis_index("data")), "collective-permute in a while whose predicate varies over data"),
        (jax.jit(lambda x: lax.scan(lambda c, _: (where(lambda x: x.sum() > 0)(c), None), x, None, 2)[0]), "over data"),
    ],
)
def test_branches_that_devices_take_alone(function, message):
    with pytest.raises(AssertionError, match=message):
        assert_uniform_branches(program(function))


def test_branches_of_which_nothing_is_known():
    with pytest.raises(AssertionError, match="in a cond whose predicate may vary: check_vma=False"):
        assert_uniform_branches(program(where(lambda x: lax.psum(x.sum(), "data") > 0), check_vma=False))
