"""Filters of logits, one by one and together, against NumPy that follows transformers' processors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardlm.generate.sampling import (
    Sampling,
    choose,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise,
    process,
)

pytestmark = pytest.mark.usefixtures("x64_module")

VOCAB = 37
LOGITS = np.random.default_rng(0).normal(0, 2, (5, VOCAB))
LOGITS[4, 3:] = -np.inf  # only three tokens are possible
SEEN = np.random.default_rng(1).random((5, VOCAB)) < 0.3


def probabilities(row):
    e = np.exp(row - row.max())
    return e / e.sum()


def reference_penalty(row, seen, penalty):
    out = row.copy()
    for i in np.flatnonzero(seen):
        out[i] = row[i] * penalty if row[i] < 0 else row[i] / penalty
    return out


def reference_top_k(row, k):
    least = sorted(row.tolist(), reverse=True)[min(k, len(row)) - 1]
    return np.array([x if x >= least else -np.inf for x in row])


def reference_top_p(row, p):
    order, p_sorted, total, out = np.argsort(row), probabilities(np.sort(row)), 0.0, row.copy()
    for place, i in enumerate(order[:-1]):  # the likeliest one always stays
        total += p_sorted[place]
        if total <= 1 - p:
            out[i] = -np.inf
    return out


def reference_min_p(row, p):
    these = probabilities(row)
    return np.where(these < p * these.max(), -np.inf, row)


def rows(function, *more):
    return np.stack([function(row, *(m[i] if isinstance(m, np.ndarray) else m for m in more))
                     for i, row in enumerate(LOGITS)])  # fmt: skip


@pytest.mark.parametrize("k", [1, 2, 7, VOCAB, 1000])
def test_top_k(k):
    np.testing.assert_array_equal(keep_top_k(jnp.asarray(LOGITS), k), rows(reference_top_k, k))


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.5, 0.9, 0.999])
def test_top_p(p):
    got = np.asarray(keep_top_p(jnp.asarray(LOGITS), p))
    np.testing.assert_array_equal(got, rows(reference_top_p, p))
    assert (np.isfinite(got).sum(-1) >= 1).all()
    kept = [probabilities(row)[np.isfinite(out)].sum() for row, out in zip(LOGITS, got, strict=True)]
    assert min(kept) >= p


@pytest.mark.parametrize("p", [0.0, 0.05, 0.4, 1.0])
def test_min_p(p):
    np.testing.assert_array_equal(keep_min_p(jnp.asarray(LOGITS), p), rows(reference_min_p, p))


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty(penalty):
    got = penalise(jnp.asarray(LOGITS), jnp.asarray(SEEN), penalty)
    np.testing.assert_allclose(got, rows(reference_penalty, SEEN, penalty), rtol=1e-15)


def test_everything_together_is_in_transformers_order():
    sampling = Sampling(temperature=0.7, top_k=9, top_p=0.8, min_p=0.1, repetition_penalty=1.4)
    got = process(jnp.asarray(LOGITS), jnp.asarray(SEEN), sampling.kind, sampling.values())

    def reference(row, seen):
        row = reference_penalty(row, seen, 1.4) / 0.7
        return reference_min_p(reference_top_p(reference_top_k(row, 9), 0.8), 0.1)

    np.testing.assert_allclose(got, rows(reference, SEEN), rtol=1e-14)
    # The negative control: temperature after the filters keeps other tokens.
    late = rows(lambda row, seen: reference_top_p(reference_penalty(row, seen, 1.4), 0.8) / 0.7, SEEN)
    assert (np.isfinite(late) != np.isfinite(np.asarray(got))).any()


def test_tokens_as_likely_as_the_last_one_kept_stay():
    equal = jnp.zeros((1, 4))
    assert np.isfinite(keep_top_k(equal, 2)).all() and np.isfinite(keep_top_p(equal, 0.3)).all()


def test_a_draw_follows_seed_and_index_alone():
    logits, seeds, made = jnp.asarray(LOGITS), jnp.arange(5, dtype=jnp.uint32), jnp.arange(5, dtype=jnp.int32)
    together = np.asarray(draw(logits, seeds, made))
    order = np.array([3, 1, 0, 4])
    np.testing.assert_array_equal(draw(logits[order], seeds[order], made[order]), together[order])
    keys = [jax.random.fold_in(jax.random.key(i), i) for i in range(5)]
    assert together.tolist() == [int(jax.random.categorical(k, row)) for k, row in zip(keys, logits, strict=True)]


def test_draws_have_the_probabilities_of_the_processed_logits():
    sampling, count = Sampling(temperature=1.5, top_k=6), 20_000
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[:1]), (count, VOCAB))
    made = jnp.arange(count, dtype=jnp.int32)
    tokens = choose(logits, None, jnp.full(count, 7, jnp.uint32), made, sampling.kind, sampling.values())
    found = np.bincount(tokens, minlength=VOCAB) / count
    expected = probabilities(reference_top_k(LOGITS[0] / 1.5, 6))
    assert (found[expected == 0] == 0).all()
    # Five standard deviations of a binomial share.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all()
    assert np.abs(found - probabilities(reference_top_k(LOGITS[0], 6))).max() > 0.02  # without the temperature


def test_temperature_zero_takes_the_likeliest():
    zeros = jnp.zeros(5, jnp.int32)
    got = choose(jnp.asarray(LOGITS), None, zeros.astype(jnp.uint32), zeros, Sampling().kind, {})
    np.testing.assert_array_equal(got, LOGITS.argmax(-1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 is not 0 or a finite number above it"),
        ({"temperature": 1e-300}, "temperature=1e-300 is not 0 or a finite number above it, from 1e-06"),
        ({"temperature": True}, "temperature=True is not 0 or a finite number"),
        ({"temperature": 1.0, "top_k": 2**40}, "top_k=.* is not a whole number of at least 1 and below"),
        ({"temperature": float("nan")}, "temperature=nan is not 0"),
        ({"temperature": None}, "temperature=None is not a number"),
        ({"temperature": 1, "top_p": 0.0}, "top_p=0.0 is not above 0 and at most 1"),
        ({"temperature": 1, "top_p": 1.1, "top_k": 0}, "top_k=0 is not a whole number of at least 1.*; top_p=1.1"),
        ({"temperature": 1, "top_k": 2.5}, "top_k=2.5 is not a whole number"),
        ({"temperature": 1, "min_p": -1}, "min_p=-1 is not from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 is not above 0"),
        ({"top_k": 3, "min_p": 0.1}, "top_k=3 has no effect at temperature=0.*min_p=0.1 has no effect"),
    ],
)
def test_settings_that_make_no_sense_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
