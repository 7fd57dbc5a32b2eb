"""The weights of a Transformer by their sizes alone, for the textbook: what each device computes with, and where.

This is written from the formulas of the architecture, not read from the model, so that `theory.py` can be set against
what the program does: neither the model nor the code that splits it is asked.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from shardlm.layout import Axis, Layout

Dims = tuple[tuple[int, str], ...]
"""(size, name) of each dim of one layer's weight, or of a table."""

_BRANCH = ("vocab", "head", "kv_head", "head_dim", "mlp", "rank")


@dataclass(frozen=True)
class Weight:
    """One weight, or its like in every layer.

    Attributes:
        held: elements with which a device computes: of its tensor shard, of all layers of its stage, padding included.
        whole: whether every device of the tensor axis holds all of it.
        branch: whether it is used inside attention or feed-forward, where those devices compute different parts.
        in_layers: whether each layer has one.
        matrix: whether it is a matrix or a table, and not a norm's scale or a bias.
        divides: whether one of its dims divides over the ZeRO axes.
        trained: whether it has a gradient.
        stored: the dtype in which it is kept and its gradient returned.
        moved: the dtype in which ZeRO-3 gathers it.
    """

    held: int
    whole: bool
    branch: bool
    in_layers: bool
    matrix: bool
    divides: bool
    trained: bool
    stored: str
    moved: str


def weights(config: Any, layout: Layout) -> Iterator[Weight]:
    """Every weight of a `TransformerConfig` on a layout whose sizes are filled in."""
    c = config
    for dims, kind in _layer(c):
        yield _weight(c, layout, dims, kind, rows_of_stage(c.num_layers, layout))
    tables: list[Dims] = [((c.padded_vocab_size, "vocab"), (c.d_model, "embed"))] * (1 if c.tied else 2)
    if c.max_sequence is not None:
        tables.append(((c.max_sequence, "position"), (c.d_model, "embed")))
    for dims in tables:
        yield _weight(c, layout, dims, "table", None)
    for _ in range(_per_norm(c)):
        yield _weight(c, layout, ((c.d_model, "embed"),), "vector", None)


def depth(num_layers: int, layout: Layout) -> int:
    """Layers that one stage runs for one microbatch of one chunk: the most that any piece of the model has."""
    pipeline = layout.pipeline
    if pipeline is None:
        return num_layers
    return max(pipeline.layers or [-(-num_layers // (layout.pipe * pipeline.chunks))])


def rows_of_stage(num_layers: int, layout: Layout) -> int:
    """Layers that a device holds, padding included."""
    return depth(num_layers, layout) * (layout.pipeline.chunks if layout.pipeline else 1)


def _layer(c: Any) -> Iterator[tuple[Dims, str]]:
    """The weights of one layer: their dims, and what kind each is."""
    embed, width = ((c.d_model, "embed"),), ((c.d_ff, "mlp"),)
    heads, kv_heads = (
        ((n, name), (c.head_dim, "head_dim")) for n, name in ((c.num_heads, "head"), (c.num_kv_heads, "kv_head"))
    )
    attention, mlp = c.attention, c.mlp
    products = [
        ("query", embed, heads, attention.bias),
        ("key", embed, kv_heads, attention.bias),
        ("value", embed, kv_heads, attention.bias),
        ("output", heads, embed, attention.output_bias),
        *([("gate", embed, width, mlp.bias)] if mlp.gated else []),
        ("up", embed, width, mlp.bias),
        ("down", width, embed, mlp.bias),
    ]
    for name, inward, outward, bias in products:
        yield inward + outward, "kernel"
        if bias:
            yield outward, "vector"
        if c.lora_of(name) is not None:
            rank = ((c.lora.rank, "rank"),)
            yield from ((inward + rank, "adapter"), (rank + outward, "adapter"))
    for _ in range((4 if c.norm.after else 2) * _per_norm(c)):
        yield embed, "vector"
    for _ in range(2 if attention.qk_norm else 0):
        yield ((c.head_dim, "head_dim"),), "vector"


def _per_norm(c: Any) -> int:
    return 2 if c.norm.kind == "layer" else 1  # a scale, and LayerNorm's bias


def _weight(c: Any, layout: Layout, dims: Dims, kind: str, rows: int | None) -> Weight:
    parts = [_parts(name, size, layout) for size, name in dims]
    local = [size // n for (size, _), n in zip(dims, parts, strict=True)]
    shards, names = layout.sizes[Axis.FSDP] * layout.sizes[Axis.EXPERT], [name for _, name in dims]
    stored = str(jnp.promote_types(c.param_dtype, jnp.float32)) if kind == "adapter" else c.param_dtype
    return Weight(
        held=math.prod(local) * (1 if rows is None else rows),
        whole=layout.tensor == 1 or all(n == 1 for n in parts),
        branch=any(name in _BRANCH for name in names),
        in_layers=rows is not None,
        matrix=kind != "vector",
        divides=shards > 1 and any(n % shards == 0 for n in local),
        trained=c.lora is None or kind == "adapter",
        stored=stored,
        moved=c.dtype if kind in ("kernel", "adapter") else stored,
    )


def _parts(name: str, size: int, layout: Layout) -> int:
    """Over how many devices tensor and vocabulary parallelism split a dim."""
    if name == "vocab":
        return math.prod(layout.sizes[axis] for axis in layout.vocabulary_axes)
    splits = name in ("head", "mlp") or (name == "kv_head" and size % layout.tensor == 0)
    return layout.tensor if splits else 1
