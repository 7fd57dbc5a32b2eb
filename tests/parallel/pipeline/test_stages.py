"""Which layers go to which stage: evenly, as listed, or by cost; and the rows in which they are stored."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import shardlm as sl
from shardlm.parallel.pipeline import balance, layers_by_cost
from shardlm.parallel.pipeline.stages import Stages

CASES = [((2, 2), 2), ((1, 3), 2), ((1, 2, 0, 2, 1, 1), 3), ((1, 1, 1, 1, 1, 1), 2), ((7,), 1)]


@pytest.mark.parametrize(("counts", "stages"), CASES)
def test_rows_are_the_layers_in_order_with_padding_after_each_piece(counts, stages):
    made = Stages(counts, stages)
    assert made.rows.size == len(counts) * max(counts) == sum(counts) + made.padding
    flat = made.rows.reshape(len(counts), -1)
    for piece, count in enumerate(counts):
        assert (flat[piece] >= 0).tolist() == [True] * count + [False] * (max(counts) - count)
        chunk, stage = divmod(piece, stages)
        np.testing.assert_array_equal(made.of_stage()[stage, chunk], flat[piece])
    assert flat[flat >= 0].tolist() == list(range(sum(counts)))
    assert made.arranged == (len(counts) > stages or made.padding > 0)


@pytest.mark.parametrize("numpy", [np, jnp])
@pytest.mark.parametrize(("counts", "stages"), CASES)
def test_arranging_and_ordering_are_inverse(counts, stages, numpy):
    made = Stages(counts, stages)
    x = numpy.arange(1.0, 1 + 3 * sum(counts)).reshape(-1, 3)
    stored = made.arrange(x)
    assert isinstance(stored, type(x)) and stored.shape == (*made.rows.shape, 3)
    np.testing.assert_array_equal(stored[made.rows < 0], 0)
    np.testing.assert_array_equal(made.in_order(stored), x)


def test_without_a_list_layers_are_spread_evenly_the_last_stages_taking_what_is_over():
    def of(layers, **settings):
        return Stages.of(sl.Layout(**settings), layers).counts

    assert of(10, pipe=4) == (2, 2, 3, 3)
    assert of(7, pipe=2, pipeline=sl.Pipeline(schedule="interleaved", chunks=2)) == (1, 2, 2, 2)
    assert of(2, pipe=4) == (0, 0, 1, 1)
    assert of(5, pipe=2, pipeline=sl.Pipeline(layers=[4, 1])) == (4, 1)
    assert of(5) == (5,)


@pytest.mark.parametrize("seed", range(4))
def test_balance_is_the_best_of_all_cuts(seed):
    random = np.random.default_rng(seed)
    costs, pieces, first, last = random.integers(1, 9, 7), int(random.integers(1, 5)), 3.0 * seed, 4.0

    def worst(counts):
        sums = [part.sum() for part in np.split(costs, np.cumsum(counts)[:-1])]
        return max(s + first * (i == 0) + last * (i == pieces - 1) for i, s in enumerate(sums))

    cuts = itertools.combinations_with_replacement(range(8), pieces - 1)
    best = min(worst(np.diff([0, *cut, 7])) for cut in cuts)
    found = balance(costs, pieces, first, last)
    assert len(found) == pieces and sum(found) == 7 and worst(found) == best


def test_layers_by_cost_gives_stages_of_wide_attention_fewer_layers():
    config = sl.TransformerConfig(
        vocab_size=64, num_layers=8, d_model=16, num_heads=2, d_ff=16,
        attention=sl.Attention(windows=(4, 4, 4, 4, None, None, None, None)),
    )  # fmt: skip
    assert layers_by_cost(config, stages=2, sequence=4) == (4, 4)
    assert layers_by_cost(config, stages=2, sequence=4096) == (6, 2)
    assert sum(layers_by_cost(config, stages=2, sequence=4096, chunks=2)) == 8
    with pytest.raises(ValueError, match="stages=0"):
        layers_by_cost(config, stages=0, sequence=8)
