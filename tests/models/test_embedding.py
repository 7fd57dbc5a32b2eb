"""Tables: what padding of the vocabulary holds, gives and receives; wrong ids are loud."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shardlm import LearnedPositions, TransformerConfig
from shardlm.models import embedding

VOCAB, PADDED, EMBED = 67, 80, 7
CONFIG = TransformerConfig(vocab_size=VOCAB, num_layers=3, d_model=EMBED, num_heads=1, head_dim=2, vocab_multiple=16)


def table(dtype="float32", seed=0):
    """Random in its padding too: what keeps padding out must not be that it happens to be zero."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=(PADDED, EMBED)), dtype)


def hidden(dtype="float32"):
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, EMBED)), dtype)


def test_padding_starts_at_zero_and_the_rest_does_not():
    rows = embedding.Table(CONFIG, rngs=nnx.Rngs(0)).table[...]
    assert rows.shape == (PADDED, EMBED)
    assert not rows[VOCAB:].any()
    assert (rows[:VOCAB] != 0).all()
    assert abs(float(rows[:VOCAB].std()) / 0.02 - 1) < 5 / math.sqrt(2 * VOCAB * EMBED)


def test_a_vocabulary_that_divides_is_not_padded():
    rows = embedding.Table(dataclasses.replace(CONFIG, vocab_size=PADDED), rngs=nnx.Rngs(0)).table[...]
    assert rows.shape == (PADDED, EMBED)
    assert (rows != 0).all()


def test_dims_are_named_by_meaning():
    tokens = embedding.Table(CONFIG, rngs=nnx.Rngs(0)).table
    positions = embedding.PositionTable(LearnedPositions(length=5), CONFIG, rngs=nnx.Rngs(0)).table
    assert tokens.get_metadata()["out_sharding"] == ("vocab", "embed")
    assert (positions[...].shape, positions.get_metadata()["out_sharding"]) == ((5, EMBED), (None, "embed"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_id_gives_its_row(dtype):
    ids = np.array([[0, 3, 66, 3, 41]])
    rows = embedding.look_up(table(dtype), jnp.asarray(ids), dataclasses.replace(CONFIG, dtype=dtype), split=False)
    assert rows.dtype == dtype
    np.testing.assert_array_equal(rows, table(dtype)[ids])


def test_an_id_outside_the_vocabulary_gives_nan():
    # Padding, the end of the table, beyond it, and what NumPy would count from the end.
    ids = jnp.array([[0, VOCAB - 1, VOCAB, PADDED - 1, PADDED, 10_000, -1, -PADDED]])
    rows = embedding.look_up(table(), ids, CONFIG, split=False)
    assert np.isnan(rows).all(axis=-1).tolist() == [[False, False, True, True, True, True, True, True]]
    assert not np.isnan(rows[:, :2]).any()


def test_the_gradient_of_a_look_up_counts_the_ids():
    ids = jnp.array([[0, 3, 66, 3, 3]])
    gradient = jax.grad(lambda rows: embedding.look_up(rows, ids, CONFIG, split=False).sum())(table())
    want = np.zeros((PADDED, EMBED))
    want[[0, 66]], want[3] = 1, 3
    np.testing.assert_array_equal(gradient, want)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_logits_are_products_with_the_rows_and_padding_is_minus_infinity(cap, x64):
    config = dataclasses.replace(CONFIG, logit_soft_cap=cap)
    z = embedding.logits(table("float64"), hidden("float64"), config)
    want = np.array(
        [[[x @ row for row in np.asarray(table("float64"))] for x in row] for row in np.asarray(hidden("float64"))]
    )
    if cap is not None:
        assert np.abs(want).max() > 2 * cap
        want = cap * np.tanh(want / cap)
    assert z.shape == (2, 5, PADDED) and z.dtype == jnp.float64
    np.testing.assert_allclose(z[..., :VOCAB], want[..., :VOCAB], rtol=1e-12, atol=1e-13)
    assert (z[..., VOCAB:] == -jnp.inf).all()


def test_without_padding_every_logit_is_finite():
    z = embedding.logits(table(), hidden(), dataclasses.replace(CONFIG, vocab_size=PADDED))
    assert np.isfinite(z).all()


@pytest.mark.parametrize("cap", [None, 2.0])
def test_padding_receives_no_gradient(cap):
    config = dataclasses.replace(CONFIG, logit_soft_cap=cap)

    def loss(rows, x):
        return -jax.nn.log_softmax(embedding.logits(rows, x, config))[..., 3].mean()

    rows, x = jax.jit(jax.grad(loss, argnums=(0, 1)))(table(), hidden())
    assert (rows[VOCAB:] == 0).all() and (rows[:VOCAB] != 0).all()
    assert np.isfinite(x).all()


def test_logits_of_bfloat16_are_summed_in_float32():
    z = embedding.logits(table(), hidden("bfloat16"), CONFIG)
    assert z.dtype == jnp.float32
    rows, x = (np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (table(), hidden()))
    want = (x @ rows.T)[..., :VOCAB]
    np.testing.assert_allclose(z[..., :VOCAB], want, atol=1e-5)
    rounded = np.asarray(jnp.asarray(want, jnp.bfloat16), np.float64)
    assert np.abs(rounded - want).max() > 1e-3  # rounding the logits to bfloat16 would show
