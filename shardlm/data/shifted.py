"""A batch from token ids alone: what a language model learns is the next token."""

from __future__ import annotations

from typing import Any

import numpy as np


def batch(tokens: Any, *, weights: Any = None, segments: Any = None, positions: Any = None) -> dict[str, np.ndarray]:
    """Makes a batch of token ids: the target of each place is the token after it.

        tokens   t1 t2 t3 t4
        targets  t2 t3 t4 t4
        weights  1  1  1  0     nothing is known to follow the last one, nor the last one of a segment

    Args:
      tokens: integers [batch, sequence], at least 2 a row; of a single text [sequence].
      weights: of each target in the loss, floats [batch, sequence], 0 for padding; default 1.
      segments: integers [batch, sequence], the document that each token is of, where a row holds several: no place
        attends to another document, and none is asked for the first token of the next one.
      positions: integers [batch, sequence], the place of each token in its document; default its place in the row.

    Returns:
      A dict of arrays [batch, sequence] for `Trainer.step`, `loss_and_grads` and `evaluate`: tokens, targets, weights,
      and segments and positions where they were given.

    Raises:
      ValueError: the rows have different lengths, or what is given has another shape than the tokens.

    Example:
      >>> made = batch([[5, 6, 7, 8]])
      >>> made["targets"].tolist(), made["weights"].tolist()
      ([[6, 7, 8, 8]], [[1.0, 1.0, 1.0, 0.0]])
    """
    tokens = _integers("tokens", tokens)
    if tokens.ndim == 1:
        tokens = tokens[None]
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(f"tokens have shape {tokens.shape}; they are [batch, sequence], with at least 2 in a row")
    last = np.zeros(tokens.shape, bool)
    last[:, -1] = True
    made = {"tokens": tokens, "targets": np.where(last, tokens, np.roll(tokens, -1, axis=1))}
    if segments is not None:
        made["segments"] = _like(tokens, "segments", _integers("segments", segments))
        last |= np.roll(made["segments"], -1, axis=1) != made["segments"]
    if positions is not None:
        made["positions"] = _like(tokens, "positions", _integers("positions", positions))
    given = np.ones(tokens.shape) if weights is None else _like(tokens, "weights", np.asarray(weights))
    return made | {"weights": np.where(last, 0, given).astype(np.float32)}


def _integers(name: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError as error:  # NumPy on rows of different lengths
        raise ValueError(f"{name} are rows of different lengths: fill them up, with weights of 0 there") from error
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} are {array.dtype}{list(array.shape)}; they are integers [batch, sequence]")
    return array


def _like(tokens: np.ndarray, name: str, array: np.ndarray) -> np.ndarray:
    array = array[None] if array.ndim == 1 else array
    if array.shape != tokens.shape:
        raise ValueError(f"{name} have shape {array.shape}, tokens {tokens.shape}")
    return array
