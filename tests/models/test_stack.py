"""The scan over layers equals a loop over them; how it is executed changes what is kept and not what is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shardlm.models.stack import PLAIN, Execution, fold_layers, pattern, scan_layers
from shardlm.parallel import remat

pytestmark = pytest.mark.usefixtures("x64_module")

LAYERS, WIDTH = 3, 5
SHIFTS = np.array([0.1, -0.4, 0.7])  # what each layer is given besides x
X = np.random.default_rng(0).normal(size=(2, WIDTH))


class Layer(nnx.Module):
    """x -> x + tanh(x W + b), which stands for a block."""

    def __init__(self, kernel, bias):
        self.kernel, self.bias = nnx.Param(kernel), nnx.Param(bias)

    def __call__(self, x, shift):
        return x + jnp.tanh(x @ self.kernel[...] + self.bias[...] + shift)


def parameters():
    rng = np.random.default_rng(1)
    shapes = {"kernel": (LAYERS, WIDTH, WIDTH), "bias": (LAYERS, WIDTH)}
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


def scanned(parameters, execution=PLAIN, runs=None):
    def apply(layer, x, inputs):
        return layer(x, inputs["shift"])

    return scan_layers(Layer(**parameters), jnp.asarray(X), apply, {"shift": jnp.asarray(SHIFTS)}, execution, runs)


def looped(parameters, order=range(LAYERS)):
    """The definition: one layer after another, each with its slice of the parameters and of the inputs."""
    x = X
    for i in order:
        x = x + np.tanh(x @ parameters["kernel"][i] + parameters["bias"][i] + SHIFTS[i])
    return x


def gradient(function):
    """How the sum of the sines of `function`'s result changes with the parameters."""
    return jax.grad(lambda p: jnp.sin(function(p)).sum())


def looped_jax(parameters):
    x = jnp.asarray(X)
    for i in range(LAYERS):
        x = Layer(parameters["kernel"][i], parameters["bias"][i])(x, SHIFTS[i])
    return x


def count(jaxpr, operation):
    """How often the operation is written in a program, those that it calls included."""
    here = sum(equation.primitive.name == operation for equation in jaxpr.eqns)
    called = [value for equation in jaxpr.eqns for value in equation.params.values()]
    called = [getattr(value, "jaxpr", value) for value in called]
    return here + sum(count(inner, operation) for inner in called if hasattr(inner, "eqns"))


def test_the_scan_is_a_loop_over_the_layers():
    got = scanned(parameters())
    np.testing.assert_allclose(got, looped(parameters()), rtol=1e-12, atol=1e-13)
    assert np.abs(got - looped(parameters(), order=(2, 1, 0))).max() > 0.01  # in this order


def test_every_rematerialisation_gives_the_gradient_of_the_loop():
    want = jax.jit(gradient(looped_jax))(parameters())
    assert all((np.abs(leaf).max(axis=-1) > 0.01).all() for leaf in jax.tree.leaves(want))
    for name in remat.NAMES:
        got = jax.jit(gradient(lambda p, name=name: scanned(p, Execution(remat=name))))(parameters())
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13), got, want)


def test_rematerialisation_makes_again_what_it_does_not_keep():
    def counts(operation):
        functions = {name: gradient(lambda p, name=name: scanned(p, Execution(remat=name))) for name in remat.NAMES}
        return {name: count(jax.make_jaxpr(f)(parameters()).jaxpr, operation) for name, f in functions.items()}

    # Of one layer, a product forward and two in backward, and what is made again.
    assert counts("dot_general") == {"none": 3, "dots": 3, "full": 4}
    assert counts("tanh") == {"none": 1, "dots": 2, "full": 2}


def test_prepare_sees_each_layers_parameters_and_its_slice_of_beside():
    beside = jnp.array([2.0, 3.0, 5.0])

    def prepare(layer, factor):
        assert jax.tree.map(jnp.shape, layer) == {"kernel": (WIDTH, WIDTH), "bias": (WIDTH,)}
        return layer | {"kernel": layer["kernel"] * factor}

    got = scanned(parameters(), Execution(prepare=prepare, beside=beside))
    scaled = parameters() | {"kernel": parameters()["kernel"] * beside[:, None, None]}
    np.testing.assert_allclose(got, looped(scaled), rtol=1e-12, atol=1e-13)
    assert np.abs(got - looped(parameters())).max() > 0.01


def test_a_name_that_is_no_rematerialisation():
    with pytest.raises(ValueError, match="remat='some'; it is one of 'none', 'dots', 'full'"):
        scanned(parameters(), Execution(remat="some"))


@pytest.mark.parametrize("runs", [(), (0,), (1,), (0, 2), (0, 1, 2)])
def test_only_the_layers_that_are_to_run_do(runs):
    flags = jnp.array([i in runs for i in range(LAYERS)])
    some = jax.jit(lambda p, runs: scanned(p, runs=runs))
    np.testing.assert_allclose(some(parameters(), flags), looped(parameters(), runs), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([0], [(1, [(0, 1)])]),
        ([0, 0, 0], [(3, [(0, 1)])]),
        ([0, 0, 1, 0, 0, 1, 0], [(2, [(0, 2), (1, 1)]), (1, [(0, 1)])]),
        ([0, 1, 1, 2], [(1, [(0, 1), (1, 2), (2, 1)])]),
    ],
)
def test_a_sequence_is_a_repeated_pattern_of_runs(kinds, expected):
    assert pattern(kinds) == expected
    assert [k for repeats, runs in expected for k in repeats * [k for k, n in runs for _ in range(n)]] == kinds


@pytest.mark.parametrize("prepare", [None, lambda layer, beside: layer | {"bias": layer["bias"] + beside}])
@pytest.mark.parametrize("kinds", [[0, 0, 1, 0, 0, 1, 0], [0, 1, 1, 2, 2, 2, 0]])
def test_folding_is_a_loop_in_which_layers_of_a_kind_share_a_state(kinds, prepare):
    rng = np.random.default_rng(2)
    p = {"kernel": rng.normal(size=(7, WIDTH, WIDTH)), "bias": rng.normal(size=(7, WIDTH))}
    beside = rng.normal(size=(7, WIDTH))
    execution = Execution(prepare=prepare, beside=None if prepare is None else jnp.asarray(beside))

    def apply(layer, x, state, kind, index):
        x = layer(x, state.sum() * (kind + 1))
        return x, state.at[index].set(x[0, 0])

    states = [jnp.zeros(kinds.count(kind)) for kind in range(max(kinds) + 1)]
    x, got = jax.jit(lambda p: fold_layers(Layer(**p), jnp.asarray(X), states, apply, kinds, execution))(p)
    want, done, y = [np.zeros(len(s)) for s in states], [0] * len(states), X
    for i, kind in enumerate(kinds):
        bias = p["bias"][i] + (0 if prepare is None else beside[i])
        y = y + np.tanh(y @ p["kernel"][i] + bias + want[kind].sum() * (kind + 1))
        want[kind][done[kind]], done[kind] = y[0, 0], done[kind] + 1
    np.testing.assert_allclose(x, y, rtol=1e-12)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
