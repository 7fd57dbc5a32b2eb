"""What a module's transformations hand back unchanged is told from what it computed; nothing is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardlm.train.assigned import handed_through

ONES = np.ones((3, 3))


def body(x, w):
    return jnp.tanh(x + w.sum()), w  # of x's shape, whatever that of w


def rows(x, w):
    return jax.lax.scan(body, x, w)


def carried(x, w):
    return jax.lax.scan(lambda c, _: ((body(*c)[0], c[1]), None), (x, w), None, length=2)[0]


def looped(x, w):
    return jax.lax.while_loop(lambda c: c[0].sum() > 0, lambda c: (body(*c)[0], c[1]), (x, w))


def branched(x, w):
    return jax.lax.cond(x.sum() > 0, body, lambda x, w: (x, w), x, w)


def swapped(x, w):
    return jax.lax.scan(lambda c, _: ((c[1], c[0]), None), (x, w), None, length=3)[0]


def one_branch(x, w):
    return jax.lax.cond(x.sum() > 0, body, lambda x, w: (x, w + 1), x, w)


@jax.custom_vjp
def custom(x, w):
    return body(x, w)


custom.defvjp(lambda x, w: (body(x, w), None), lambda _, g: g)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (body, [None, 1]),
        (jax.jit(body), [None, 1]),
        (jax.checkpoint(body), [None, 1]),
        (jax.jit(jax.checkpoint(jax.jit(body))), [None, 1]),
        (rows, [None, 1]),
        (lambda x, w: jax.lax.scan(jax.checkpoint(body), x, w, reverse=True), [None, 1]),
        (carried, [None, 1]),
        (looped, [None, 1]),
        (branched, [None, 1]),
        (custom, [None, 1]),
        (jax.vmap(body, in_axes=(None, 0), out_axes=0), [None, 1]),
        (lambda x, w: (x, w.reshape(w.shape).astype(w.dtype)), [0, 1]),
        (lambda x, w: (w, x), [1, 0]),
        # computed, or not known to be the same
        (jax.checkpoint(lambda x, w: (x, w * 1.5)), [0, None]),
        (lambda x, w: (x, w.T), [0, None]),
        (lambda x, w: (x, w.astype(jnp.bfloat16).astype(w.dtype)), [0, None]),
        (swapped, [None, None]),
        (one_branch, [None, None]),
        (lambda x, w: jax.lax.scan(body, x, jnp.stack([w, w])), [None, None]),
        (lambda x, w: (x, ONES), [0, None]),
        (lambda x, w: jax.lax.scan(lambda c, r: (c, r[::-1]), x, w), [0, None]),
    ],
)
def test_what_is_handed_through(function, expected):
    assert handed_through(jax.make_jaxpr(function)(jnp.ones((3, 3)), jnp.ones((3, 3)))) == expected
