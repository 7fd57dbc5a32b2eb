"""What each policy keeps, read off the residuals of a layer's backward."""

import jax
import jax.numpy as jnp
import pytest

from shardlm.parallel import remat


def residuals(name: str) -> int:
    """Operations that the backward of three layers of tanh(x w) runs again or reads: products in it."""

    def layer(x, w):
        return jnp.tanh(x @ w)

    def loss(x, w):
        return jax.lax.scan(lambda x, w: (jax.checkpoint(layer, policy=remat.policy(name))(x, w), None), x, w)[0].sum()

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(jnp.ones((2, 3)), jnp.ones((4, 3, 3))))
    return text.count("dot_general["), text.count("= tanh")


def test_none_repeats_nothing_dots_the_activation_full_everything():
    # Forward: one product and one tanh in the loop's body; backward: two products more.
    assert residuals("none") == (3, 1)
    assert residuals("dots") == (3, 2)
    assert residuals("full") == (4, 2)


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="remat='ful'; it is one of 'none', 'dots', 'full'"):
        remat.policy("ful")
