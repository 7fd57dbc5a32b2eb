"""Every collective against NumPy, and its transpose against the adjoint identity <C x, y> = <x, C^T y>."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from shardlm import collectives
from shardlm.layout import Axis, Layout

SHARDED, WHOLE = P(None, "tensor"), P()
X = np.arange(24.0, dtype=np.float32).reshape(2, 12)


@pytest.fixture(scope="module")
def mesh():
    return Layout(data=2, tensor=4).mesh()


def run(mesh, function, spec, out_spec, x=X):
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=out_spec))(x)


def test_outside_a_manual_region_all_is_identity():
    x = jnp.ones((2, 4))
    for result in (
        collectives.vary(x, Axis.TENSOR),
        collectives.all_reduce(x, (Axis.DATA, Axis.TENSOR)),
        collectives.all_reduce_max(x, Axis.TENSOR),
        collectives.all_gather(x, Axis.TENSOR, 1),
        collectives.reduce_scatter(x, Axis.TENSOR, 1),
        collectives.split(x, Axis.TENSOR, 1),
    ):
        assert result is x
    assert collectives.size(Axis.TENSOR) == 1
    assert collectives.index(Axis.TENSOR) == 0
    assert collectives.varying(x) == frozenset()


def test_axes_of_one_device_are_left_alone(mesh):
    def function(x):
        assert collectives.active((Axis.FSDP, Axis.TENSOR)) == ("tensor",)
        assert collectives.all_gather(x, Axis.FSDP, 1) is x
        return x

    run(mesh, function, SHARDED, SHARDED)


def test_values(mesh):
    parts = np.split(X, 4, axis=1)
    gathered = run(mesh, lambda x: collectives.all_gather(x, Axis.TENSOR, 1)[None], SHARDED, P("tensor"))
    np.testing.assert_array_equal(gathered, np.stack([X] * 4))
    np.testing.assert_array_equal(
        run(mesh, lambda x: collectives.all_reduce(x, Axis.TENSOR), SHARDED, WHOLE), sum(parts)
    )
    np.testing.assert_array_equal(
        run(mesh, lambda x: collectives.all_reduce_max(x, Axis.TENSOR), SHARDED, WHOLE), np.max(parts, axis=0)
    )
    scattered = run(
        mesh,
        lambda x: collectives.reduce_scatter(x * (1 + collectives.index(Axis.TENSOR)), Axis.TENSOR, 1),
        WHOLE,
        SHARDED,
    )
    np.testing.assert_array_equal(scattered, 10 * X)
    np.testing.assert_array_equal(run(mesh, lambda x: collectives.split(x, Axis.TENSOR, 1), WHOLE, SHARDED), X)


@pytest.mark.parametrize(
    ("function", "spec", "out_spec"),
    [
        (lambda x: collectives.all_reduce(x, Axis.TENSOR), SHARDED, WHOLE),
        (lambda x: collectives.vary(x, Axis.TENSOR), WHOLE, P("tensor")),
        (lambda x: collectives.all_gather(x, Axis.TENSOR, 1), SHARDED, P("tensor")),
        (lambda x: collectives.reduce_scatter(collectives.vary(x, Axis.TENSOR), Axis.TENSOR, 1), WHOLE, SHARDED),
        (lambda x: collectives.split(x, Axis.TENSOR, 1), WHOLE, SHARDED),
    ],
    ids=["all_reduce", "vary", "all_gather", "reduce_scatter", "split"],
)
def test_the_transpose_is_the_adjoint(mesh, function, spec, out_spec):
    call = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=out_spec)
    y, pull = jax.vjp(jax.jit(call), jnp.asarray(X))
    other = jnp.asarray(np.random.default_rng(0).normal(size=y.shape), jnp.float32)
    np.testing.assert_allclose((y * other).sum(), (X * pull(other)[0]).sum(), rtol=1e-5)


def test_half_precision_is_summed_in_float32_and_moved_as_it_is(mesh):
    x = jnp.asarray(X, jnp.bfloat16)

    def gather(x):
        return collectives.all_gather(x, Axis.TENSOR, 1)

    call = jax.shard_map(gather, mesh=mesh, in_specs=SHARDED, out_specs=P("tensor"))
    text = str(jax.make_jaxpr(lambda x, y: jax.vjp(call, x)[1](y))(x, jnp.ones((8, 12), jnp.bfloat16)))
    assert "bf16[2,12]{V:tensor} = all_gather" in text
    assert "f32[2,3]{V:tensor} = reduce_scatter" in text
    # In bfloat16, whose neighbours above 256 are 2 apart, 256 + 1 is 256 however often; in float32 the sum is 259.
    small = jnp.asarray([[256, 1, 1, 1]], jnp.bfloat16)
    total = run(mesh, lambda x: collectives.all_reduce(x, Axis.TENSOR), SHARDED, WHOLE, small)
    assert total.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(total, np.float32), [[260]])


def test_zeros_vary_as_their_model_does(mesh):
    def function(x):
        zeros = collectives.zeros_like(x, jnp.float16)
        assert collectives.varying(zeros) == {"tensor"} and zeros.dtype == jnp.float16
        return x

    run(mesh, function, SHARDED, SHARDED)
