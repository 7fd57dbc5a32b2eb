"""The feed-forward branch is its formula, for every activation, gated and plain, with biases and without."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shardlm import MLP, TransformerConfig
from shardlm.models import config, mlp
from shardlm.models.mlp import FeedForward

BY_HAND = {
    "silu": lambda v: v / (1 + math.exp(-v)),
    "gelu": lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2,
    "gelu_tanh": lambda v: v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2,
    "relu": lambda v: max(v, 0.0),
}
WIDE = {"dtype": "float64", "param_dtype": "float64"}
SIZES = {"vocab_size": 67, "num_layers": 3, "d_model": 7, "num_heads": 1, "head_dim": 2, "d_ff": 11}


def perturbed(build):
    """What `build` makes, with every parameter random, since biases start at zero and norms at one; and these."""
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(build))
    drawn = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), nnx.to_pure_dict(state))
    return nnx.merge(graph, nnx.State(drawn)), jax.tree.map(lambda p: np.asarray(p, np.float64), drawn)


def reference(activation, p, x):
    act = np.vectorize(BY_HAND[activation])
    line = lambda name, x: x @ p[name]["kernel"] + p[name].get("bias", 0.0)  # noqa: E731
    hidden = act(line("gate", x)) * line("up", x) if "gate" in p else act(line("up", x))
    return line("down", hidden)


def test_the_configuration_names_the_activations_that_there_are():
    assert set(config.ACTIVATIONS) == set(mlp.ACTIVATIONS) == set(BY_HAND)


@pytest.mark.parametrize("activation", BY_HAND)
def test_an_activation_is_its_formula(activation, x64):
    v = np.linspace(-4, 4, 33)
    np.testing.assert_allclose(
        mlp.ACTIVATIONS[activation](jnp.asarray(v)), [BY_HAND[activation](x) for x in v], atol=1e-14
    )


def test_no_activation_passes_for_another():
    """The negative control; the two GELUs are the closest, 5e-4 apart."""
    v = np.linspace(-4, 4, 33)
    for first, second in itertools.combinations(BY_HAND.values(), 2):
        assert max(abs(first(x) - second(x)) for x in v) > 1e-4


@pytest.mark.parametrize("activation", BY_HAND)
@pytest.mark.parametrize("gated", [True, False])
def test_the_branch_is_its_formula(gated, activation, x64):
    bias = activation in ("gelu", "relu")
    c = TransformerConfig(mlp=MLP(gated=gated, activation=activation, bias=bias), **SIZES, **WIDE)
    module, p = perturbed(lambda: FeedForward(c, rngs=nnx.Rngs(0)))
    names = {"gate", "up", "down"} if gated else {"up", "down"}
    assert {name: set(part) for name, part in p.items()} == dict.fromkeys(
        names, {"kernel", "bias"} if bias else {"kernel"}
    )
    x = np.random.default_rng(1).normal(size=(2, 5, 7))
    np.testing.assert_allclose(jax.jit(module)(jnp.asarray(x)), reference(activation, p, x), rtol=1e-12, atol=1e-12)


def test_initial_weights_are_small_at_the_way_out_and_biases_zero():
    c = TransformerConfig(
        vocab_size=67, num_layers=3, d_model=80, num_heads=1, d_ff=80, mlp=MLP(bias=True), init_std=0.5
    )
    module = FeedForward(c, rngs=nnx.Rngs(0))
    # A standard deviation estimated from n draws is off by 1/sqrt(2n) of itself: within five times that, n = 6400.
    for kernel, std in ((module.gate, 0.5), (module.up, 0.5), (module.down, 0.5 / math.sqrt(6))):
        assert abs(float(kernel.kernel[...].std()) / std - 1) < 5 / math.sqrt(12_800)
        assert not kernel.bias[...].any()
    assert (module.gate.kernel[...] != module.up.kernel[...]).mean() > 0.99


def test_dims_are_named_by_meaning():
    c = TransformerConfig(mlp=MLP(bias=True), **SIZES)
    module = nnx.eval_shape(lambda: FeedForward(c, rngs=nnx.Rngs(0)))
    named = {
        "/".join(map(str, path)): (variable.get_value().shape, variable.get_metadata()["out_sharding"])
        for path, variable in nnx.to_flat_state(nnx.state(module))
    }
    assert named == {
        "gate/kernel": ((7, 11), ("embed", "mlp")),
        "gate/bias": ((11,), ("mlp",)),
        "up/kernel": ((7, 11), ("embed", "mlp")),
        "up/bias": ((11,), ("mlp",)),
        "down/kernel": ((11, 7), ("mlp", "embed")),
        "down/bias": ((7,), ("embed",)),
    }


def test_bfloat16_in_and_out_with_weights_in_float32():
    c = TransformerConfig(mlp=MLP(bias=True), **SIZES)
    module, p = perturbed(lambda: FeedForward(c, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 7)), jnp.bfloat16)
    got = jax.jit(module)(x)
    assert got.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(module))} == {jnp.dtype("float32")}
    want = reference("silu", p, np.asarray(x, np.float64))
    # Seven roundings of half a unit in 8 bits on the way, against the largest result.
    assert np.abs(np.asarray(got, np.float64) - want).max() < 7 * 2.0**-8 * np.abs(want).max()
