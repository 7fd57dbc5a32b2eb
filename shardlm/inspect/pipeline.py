"""What the schedule of a pipeline costs a step: its bubble, the inputs that it stashes, what is computed for nothing.

All stages run one program in common ticks (`parallel.pipeline`). A tick that has a forward on any stage has one on all,
and so with backwards: of m microbatches and v chunks a stage works on m v, and in the other ticks computes on masked
arrays. Embedding and head are split over the stages, run once per microbatch, and work on one each time.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from shardlm.inspect.flops import of_equation
from shardlm.inspect.program import Program
from shardlm.inspect.render import Section, flop, percent, size
from shardlm.inspect.walk import Place, equations
from shardlm.layout import Axis, Layout
from shardlm.parallel.pipeline.schedule import orders
from shardlm.parallel.pipeline.simulate import Times, asynchronous, synchronous
from shardlm.parallel.pipeline.stages import Stages
from shardlm.parallel.pipeline.table import Table
from shardlm.parallel.pipeline.ticks import make_table

_LAYERS = ("has_forward", "has_backward", "has_weight")  # purposes of branches that run a stage's layers


@dataclass(frozen=True)
class PipelineCost:
    """A schedule's cost on one model and batch.

    Attributes:
        schedule: as a layout says it.
        stages, microbatches, chunks: its sizes.
        ticks: how many there are; `forward_ticks` of them have forwards and `backward_ticks` backwards.
        bubble: time lost over the ideal time, in the ticks that run, FLOPs being time; padding counts as work.
        bubble_alone: the same if each stage ran on its own, as soon as it could, without padding, with the embedding on
            the first and the head on the last.
        padding: rows of layers, of all stages together, that hold none: they are computed like layers, and dropped.
        stashed: the most inputs that each stage keeps for its backwards at a time.
        stashed_alone: the same if each stage ran on its own; min(p - s, m) on stage s of 1F1B.
        slots: of every device's stash, as all run one program.
        input_bytes: of one stashed input; None where stages keep residuals.
        times: FLOPs of a stage's forward and backward of one microbatch, or of the backward's two halves, and of the
            head, by all stages together.
        sent: bytes that one device sends over `pipe` in a step, by purpose.
        advice: what would make the bubble smaller.
    """

    schedule: str
    stages: int
    microbatches: int
    chunks: int
    ticks: int
    forward_ticks: int
    backward_ticks: int
    bubble: float
    bubble_alone: float
    padding: int
    stashed: tuple[int, ...]
    stashed_alone: tuple[int, ...]
    slots: int
    input_bytes: int | None
    times: Mapping[str, float]
    sent: Mapping[str, float]
    advice: tuple[str, ...] = ()

    def sections(self, masked: float) -> list[Section]:
        """Its tables in a report; `masked` are the FLOPs that a device computes for nothing."""

        def stages(counts: tuple[int, ...]) -> str:
            shown = map(str, counts if len(counts) <= 8 else (*counts[:3], "...", *counts[-3:]))
            return ", ".join(shown)

        def held(counts: tuple[int, ...]) -> str:
            each = self.input_bytes or 0
            return " to ".join(dict.fromkeys(size(function(counts) * each) for function in (max, min)))

        what, wide = "microbatches' residuals", ""
        if self.input_bytes:
            what, wide = "inputs", f" of {size(self.input_bytes)}"
        rows = (
            ("bubble, of the ideal time", percent(self.bubble), percent(self.bubble_alone)),
            (f"{what} stashed, by stage", stages(self.stashed), stages(self.stashed_alone)),
            *([("bytes of them", held(self.stashed), held(self.stashed_alone))] if self.input_bytes else []),
        )
        each = self.microbatches * self.chunks
        padded = f" and in {self.padding} rows of padding" if self.padding else ""
        notes = (
            f"every device has room for {self.slots} {what}{wide}, as all run one program",
            f"a stage has a forward in {each} of the {self.forward_ticks} ticks that have any, a backward in {each} of "
            f"{self.backward_ticks}; in the others{padded} it computes on masked arrays, {flop(masked)}: "
            "no model FLOPs, but time and communication",
            *self.advice,
        )
        several = f", {self.chunks} chunks each" if self.chunks > 1 else ""
        title = f"{self.stages} stages{several}, {self.microbatches} microbatches, {self.ticks} ticks"
        heads = ("", ">in common ticks, as it runs", ">each stage on its own")
        sent = tuple((what, size(count)) for what, count in self.sent.items())
        return [
            Section(f"pipeline {self.schedule}: {title}", heads, rows, notes),
            Section("sent over pipe by one device in one step", ("for", ">bytes"), sent),
        ]


@functools.lru_cache(maxsize=16)
def table_of(layout: Layout) -> Table | None:
    """The ticks of a layout's pipeline; None where it has none."""
    pipeline = layout.pipeline
    return (
        None if pipeline is None else make_table(pipeline.schedule, layout.pipe, pipeline.microbatches, pipeline.chunks)
    )


