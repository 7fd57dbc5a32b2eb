"""From orders to packed ticks: when each operation runs, and which slots it reads and writes.

Ticks are synchronous: all stages take part in each, and what is sent in one arrives for the next. A tick holds at most
one forward, one backward and, if backwards are split, one weight-gradient per stage, and costs every stage the kinds of
operation that any stage has in it. So time is the number of ticks with forwards times F plus the number of ticks with
backwards times B, and both are smallest if every stage's forwards run one per tick as soon as they can, and so do its
backwards:

- Forwards keep the stage's order among themselves and wait for nothing else. They overtake backwards: a backward that
  has to come round through synchronous ticks is later than in the asynchronous order, and waiting for it would cost a
  forward every time.
- Backwards keep their order, and are later than the forwards before them in the order; this keeps GPipe what it is.
- Weight gradients keep their order, wait for all that precedes them, and the k-th runs in the same tick on all stages,
  the first in which every stage can. They so take v m ticks and not v m + p - 1. The stash does not grow by it, as it
  has the size that the first stage needs, which is the last to come to a weight gradient.

For 1F1B and GPipe this gives m + p - 1 ticks with forwards and as many with backwards, (m + p - 1)(F + B) together, the
time of the asynchronous schedule; interleaved v m + p - 1 of each, split backwards (m + p - 1)(F + I) + m W. Stage s
of 1F1B runs the forward of microbatch i in tick s + i and its backward in tick 2 p - 1 - s + i: the head's gradient is
there one tick after the last forward, and each stage is one tick more. It so stashes min(2 (p - s) - 1, m) inputs where
the asynchronous schedule holds min(p - s, m).

Slots are the colours of an interval graph, each interval the life of one value in one buffer of one stage; giving each
interval the lowest free slot in order of starts needs as many slots as values ever live together, and no fewer do.
"""

import functools
import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from .schedule import Kind, Operation, Orders, Schedule, orders
from .table import PER_STAGE, PER_TICK, Table
from .validate import validate

_Ticks = dict[tuple[int, Operation], int]  # of (stage, operation)
_BACKWARD, _WEIGHT, _FORWARD, _ARRIVAL = range(4)  # moments within a tick
_MOMENTS = 4


def make_table(schedule: str | Schedule, stages: int, microbatches: int, chunks: int = 1) -> Table:
    """The packed and validated table of a schedule.

    Args:
        schedule: a name in `SCHEDULES`, or a function of stages, microbatches and chunks.

    Raises:
        ValueError: as `orders` does.

    >>> print(make_table("1f1b", stages=2, microbatches=3))
    2 stages, 3 microbatches, chunks: 1; 6 ticks: 4 with forwards, 4 with backwards; slots per stage: \
1 activation, 1 gradient, 3 stash
    tick            0  1  2  3  4  5
    kind            F  F FB FB  B  B
    embed           0  1  2  .  .  .
    head            .  0  1  2  .  .
    embed_gradient  .  .  .  0  1  2
    stage 0 F       0  1  2  .  .  .
    stage 0 B       .  .  .  0  1  2
    stage 1 F       .  0  1  2  .  .
    stage 1 B       .  .  0  1  2  .
    """
    # Of a name there is one table; a user's function may give another order the next time.
    return (_known if isinstance(schedule, str) else _packed)(schedule, stages, microbatches, chunks)


def _packed(schedule: str | Schedule, stages: int, microbatches: int, chunks: int) -> Table:
    order = orders(schedule, stages, microbatches, chunks)
    table = _table(_times(order, chunks), stages, microbatches, chunks)
    validate(table)
    return table


_known = functools.lru_cache(maxsize=64)(_packed)


