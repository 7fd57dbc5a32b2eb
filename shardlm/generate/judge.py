"""Log-probabilities of given tokens, texts side by side in a batch, a chunk of tokens at a time."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from shardlm._errors import is_int
from shardlm.generate.api import room, rows_of
from shardlm.generate.loop import programs
from shardlm.generate.model import ShardedModel
from shardlm.layout import Layout
from shardlm.models.config import TransformerConfig
from shardlm.train.engine import Parameters


class Span(NamedTuple):
    """A part of a text to run at once: ids[start:end - 1] go in, and the tokens first to end - 1 are judged."""

    start: int
    first: int
    end: int


def cut(length: int, window: int, stride: int) -> list[Span]:
    """Spans that judge every token but the first of `length` once, none longer than `window` tokens going in.

    Example:
        >>> cut(8, 4, 2)
        [Span(start=0, first=1, end=5), Span(start=2, first=5, end=7), Span(start=3, first=7, end=8)]
    """
    spans = [Span(0, 1, min(window + 1, length))]
    while (end := spans[-1].end) < length:
        after = min(end + stride, length)
        spans.append(Span(max(0, after - 1 - window), end, after))
    return spans


def judge(
    config: TransformerConfig,
    params: Parameters,
    rows: Sequence[np.ndarray],
    spans: Sequence[Sequence[Span]],
    layout: Layout | str | None,
    batch_size: int | None,
    chunk: int,
    devices: Sequence[Any] | None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each row the log-probabilities of its judged tokens, float64[n], and whether each is the likeliest."""
    if not is_int(chunk) or chunk < 1:
        raise ValueError(f"chunk={chunk!r} is not a whole number from 1")
    if not rows:
        return []
    _check_ids(config, rows)
    model = ShardedModel.of(config, layout, devices)
    parts = [(i, span) for i, row_spans in enumerate(spans) for span in row_spans]
    parts.sort(key=lambda part: part[1].start - part[1].end)  # the longest first, so that a batch has equal lengths
    length = room(max(span.end - 1 - span.start for _, span in parts), config.max_sequence)
    count, chunk = rows_of(model.layout, len(parts), batch_size), min(chunk, length)
    what = f"scoring of {count:,} rows of up to {length:,} tokens"
    params = model.place(params, model.cache_bytes(count, length, chunk), what)
    judge = _compiled(model, count, length, chunk)
    start, run = programs(model, count, length, chunk).start, programs(model, count, length, chunk).run
    found: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    for first in range(0, len(parts), count):
        batch = parts[first : first + count]
        ids = [rows[i][span.start : span.end] for i, span in batch]
        cache, results = run(start).cache, []
        for at in range(0, max(map(len, ids)) - 1, chunk):
            tokens, targets = (np.zeros((count, chunk), np.int32) for _ in range(2))
            counts = np.zeros(count, np.int32)
            for j, row in enumerate(ids):
                counts[j] = n = min(chunk, max(0, len(row) - 1 - at))
                tokens[j, :n], targets[j, :n] = row[at : at + n], row[at + 1 : at + 1 + n]
            logprobs, greedy, cache = run(judge, params, tokens, targets, counts, cache)
            results.append(jax.device_get((logprobs, greedy)))
        logprobs, greedy = (np.concatenate(x, axis=1) for x in zip(*results, strict=True))
        for j, (i, span) in enumerate(batch):
            scored = slice(span.first - span.start - 1, span.end - span.start - 1)
            found[i, span.first] = logprobs[j, scored].astype(np.float64), greedy[j, scored]
    result = []
    for i, row_spans in enumerate(spans):
        logprobs, greedy = zip(*(found[i, span.first] for span in row_spans), strict=True)
        result.append((np.concatenate(logprobs), np.concatenate(greedy)))
    return result


@functools.lru_cache(maxsize=32)
def _compiled(model: ShardedModel, rows: int, length: int, chunk: int) -> Any:
    out = (model.sharding(), model.sharding(), model.cache_shardings)
    return jax.jit(model.score, donate_argnums=4, out_shardings=out)


def _check_ids(config: TransformerConfig, rows: Sequence[np.ndarray]) -> None:
    for i, ids in enumerate(rows):
        if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= config.vocab_size:
            raise ValueError(f"text {i} has {ids.dtype} ids from {ids.min()} to {ids.max()}; the model has 0 to "
                             f"{config.vocab_size - 1}")  # fmt: skip
