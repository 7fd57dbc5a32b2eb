"""What else could be chosen: what each recomputation policy would change, and what would make a step fit."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from shardlm.inspect import flops, memory, pipeline, render
from shardlm.inspect.hardware import Hardware
from shardlm.inspect.memory import Memory
from shardlm.inspect.pipeline import PipelineCost
from shardlm.inspect.program import Program
from shardlm.layout import Layout, LayoutError
from shardlm.parallel.pipeline.simulate import Times, synchronous

Variant = Callable[[Layout, Any], Program]
"""The same step on another layout of as many devices, and with another config."""

POLICIES = ("none", "dots", "full")
# Room to leave: XLA's CPU compiler was within 10 % of the prediction, its GPU compiler needed up to 56 % more where all
# is recomputed and the model is small.
MARGIN = 0.25
BUBBLE = 0.1  # of the ideal time: above it more microbatches are looked for


def remat(program: Program, variant: Variant) -> dict[str, tuple[int, float]]:
    """For each policy the peak in bytes, and the FLOPs that it recomputes, on one device."""
    result = {}
    for policy in POLICIES:
        layout = _legal(program.layout, remat=policy)
        if layout is None:
            continue
        other = program if layout == program.layout else variant(layout, program.config)
        peak = memory.of(other).peak
        assert peak is not None
        result[policy] = (peak, _recomputed(other))
    return result


def fitting(program: Program, variant: Variant, needs: Memory, hardware: Hardware) -> tuple[str, ...]:
    """What to do about memory, in words: nothing where it fits with room to spare.

    Changes are tried one after another, each on top of those before it, the cheapest first, until the step fits.
    """
    room, peak = hardware.memory, needs.peak
    assert peak is not None
    if peak <= room * (1 - MARGIN):
        return ()
    lines = []
    if peak <= room:
        lines.append(
            f"tight: a compiler may need {MARGIN:.0%} more than predicted, and only {render.size(room - peak)} are left"
        )
    layout, config, changes = program.layout, program.config, {}
    for text, layout, config in _changes(program):
        try:
            other = variant(layout, config)
        except LayoutError:
            continue
        changes[text.partition("=")[0]] = text  # a setting's last value alone
        found = memory.of(other).peak
        assert found is not None
        if found <= room * (1 - MARGIN):
            again = _recomputed(other)
            extra = f", for {render.flop(again)} recomputed on each device" if again else ""
            attention = config.attention.implementation
            other_attention = (
                "" if attention == program.config.attention.implementation else f" --attention {attention}"
            )
            lines.append(
                f"{' and '.join(changes.values())} would bring it to {render.size(found)}{extra}: "
                f"--layout {layout}{other_attention}"
            )
            return tuple(lines)
    if changes:
        lines.append(f"{' and '.join(changes.values())} together are not enough")
    held = f"parameters and optimizer state take {render.size(needs.state)} on each"
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(program.state))
    lines.append(
        f"{held} of {program.num_devices} devices. Split over all, by fsdp and tensor, they would take "
        f"{render.size(whole / program.num_devices)}; use more devices along fsdp, with as few rows of the batch on "
        "each"
        if program.layout.zero == 3
        else f"{held} device: zero=3 splits them over fsdp"
    )
    return tuple(lines)


def with_bubble(program: Program, cost: PipelineCost | None) -> PipelineCost | None:
    """The cost of a pipeline with what would make its bubble smaller, where that is above `BUBBLE`.

    Looked for are the fewest microbatches of the same rows that bring it there, the bubble being to theirs as the
    microbatches are (arXiv:2104.04473 section 2.2); what they give is simulated.
    """
    if cost is None or cost.bubble <= BUBBLE:
        return cost
    layout, rows = program.layout, program.batch_size // program.layout.batch_shards
    each = rows // cost.microbatches
    now = f"a bubble of {cost.bubble:.1%} of the ideal time with microbatches of {each} row{'s' if each > 1 else ''}"
    counts = [n for n in range(cost.microbatches + 1, rows + 1) if rows % n == 0]
    enough = [n for n in counts if cost.bubble * cost.microbatches / n <= BUBBLE]
    for count in [*enough, *reversed(counts)]:
        changed = _with_microbatches(layout, count)
        table = None if changed is None else pipeline.table_of(changed)
        if table is not None:
            found = synchronous(table, Times(**cost.times)).bubble_fraction
            line = f"{now}: {count} of {rows // count} would make it {found:.1%}: --layout {changed}"
            return dataclasses.replace(cost, advice=(line,)) if found < cost.bubble else cost
    line = f"{now}: more rows in the batch, in more microbatches, or fewer stages would make it smaller"
    return dataclasses.replace(cost, advice=(line,))


def _changes(program: Program) -> Iterator[tuple[str, Layout, Any]]:
    """(what, the layout, the config) after each change, cheapest first."""
    layout, config = program.layout, program.config
    attention = config.attention
    if layout.tensor > 1 and not layout.sequence_parallel:
        layout = dataclasses.replace(layout, sequence_parallel=True)
        yield "sequence_parallel", layout, config
    if attention.implementation == "xla":
        config = dataclasses.replace(config, attention=dataclasses.replace(attention, implementation="chunked"))
        yield 'attention implementation="chunked" (or "cudnn" on a GPU)', layout, config
    if layout.zero < 3 and layout.fsdp > 1:
        layout = dataclasses.replace(layout, zero=3)
        yield "zero=3", layout, config
    rows = program.batch_size // layout.batch_shards
    for policy in POLICIES[POLICIES.index(layout.remat) + 1 :]:
        if changed := _legal(layout, remat=policy):
            layout = changed
            yield f"remat={policy}", layout, config
    for count in (n for n in range(layout.microbatches + 1, rows + 1) if rows % n == 0 and math.log2(n).is_integer()):
        if layout.pipeline is None:
            layout = dataclasses.replace(layout, accumulate=count)
            yield f"accumulate={count}", layout, config
        elif (more := _with_microbatches(layout, count)) is not None:
            layout = more
            yield f"microbatches={count}", layout, config


def _with_microbatches(layout: Layout, count: int) -> Layout | None:
    """A pipelined layout with so many microbatches; None where its schedule does not take them."""
    assert layout.pipeline is not None
    try:
        changed = dataclasses.replace(layout, pipeline=dataclasses.replace(layout.pipeline, microbatches=count))
        return changed if pipeline.table_of(changed) is not None else None
    except ValueError:
        return None


def _recomputed(program: Program) -> float:
    return flops.of(program.jaxpr, program.num_devices, pipeline.used(program)).recomputed


def _legal(layout: Layout, **changes: Any) -> Layout | None:
    """The layout with these changes; None where they contradict its pipeline."""
    try:
        return dataclasses.replace(layout, **changes)
    except LayoutError:
        return None
