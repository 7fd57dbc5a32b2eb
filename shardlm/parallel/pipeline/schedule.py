"""Schedules as data: for each stage, the order in which it runs its operations.

p stages, m microbatches, v chunks per stage. Chunk c of stage s is the virtual stage g = c p + s: the model is cut into
v p pieces and the pieces are dealt out to the stages in turn (arXiv:2104.04473 section 2.2.2). The forward of g needs
the forward of g - 1, its backward the backward of g + 1.

A schedule is a function of p, m and v; a user's own is as good as those in `SCHEDULES`:

>>> def one_at_a_time(stages, microbatches, chunks):
...     both = (Kind.FORWARD, Kind.BACKWARD)
...     return [[Operation(kind, i) for i in range(microbatches) for kind in both] for _ in range(stages)]
>>> print(*orders(one_at_a_time, stages=2, microbatches=3)[0])
F0 B0 F1 B1 F2 B2
"""

import collections
import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Kind(enum.StrEnum):
    """What an operation does; the value is the letter in charts and messages.

    A backward is either one operation or two, of which only the first has another stage waiting for it.
    """

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"


class Operation(NamedTuple):
    """One operation on one microbatch by one chunk of a stage; printed as F3, or F3.1 for a chunk other than 0."""

    kind: Kind
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


Orders = Sequence[Sequence[Operation]]
Schedule = Callable[[int, int, int], Orders]


def gpipe(stages: int, microbatches: int, chunks: int = 1) -> Orders:
    """All forwards, then all backwards: every stage holds m microbatches (arXiv:2104.04473 section 2.2.1)."""
    _refuse_chunks("gpipe", chunks)
    return [
        [Operation(kind, i) for kind in (Kind.FORWARD, Kind.BACKWARD) for i in range(microbatches)]
        for _ in range(stages)
    ]


def one_forward_one_backward(stages: int, microbatches: int, chunks: int = 1) -> Orders:
    """Each backward as early as can be: stage s holds min(p - s, m) microbatches (arXiv:2104.04473 section 2.2.1)."""
    _refuse_chunks("1f1b", chunks)
    forwards = [Operation(Kind.FORWARD, i) for i in range(microbatches)]
    backwards = [Operation(Kind.BACKWARD, i) for i in range(microbatches)]
    return [_alternate(forwards, backwards, warmup=stages - s - 1) for s in range(stages)]


def interleaved(stages: int, microbatches: int, chunks: int = 1) -> Orders:
    """1F1B over v p virtual stages, p microbatches through one chunk before the next (arXiv:2104.04473 section 2.2.2).

    The bubble is v times smaller than that of 1F1B. Stage s runs 2 (p - s - 1) + (v - 1) p forwards before its first
    pair, as Megatron-LM does; with one chunk this is 1F1B itself, whose p - s - 1 are enough.
    """
    if microbatches % stages:
        above = -(-microbatches // stages) * stages
        legal = f"{above - stages} or {above}" if above > stages else f"{above}"
        raise ValueError(
            f"schedule 'interleaved' needs microbatches to be a multiple of the stages, but "
            f"microbatches={microbatches} and stages={stages}: use microbatches={legal}, or schedule '1f1b'"
        )
    if chunks == 1:
        return one_forward_one_backward(stages, microbatches)
    turns = [
        (first + i, chunk) for first in range(0, microbatches, stages) for chunk in range(chunks) for i in range(stages)
    ]
    forwards = [Operation(Kind.FORWARD, i, chunk) for i, chunk in turns]
    backwards = [Operation(Kind.BACKWARD, i, chunks - 1 - chunk) for i, chunk in turns]
    return [_alternate(forwards, backwards, warmup=2 * (stages - s - 1) + (chunks - 1) * stages) for s in range(stages)]


def zb_h1(stages: int, microbatches: int, chunks: int = 1) -> Orders:
    """ZB-H1: 1F1B with the backward split, weight gradients filling its bubble (arXiv:2401.10241 section 2.1).

    Stage s starts weight gradients s microbatches late, so that every stage holds min(p, m) microbatches, as many as
    the first stage of 1F1B. It runs where stages keep residuals, `Pipeline(recompute=False)`; in the executor's common
    ticks the bubble is (p - 1)(F + I), where that of 1F1B is (p - 1)(F + I + W).
    """
    _refuse_chunks("zb-h1", chunks)
    orders = []
    for s in range(stages):
        warmup = min(stages - s - 1, microbatches)
        order = [Operation(Kind.FORWARD, i) for i in range(warmup)]
        for i in range(microbatches + s):
            if warmup + i < microbatches:
                order.append(Operation(Kind.FORWARD, warmup + i))
            if i < microbatches:
                order.append(Operation(Kind.INPUT_GRADIENT, i))
            if i >= s:
                order.append(Operation(Kind.WEIGHT_GRADIENT, i - s))
        orders.append(order)
    return orders


SCHEDULES: dict[str, Schedule] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
    "zb-h1": zb_h1,
}


