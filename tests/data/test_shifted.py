"""A batch of ids alone asks each place for the next token, and nothing of the last one."""

import numpy as np
import pytest

from shardlm.data import batch


def test_targets_are_the_tokens_after():
    tokens = np.arange(12).reshape(2, 6)
    made = batch(tokens)
    assert made["tokens"].tolist() == tokens.tolist()
    assert made["targets"][:, :-1].tolist() == tokens[:, 1:].tolist()
    assert made["weights"].tolist() == [[1, 1, 1, 1, 1, 0]] * 2
    assert made["weights"].dtype == np.float32
    assert batch(range(6))["tokens"].shape == (1, 6)


def test_nothing_is_asked_across_segments_and_weights_are_those_of_targets():
    made = batch([[1, 2, 3, 4]], segments=[[1, 1, 2, 2]], positions=[0, 1, 0, 1], weights=[[0.5, 1, 2, 1]])
    assert made["weights"].tolist() == [[0.5, 0, 2, 0]]
    assert made["targets"].tolist() == [[2, 3, 4, 4]]
    assert made["positions"].tolist() == [[0, 1, 0, 1]]
    assert list(made) == ["tokens", "targets", "segments", "positions", "weights"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": [[1, 2], [3]]}, "tokens are rows of different lengths: fill them up, with weights of 0 there"),
        ({"tokens": [[1], [2]]}, r"tokens have shape \(2, 1\); they are \[batch, sequence\], with at least 2 in a row"),
        ({"tokens": 3}, r"tokens have shape \(\); they are"),
        ({"tokens": [[1.0, 2.0]]}, r"tokens are float64\[1, 2\]; they are integers"),
        ({"tokens": "abc"}, "tokens are <U3"),
        ({"tokens": [[1, 2]], "weights": [[1, 2, 3]]}, r"weights have shape \(1, 3\), tokens \(1, 2\)"),
        ({"tokens": [[1, 2]], "segments": [[0.0, 1.0]]}, "segments are float64"),
    ],
)
def test_what_makes_no_batch(given, message):
    with pytest.raises(ValueError, match=message):
        batch(**given)
