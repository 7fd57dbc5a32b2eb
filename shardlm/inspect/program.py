"""A training step to look at: traced, never run; of a model of ours, of a user's module, or any function."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax

from shardlm.dims import Split
from shardlm.layout import Layout

Abstract = Any
"""A tree of `jax.ShapeDtypeStruct`s with shardings."""


@dataclass(frozen=True)
class Program:
    """One step, from the outside.

    Attributes:
        step: a function (state, batch) -> (state, metrics), not yet compiled.
        state: with attributes or keys `params` and `opt_state`, as abstract arrays with shardings.
        batch: as abstract arrays with shardings.
        mesh: of the shardings: a `jax.sharding.Mesh`, or an `AbstractMesh` where no devices exist.
        layout: what the step was made from.
        dtype: of the computation.
        config: a `TransformerConfig`; None for a user's module.
        splits: how each parameter is split, by path.
        manual: whether all communication is written in the program, and none left to the compiler.
        batch_size, sequence: of the global batch; sequence is None where the batch is not [batch, sequence].
        attended: which part of each query's keys a fused attention kernel computes, causality or a window hiding the
            others; 1 where all are computed, and hidden afterwards.
        update_copies: bytes of a device that an update takes beside state and gradients, for an optimizer that is given
            other arrays than those that are stored.
        notes: what a reader must know, such as what stands in for what.
        compiled: a function that compiles the step; None where its devices do not exist.
    """

    step: Callable[..., Any]
    state: Abstract
    batch: Abstract
    mesh: Any
    layout: Layout
    dtype: str
    config: Any = None
    splits: Mapping[str, Split] = field(default_factory=dict)
    manual: bool = False
    batch_size: int = 0
    sequence: int | None = None
    attended: float = 1.0
    update_copies: int = 0
    notes: tuple[str, ...] = ()
    compiled: Callable[[], Any] | None = None

    @cached_property
    def jaxpr(self) -> Any:
        """The traced step."""
        return jax.make_jaxpr(self.step)(self.state, self.batch)

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each mesh axis, in mesh order."""
        return dict(self.mesh.shape)

    @property
    def num_devices(self) -> int:
        """Number of devices in the mesh."""
        return math.prod(self.sizes.values())

    @property
    def tokens(self) -> int | None:
        """Tokens of the global batch; None where it is not of tokens."""
        return None if self.sequence is None else self.batch_size * self.sequence


def bytes_per_device(tree: Abstract) -> int:
    """What one device holds of a tree of arrays or abstract arrays, by their shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
