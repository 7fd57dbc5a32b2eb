"""What is kept of a function, read off a layer whose gradients are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardlm.parallel.pipeline.residuals import Cut

WIDTH = 3


def layer(parameters, x, mask):
    """Three weights on one input, one of them cast, and a mask that does not depend on it."""
    flat = x.reshape(-1, WIDTH)
    first = flat @ parameters["first"].astype(jnp.float16).astype(x.dtype)
    second = x.reshape(-1, WIDTH) @ parameters["second"]
    kept = jax.lax.select(mask.reshape(-1, WIDTH) > 1, jnp.sin(first) * second, jnp.zeros_like(first))
    return x + (kept * parameters["scale"]).reshape(x.shape)


def make(given, x):
    return jax.vjp(lambda parameters, x: layer(parameters, x, given[1]), given[0], x)[1]


@pytest.fixture(scope="module")
def arguments():
    random = np.random.default_rng(0)
    shapes = {"first": (WIDTH, WIDTH), "second": (WIDTH, WIDTH), "scale": (WIDTH,)}
    parameters = {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    return (parameters, jnp.arange(10.0).reshape(2, 5, 1) * jnp.ones(WIDTH)), jnp.asarray(
        random.normal(size=(2, 5, WIDTH)), jnp.float32
    )


def test_what_depends_on_the_input_is_kept_and_once(arguments):
    given, x = arguments
    cut = Cut.of(make, given, x)
    kept = cut.keep(make(given, x))
    # x itself though two products reshape it, cos(first), sin(first), second, and their masked product; no weight, no
    # mask and no scale.
    assert sorted(k.shape for k in kept) == [(10, WIDTH)] * 5
    assert sum(np.array_equal(k, x.reshape(-1, WIDTH)) for k in kept) == 1
    assert len(cut.source) == 6 and len(cut.types) > 6


def test_the_function_is_restored_from_what_is_kept_and_the_parameters(arguments):
    given, x = arguments
    cut = Cut.of(make, given, x)
    kept = cut.keep(make(given, x))
    dy = jnp.cos(x)
    want = make(given, x)(dy)
    found = cut.restore(make(given, jnp.full_like(x, jnp.nan)), kept)(dy)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    elsewhere = cut.restore(make(given, x), [2 * k for k in kept])(dy)
    assert not np.allclose(elsewhere[1], want[1])


def test_nothing_of_the_forward_is_made_again(arguments):
    given, x = arguments
    cut = Cut.of(make, given, x)
    kept = cut.keep(make(given, x))
    apply = jax.jit(lambda given, kept, dy: cut.restore(make(given, jnp.zeros_like(dy)), kept)(dy))
    products = apply.lower(given, kept, x).compile().as_text().count(" dot(")
    assert products == 4  # two weights, two inputs


def test_a_function_made_otherwise_is_refused(arguments):
    given, x = arguments
    cut = Cut.of(make, given, x)
    with pytest.raises(AssertionError, match="made otherwise than what was cut"):
        cut.keep(jax.vjp(lambda x: jnp.sin(x), x)[1])
