"""Continuous batching: requests share a batch of rows, and a row whose request is finished takes the next one at once.

The host decides between calls which row works on what; nothing is compiled again, and what a request makes does not
depend on who its neighbours are.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from shardlm.generate.loop import NONE, STEPS, Output, Programs, fresh
from shardlm.generate.requests import Request
from shardlm.train.engine import Parameters


@dataclass(frozen=True)
class Made:
    """Tokens that one call made for one request.

    Attributes:
        request: its index.
        tokens: int32[n].
        log_probabilities: float32[n]; see `loop.Output`.
        top_tokens, top_log_probabilities: [n, top].
        reason: "eos", "stop" or "length" where these are its last, else None.
    """

    request: int
    tokens: np.ndarray
    log_probabilities: np.ndarray
    top_tokens: np.ndarray
    top_log_probabilities: np.ndarray
    reason: str | None


@dataclass
class Clock:
    """Where the time went: seconds and tokens of calls that fill prompts, and of those that only generate."""

    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0


@dataclass
class _Row:
    request: Request | None = None
    filled: int = 0  # tokens of the prompt that are in the cache
    tokens: list[int] = field(default_factory=list)

    @property
    def filling(self) -> bool:
        return self.request is not None and self.filled < len(self.request.prompt)


def serve(
    programs: Programs,
    params: Parameters,
    requests: Sequence[Request],
    values: dict[str, Any],
    eos: np.ndarray,
    stop: Callable[[list[int]], int | None] | None = None,
    burst: int = STEPS,
    clock: Clock | None = None,
) -> Iterator[Made]:
    """Work through requests, in order, as rows become free.

    Args:
        programs: what runs.
        params: as `programs.model.place` gives them.
        requests: none longer than `programs.max_length`.
        values: of the `Sampling` whose kind `programs` has.
        eos: int32[n], tokens that end a request.
        stop: from the tokens of a request so far, how many of them to keep if it is to stop there, else None.
        burst: tokens of a row between two looks at them, at most `STEPS`.
        clock: what to add times to.

    Raises:
        ArithmeticError: the model's logits are not numbers.
    """
    clock = Clock() if clock is None else clock
    state = programs.run(programs.start)
    queue, rows = deque(requests), [_Row() for _ in range(programs.rows)]
    stopped = np.zeros(programs.rows, bool)
    while queue or any(row.request for row in rows):
        began = time.perf_counter()
        brings = _fill(rows, queue, programs.chunk)
        if brings is not None:
            state, output = programs.run(programs.prefill, params, state, brings, stopped, eos, values)
        else:
            active = sum(row.request is not None for row in rows)
            steps, leave = np.int32(burst), np.int32(active - 1 if queue else 0)
            state, output = programs.run(programs.decode, params, state, stopped, eos, values, steps, leave)
        output = jax.device_get(output)
        seconds, count = time.perf_counter() - began, int((output.tokens != NONE).sum())
        if brings is not None:
            clock.prefill_seconds += seconds
            clock.prefill_tokens += int(brings.counts.sum())
        else:
            clock.decode_seconds += seconds
            clock.decode_tokens += count
        stopped = np.zeros(programs.rows, bool)
        for i, row in enumerate(rows):
            if row.request is None or row.filling:
                continue
            made = _made(row, i, output, eos, stop)
            if made.reason is not None:
                stopped[i] = made.reason == "stop"
                rows[i] = _Row()
            yield made


def _fill(rows: list[_Row], queue: deque[Request], chunk: int) -> Any:
    """Give free rows their requests, and the next part of every unfinished prompt; None where there is none."""
    brings = fresh(len(rows), chunk)
    for i, row in enumerate(rows):
        if row.request is None and queue:
            row.request = queue.popleft()
            brings.starts[i], brings.seed[i], brings.limit[i] = True, row.request.seed, row.request.limit
        if row.filling:
            assert row.request is not None
            part = row.request.prompt[row.filled : row.filled + chunk]
            brings.tokens[i, : len(part)], brings.counts[i] = part, len(part)
            row.filled += len(part)
            brings.ends[i] = not row.filling
    return brings if brings.counts.any() else None


def _made(row: _Row, i: int, output: Output, eos: np.ndarray, stop: Callable[[list[int]], int | None] | None) -> Made:
    assert row.request is not None
    count = int((output.tokens[i] != NONE).sum())
    tokens = output.tokens[i, :count]
    if not np.isfinite(output.log_probabilities[i, :count]).all():
        raise ArithmeticError(
            f"the model's logits for prompt {row.request.index} are not numbers: its parameters hold NaN or infinity, "
            "or numbers too large for its dtype"
        )
    before = len(row.tokens)
    row.tokens.extend(tokens.tolist())
    kept = stop(row.tokens) if stop is not None else None
    reason = None
    if kept is not None:
        count, reason = max(kept - before, 0), "stop"
    elif count and tokens[-1] in eos:
        reason = "eos"
    elif len(row.tokens) >= row.request.limit:
        reason = "length"
    return Made(
        row.request.index, tokens[:count], output.log_probabilities[i, :count], output.top_tokens[i, :count],
        output.top_log_probabilities[i, :count], reason,
    )  # fmt: skip
