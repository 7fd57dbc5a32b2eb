"""A vocabulary split over devices, looked up at a wrong place: which row did each token really get?

A device holds the ids from its offset on. With a wrong offset, or without a mask, tokens get another row, no row, or a
row too many; for each token the row that it got is found among those it could have.
"""

from collections.abc import Callable

import numpy as np

from shardlm.layout import Axis
from shardlm.verification.diagnosis import Diagnosis
from shardlm.verification.locate import Forwards, Found

_TENSOR, _DIM = str(Axis.TENSOR), "vocab"


def embedding(runs: Forwards, found: Found) -> Diagnosis | None:
    """What is wrong with the look-up of token embeddings, or None."""
    config, tokens = runs.trainer.config, runs.batch["tokens"]
    got = runs.found(found.params, 0)["hidden"].whole()
    nothing = runs.expected({p: np.zeros_like(x) if p in _TABLE else x for p, x in found.params.items()}, 0)["hidden"]

    def shifted(by: int) -> np.ndarray:
        moved = np.clip(tokens + by, 0, config.vocab_size - 1)
        rows = runs.expected(found.params, 0, tokens=moved)["hidden"]
        return np.where(_outside(tokens + by, config.vocab_size)[..., None], nothing, rows)

    return _explain(runs, found, tokens, got, nothing, shifted, "the row of a table") or _unmasked(runs, found, got)


def target(runs: Forwards, found: Found) -> Diagnosis | None:
    """What is wrong with the look-up of the targets' logits, or None."""
    config, ids = runs.trainer.config, np.maximum(runs.batch["targets"], 0)
    expected = runs.expected(found.params, found.layers)
    logits = expected["logits"].astype(np.float64)
    real = logits[..., : config.vocab_size]
    log_total = np.log(np.exp(real - real.max(-1, keepdims=True)).sum(-1)) + real.max(-1)
    got = log_total - runs.found(found.params, found.layers)["nll"].whole()
    peak = real.max(-1)  # a target that no device holds adds 0 to the shifted logits

    def shifted(by: int) -> np.ndarray:
        moved = np.clip(ids + by, 0, config.vocab_size - 1)
        at = np.take_along_axis(logits, moved[..., None], -1)[..., 0]
        return np.where(_outside(ids + by, config.vocab_size), peak, at)

    return _explain(runs, found, ids, got, peak, shifted, "the logit of a target")


_TABLE = ("embedding/table",)


def _explain(
    runs: Forwards,
    found: Found,
    ids: np.ndarray,
    got: np.ndarray,
    nothing: np.ndarray,
    shifted: Callable[[int], np.ndarray],
    what: str,
) -> Diagnosis | None:
    count, size = runs.trainer.layout.tensor, runs.trainer.config.padded_vocab_size
    if count == 1:
        return None
    part, close = size // count, _elementwise(found)
    if close(got, nothing + sum(shifted(k * part) - nothing for k in range(count)))[ids < part].all() and (
        close(got, nothing)[ids >= part].all()
    ):
        text = (
            f"every device looks ids up as if its part of the vocabulary began at 0: its offset, {part} ids, is missing"
        )
        return Diagnosis("shift", text, _TENSOR, _DIM)
    right, none = close(got, shifted(0)), close(got, nothing)
    if right.all():
        return None
    for by in (-1, 1, *(k * part for k in range(1 - count, count) if k), -2, 2):
        moved = close(got, shifted(by))
        wrong = ids // part
        shards = sorted({int(s) for s in np.unique(wrong[~right])})
        if (right | moved | none).all() and moved[~right].mean() > 0.5:
            text = (
                f"{what} is that of id {by:+d}, or none where no device has that, for ids of part "
                f"{', '.join(map(str, shards))} of the vocabulary ({part} ids a device): a wrong offset"
            )
            return Diagnosis("shift", text, _TENSOR, _DIM)
    return None


def _unmasked(runs: Forwards, found: Found, got: np.ndarray) -> Diagnosis | None:
    """Whether every token of one part of the vocabulary has the same vector too many."""
    count = runs.trainer.layout.tensor
    if count == 1:
        return None
    extra = got - found.suspect.expected
    shard = runs.batch["tokens"] // (runs.trainer.config.padded_vocab_size // count)
    groups = [extra[shard == s] for s in range(count) if (shard == s).any()]
    if not all(found.suspect.close(group, np.broadcast_to(group[:1], group.shape)) for group in groups):
        return None
    text = (
        "every token of one part of the vocabulary gets the same vector added: devices that do not hold its id "
        "add a row instead of zeros"
    )
    return Diagnosis("mask", text, _TENSOR, _DIM)


def _elementwise(found: Found) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    scale = found.suspect.tolerance * 8 * np.abs(found.suspect.expected).max()

    def close(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        gap = np.abs(a - b) <= scale
        return gap if gap.ndim == 2 else gap.all(-1)

    return close


def _outside(ids: np.ndarray, size: int) -> np.ndarray:
    return (ids < 0) | (ids >= size)
