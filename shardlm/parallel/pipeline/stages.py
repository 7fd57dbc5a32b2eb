"""Which layers each stage holds, and in which rows of the stacked parameters they are stored.

The model is cut into v p pieces of consecutive layers, and the pieces are dealt out to the stages in turn: chunk c of
stage s is piece c p + s. A device holds v chunks of k layers, k being the most that any piece has, so a stacked
parameter is stored as `[chunks, stages * k, ...]`, its second dim split over `pipe`, or, of one chunk, as
`[stages * k, ...]`. Pieces of fewer layers end in rows of padding, zeros that compute the identity. Read row by row,
layers stay in the model's order; with neither padding nor a second chunk this is `[num_layers, ...]`, as anywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardlm.layout import Layout


@dataclass(frozen=True)
class Stages:
    """A model's layers over the stages of a pipeline.

    Attributes:
        counts: layers of each piece, in the model's order.
        stages: number of stages.
    """

    counts: tuple[int, ...]
    stages: int

    @classmethod
    def of(cls, layout: Layout, num_layers: int) -> "Stages":
        """The stages of a layout that `check` has passed; without a pipeline there is one."""
        pipeline = layout.pipeline
        if pipeline is None:
            return cls((num_layers,), 1)
        return cls(pipeline.counts(num_layers, layout.pipe), layout.pipe)

    @property
    def chunks(self) -> int:
        """Pieces of each stage."""
        return len(self.counts) // self.stages

    @property
    def depth(self) -> int:
        """Rows of each piece, the most layers that any has."""
        return max(self.counts)

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the leading dims of a stored parameter."""
        return ("layer",) if self.chunks == 1 else ("chunk", "layer")

    @property
    def padding(self) -> int:
        """Number of rows that hold no layer."""
        return self.rows.size - sum(self.counts)

    @cached_property
    def rows(self) -> np.ndarray:
        """int32, of the shape of the leading dims: which layer each row is, -1 for padding."""
        pieces = np.full((len(self.counts), self.depth), -1, np.int32)
        pieces[np.arange(self.depth) < np.array(self.counts)[:, None]] = np.arange(sum(self.counts))
        return pieces.reshape(-1) if self.chunks == 1 else pieces.reshape(self.chunks, -1)

    @property
    def arranged(self) -> bool:
        """Whether parameters are stored otherwise than as `[num_layers, ...]`."""
        return self.chunks > 1 or self.padding > 0

    @property
    def places(self) -> np.ndarray:
        """int[num_layers]: where each layer is among the rows, read one after another."""
        flat = self.rows.reshape(-1)
        return np.flatnonzero(flat >= 0)

    def in_order(self, x: Any) -> Any:
        """A stored array, of JAX or NumPy, as [num_layers, ...] in the model's order, without padding."""
        return x.reshape(-1, *x.shape[self.rows.ndim :])[self.places]

    def arrange(self, x: Any) -> Any:
        """The inverse of `in_order`; padding is zero."""
        rows = self.rows.reshape(-1)
        numpy = jnp if isinstance(x, jax.Array) else np
        real = (rows >= 0).reshape(-1, *(1,) * (x.ndim - 1))
        padded = numpy.where(real, x[np.maximum(rows, 0)], numpy.zeros((), x.dtype))
        return padded.reshape(*self.rows.shape, *x.shape[1:])

    def of_stage(self) -> np.ndarray:
        """int32[stages, chunks, depth]: the rows by stage, as its device holds them."""
        return self.rows.reshape(self.chunks, self.stages, self.depth).swapaxes(0, 1)


def layers_by_cost(config: Any, stages: int, sequence: int, chunks: int = 1) -> tuple[int, ...]:
    """A list for `Pipeline(layers=...)`: the stage with the most FLOPs has as few as can be.

    Counted are each layer's matrix products and, as far as its sliding window goes, its attention; embedding and head
    are not, as all stages compute them together. Stages wait for the slowest and are padded to the longest, so this
    pays where layers differ, as with windows; equal layers are spread evenly.

    Args:
        config: a `TransformerConfig`.
        stages, chunks: the layout's.
        sequence: tokens per row.

    Raises:
        ValueError: a number is not positive.
    """
    for name, value in (("stages", stages), ("sequence", sequence), ("chunks", chunks)):
        if value < 1:
            raise ValueError(f"layers_by_cost: {name}={value}; it is at least 1")
    c = config
    heads = c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    products = 2 * c.d_model * (heads + c.d_ff * (3 if c.mlp.gated else 2))
    seen = [sequence if window is None else min(window, sequence) for window in c.windows]
    # A query sees its window, or half the sequence on average.
    visible = [n - n * (n - 1) / (2 * sequence) for n in seen]
    return balance([products + 4 * c.num_heads * c.head_dim * n for n in visible], stages * chunks)


def balance(costs: Sequence[float], pieces: int, first: float = 0.0, last: float = 0.0) -> tuple[int, ...]:
    """Layers of each piece such that the costliest piece is as cheap as can be.

    Args:
        costs: of each layer, in the model's order, in any unit.
        pieces: stages times chunks.
        first, last: what the first and the last piece have to do besides.

    Example:
        >>> balance([1, 1, 1, 1, 4, 4], pieces=3)
        (4, 1, 1)
    """
    total = np.concatenate([[0.0], np.cumsum(np.asarray(costs, float))])
    extra = np.zeros(pieces)
    extra[0] += first
    extra[-1] += last
    ends = np.arange(len(total))
    # best[n]: the least costliest piece with the first n layers in the pieces so far; cut[piece][n]: where it starts.
    best, cuts = total + extra[0], []
    for piece in range(1, pieces):
        cost = np.maximum(best[None, :], total[:, None] - total[None, :] + extra[piece])
        cost = np.where(ends[None, :] <= ends[:, None], cost, np.inf)
        cuts.append(cost.argmin(axis=1))
        best = cost.min(axis=1)
    counts, end = [], len(costs)
    for cut in reversed(cuts):
        counts.append(end - int(cut[end]))
        end = int(cut[end])
    return (end, *reversed(counts))
