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
from shardlm.layout import Axis, Layout
from shardlm.parallel import zero


@dataclass(frozen=True)
class Expected:
    """One line of the textbook: what is sent over some axes, and why.

    Attributes:
        what: in words.
        kind: "all-reduce", "all-gather" or "reduce-scatter".
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
    lines = _Lines(layout)
    for split in splits.values():
        _parameter(lines, split, config, layout)
    rows = batch_size // layout.batch_shards // layout.accumulate
    if layout.tensor > 1:
        _activations(lines, config, layout, rows * sequence)
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


def _parameter(lines: _Lines, split: Split, config: Any, layout: Layout) -> None:
    plan = zero.plan(split, layout, config.dtype)
    sizes = {str(axis): n for axis, n in layout.sizes.items()}
    held = math.prod(split.shape) // math.prod(sizes[axis] for axes in split.model for axis in axes)
    wide = str(jnp.promote_types(config.param_dtype, jnp.float32))
    microbatches, shards = layout.accumulate, math.prod(sizes[axis] for axis in split.zero_axes)
    matrix = plan.per_use
    name = "layers' matrices" if plan.in_layers and matrix else "tables" if matrix else "parameters"
    summed = microbatches if plan.per_use else 1
    if split.zero_axes and not split.frozen:
        lines.add(f"gradients of {name}", "reduce-scatter", split.zero_axes, held * summed, wide)
    if split.zero_axes:
        if not split.stored_sharded and not split.frozen:
            lines.add("updated parameters", "all-gather", split.zero_axes, held, config.param_dtype)
        elif split.stored_sharded and plan.in_layers and plan.per_use:
            gathers = 2 * microbatches
            lines.add(
                f"{name}, forward and backward",
                "all-gather",
                split.zero_axes,
                held * gathers,
                plan.dtype or config.param_dtype,
            )
        elif split.stored_sharded:
            lines.add(f"{name}", "all-gather", split.zero_axes, held, plan.dtype or config.param_dtype)
    if split.frozen:
        return
    now = tuple(axis for axis in plan.summed if axis not in plan.late)
    lines.add(f"gradients of {name}", "all-reduce", now, held // shards * summed, wide)
    lines.add(f"gradients of {name}", "all-reduce", plan.late, held // shards, wide)


def _activations(lines: _Lines, config: Any, layout: Layout, tokens: int) -> None:
    axes, microbatches = (str(Axis.TENSOR),), layout.accumulate
    own, wide = config.dtype, str(jnp.promote_types(config.dtype, jnp.float32))
    stream = tokens * config.d_model * microbatches
    # Recomputed: what attention enters with and leaves with, and what the MLP enters with; its own result is needed
    # only by a norm after it.
    enters, leaves = (2, 1 + config.norm.after) if layout.remat == "full" else (0, 0)
    if layout.sequence_parallel:
        layers = config.num_layers
        lines.add("layers", "all-gather", axes, layers * (4 + enters) * stream, own)
        lines.add("layers", "reduce-scatter", axes, layers * (4 + leaves) * stream, wide)
        lines.add("embedding", "reduce-scatter", axes, stream, wide)
        if config.lora is None:  # else nothing that embeds has a gradient
            lines.add("embedding", "all-gather", axes, stream, own)
        lines.add("head", "all-gather", axes, stream, own)
        lines.add("head", "reduce-scatter", axes, stream, wide)
    else:
        lines.add("layers", "all-reduce", axes, config.num_layers * (4 + leaves) * stream, wide)
        lines.add("embedding and head", "all-reduce", axes, 2 * stream, wide)
    lines.add("cross-entropy", "all-reduce", axes, 3 * tokens * microbatches, wide)