def _times(order: Orders, chunks: int) -> _Ticks:
    """The tick of every operation. Orders are free of deadlock, and so are these, which wait for less."""
    stages, ticks = len(order), {}

    def neighbour(stage: int, operation: Operation, step: int) -> int | None:
        """First tick that can use what the virtual stage `step` further has to give; None if not known yet."""
        virtual = operation.chunk * stages + stage + step
        tick = ticks.get((virtual % stages, operation._replace(chunk=virtual // stages)))
        return None if tick is None else tick + 1

    def forward(stage: int, operation: Operation) -> int | None:
        return 0 if operation.chunk == stage == 0 else neighbour(stage, operation, -1)

    def backward(stage: int, operation: Operation) -> int | None:
        if (operation.chunk, stage) == (chunks - 1, stages - 1):
            return ticks[stage, operation._replace(kind=Kind.FORWARD)] + 1
        return neighbour(stage, operation, 1)

    _as_soon_as_possible(order, {Kind.FORWARD}, forward, ticks)
    _as_soon_as_possible(order, {Kind.BACKWARD, Kind.INPUT_GRADIENT}, backward, ticks)
    weights = [_weights_ready(stage, row, ticks) for stage, row in enumerate(order)]
    free = 0
    for turn in zip(*weights, strict=True):
        free = max(free, *(ready for _, ready in turn))
        ticks |= {(stage, operation): free for stage, (operation, _) in enumerate(turn)}
        free += 1
    return ticks


def _as_soon_as_possible(
    order: Orders, kinds: set[Kind], ready: Callable[[int, Operation], int | None], ticks: _Ticks
) -> None:
    """Adds the operations of `kinds` to `ticks`, one per tick and stage, none before a forward that precedes it."""
    position, free = [0] * len(order), [0] * len(order)
    moved = True
    while moved:
        moved = False
        for stage, row in enumerate(order):
            while position[stage] < len(row):
                operation = row[position[stage]]
                if operation.kind in kinds:
                    earliest = ready(stage, operation)
                    if earliest is None:
                        break
                    ticks[stage, operation] = max(earliest, free[stage])
                    free[stage] = ticks[stage, operation] + 1
                elif operation.kind is Kind.FORWARD:
                    free[stage] = max(free[stage], ticks[stage, operation] + 1)
                position[stage] += 1
                moved = True
    assert position == [len(row) for row in order], "orders were not checked"


def _weights_ready(stage: int, row: Sequence[Operation], ticks: _Ticks) -> list[tuple[Operation, int]]:
    """The weight gradients of one stage, each with the tick from which all that precedes it in the order is done."""
    ready, result = 0, []
    for operation in row:
        if operation.kind is Kind.WEIGHT_GRADIENT:
            result.append((operation, ready))
        else:  # an input gradient runs before the weight gradient in one tick, a forward after it
            ready = max(ready, ticks[stage, operation] + (operation.kind is Kind.FORWARD))
    return result


class _Buffer:
    """One buffer of every stage; the lives of its values, and where in the table their slot is to be written."""

    def __init__(self, stages: int):
        self.lives = [[] for _ in range(stages)]

    def hold(self, stage: int, start: tuple[int, int], end: tuple[int, int], cells: Iterable[tuple]) -> None:
        """A value lives from `start` to `end`, both a tick and a moment within it and both included."""
        first, last = (tick * _MOMENTS + moment for tick, moment in (start, end))
        self.lives[stage].append((first, last, list(cells)))

    def colour(self) -> int:
        """Writes every value's slot into its cells; returns the number of slots."""
        slots = 0
        for lives in self.lives:
            free, busy, used = [], [], 0
            for first, last, cells in sorted(lives, key=lambda life: life[:2]):
                while busy and busy[0][0] < first:
                    heapq.heappush(free, heapq.heappop(busy)[1])
                if not free:
                    heapq.heappush(free, used)
                    used += 1
                slot = heapq.heappop(free)
                heapq.heappush(busy, (last, slot))
                for array, *index in cells:
                    array[tuple(index)] = slot
            slots = max(slots, used)
        return slots


def _table(ticks: _Ticks, stages: int, microbatches: int, chunks: int) -> Table:
    length, last = max(ticks.values()) + 1, stages * chunks - 1
    split = any(operation.kind is Kind.WEIGHT_GRADIENT for _, operation in ticks)
    a = {name: np.full((length, stages), -1, np.int32) for name in PER_STAGE}
    a |= {name: np.full(length, -1, np.int32) for name in PER_TICK}
    buffers: dict[str, _Buffer] = defaultdict(lambda: _Buffer(stages))
    names = {Kind.FORWARD: "forward", Kind.WEIGHT_GRADIENT: "weight"}
    back = Kind.INPUT_GRADIENT if split else Kind.BACKWARD
    for (s, operation), t in ticks.items():
        kind, i, chunk = operation
        name, g = names.get(kind, "backward"), chunk * stages + s
        a[f"{name}_microbatch"][t, s], a[f"{name}_chunk"][t, s] = i, chunk
        if kind is Kind.FORWARD:
            b = ticks[s, Operation(back, i, chunk)]
            cells, end = [(a["forward_stash"], t, s), (a["backward_stash"], b, s)], (b, _BACKWARD)
            if split:
                w = ticks[s, Operation(Kind.WEIGHT_GRADIENT, i, chunk)]
                cells, end = [*cells, (a["weight_stash"], w, s)], (w, _WEIGHT)
                passed = [(a["backward_write"], b, s), (a["weight_read"], w, s)]
                buffers["weight"].hold(s, (b, _BACKWARD), end, passed)
            buffers["stash"].hold(s, (t, _FORWARD), end, cells)
            if g == 0:
                a["embed_microbatch"][t] = i
            if g == last:
                a["head_microbatch"][t] = i
                cells = [(a["head_write"], t), (a["backward_read"], b, s)]
                buffers["gradient"].hold(s, (t, _ARRIVAL), (b, _BACKWARD), cells)
            else:
                to, c = (g + 1) % stages, (g + 1) // stages
                use = ticks[to, Operation(kind, i, c)]
                cells = [(a["activation_arrival"], t, to), (a["forward_read"], use, to)]
                buffers["activation"].hold(to, (t, _ARRIVAL), (use, _FORWARD), cells)
        elif kind is back:
            if g == 0:
                a["embed_gradient_microbatch"][t] = i
            else:
                to, c = (g - 1) % stages, (g - 1) // stages
                use = ticks[to, Operation(kind, i, c)]
                cells = [(a["gradient_arrival"], t, to), (a["backward_read"], use, to)]
                buffers["gradient"].hold(to, (t, _ARRIVAL), (use, _BACKWARD), cells)
    slots = {f"{name}_slots": buffers[name].colour() for name in ("activation", "gradient", "stash", "weight")}
    has = {f"has_{name}": np.any(a[f"{name}_microbatch"] >= 0, axis=1) for name in ("forward", "backward", "weight")}
    for array in (*a.values(), *has.values()):
        array.flags.writeable = False
    return Table(stages=stages, microbatches=microbatches, chunks=chunks, split=split, **slots, **a, **has)
