"""The cache, split over any layout, gives the logits of one device without a cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import shardlm as sl
from shardlm._text import size
from shardlm.generate.model import ShardedModel
from shardlm.train.engine import flatten
from tests.generate.settings import LAYOUTS, LEARNED, MIXED, VOCAB, devices, log_softmax, parameters, plain_logits

pytestmark = pytest.mark.usefixtures("x64_module")

ROWS, ROOM, CHUNK = 8, 24, 4
RANDOM = np.random.default_rng(5)
LENGTHS = np.array([23, 3, 7, 11, 1, 5, 16, 12])
IDS = [RANDOM.integers(0, VOCAB, n) for n in LENGTHS]


def sharded(config, text):
    layout = sl.Layout.parse(text)
    return ShardedModel.of(config, layout, devices(layout))


def run(model, function, finish, wrong=lambda cache: cache):
    """All tokens of all rows through `function`, in chunks and then one by one; `finish(row, from, to, results)`."""
    params = model.place(parameters(model.config))
    cache = jax.jit(lambda: model.empty_cache(ROWS, ROOM, CHUNK), out_shardings=model.cache_shardings)()
    done = np.zeros(ROWS, int)
    while (done < LENGTHS).any():
        size = CHUNK if done.max() < 12 else 1
        counts = np.minimum(size, LENGTHS - done)
        tokens = np.zeros((ROWS, CHUNK), np.int32)
        for i, count in enumerate(counts):
            tokens[i, :count] = IDS[i][done[i] : done[i] + count]
        *results, cache = jax.block_until_ready(function(params, tokens, counts.astype(np.int32), wrong(cache)))
        for i in np.flatnonzero(counts):
            finish(i, done[i], done[i] + counts[i], [np.asarray(x)[i] for x in results])
        done += counts
    return cache


@functools.cache
def extend(model):
    return jax.jit(model.extend)


def worst_logit(config, text, wrong=lambda cache: cache):
    model, worst = sharded(config, text), []

    def finish(i, first, last, results):
        worst.append(np.abs(results[0] - plain_logits(config, IDS[i])[last - 1]).max())

    run(model, extend(model), finish, wrong)
    return max(worst)


@pytest.mark.parametrize("text", LAYOUTS)
def test_logits_on_any_layout_are_those_of_one_device_without_a_cache(text):
    assert worst_logit(MIXED, text) < 1e-12


def test_learned_positions_too():
    assert worst_logit(LEARNED, "data=2,fsdp=2,tensor=2") < 1e-12


def test_a_cache_of_other_rows_gives_other_logits():
    def other(cache):
        return jax.tree.map(lambda x: jnp.roll(x, 1, axis=1) if x.ndim > 1 else x, cache)

    assert worst_logit(MIXED, LAYOUTS[0], other) > 1e-3


def test_targets_are_judged_as_by_the_plain_module():
    model = sharded(MIXED, "fsdp=2,tensor=4")
    after = [np.append(ids[1:], 0) for ids in IDS]

    def score(params, tokens, counts, cache):
        targets = np.zeros_like(tokens)
        for i in range(ROWS):
            at = int(np.asarray(cache.length)[i])
            targets[i, : counts[i]] = after[i][at : at + counts[i]]
        return judge(params, tokens, targets, counts, cache)

    judge = jax.jit(model.score)

    def finish(i, first, last, results):
        z = log_softmax(plain_logits(MIXED, IDS[i]))[first:last]
        target = after[i][first:last]
        count = last - first
        np.testing.assert_allclose(results[0][:count], z[np.arange(count), target], rtol=1e-12)
        assert (results[1][:count] == (z.argmax(-1) == target)).all()

    run(model, score, finish)


def test_the_cache_is_split_over_rows_and_heads():
    model = sharded(MIXED, "data=2,fsdp=2,tensor=2")
    cache = jax.jit(lambda: model.empty_cache(ROWS, ROOM, CHUNK), out_shardings=model.cache_shardings)()
    assert [keys.sharding.spec for keys in cache.keys] == [P(None, ("data", "fsdp"), "tensor")] * 2
    assert [keys.addressable_shards[0].data.shape for keys in cache.keys] == [(2, 2, 1, 8, 6), (1, 2, 1, 24, 6)]
    assert cache.length.sharding.spec == P(("data", "fsdp"))


def test_heads_that_are_cached_several_times_are_counted():
    model = sharded(MIXED, "fsdp=2,tensor=4")
    cache = jax.eval_shape(lambda: model.empty_cache(ROWS, ROOM, CHUNK))
    assert [keys.shape[2] for keys in cache.keys] == [4, 4]
    # On a device 4 rows with one head of 6 numbers of 8 bytes, keys and values: 2 layers of 8 slots, 1 of 24.
    held = 2 * 4 * 6 * 8 * (2 * 8 + 24)
    text = model.describe(ROWS, ROOM, CHUNK)
    assert f"{size(held)} of cache (float64); 2 layers with a window of 5 keep 8 tokens, 1 layers" in text
    assert f"each is cached 2 times, once for each device whose queries use it: {size(4 * held)} of cache" in text
    assert f"for {size(2 * held)} of different numbers" in text
    assert "gathered over fsdp=2 for every token" in text
    assert "cached" not in sharded(MIXED, "data=2,fsdp=2,tensor=2").describe(ROWS, ROOM, CHUNK)


def test_parameters_come_from_any_layout_and_padding():
    wider = dataclasses.replace(MIXED, vocab_multiple=16)
    params = sharded(wider, "data=2,tensor=4").place(parameters(wider))
    assert params["embedding"]["table"].shape[0] == 80
    model = sharded(MIXED, "fsdp=2,tensor=2")
    placed = model.place(params)
    assert placed["embedding"]["table"].shape == (68, 16)
    for path, leaf in flatten(placed).items():
        assert leaf.sharding.spec == model.plan.splits[path].stored, path
    np.testing.assert_array_equal(placed["embedding"]["table"][:VOCAB], params["embedding"]["table"][:VOCAB])
    again = model.place(placed)
    assert all(a is b for a, b in zip(jax.tree.leaves(placed), jax.tree.leaves(again), strict=True))


def test_other_parameters_are_one_error():
    wrong = jax.tree.map(lambda x: x, parameters(MIXED))
    wrong["embedding"]["table"] = wrong["embedding"]["table"].astype(np.float32)
    wrong["final_norm"] = {"scale": np.zeros((3,)), "bias": np.zeros(3)}
    del wrong["layers"]["mlp"]
    with pytest.raises(ValueError, match="not those of the configuration") as error:
        sharded(MIXED, "data=1").place(wrong)
    for text in (
        "embedding/table is float32, and param_dtype='float64'",
        "final_norm/bias is not of the model",
        r"final_norm/scale has shape (3,), expected (16,)",
        "layers/mlp/up/kernel is missing",
    ):
        assert text in str(error.value)
    with pytest.raises(TypeError, match="params is a list; it is the nested dict"):
        sharded(MIXED, "data=1").place([1])


def test_stages_are_refused_and_sequence_parallelism_is_left_out_with_a_warning():
    with pytest.raises(sl.LayoutError, match=r"pipe=2.* Give a layout without it, such as fsdp=4,tensor=2"):
        sharded(MIXED, "pipe=2,fsdp=2,tensor=2")
    with pytest.warns(UserWarning, match="sequence_parallel has no effect in generation"):
        model = sharded(MIXED, "tensor=2,sequence_parallel")
    assert model is sharded(MIXED, "tensor=2")
    with pytest.raises(sl.LayoutError, match="num_heads=4 is not a positive multiple of tensor=8"):
        sharded(MIXED, "tensor=8")