def orders(schedule: str | Schedule, stages: int, microbatches: int, chunks: int = 1) -> list[tuple[Operation, ...]]:
    """Each stage's order of operations, checked to be complete and free of deadlock.

    Args:
        schedule: a name in `SCHEDULES`, or a function of stages, microbatches and chunks.

    Raises:
        ValueError: for a name or size that is not legal, for operations missing or twice, and for orders in which the
            stages come to wait for each other; the message names stage and operation.
    """
    for name, size in (("stages", stages), ("microbatches", microbatches), ("chunks", chunks)):
        if size < 1:
            raise ValueError(f"{name}={size}; it is at least 1")
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(
                f"schedule={schedule!r}; it is one of {', '.join(map(repr, SCHEDULES))}, or a function "
                "(stages, microbatches, chunks) -> each stage's list of operations"
            )
        schedule = SCHEDULES[schedule]
    result = [tuple(order) for order in schedule(stages, microbatches, chunks)]
    if len(result) != stages:
        raise ValueError(f"the schedule gave orders for {len(result)} stages; there are {stages}")
    _check_complete(result, microbatches, chunks)
    _check_progress(result, chunks)
    return result


def needs(operation: Operation, stage: int, stages: int, chunks: int) -> list[tuple[int, Operation]]:
    """The operations, with their stages, whose results `operation` on `stage` reads."""
    kind, i, chunk = operation
    if kind is Kind.WEIGHT_GRADIENT:
        return [(stage, Operation(Kind.INPUT_GRADIENT, i, chunk))]
    step = -1 if kind is Kind.FORWARD else 1
    virtual = chunk * stages + stage + step
    neighbour = [(virtual % stages, Operation(kind, i, virtual // stages))] if 0 <= virtual < stages * chunks else []
    return neighbour if kind is Kind.FORWARD else [(stage, Operation(Kind.FORWARD, i, chunk)), *neighbour]


def _alternate(forwards: list[Operation], backwards: list[Operation], warmup: int) -> list[Operation]:
    """`warmup` forwards, then one forward and one backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    pairs = zip(forwards[warmup:], backwards, strict=False)
    return [*forwards[:warmup], *(op for pair in pairs for op in pair), *backwards[len(forwards) - warmup :]]


def _refuse_chunks(name: str, chunks: int) -> None:
    if chunks != 1:
        raise ValueError(f"schedule {name!r} has one chunk per stage, but chunks={chunks}; 'interleaved' has several")


def _check_complete(result: Orders, microbatches: int, chunks: int) -> None:
    kinds = {operation.kind for order in result for operation in order}
    split = bool(kinds & {Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT})
    if split and Kind.BACKWARD in kinds:
        raise ValueError("the schedule mixes whole backwards (B) with split ones (I and W); use one of them throughout")
    backward = (Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT) if split else (Kind.BACKWARD,)
    kinds = (Kind.FORWARD, *backward)
    expected = [Operation(kind, i, c) for kind in kinds for i in range(microbatches) for c in range(chunks)]
    legal = set(expected)
    for stage, order in enumerate(result):
        extra = [op for op in order if op not in legal]
        twice = [op for op, times in collections.Counter(order).items() if times > 1]
        present = set(order)
        missing = [op for op in expected if op not in present]
        for found, problem in (
            (extra, f"is not among {microbatches} microbatches of {chunks} chunks"),
            (twice, "comes twice"),
            (missing, "is missing"),
        ):
            if found:
                more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
                raise ValueError(f"stage {stage}: {found[0]}{more} {problem}")


def _check_progress(result: Orders, chunks: int) -> None:
    """Runs the orders without a clock: each stage goes on as far as it can."""
    stages, done, position = len(result), set(), [0] * len(result)

    def waits_for(stage: int) -> list[tuple[int, Operation]]:
        return [need for need in needs(result[stage][position[stage]], stage, stages, chunks) if need not in done]

    moved = True
    while moved:
        moved = False
        for stage, order in enumerate(result):
            while position[stage] < len(order) and not waits_for(stage):
                done.add((stage, order[position[stage]]))
                position[stage] += 1
                moved = True
    blocked = [
        f"{result[stage][position[stage]]} on stage {stage} waits for "
        + " and ".join(f"{operation} on stage {other}" for other, operation in waits_for(stage))
        for stage in range(stages)
        if position[stage] < len(result[stage])
    ]
    if blocked:
        raise ValueError(f"the orders deadlock: {'; '.join(blocked)}")
