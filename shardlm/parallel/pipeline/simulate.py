"""What a schedule costs, before a device is touched: makespan, bubble, activations held, messages sent.

Two accountings of the same orders:

- `asynchronous`: every stage runs its order as soon as what it needs is there. The textbook's numbers, for p stages, m
  microbatches, v chunks per stage, F and B the times of a stage's forward and backward of a microbatch: the bubble is
  (p - 1)(F + B) for GPipe and 1F1B and (p - 1)(F + B) / v interleaved, so (p - 1) / m and (p - 1) / (v m) of the ideal
  time (arXiv:2104.04473 section 2.2); (p - 1)(F + I - W) for ZB-H1, whose backward is I and then W
  (arXiv:2401.10241, whose B is the I here), if W is no longer than F and I; else (p - 1) max(F, I).
- `synchronous`: what the executor does. A tick has the same kinds of operation on all stages, whether or not a stage
  has one of them, and lasts as long as the slowest stage takes for them. The bubble is the same for GPipe, 1F1B and
  interleaved; for ZB-H1 it is (p - 1)(F + I), as nothing can fill the start and the end.

The bubble is makespan minus ideal time, the work of the stage that has most. Times may be of any unit and any numbers.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .schedule import Kind, Operation, Orders, needs
from .table import FIELDS, Table

Time = float | Iterable[float]  # the same for all stages, or one number per stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """How long one operation takes; of one chunk of one stage, one microbatch.

    Attributes:
        forward, backward, input_gradient, weight_gradient: on a stage, or a sequence with each stage's.
        send: from one stage to the next.
        embedding, embedding_backward, head: on the devices of one stage; head is forward and backward, with the loss.

    Raises:
        ValueError: for a negative time.
    """

    forward: Time = 1.0
    backward: Time = 2.0
    input_gradient: Time = 1.0
    weight_gradient: Time = 1.0
    send: float = 0.0
    embedding: float = 0.0
    embedding_backward: float = 0.0
    head: float = 0.0

    def __post_init__(self):
        for name, time in list(vars(self).items()):
            each = tuple(time) if isinstance(time, Iterable) else (time,)
            if min(each) < 0:
                raise ValueError(f"{name}={time}; a time is not negative")
            if isinstance(time, Iterable):
                object.__setattr__(self, name, each)

    def of(self, kind: Kind, stage: int) -> float:
        """The time of an operation, without embedding and head."""
        time = getattr(self, kind.name.lower())
        return time[stage] if isinstance(time, tuple) else time

    def check(self, stages: int) -> None:
        """Raises ValueError for a sequence that has not one time per stage."""
        for name, time in vars(self).items():
            if isinstance(time, tuple) and len(time) != stages:
                raise ValueError(f"{name} has {len(time)} times; there are {stages} stages")


class Span(NamedTuple):
    """One operation in time."""

    stage: int
    operation: Operation
    start: float
    end: float


class Shared(NamedTuple):
    """Embedding or head, as a part of a synchronous tick."""

    stage: int
    start: float
    end: float


class Tick(NamedTuple):
    """One synchronous tick: when, and how many stages send an activation and a gradient in it."""

    start: float
    end: float
    activations: int
    gradients: int


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Simulation:
    """The outcome of a simulation.

    Attributes:
        makespan: from the first operation to the end of the last.
        work: each stage's time with something to do.
        peak_activations: the most stage inputs that each stage holds at a time, of all its chunks.
        activations, gradients: messages sent in all.
        spans: every operation in time.
        ticks: the ticks of the synchronous accounting; none in the asynchronous one.
        shared: embedding and head in those ticks; the asynchronous operations of the first and last stage hold theirs.
    """

    makespan: float
    work: tuple[float, ...]
    peak_activations: tuple[int, ...]
    activations: int
    gradients: int
    spans: tuple[Span, ...]
    ticks: tuple[Tick, ...] = ()
    shared: tuple[Shared, ...] = ()

    @property
    def ideal(self) -> float:
        """The work of the stage that has most."""
        return max(self.work)

    @property
    def bubble(self) -> float:
        """Time lost: makespan less the ideal."""
        return self.makespan - self.ideal

    @property
    def bubble_fraction(self) -> float:
        """Time lost over the ideal time, the ratio of arXiv:2104.04473 section 2.2."""
        return self.bubble / self.ideal

    def __repr__(self) -> str:
        kind = f"synchronous, {len(self.ticks)} ticks" if self.ticks else "asynchronous"
        return (
            f"{kind}: makespan {self.makespan:g}, ideal {self.ideal:g}, bubble {self.bubble:g} "
            f"({self.bubble_fraction:.1%} of ideal); peak activations per stage {list(self.peak_activations)}; "
            f"messages: {self.activations} activations, {self.gradients} gradients"
        )


def asynchronous(orders: Orders, times: Times = Times()) -> Simulation:
    """Each stage runs its order as soon as it can; a send takes time but keeps no stage from working.

    Args:
        orders: each stage's operations, as `schedule.orders` gives them, free of deadlock.
        times: embedding and head are work of the first and the last stage.

    >>> from shardlm.parallel.pipeline import orders
    >>> asynchronous(orders("1f1b", stages=4, microbatches=8))
    asynchronous: makespan 33, ideal 24, bubble 9 (37.5% of ideal); peak activations per stage [4, 3, 2, 1]; \
