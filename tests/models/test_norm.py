"""RMSNorm and LayerNorm follow their formulas, in at least float32."""

import jax.numpy as jnp
import numpy as np
import pytest

from shardlm import Norm
from shardlm.models.norm import Normalize

LENGTH = 7
EPSILON = 0.3  # large, so that a wrong place for it shows
NORMS = [Norm(kind=kind, epsilon=EPSILON, one_plus_scale=plus) for kind in ("rms", "layer") for plus in (False, True)]


def reference(norm, x, scale, bias):
    """One vector at a time, in float64: the mean square, or the variance about the mean, to the power -1/2."""
    rows = []
    for row in x.reshape(-1, LENGTH).astype(np.float64):
        centred = row - sum(row) / LENGTH if norm.kind == "layer" else row
        root = np.sqrt(sum(v * v for v in centred) / LENGTH + norm.epsilon)
        rows.append(
            centred / root * (1 + scale if norm.one_plus_scale else scale) + (bias if norm.kind == "layer" else 0)
        )
    return np.array(rows).reshape(x.shape)


def built(norm, dtype="float64"):
    """A norm with random scale and bias, and these."""
    rng = np.random.default_rng(1)
    module = Normalize(norm, "embed", LENGTH, dtype)
    module.scale[...] = jnp.asarray(rng.normal(size=LENGTH), dtype)
    if module.bias is not None:
        module.bias[...] = jnp.asarray(rng.normal(size=LENGTH), dtype)
    bias = 0.0 if module.bias is None else np.asarray(module.bias[...], np.float64)
    return module, np.asarray(module.scale[...], np.float64), bias


def sample(*shape):
    return np.random.default_rng(0).normal(loc=0.7, scale=2.0, size=shape)


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_a_norm_follows_its_formula(norm, x64):
    x = sample(2, 3, LENGTH)
    module, scale, bias = built(norm)
    got = module(jnp.asarray(x))
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, reference(norm, x, scale, bias), rtol=1e-12, atol=1e-13)


def test_every_field_changes_the_result():
    """The negative control of the test above: its tolerance separates every norm from every other."""
    x = sample(2, 3, LENGTH)
    _, scale, bias = built(NORMS[2], "float32")
    others = [*NORMS, Norm(epsilon=EPSILON + 1e-6)]
    results = [reference(norm, x, scale, bias) for norm in others]
    for i, first in enumerate(results):
        for second in results[:i]:
            assert np.abs(first - second).max() > 1e-8


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_a_new_norm_only_normalises(norm):
    x = sample(5, LENGTH).astype(np.float32)
    ones, zeros = np.ones(LENGTH), np.zeros(LENGTH)
    want = reference(norm, x, zeros if norm.one_plus_scale else ones, zeros)
    np.testing.assert_allclose(Normalize(norm, "embed", LENGTH, "float32")(x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_half_precision_is_computed_in_float32_and_rounded_once(kind, dtype):
    # The square of 300 is not a number of float16, and a mean of bfloat16 terms would lose all but two digits.
    x = jnp.asarray(300 * sample(4, LENGTH), dtype)
    module, scale, bias = built(Norm(kind=kind, epsilon=EPSILON), "float32")
    got = module(x)
    assert got.dtype == x.dtype
    want = reference(module.norm, np.asarray(x, np.float64), scale, bias)
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1.01 * half_ulp, atol=1e-6)


def test_parameters_are_stored_in_the_dtype_asked_for_and_named_by_their_dim():
    module = Normalize(Norm(kind="layer"), "head_dim", LENGTH, "bfloat16")
    for parameter in (module.scale, module.bias):
        assert parameter[...].dtype == jnp.bfloat16
        assert parameter.get_metadata()["out_sharding"] == ("head_dim",)
    assert Normalize(Norm(), "embed", LENGTH, "float32").bias is None
