"""Checks a table by replaying it with names in place of arrays; knows nothing of how the table was made."""

import numpy as np

from .schedule import Kind, Operation
from .table import FIELDS, PER_STAGE, PER_TICK, PREDICATES, Table


def validate(table: Table) -> None:
    """Raises if executing `table` would not be one forward and one backward of every microbatch by every chunk.

    Checked: array shapes and the range of every number; every operation once; each operation's inputs are in the slots
    that it reads; no slot is written while its value is still needed; what a stage sends is what the receiver writes;
    the predicates are true in just the ticks in which some stage has such an operation; embedding and head work on the
    microbatches of their ticks.

    Raises:
        ValueError: names the tick, the stage, the operation and what is missing or in the way.
    """
    _check_arrays(table)
    replay = _Replay(table)
    for tick in range(table.ticks):
        replay.tick(tick)
    replay.finish()


def _check_arrays(table: Table) -> None:
    limits = {"microbatch": table.microbatches, "chunk": table.chunks}
    of_slots = {
        "forward_read": "activation", "forward_stash": "stash", "backward_stash": "stash", "backward_read": "gradient",
        "backward_write": "weight", "weight_stash": "stash", "weight_read": "weight", "head_write": "gradient",
        "activation_arrival": "activation", "gradient_arrival": "gradient",
    }  # fmt: skip
    for names, shape in (
        (PER_STAGE, (table.ticks, table.stages)),
        (PER_TICK, (table.ticks,)),
        (PREDICATES, (table.ticks,)),
    ):
        for name in names:
            array = getattr(table, name)
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}; {table.ticks} ticks need {shape}")
            if name in PREDICATES:
                continue
            limit = limits.get(name.split("_")[-1])
            if limit is None:
                limit = getattr(table, f"{of_slots[name]}_slots")
            for where in np.argwhere((array < -1) | (array >= limit))[:1]:
                place = ", ".join(f"{word} {n}" for word, n in zip(("tick", "stage"), where, strict=False))
                raise ValueError(f"{place}: {name} is {array[tuple(where)]}, which is not -1 to {limit - 1}")


