"""Dropout masks are fair, and a function of the key, the layer, the site and the place in the global batch."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardlm.models.dropout import Dropout

RATE = 0.3
BATCH, SEQUENCE, EMBED = 6, 5, 40


def whole(**changes):
    dropout = Dropout(RATE, jax.random.key(3), jnp.arange(BATCH), jnp.arange(SEQUENCE))
    return dataclasses.replace(dropout, **changes)


@jax.jit
def call(dropout, x, layer=2, site=1):
    return dropout(x, layer, site)


def ones(rows=BATCH, columns=SEQUENCE):
    return jnp.ones((rows, columns, EMBED))


def test_the_same_call_gives_the_same_mask():
    np.testing.assert_array_equal(call(whole(), ones()), call(whole(), ones()))


@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 6), slice(1, 6, 2)])
@pytest.mark.parametrize("columns", [slice(0, 3), slice(2, 5)])
def test_a_part_of_the_batch_has_the_mask_it_has_in_the_whole(rows, columns):
    x = jax.random.normal(jax.random.key(0), (BATCH, SEQUENCE, EMBED))
    part = whole(rows=jnp.arange(BATCH)[rows], columns=jnp.arange(SEQUENCE)[columns])
    want = call(whole(), x)[rows, columns]
    np.testing.assert_array_equal(call(part, x[rows, columns]), want)
    elsewhere = dataclasses.replace(part, rows=part.rows + 1)
    assert (call(elsewhere, x[rows, columns]) != want).any()


def test_no_two_tokens_layers_sites_or_keys_share_a_mask():
    calls = [
        call(whole(key=jax.random.key(seed)), ones(), layer, site)
        for seed in (0, 1)
        for layer in (0, 1, 2)
        for site in (0, 1)
    ]
    masks = [np.asarray(y).astype(bool).reshape(-1, EMBED) for y in calls]
    count = 2 * 3 * 2 * BATCH * SEQUENCE
    # Two masks of 40 elements are equal by chance once in 1e10 pairs; there are 65,000 pairs.
    assert len({mask.tobytes() for mask in np.concatenate(masks)}) == count


def test_the_rate_is_within_a_binomial_bound_and_the_mean_is_kept():
    calls = [call(whole(), ones(), layer) for layer in range(50)]
    y = np.stack(calls)
    deviation = math.sqrt(RATE * (1 - RATE) / y.size)  # of 60,000 independent draws
    dropped = np.mean(y == 0)
    assert abs(dropped - RATE) < 5 * deviation
    assert abs(dropped - (1 - RATE)) > 5 * deviation  # rate and its complement are told apart
    assert abs(y.mean() - 1) < 5 * deviation / (1 - RATE)


def test_what_is_kept_is_divided_by_the_probability_of_keeping():
    x = jax.random.normal(jax.random.key(0), (BATCH, SEQUENCE, EMBED))
    y = np.asarray(call(whole(), x))
    kept = y != 0
    assert 0 < kept.sum() < y.size
    np.testing.assert_allclose(y[kept], np.asarray(x)[kept] / (1 - RATE), rtol=1e-6)


def test_rate_zero_changes_nothing():
    x = jax.random.normal(jax.random.key(0), (BATCH, SEQUENCE, EMBED))
    np.testing.assert_array_equal(call(whole(rate=0.0), x), x)


def test_the_gradient_passes_where_the_value_does():
    gradient = jax.grad(lambda x: call(whole(), x).sum())(ones())
    np.testing.assert_array_equal(gradient, call(whole(), ones()))


def test_a_layer_counted_by_a_traced_number_is_the_same_layer():
    traced = call(whole(), ones(), layer=jnp.int32(2))  # as in a scan over layers
    np.testing.assert_array_equal(traced, whole()(ones(), layer=2, site=1))
    assert (traced != whole()(ones(), layer=1, site=1)).any()


def test_the_mask_and_the_dtype_do_not_depend_on_each_other():
    y = call(whole(), ones().astype("bfloat16"))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y == 0, call(whole(), ones()) == 0)
