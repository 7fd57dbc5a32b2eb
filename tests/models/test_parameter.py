"""Parameters are drawn from the key and the global position of each element, and carry the names of their dims."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from shardlm.models import parameter

SHAPE = (24, 40)


def draw(dtype="float32", seed=0, std=0.3, shape=SHAPE):
    return parameter.normal(nnx.Rngs(seed), ("embed", "mlp"), shape, std, dtype)


def test_a_normal_draw_has_the_deviation_asked_for():
    value = np.asarray(draw(shape=(100, 60))[...])
    # Of 6000 draws the mean is off by std/sqrt(6000) and the deviation by std/sqrt(12000): within five times that.
    assert abs(value.mean()) < 5 * 0.3 / math.sqrt(6000)
    assert abs(value.std() / 0.3 - 1) < 5 / math.sqrt(12_000)


def test_a_draw_is_a_function_of_the_key():
    np.testing.assert_array_equal(draw()[...], draw()[...])
    assert (draw()[...] != draw(seed=1)[...]).mean() > 0.99
    rngs = nnx.Rngs(0)
    first, second = (parameter.normal(rngs, ("embed",), (50,), 1.0, "float32")[...] for _ in range(2))
    assert (first != second).mean() > 0.9


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_parameter_is_the_float32_draw_rounded(dtype):
    value = draw(dtype)[...]
    assert value.dtype == dtype
    np.testing.assert_array_equal(value, draw()[...].astype(dtype))


def test_a_float64_parameter_is_the_float32_draw(x64):
    value = draw("float64")[...]
    assert value.dtype == jnp.float64
    # In float32 the deviation and the product with it are rounded, each by half a unit in 24 bits.
    np.testing.assert_allclose(value, draw()[...], rtol=2.0**-23)


def test_a_constant_is_one():
    scale = parameter.constant(("embed",), (5,), 1.5, "bfloat16")
    assert scale[...].dtype == jnp.bfloat16
    np.testing.assert_array_equal(scale[...].astype(np.float32), np.full(5, 1.5))


def test_dims_are_kept_beside_the_value_and_no_mesh_is_asked_for():
    assert draw().get_metadata()["out_sharding"] == ("embed", "mlp")
    assert parameter.constant((None,), (5,), 0.0, "float32").get_metadata()["out_sharding"] == (None,)


@pytest.mark.parametrize("spec", [PartitionSpec("x"), PartitionSpec(None, "x"), PartitionSpec("x", "y")], ids=str)
def test_a_parameter_born_sharded_is_the_one_born_whole(spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    born = jax.jit(lambda: draw()[...], out_shardings=NamedSharding(mesh, spec))()
    assert born.sharding.spec == spec
    # Compiled, the product with the deviation may be fused into the draw: one unit in float32's last place.
    np.testing.assert_allclose(born, draw()[...], rtol=2.0**-22)