messages: 24 activations, 24 gradients
    """
    stages = len(orders)
    times.check(stages)
    chunks = 1 + max(operation.chunk for order in orders for operation in order)
    ends: dict[tuple[int, Operation], float] = {}
    free, position, spans = [0.0] * stages, [0] * stages, []
    while len(ends) < sum(map(len, orders)):
        before = len(ends)
        for stage, order in enumerate(orders):
            while position[stage] < len(order):
                operation = order[position[stage]]
                sources = needs(operation, stage, stages, chunks)
                if not all(source in ends for source in sources):
                    break
                arrivals = [ends[source] + (times.send if source[0] != stage else 0) for source in sources]
                start = max([free[stage], *arrivals])
                end = start + _alone(operation, stage, stages, chunks, times)
                spans.append(Span(stage, operation, start, end))
                ends[stage, operation] = free[stage] = end
                position[stage] += 1
        assert len(ends) > before, "orders were not checked"
    return _simulation(spans, stages, chunks, max(ends.values()))


def synchronous(table: Table, times: Times = Times(), *, vocabulary_split: bool = True) -> Simulation:
    """The time that the executor of packed ticks takes.

    A tick that sends lasts one send longer. Embedding and head are barriers: the stages are together before and after.

    Args:
        table: a valid table.
        times: of embedding and head the time on one stage's devices; all stages share it.
        vocabulary_split: if false, embedding and head are work of the first and the last stage, which the tick of all
            stages waits for.

    >>> from shardlm.parallel.pipeline import make_table
    >>> synchronous(make_table("1f1b", stages=4, microbatches=8))
    synchronous, 15 ticks: makespan 33, ideal 24, bubble 9 (37.5% of ideal); peak activations per stage [7, 5, 3, 1]; \
messages: 24 activations, 24 gradients
    """
    stages = table.stages
    times.check(stages)
    share = stages if vocabulary_split else 1
    kinds = {
        "backward": Kind.INPUT_GRADIENT if table.split else Kind.BACKWARD,
        "weight": Kind.WEIGHT_GRADIENT,
        "forward": Kind.FORWARD,
    }
    spans, ticks, shared, now = [], [], [], 0.0

    def together(at: list[float], time: float, stage: int) -> list[float]:
        """A barrier, then an operation of all stages, or of `stage` while the others wait."""
        start, end = max(at), max(at) + time / share
        shared.extend(Shared(s, start, end) for s in (range(stages) if vocabulary_split else [stage]))
        return [end] * stages

    for t in range(table.ticks):
        start, at = now, [now] * stages
        for name, kind in kinds.items():
            if name == "forward":
                if times.embedding_backward and table.embed_gradient_microbatch[t] >= 0:
                    at = together(at, times.embedding_backward, 0)
                if times.embedding and table.embed_microbatch[t] >= 0:
                    at = together(at, times.embedding, 0)
            if getattr(table, f"has_{name}")[t]:
                for s in range(stages):
                    i, chunk = (int(getattr(table, f"{name}_{field}")[t, s]) for field in FIELDS[name][:2])
                    end = at[s] + times.of(kind, s)
                    if i >= 0:
                        spans.append(Span(s, Operation(kind, i, chunk), at[s], end))
                    at[s] = end
        if times.head and table.head_microbatch[t] >= 0:
            at = together(at, times.head, stages - 1)
        messages = [int((arrival[t] >= 0).sum()) for arrival in (table.activation_arrival, table.gradient_arrival)]
        now = max(at) + (times.send if any(messages) else 0)
        ticks.append(Tick(start, now, *messages))
    return _simulation(spans, stages, table.chunks, now, ticks, shared)


def _alone(operation: Operation, stage: int, stages: int, chunks: int, times: Times) -> float:
    """The time of an operation, with embedding and head on the first and the last virtual stage."""
    time, virtual = times.of(operation.kind, stage), operation.chunk * stages + stage
    if operation.kind is Kind.FORWARD:
        return time + (times.embedding if virtual == 0 else 0) + (times.head if virtual == stages * chunks - 1 else 0)
    return time + (times.embedding_backward if virtual == 0 and operation.kind is not Kind.WEIGHT_GRADIENT else 0)


def _simulation(
    spans: list[Span],
    stages: int,
    chunks: int,
    makespan: float,
    ticks: Sequence[Tick] = (),
    shared: Sequence[Shared] = (),
) -> Simulation:
    """Spans of a stage are in the order in which it ran them; a backward frees its input before the next forward."""
    split = any(span.operation.kind is Kind.WEIGHT_GRADIENT for span in spans)
    work = [sum(end - start for s, start, end in shared if s == stage) for stage in range(stages)]
    held, peak = [0] * stages, [0] * stages
    activations = gradients = 0
    for stage, operation, start, end in spans:
        work[stage] += end - start
        virtual = operation.chunk * stages + stage
        if operation.kind is Kind.FORWARD:
            held[stage] += 1
            activations += virtual < stages * chunks - 1
        elif operation.kind is (Kind.WEIGHT_GRADIENT if split else Kind.BACKWARD):
            held[stage] -= 1
        if operation.kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT):
            gradients += virtual > 0
        peak[stage] = max(peak[stage], held[stage])
    return Simulation(
        makespan=makespan, work=tuple(work), peak_activations=tuple(peak), activations=activations, gradients=gradients,
        spans=tuple(spans), ticks=tuple(ticks), shared=tuple(shared),
    )  # fmt: skip
