"""What a step of the manual engine has to send, by the textbook, from the sizes of the model, layout and batch alone.

Nothing here looks at a program, nor asks the code that makes one: the ledger reads the program, and the two must agree.
Where the program decides otherwise than the textbook, their ratio is not 1. Units are elements of whole arrays on one
device; P_i is one parameter as a device holds it for computing (of its tensor shard), M the number of microbatches.

- Gradients are summed over the batch axes: an all-reduce of P_i over data, or with ZeRO a reduce-scatter of P_i over
  fsdp and an all-reduce of the shard over data (arXiv:1910.02054 section 7): once per step, or per microbatch where it
  happens inside backward.
  With `reduce_gradients="layer"` matrices and tables are summed in every microbatch. With "step" their all-reduce is
  once per step, and so is the reduce-scatter under ZeRO-1; ZeRO-2 and 3 keep no whole gradient and reduce-scatter in
  every microbatch. Vectors are always summed once. A parameter of which no dim divides by fsdp is all-reduced instead.
- ZeRO-1 and 2 gather each updated parameter once per step, P_i. ZeRO-3 gathers the layers' matrices in forward and
  again in backward of every microbatch, 2 P_i; tables and vectors once per step.
- What all devices of the tensor axis hold whole and use on parts of their own (key/value heads fewer than devices, the
  norms of queries and keys; under sequence parallelism all that is whole) has its gradient summed over tensor as well.
- Tensor parallelism sums b s h twice per layer forward and twice backward (arXiv:1909.08053 section 3); with sequence
  parallelism each sum is a reduce-scatter and an all-gather (arXiv:2205.05198 section 4.2). The embedding and the head
  add one each way. Cross-entropy over a split vocabulary takes three all-reduces of b s.
- What is frozen is gathered and never summed, nor gathered after an update.
- Full recomputation makes a layer's communication again, except what only its output needs.
- In a pipeline of p stages and v chunks of the model in each, a stage runs its layers in each of F ticks, and runs them
  again and then back in each of B ticks, F = B = v M + p - 1 for every schedule here; where it has no microbatch it
  communicates all the same. A tick in which any stage has something to send sends b s h from each, b the rows of a
  microbatch: in F - 1 ticks the textbook's b s h per boundary, microbatch and direction. Gradients of parameters are
  summed once per step, after the last tick. The vocabulary is split over the stages (arXiv:2411.05288): per microbatch
  the embedding is summed over them and its gradient sent to all, the last stage's output sent to all and its gradient
  summed; three all-reduces of b s are over pipe as over tensor. Of a user's own schedule the textbook does not know F
  and B: where they count, there is no statement.
- Two scalars per step, the sums of losses and of weights.

Sums of bfloat16 travel as float32, gathers as they are.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from shardlm.inspect.ledger import wire
from shardlm.inspect.weights import Weight, depth, rows_of_stage, weights
from shardlm.layout import Axis, Layout


@dataclass(frozen=True)
class Expected:
    """One line of the textbook: what is sent over some axes, and why.

    Attributes:
        what: in words.
        kind: "all-reduce", "all-gather", "reduce-scatter" or "collective-permute".
        axes: the mesh axes that take part, in mesh order.
        elements: of the whole array, all runs in a step together; None where the textbook does not say how many.
        dtype: in which it travels.
        bytes: what one device sends in one step, in a ring; None likewise.
    """

    what: str
    kind: str
    axes: tuple[str, ...]
    elements: int | None
    dtype: str
    bytes: float | None


@dataclass(frozen=True)
class _Turns:
    """How often a device runs all the layers that it holds.

    Attributes:
        forward, backward: so often in a step; of one chunk in a tick, so many ticks over the number of chunks.
        again: how often it runs them forward again for a backward.
    """

    forward: float
    again: float
    backward: float


def expected(config: Any, layout: Layout, batch_size: int, sequence: int) -> tuple[Expected, ...]:
    """The textbook's lines for one training step.

    Args:
        config: a `TransformerConfig`, its vocabulary padded as the layout needs.
        layout: its sizes resolved.
        batch_size, sequence: of the global batch.
    """
    lines, turns, held = _Lines(layout), _turns(layout), list(weights(config, layout))
    for weight in held:
        _parameter(lines, weight, config, layout, turns)
    tokens = batch_size // layout.batch_shards // layout.microbatches * sequence
    if layout.tensor > 1:
        _layers(lines, config, layout, tokens, turns)
    if layout.tensor > 1 or layout.pipe > 1:
        _vocabulary(lines, config, layout, tokens)
    if layout.pipeline is not None:
        _stages(lines, config, layout, held, tokens)
    wide = str(jnp.promote_types(config.dtype, jnp.float32))
    batch = tuple(str(axis) for axis in (Axis.DATA, Axis.FSDP, Axis.EXPERT, Axis.CONTEXT) if layout.sizes[axis] > 1)
    lines.add("sums of losses and weights", "all-reduce", batch, 2, wide)
    return lines.merged()


def ticks(layout: Layout) -> int | None:
    """Ticks of a pipeline with forwards, v M + p - 1, and as many with backwards; None of a user's own schedule.

    1F1B and GPipe: arXiv:2104.04473 section 2.2.1; interleaved: section 2.2.2; ZB-H1, whose gradients of inputs are
    counted as backwards: arXiv:2401.10241 section 2.1.
    """
    pipeline = layout.pipeline
    if pipeline is None or not isinstance(pipeline.schedule, str):
        return None
    return pipeline.chunks * pipeline.microbatches + layout.pipe - 1


def _turns(layout: Layout) -> _Turns | None:
    """None where the textbook does not know them."""
    if layout.pipeline is None:
        return _Turns(layout.accumulate, 0, layout.accumulate)
    count = ticks(layout)
    if count is None:
        return None
    each = count / layout.pipeline.chunks
    return _Turns(each, each if layout.pipeline.recompute else 0, each)


class _Lines:
    def __init__(self, layout: Layout):
        self.sizes = {str(axis): n for axis, n in layout.sizes.items()}
        self.found: dict[tuple[str, str, tuple[str, ...], str], float | None] = {}

    def add(self, what: str, kind: str, axes: tuple[str, ...], elements: float | None, dtype: str) -> None:
        axes = tuple(axis for axis in self.sizes if axis in axes and self.sizes[axis] > 1)
        if axes and elements != 0:
            key = (what, kind, axes, dtype)
            before = self.found.get(key, 0)
            self.found[key] = None if elements is None or before is None else before + elements

    def merged(self) -> tuple[Expected, ...]:
        def line(what: str, kind: str, axes: tuple[str, ...], dtype: str, elements: float | None) -> Expected:
            if elements is None:
                return Expected(what, kind, axes, None, dtype, None)
            size, count = math.prod(self.sizes[axis] for axis in axes), round(elements)
            return Expected(what, kind, axes, count, dtype, wire(kind, size) * count * jnp.dtype(dtype).itemsize)

        return tuple(line(*key, elements) for key, elements in self.found.items())


def _parameter(lines: _Lines, weight: Weight, config: Any, layout: Layout, turns: _Turns | None) -> None:
    shard_axes = tuple(str(a) for a in (Axis.FSDP, Axis.EXPERT)) if weight.divides else ()
    other_axes = tuple(str(a) for a in (Axis.DATA, Axis.FSDP, Axis.EXPERT, Axis.CONTEXT) if str(a) not in shard_axes)
    if weight.whole and (layout.sequence_parallel or weight.branch):
        other_axes += (str(Axis.TENSOR),)
    shards = math.prod(lines.sizes[axis] for axis in shard_axes)
    wide = str(jnp.promote_types(weight.stored, jnp.float32))
    # In a pipeline everything happens once, before the first tick and after the last, unless it is asked for otherwise.
    where_used = weight.matrix and (layout.pipeline is None or (layout.pipeline.gather == "use" and weight.in_layers))
    name = "layers' matrices" if where_used and weight.in_layers else "tables" if where_used else "parameters"
    if layout.zero == 3 and where_used and weight.in_layers:
        again = turns is not None and layout.pipeline is not None and _all_again(config, layout) * turns.again
        often = None if turns is None else turns.forward + turns.backward + again
        lines.add(f"{name}, forward and backward", "all-gather", shard_axes, _times(weight.held, often), weight.moved)
    elif layout.zero == 3:
        lines.add(name, "all-gather", shard_axes, weight.held, weight.moved)
    elif weight.trained:
        lines.add("updated parameters", "all-gather", shard_axes, weight.held, weight.stored)
    if not weight.trained:
        return
    often = None if turns is None else turns.backward
    each_layer = layout.gradient_reduction == "layer"
    scattered = often if where_used and (each_layer or layout.zero > 1) else 1
    lines.add(f"gradients of {name}", "reduce-scatter", shard_axes, _times(weight.held, scattered), wide)
    summed = often if where_used and each_layer else 1
    lines.add(f"gradients of {name}", "all-reduce", other_axes, _times(weight.held // shards, summed), wide)


def _times(elements: int, often: float | None) -> float | None:
    return None if often is None else elements * often


def _all_again(config: Any, layout: Layout) -> bool:
    """Whether a stage that is run again needs all of it; of a single layer nobody asks what it made."""
    return depth(config.num_layers, layout) > 1


def _layers(lines: _Lines, config: Any, layout: Layout, tokens: int, turns: _Turns | None) -> None:
    axes, own, wide = (str(Axis.TENSOR),), config.dtype, str(jnp.promote_types(config.dtype, jnp.float32))
    # Recomputed: what attention enters with and leaves with, and what the MLP enters with; its own result is needed
    # only by a norm after it.
    enters, leaves = (2, 1 + config.norm.after) if layout.remat == "full" else (0, 0)
    # Of a stage that is run again, all, as each layer needs the one before; of a stage's only layer, what its backward
    # needs, which under full recomputation is its input alone.
    again_enters, again_leaves = 2, 2
    if layout.pipe > 1 and not _all_again(config, layout):
        again_enters, again_leaves = (0, 0) if layout.remat == "full" else (2, 1 + config.norm.after)
    entered = left = None
    if turns is not None:
        stream = tokens * config.d_model * rows_of_stage(config.num_layers, layout)
        both = 2 * (turns.forward + turns.backward)
        entered = stream * (both + again_enters * turns.again + enters * turns.backward)
        left = stream * (both + again_leaves * turns.again + leaves * turns.backward)
    if layout.sequence_parallel:
        lines.add("layers", "all-gather", axes, entered, own)
        lines.add("layers", "reduce-scatter", axes, left, wide)
    else:
        lines.add("layers", "all-reduce", axes, left, wide)


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


def _stages(lines: _Lines, config: Any, layout: Layout, held: list[Weight], tokens: int) -> None:
    axes, own, wide = (str(Axis.PIPE),), config.dtype, str(jnp.promote_types(config.dtype, jnp.float32))
    stream = tokens * config.d_model // (layout.tensor if layout.sequence_parallel else 1)
    # In the last tick with a forward only the last stage has one, which sends nothing on; so with backwards.
    count = ticks(layout)
    sends = None if count is None else (count - 1) * stream
    lines.add("activations to the next stage", "collective-permute", axes, sends, own)
    lines.add("gradients to the one before", "collective-permute", axes, sends, own)
    if Axis.PIPE not in layout.vocabulary_axes:  # the ends are by themselves, and their gradients summed once
        outer = sum(weight.held for weight in held if not weight.in_layers and weight.trained)
        lines.add("gradients of embedding and head", "all-reduce", axes, outer, wide)
        lines.add("sums of losses and weights", "all-reduce", axes, 1, wide)
        return
    lines.add("last stage's output, to all", "all-reduce", axes, layout.microbatches * stream, wide)
    if config.lora is None:
        lines.add("gradient of the embedding, to all", "all-reduce", axes, layout.microbatches * stream, wide)