def used(program: Program) -> Callable[[Place], float]:
    """Of what a step computes at a place, which part is on a microbatch and a layer, on the average stage."""
    table = table_of(program.layout) if program.manual else None
    if table is None:
        return lambda place: 1.0
    stages = Stages.of(program.layout, program.config.num_layers)
    operations, real = table.microbatches * table.chunks, sum(stages.counts) / stages.rows.size

    def part(place: Place) -> float:
        return operations / place.taken * real if place.taken is not None and place.purpose in _LAYERS else 1.0

    return part


def times(program: Program, table: Table) -> dict[str, float]:
    """FLOPs of a traced step as `Times` of the simulation; padding of a stage runs like layers."""
    sums: dict[str, float] = dict.fromkeys((*_LAYERS, "head"), 0.0)
    for equation, place in equations(program.jaxpr):
        if place.taken is not None:
            sums[place.purpose if place.purpose in _LAYERS else "head"] += of_equation(equation) * place.times
    names = {"has_forward": "forward", "has_backward": "input_gradient" if table.split else "backward"}
    names |= {"has_weight": "weight_gradient"} if table.split else {}
    cost: dict[str, float] = {name: sums[kind] / int(getattr(table, kind).sum()) for kind, name in names.items()}
    return cost | {"head": sums["head"] / table.microbatches * table.stages}


def of(program: Program, textbook: Iterable[Any]) -> PipelineCost | None:
    """The cost of a program's pipeline; None where it runs none.

    Args:
        program: a step of our Transformer.
        textbook: the lines of `theory.expected` for it.
    """
    layout, table = program.layout, table_of(program.layout)
    if table is None or not program.manual or program.sequence is None:
        return None
    assert layout.pipeline is not None
    cost, stages = times(program, table), Stages.of(layout, program.config.num_layers)
    ticks = synchronous(table, Times(**cost))
    real = [(chunks >= 0).mean() for chunks in stages.of_stage()]
    each: dict[str, Any] = {name: [time * part for part in real] for name, time in cost.items() if name != "head"}
    own = Times(**each, head=cost["head"])
    alone = asynchronous(orders(layout.pipeline.schedule, table.stages, table.microbatches, table.chunks), own)
    tokens = program.batch_size // layout.batch_shards // table.microbatches * program.sequence
    parts = layout.tensor if layout.sequence_parallel else 1
    one = tokens // parts * program.config.d_model * jnp.dtype(program.config.dtype).itemsize
    sent: dict[str, float] = {}
    for line in textbook:
        if str(Axis.PIPE) in line.axes and line.kind != "collective-permute":
            sent[line.what] = sent.get(line.what, 0.0) + line.bytes
    sent["activations to the next stage"] = one * int(table.sends_activation.sum())
    sent["gradients to the one before"] = one * int(table.sends_gradient.sum())
    return PipelineCost(
        schedule=str(layout.pipeline),
        stages=table.stages,
        microbatches=table.microbatches,
        chunks=table.chunks,
        ticks=table.ticks,
        forward_ticks=int(table.has_forward.sum()),
        backward_ticks=int(table.has_backward.sum()),
        bubble=ticks.bubble_fraction,
        bubble_alone=alone.bubble_fraction,
        padding=stages.padding,
        stashed=ticks.peak_activations,
        stashed_alone=alone.peak_activations,
        slots=table.stash_slots,
        input_bytes=one if layout.pipeline.recompute else None,
        times=cost,
        sent=sent,
    )
