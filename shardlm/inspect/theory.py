"""What a step of the manual engine has to send, by the textbook, from the sizes of the model, layout and batch alone.

Nothing here looks at a program: the ledger does that, and the two must agree. Units are elements of whole arrays on one
device; P_i is one parameter as a device holds it for computing (of its tensor shard), M the number of microbatches.

- Gradients are summed over the batch axes: an all-reduce of P_i over data, or with ZeRO a reduce-scatter of P_i over
  fsdp and an all-reduce of the shard over data (arXiv:1910.02054 section 7): once per step, or per microbatch where it
  happens inside backward.
- ZeRO-1 and 2 gather each updated parameter once per step, P_i. ZeRO-3 gathers the layers' matrices in forward and
  again in backward of every microbatch, 2 P_i; tables and vectors once per step.
- Tensor parallelism sums b s h twice per layer forward and twice backward (arXiv:1909.08053 section 3); with sequence
  parallelism each sum is a reduce-scatter and an all-gather (arXiv:2205.05198 section 4.2). The embedding and the head
  add one each way. Cross-entropy over a split vocabulary takes three all-reduces of b s.
- What is frozen is gathered and never summed, nor gathered after an update.
- Full recomputation makes a layer's communication again, except what only its output needs.
- In a pipeline a stage runs its layers in each tick that has a forward on any stage, F ticks, and runs them again and
  then back in each of B ticks with a backward; where it has no microbatch it communicates all the same. A tick in which
  any stage has something to send sends b s h from each, b the rows of a microbatch: the textbook's b s h per boundary,
  microbatch and direction, in as many ticks as the table says. The vocabulary is split over the stages
  (arXiv:2411.05288): per microbatch the embedding is summed over them and its gradient sent to all, the last stage's
  output sent to all and its gradient summed; three all-reduces of b s are over pipe as over tensor.
- Two scalars per step, the sums of losses and of weights.

Sums of bfloat16 travel as float32, gathers as they are.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from shardlm.dims import Split
from shardlm.inspect.ledger import wire
from shardlm.inspect.pipeline import table_of
from shardlm.layout import Axis, Layout
from shardlm.parallel import zero
from shardlm.parallel.pipeline.stages import Stages
from shardlm.parallel.pipeline.table import Table


@dataclass(frozen=True)
class Expected:
    """One line of the textbook: what is sent over some axes, and why.

    Attributes:
        what: in words.
        kind: "all-reduce", "all-gather", "reduce-scatter" or "collective-permute".
        axes: the mesh axes that take part, in mesh order.
        elements: of the whole array, all runs in a step together.
        dtype: in which it travels.
        bytes: what one device sends in one step, in a ring.
    """

    what: str
    kind: str
    axes: tuple[str, ...]
    elements: int
    dtype: str
    bytes: float


def expected(
    config: Any, layout: Layout, splits: Mapping[str, Split], batch_size: int, sequence: int
) -> tuple[Expected, ...]:
    """The textbook's lines for one training step.

    Args:
        config: a `TransformerConfig`.
        layout: its sizes resolved.
        splits: how each parameter is split, by path.
        batch_size, sequence: of the global batch.
    """
    lines, table = _Lines(layout), table_of(layout)
    for split in splits.values():
        _parameter(lines, split, config, layout, table)
    tokens = batch_size // layout.batch_shards // layout.microbatches * sequence
    if layout.tensor > 1:
        _layers(lines, config, layout, tokens, *_passes(config.num_layers, layout, table))
    if layout.tensor > 1 or layout.pipe > 1:
        _vocabulary(lines, config, layout, tokens)
    if table is not None:
        _stages(lines, config, layout, splits, tokens, table)
    wide = str(jnp.promote_types(config.dtype, jnp.float32))
    batch = tuple(str(axis) for axis in (Axis.DATA, Axis.FSDP, Axis.EXPERT, Axis.CONTEXT) if layout.sizes[axis] > 1)
    lines.add("sums of losses and weights", "all-reduce", batch, 2, wide)
    return lines.merged()


class _Lines:
    def __init__(self, layout: Layout):
        self.sizes = {str(axis): n for axis, n in layout.sizes.items()}
        self.found: dict[tuple[str, str, tuple[str, ...], str], int] = {}

    def add(self, what: str, kind: str, axes: tuple[str, ...], elements: int, dtype: str) -> None:
        axes = tuple(axis for axis in self.sizes if axis in axes and self.sizes[axis] > 1)
        if axes and elements:
            key = (what, kind, axes, dtype)
            self.found[key] = self.found.get(key, 0) + elements

    def merged(self) -> tuple[Expected, ...]:
        def line(what: str, kind: str, axes: tuple[str, ...], dtype: str, elements: int) -> Expected:
            size = math.prod(self.sizes[axis] for axis in axes)
            sent = wire(kind, size) * elements * jnp.dtype(dtype).itemsize
            return Expected(what, kind, axes, elements, dtype, sent)

        return tuple(line(*key, elements) for key, elements in self.found.items())


def _parameter(lines: _Lines, split: Split, config: Any, layout: Layout, table: Table | None) -> None:
    plan = zero.plan(split, layout, config.dtype)
    sizes = {str(axis): n for axis, n in layout.sizes.items()}
    held = math.prod(split.shape) // math.prod(sizes[axis] for axes in split.model for axis in axes)
    wide = str(jnp.promote_types(config.param_dtype, jnp.float32))
    shards = math.prod(sizes[axis] for axis in split.zero_axes)
    gathers, sums = _uses(config, layout, table)
    matrix = plan.per_use
    name = "layers' matrices" if plan.in_layers and matrix else "tables" if matrix else "parameters"
    summed = sums if plan.per_use else 1
    if split.zero_axes and not split.frozen:
        lines.add(f"gradients of {name}", "reduce-scatter", split.zero_axes, int(held * summed), wide)
    if split.zero_axes:
        if not split.stored_sharded and not split.frozen:
            lines.add("updated parameters", "all-gather", split.zero_axes, held, config.param_dtype)
        elif split.stored_sharded and plan.in_layers and plan.per_use:
            lines.add(
                f"{name}, forward and backward",
                "all-gather",
                split.zero_axes,
                int(held * gathers),
                plan.dtype or config.param_dtype,
            )
        elif split.stored_sharded:
            lines.add(f"{name}", "all-gather", split.zero_axes, held, plan.dtype or config.param_dtype)
    if split.frozen:
        return
    now = tuple(axis for axis in plan.summed if axis not in plan.late)
    lines.add(f"gradients of {name}", "all-reduce", now, int(held // shards * summed), wide)
    lines.add(f"gradients of {name}", "all-reduce", plan.late, held // shards, wide)


def _uses(config: Any, layout: Layout, table: Table | None) -> tuple[float, float]:
    """How often a step gathers all that a device holds of what is used layer by layer, and sums its gradients."""
    if table is None:
        return 2 * layout.accumulate, layout.accumulate
    forwards, backwards = (int(flags.sum()) / table.chunks for flags in (table.has_forward, table.has_backward))
    # Made again, layers are gathered for that too; but of a single one nobody asks what it made.
    again = layout.pipeline.recompute and Stages.of(layout, config.num_layers).depth > 1 if layout.pipeline else False
    return forwards + (2 if again else 1) * backwards, backwards


def _passes(layers: int, layout: Layout, table: Table | None) -> tuple[int, int, int]:
    """How many layers, padding included, one device runs forward in a step, again for their backward, and backward."""
    if table is None:
        return layers * layout.accumulate, 0, layers * layout.accumulate
    depth = Stages.of(layout, layers).depth
    forwards, backwards = depth * int(table.has_forward.sum()), depth * int(table.has_backward.sum())
    return forwards, backwards if layout.pipeline and layout.pipeline.recompute else 0, backwards


def _layers(lines: _Lines, config: Any, layout: Layout, tokens: int, forward: int, again: int, backward: int) -> None:
    axes, own, wide = (str(Axis.TENSOR),), config.dtype, str(jnp.promote_types(config.dtype, jnp.float32))
    stream = tokens * config.d_model
    # Recomputed: what attention enters with and leaves with, and what the MLP enters with; its own result is needed
    # only by a norm after it.
    enters, leaves = (2, 1 + config.norm.after) if layout.remat == "full" else (0, 0)
    # Of a stage that is run again, all, as each layer needs the one before; of a stage's only layer, what its backward
    # needs, which under full recomputation is its input alone.
    again_enters, again_leaves = 2, 2
    if layout.pipe > 1 and Stages.of(layout, config.num_layers).depth == 1:
        again_enters, again_leaves = (0, 0) if layout.remat == "full" else (2, 1 + config.norm.after)
    entered = 2 * (forward + backward) + again_enters * again + enters * backward
    left = 2 * (forward + backward) + again_leaves * again + leaves * backward
    if layout.sequence_parallel:
        lines.add("layers", "all-gather", axes, entered * stream, own)
        lines.add("layers", "reduce-scatter", axes, left * stream, wide)
    else:
        lines.add("layers", "all-reduce", axes, left * stream, wide)


def _vocabulary(lines: _Lines, config: Any, layout: Layout, tokens: int) -> None:
    """Embedding, head and cross-entropy, which are split over tensor and, but for "ends", over the stages."""
    tensor = str(Axis.TENSOR)
    pipe = str(Axis.PIPE) if Axis.PIPE in layout.vocabulary_axes else tensor
    own, wide = config.dtype, str(jnp.promote_types(config.dtype, jnp.float32))
    stream = tokens * config.d_model * layout.microbatches
    if layout.sequence_parallel:
        lines.add("embedding", "reduce-scatter", (tensor,), stream, wide)
        if config.lora is None:  # else nothing that embeds has a gradient
            lines.add("embedding", "all-gather", (tensor,), stream, own)
        lines.add("head", "all-gather", (tensor,), stream, own)
        lines.add("head", "reduce-scatter", (tensor,), stream, wide)
        if pipe != tensor:
            lines.add("embedding", "all-reduce", (pipe,), stream // layout.tensor, wide)
    else:
        lines.add("embedding", "all-reduce", (pipe, tensor), stream, wide)
        lines.add("head", "all-reduce", (tensor,), stream, wide)
    if pipe != tensor:
        held = stream // (layout.tensor if layout.sequence_parallel else 1)
        lines.add("gradient of the head's input", "all-reduce", (pipe,), held, wide)
    lines.add("cross-entropy", "all-reduce", (pipe, tensor), 3 * tokens * layout.microbatches, wide)


def _stages(lines: _Lines, config: Any, layout: Layout, splits: Mapping[str, Split], tokens: int, table: Table) -> None:
    axes, own, wide = (str(Axis.PIPE),), config.dtype, str(jnp.promote_types(config.dtype, jnp.float32))
    held = tokens * config.d_model // (layout.tensor if layout.sequence_parallel else 1)
    lines.add(
        "activations to the next stage", "collective-permute", axes, int(table.sends_activation.sum()) * held, own
    )
    lines.add("gradients to the one before", "collective-permute", axes, int(table.sends_gradient.sum()) * held, own)
    if Axis.PIPE not in layout.vocabulary_axes:  # the ends are by themselves, and their gradients summed once
        outer = [split for split in splits.values() if not split.stacked and not split.frozen]
        count = sum(math.prod(s.shape) // math.prod(lines.sizes[a] for axes in s.model for a in axes) for s in outer)
        lines.add("gradients of embedding and head", "all-reduce", axes, count, wide)
        lines.add("sums of losses and weights", "all-reduce", axes, 1, wide)
        return
    lines.add("last stage's output, to all", "all-reduce", axes, table.microbatches * held, wide)
    if config.lora is None:
        lines.add("gradient of the embedding, to all", "all-reduce", axes, table.microbatches * held, wide)