class _Replay:
    """Buffers that hold names of values, per stage and slot; None where nothing is needed any more."""

    def __init__(self, table: Table):
        self.table = table
        self.last = table.stages * table.chunks - 1
        self.buffers: dict[str, list[list[str | None]]] = {
            name: [[None] * getattr(table, f"{name}_slots") for _ in range(table.stages)]
            for name in ("activation", "gradient", "stash", "weight")
        }
        self.done: dict[tuple[int, Operation], int] = {}
        self.backward = Kind.INPUT_GRADIENT if table.split else Kind.BACKWARD

    def tick(self, t: int) -> None:
        """One tick, in the order of the executor."""
        table, stages = self.table, range(self.table.stages)
        forwards = [self.operation(t, s, "forward", Kind.FORWARD) for s in stages]
        backwards = [self.operation(t, s, "backward", self.backward) for s in stages]
        weights = [self.operation(t, s, "weight", Kind.WEIGHT_GRADIENT) for s in stages]
        for name, operations in (("forward", forwards), ("backward", backwards), ("weight", weights)):
            self.check_predicate(t, name, operations)
        self.check_vocabulary(t, forwards, backwards)
        for s, operation in enumerate(backwards):
            if operation:
                self.run_backward(t, s, operation)
        for s, operation in enumerate(weights):
            if operation:
                forward = operation._replace(kind=Kind.FORWARD)
                self.read("stash", t, s, table.weight_stash[t, s], _input(forward), operation)
                rest = _rest(operation._replace(kind=Kind.INPUT_GRADIENT))
                self.read("weight", t, s, table.weight_read[t, s], rest, operation)
        for s, operation in enumerate(forwards):
            if operation:
                self.run_forward(t, s, operation)
        self.run_head(t)
        self.arrive(t, "activation", forwards, 1)
        self.arrive(t, "gradient", backwards, -1)

    def operation(self, t: int, s: int, name: str, kind: Kind) -> Operation | None:
        row = {field: int(getattr(self.table, f"{name}_{field}")[t, s]) for field in FIELDS[name]}
        microbatch, chunk = row["microbatch"], row["chunk"]
        if microbatch < 0:
            for field, value in row.items():
                if value >= 0:
                    raise ValueError(
                        f"tick {t}, stage {s}: no {name}, but {name}_{field} is {value}; -1 says that it is idle"
                    )
            return None
        if chunk < 0:
            raise ValueError(f"tick {t}, stage {s}: {name} of microbatch {microbatch} has no chunk")
        operation = Operation(kind, microbatch, chunk)
        if kind is Kind.WEIGHT_GRADIENT and not self.table.split:
            raise ValueError(f"tick {t}, stage {s}: {operation} in a table whose backwards are not split")
        before = self.done.setdefault((s, operation), t)
        if before != t:
            raise ValueError(f"tick {t}, stage {s}: {operation} already ran in tick {before}")
        return operation

    def check_predicate(self, t: int, name: str, operations: list[Operation | None]) -> None:
        predicate = bool(getattr(self.table, f"has_{name}")[t])
        for s, operation in enumerate(operations):
            if operation and not predicate:
                raise ValueError(f"tick {t}, stage {s}: {operation} does not run, as has_{name} is false in this tick")
        if predicate and not any(operations):
            raise ValueError(f"tick {t}: has_{name} is true, and no stage has such an operation")

    def check_vocabulary(self, t: int, forwards: list[Operation | None], backwards: list[Operation | None]) -> None:
        table = self.table
        first, last = forwards[0], forwards[-1]
        back = backwards[0]
        for name, operation, stage in (
            ("embed_microbatch", first if first and first.chunk == 0 else None, 0),
            ("head_microbatch", last if last and last.chunk == table.chunks - 1 else None, table.stages - 1),
            ("embed_gradient_microbatch", back if back and back.chunk == 0 else None, 0),
        ):
            expected, found = operation.microbatch if operation else -1, int(getattr(table, name)[t])
            if found != expected:
                what = f"{operation} needs" if operation else "there is no such operation, so it has to be"
                raise ValueError(f"tick {t}, stage {stage}: {name} is {found}, but {what} {expected}")

    def run_forward(self, t: int, s: int, operation: Operation) -> None:
        table, slot = self.table, int(self.table.forward_read[t, s])
        virtual = operation.chunk * table.stages + s
        if virtual:
            before = operation._replace(chunk=(virtual - 1) // table.stages)
            self.read("activation", t, s, slot, _output(before, (s - 1) % table.stages), operation)
        elif slot >= 0:
            raise ValueError(
                f"tick {t}, stage {s}: {operation} reads the embedding, but forward_read is {slot}; -1 says so"
            )
        self.write("stash", t, s, int(table.forward_stash[t, s]), _input(operation), str(operation))

    def run_head(self, t: int) -> None:
        table, s = self.table, self.table.stages - 1
        microbatch, slot = int(table.head_microbatch[t]), int(table.head_write[t])
        if microbatch >= 0:
            done = Operation(Kind.FORWARD, microbatch, table.chunks - 1)
            self.write("gradient", t, s, slot, _gradient(done, s), f"the head of microbatch {microbatch}")
        elif slot >= 0:
            raise ValueError(f"tick {t}, stage {s}: head_write is {slot}, but head_microbatch is -1")

    def run_backward(self, t: int, s: int, operation: Operation) -> None:
        table = self.table
        forward = operation._replace(kind=Kind.FORWARD)
        self.read("stash", t, s, table.backward_stash[t, s], _input(forward), operation, keep=table.split)
        self.read("gradient", t, s, table.backward_read[t, s], _gradient(forward, s), operation)
        if table.split:
            self.write("weight", t, s, int(table.backward_write[t, s]), _rest(operation), str(operation))
        elif table.backward_write[t, s] >= 0:
            raise ValueError(f"tick {t}, stage {s}: {operation} is not split, but has a backward_write")

    def arrive(self, t: int, buffer: str, sent: list[Operation | None], step: int) -> None:
        """What the stages' operations sent arrives at the next or previous virtual stage."""
        table = self.table
        for s, operation in enumerate(sent):
            receiver = (s + step) % table.stages
            slot = int(getattr(table, f"{buffer}_arrival")[t, receiver])
            target = operation.chunk * table.stages + s + step if operation else -1
            if operation and 0 <= target <= self.last:
                if step > 0:
                    value = _output(operation, s)
                else:  # the gradient of its input is that of the previous virtual stage's output
                    value = _gradient(Operation(Kind.FORWARD, operation.microbatch, target // table.stages), receiver)
                self.write(buffer, t, receiver, slot, value, f"{operation} of stage {s}")
            elif slot >= 0:
                raise ValueError(
                    f"tick {t}, stage {receiver}: {buffer}_arrival is {slot}, but stage {s} sends it no {buffer}"
                )

    def write(self, buffer: str, t: int, s: int, slot: int, value: str, writer: str) -> None:
        if slot < 0:
            raise ValueError(f"tick {t}, stage {s}: {writer} has no {buffer} slot to write {value} to")
        held = self.buffers[buffer][s][slot]
        if held:
            raise ValueError(
                f"tick {t}, stage {s}: {writer} writes {value} to {buffer} slot {slot}, which still holds {held}"
            )
        self.buffers[buffer][s][slot] = value

    def read(
        self,
        buffer: str,
        t: int,
        s: int,
        slot: int,
        value: str,
        reader: Operation,
        keep: bool = False,
    ) -> None:
        held = self.buffers[buffer][s][slot] if slot >= 0 else None
        if held != value:
            holds = "it names no slot" if slot < 0 else f"slot {slot} holds {held or 'nothing'}"
            raise ValueError(f"tick {t}, stage {s}: {reader} needs {value} in its {buffer} slot; {holds}")
        if not keep:
            self.buffers[buffer][s][slot] = None

    def finish(self) -> None:
        """Every operation has run."""
        table = self.table
        kinds = (Kind.FORWARD, self.backward, Kind.WEIGHT_GRADIENT)[: 3 if table.split else 2]
        for s in range(table.stages):
            for kind in kinds:
                for i in range(table.microbatches):
                    for chunk in range(table.chunks):
                        operation = Operation(kind, i, chunk)
                        if (s, operation) not in self.done:
                            raise ValueError(f"stage {s}: {operation} is missing from all {table.ticks} ticks")


def _input(forward: Operation) -> str:
    return f"the input of {forward}"


def _output(forward: Operation, stage: int) -> str:
    return f"the output of {forward} on stage {stage}"


def _gradient(forward: Operation, stage: int) -> str:
    return f"the gradient of {_output(forward, stage)}"


def _rest(operation: Operation) -> str:
    return f"what {operation} keeps for the weights"
