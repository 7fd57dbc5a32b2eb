"""The ledger lists every collective of any function: loops multiplied, branches apart, with phase and source line."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

import shardlm as sl
from shardlm.inspect import ledger
from shardlm.inspect.hlo import Collective, collectives
from shardlm.inspect.ledger import compiler_adds, total_bytes, wire

ROWS = jax.ShapeDtypeStruct((8, 4), jnp.float32)


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def manual(function, mesh, out_specs=P(), in_specs=P("data")):
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@pytest.mark.parametrize(
    ("function", "kind", "elements", "sent"),
    [
        (lambda x: lax.psum(x, "data"), "all-reduce", 8, 2 * 3 / 4 * 8 * 4),
        (lambda x: lax.pmax(x, "data"), "all-reduce", 8, 2 * 3 / 4 * 8 * 4),
        (lambda x: lax.all_gather(x, "data", tiled=True), "all-gather", 32, 3 / 4 * 32 * 4),
        (lambda x: lax.psum_scatter(jnp.tile(x, (2, 1)), "data", tiled=True), "reduce-scatter", 16, 3 / 4 * 16 * 4),
        (lambda x: lax.all_to_all(x, "data", 1, 0, tiled=True), "all-to-all", 8, 3 / 4 * 8 * 4),
        (lambda x: lax.ppermute(x, "data", [(0, 1), (1, 0)]), "collective-permute", 8, 8 * 4),
    ],
)
def test_each_kind_has_its_size_and_ring_bytes(function, kind, elements, sent, mesh):
    [entry] = ledger(manual(function, mesh, P()), ROWS).entries
    assert (entry.kind, entry.axes, entry.size, entry.dtype, entry.elements) == (
        kind,
        ("data",),
        4,
        "float32",
        elements,
    )
    assert entry.bytes == sent
    assert entry.count == 1


def test_axes_are_in_mesh_order_and_an_axis_of_one_device_sends_nothing(mesh):
    both = ledger(manual(lambda x: lax.psum(x, ("tensor", "data")), mesh), ROWS)
    assert [(e.axes, e.size) for e in both] == [(("data", "tensor"), 8)]
    single = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "tensor"))
    assert not ledger(manual(lambda x: lax.psum(x, "data"), single), ROWS).entries


def test_loops_multiply_and_nested_loops_multiply_again(mesh):
    def function(x):
        def inner(c, _):
            return c + lax.psum(c, "tensor"), None

        def outer(c, _):
            return lax.scan(inner, lax.psum(c, "data"), None, length=3)[0], None

        return lax.scan(outer, x, None, length=5)[0]

    found = ledger(manual(function, mesh, P("data")), ROWS)
    assert {e.axes: e.count for e in found} == {("data",): 5, ("tensor",): 15}


def test_a_while_loop_is_counted_once_and_says_so(mesh):
    def function(x):
        return lax.while_loop(lambda c: c[1] < 3, lambda c: (lax.psum(c[0], "data"), c[1] + 1), (x, 0))[0]

    [entry] = ledger(manual(function, mesh, P("data")), ROWS).entries
    assert entry.endless
    assert entry.count == 1


def test_branches_are_apart_and_the_most_expensive_one_counts(mesh):
    def function(x):
        small, large = lambda x: x + lax.psum(x[:1], "data"), lambda x: x + lax.psum(lax.psum(x, "data"), "data")
        return lax.psum(lax.cond(x.sum() > 0, small, large, x), "data")

    found = ledger(manual(function, mesh, P("data")), ROWS)
    assert sorted(b.rpartition(" branch ")[2] for e in found for b in e.branch) == ["1 of 2", "1 of 2", "2 of 2"]
    one = wire("all-reduce", 4) * 8 * 4
    assert found.bytes() == one + 2 * one
    assert total_bytes(e for e in found if not e.branch) == one


def test_forward_and_backward_and_the_line_that_asks(mesh):
    def loss(w, x):
        return lax.psum((lax.all_gather(w, "tensor", tiled=True) * x).sum(), "data")

    line = inspect.getsourcelines(loss)[1] + 1
    function = jax.shard_map(
        jax.value_and_grad(loss),
        mesh=mesh,
        in_specs=(P("tensor"), P("data")),
        out_specs=(P(), P("tensor")),
        check_vma=False,
    )
    found = ledger(function, jax.ShapeDtypeStruct((4,), jnp.float32), ROWS)
    assert {(e.kind, e.phase) for e in found} >= {("all-gather", "forward"), ("reduce-scatter", "backward")}
    assert {e.source for e in found} == {f"test_ledger.py:{line}"}


def test_a_plain_jit_has_no_traced_collectives_and_the_compiler_adds_its_own(mesh):
    from jax.sharding import NamedSharding

    x = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    function = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, P()))
    traced = ledger(function, x)
    assert not traced.entries
    full = compiler_adds(traced, collectives(function.lower(x).compile().as_text(), mesh), dict(mesh.shape))
    assert full.compiled
    assert [(e.kind, e.axes, e.elements, e.size, e.source) for e in full.added] == [("all-reduce", ("data",), 4, 4, "")]


def test_no_device_is_needed():
    mesh = AbstractMesh((4096, 8), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((4096, 8), jnp.bfloat16)
    [entry] = ledger(manual(lambda x: lax.all_gather(x, "data", tiled=True), mesh), x).entries
    assert (entry.size, entry.elements, entry.bytes) == (4096, 4096 * 8, 4095 / 4096 * 4096 * 8 * 2)


def test_selection_and_counts(mesh):
    def function(x):
        return lax.psum(lax.psum(x, "data"), "tensor") + lax.pmax(x, ("data", "tensor"))

    found = ledger(manual(function, mesh, P("data")), ROWS)
    assert len(found.select(axis="tensor")) == 2
    assert len(found.select(kind="all-reduce", axis="data", phase="forward")) == 2
    assert not found.select(kind="all-gather")
    assert found.counts()[Collective("all-reduce", ("data",), 8)] == 1
    assert set(found.by_axes()) == {("data",), ("tensor",), ("data", "tensor")}


def test_recomputed_communication_is_marked():
    config = sl.presets.tiny(num_layers=2, d_model=16, d_ff=24, num_heads=2, num_kv_heads=2, vocab_size=16)
    layout = sl.Layout(fsdp=2, tensor=2, remat="full")
    report = sl.Trainer(config, layout, devices=4).explain(batch_size=2, sequence=8)
    again = [e for e in report.ledger if e.recomputed]
    assert {(e.kind, e.axes) for e in again} == {("all-gather", ("fsdp",)), ("all-reduce", ("tensor",))}
    assert {e.phase for e in again} == {"backward"}
