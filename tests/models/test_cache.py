"""A row that grows token by token has the logits that the whole row has at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import shardlm as sl
from shardlm.models.cache import Cache, CacheVisibility, kinds_of, slots_of
from shardlm.models.transformer import parameter_dims

pytestmark = pytest.mark.usefixtures("x64_module")

VOCAB, LENGTH, CHUNK, ROOM = 67, 17, 4, 20
BASE = sl.TransformerConfig(
    vocab_size=VOCAB, num_layers=3, d_model=10, num_heads=4, num_kv_heads=2, head_dim=6, d_ff=14,
    norm=sl.Norm(epsilon=0.1), vocab_multiple=16, dtype="float64", param_dtype="float64",
)  # fmt: skip
GEMMA = dataclasses.replace(
    BASE, tied=True, embedding_scale=10**0.5, mlp=sl.MLP(activation="gelu_tanh"),
    norm=sl.Norm(epsilon=0.1, one_plus_scale=True, after=True),
)  # fmt: skip
CONFIGS = {
    "windows": dataclasses.replace(BASE, attention=sl.Attention(windows=(3,))),
    "grouped, norms and biases": dataclasses.replace(BASE, attention=sl.Attention(bias=True, qk_norm=True)),
    "mixed, soft caps": dataclasses.replace(
        GEMMA, num_layers=5, attention=sl.Attention(scale=0.5, soft_cap=1.5, windows=(3, None)), logit_soft_cap=2.0
    ),
    "mixed, local rope": dataclasses.replace(
        GEMMA, num_layers=8, attention=sl.Attention(qk_norm=True, windows=(3, 1, None)),
        local_positions=sl.Rope(theta=20.0),
        positions=sl.Rope(theta=100.0, scaling=sl.LinearScaling(factor=8.0)),
    ),
    "multi-head, learned positions": dataclasses.replace(
        BASE, tied=True, num_kv_heads=4, attention=sl.Attention(bias=True, output_bias=True, implementation="chunked"),
        mlp=sl.MLP(gated=False, activation="gelu", bias=True), norm=sl.Norm(kind="layer", epsilon=0.1),
        positions=sl.LearnedPositions(length=LENGTH),
    ),
}  # fmt: skip
TOKENS = np.random.default_rng(3).integers(0, VOCAB, (4, LENGTH)).astype(np.int32)
LENGTHS = np.array([LENGTH, 1, 7, 12])


def random_parameters(config, seed=0):
    """Every parameter random: at initial values a norm's scale or a bias that is left out does not show."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(0.5 * rng.normal(size=p.shape), p.dtype), parameter_dims(config)[1])


@functools.cache
def compiled(config):
    graph = parameter_dims(config)[0]

    def model(parameters):
        return nnx.merge(graph, nnx.State(parameters))

    def extend(parameters, tokens, counts, cache):
        hidden, cache = model(parameters).extend(tokens, counts, cache)
        return model(parameters).logits(hidden)[..., :VOCAB], cache

    return jax.jit(lambda parameters, tokens: model(parameters)(tokens)), jax.jit(extend)


def grown(config, sizes, change=lambda cache: cache):
    """Logits of each row's tokens, taken in `sizes` at a time, each at most CHUNK, and the largest difference."""
    whole, extend = compiled(config)
    parameters = random_parameters(config)
    expected = np.asarray(whole(parameters, TOKENS))
    cache = Cache.empty(config, len(TOKENS), config.num_kv_heads, ROOM, CHUNK)
    done, worst = np.zeros(len(TOKENS), int), 0.0
    for size in sizes:
        counts = np.minimum(size, LENGTHS - done)
        tokens = np.full((len(TOKENS), CHUNK), VOCAB, np.int32)  # what is not real is not even a token
        for i, count in enumerate(counts):
            tokens[i, :count] = TOKENS[i, done[i] : done[i] + count]
        logits, cache = extend(parameters, tokens, counts.astype(np.int32), change(cache))
        for i, count in enumerate(counts):
            found, there = np.asarray(logits)[i, :count], expected[i, done[i] : done[i] + count]
            worst = max(worst, np.abs(found - there).max(initial=0))
        done += counts
    assert done.tolist() == LENGTHS.tolist() == np.asarray(cache.length).tolist()
    return worst


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_whole_row(name):
    # Chunks that are longer than the window, single tokens, chunks that are not full: one program for all.
    assert grown(CONFIGS[name], [4, 4, 1, 1, 3, 2, 2]) < 1e-12


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: dataclasses.replace(cache, keys=tuple(jnp.roll(k, 1, axis=3) for k in cache.keys)),
        lambda cache: dataclasses.replace(cache, values=tuple(v[:, ::-1] for v in cache.values)),
    ],
)
def test_another_cache_gives_other_logits(change):
    assert grown(CONFIGS["mixed, soft caps"], [4, 4, 1, 1, 3, 2, 2], change) > 1e-3


def test_a_layer_with_a_window_keeps_no_more_than_it_and_a_chunk():
    cache = Cache.empty(CONFIGS["mixed, local rope"], 3, 2, 100, CHUNK)
    assert cache.windows == (3, 1, None)
    assert [keys.shape for keys in cache.keys] == [(3, 3, 2, 3 + CHUNK - 1, 6), (3, 3, 2, CHUNK, 6), (2, 3, 2, 100, 6)]
    assert (slots_of(None, 10, 4), slots_of(3, 10, 1), slots_of(9, 10, 4)) == (10, 3, 10)
    assert kinds_of((None, 4, 4, None, 2)) == (None, 4, 2)


def test_a_query_sees_its_window_of_what_is_there():
    visibility = CacheVisibility(jnp.array([[5, 6], [0, 1]]), jnp.array([[4, 5, 6, 3], [0, -3, -2, -1]]), 2)
    seen = np.asarray(visibility.mask())[:, 0].astype(int).tolist()
    assert seen == [[[1, 1, 0, 0], [0, 1, 1, 0]], [[1, 0, 0, 0], [1, 0, 0, 0]]]
    np.testing.assert_array_equal(visibility.mask(jnp.array([1])), np.asarray(visibility.mask())[:, :, 1:])
