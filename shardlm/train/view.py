"""What an optimizer sees of a parameter: the model's rows, in the model's order, whatever the layout stores.

A layout may store a parameter otherwise than the model has it, in its leading dims:

- layers of a pipeline with chunks or uneven stages are [chunks, stages * k, ...] with rows of padding, and in the model
  [num_layers, ...];
- tables over the vocabulary end in rows of padding, and in the model they have `vocab_size` rows.

A `View` changes one into the other. Where mesh axes split the leading dim, another dim takes the split over meanwhile
(an all-to-all of what a device holds), or, where none divides, every device gets all rows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from shardlm import collectives
from shardlm.dims import Split
from shardlm.layout import Axis
from shardlm.parallel.pipeline.stages import Stages

if TYPE_CHECKING:
    from shardlm.models.config import TransformerConfig

Axes = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class View:
    """One parameter as the model has it, and as the layout stores it.

    Attributes:
        split: how it is stored.
        rows: int32, of the shape of the leading dims: which row of the model each stored one is, -1 for padding.
        mesh: whose axes split it.
    """

    split: Split
    rows: np.ndarray
    mesh: Any

    @property
    def padded(self) -> bool:
        """Whether some rows are padding."""
        return bool((self.rows < 0).any())

    @property
    def tag(self) -> tuple[tuple[int, ...], bytes]:
        """The same for two parameters exactly where their rows are stored alike."""
        return self.rows.shape, self.rows.tobytes()

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The global shape in the model."""
        return (int(self.rows.max()) + 1, *self.split.shape[self.rows.ndim :])

    @cached_property
    def axes(self) -> Axes:
        """The mesh axes that split the rows as stored."""
        return _axes(self.split)[self.rows.ndim - 1]

    @cached_property
    def dim(self) -> int | None:
        """The stored dim that takes over the split of the rows, the largest that divides; None where none does."""
        axes, lead = _axes(self.split), self.rows.ndim
        local = [n // self._count(names) for n, names in zip(self.split.shape, axes, strict=True)]
        fits = [d for d in range(lead, len(local)) if self.axes and local[d] % self._count(self.axes) == 0]
        return max(fits, key=lambda d: local[d], default=None)

    @cached_property
    def spec(self) -> PartitionSpec:
        """How it is split in the model's order: as its gradient, but for the rows."""
        axes = list(_axes(self.split))
        if self.dim is not None:
            axes[self.dim] += self.axes
        return PartitionSpec(None, *(names or None for names in axes[self.rows.ndim :]))

    def take(self, x: Any) -> Any:
        """Stored rows, all of them, as the model's."""
        flat = x.reshape(-1, *x.shape[self.rows.ndim :])
        rows = self.rows.reshape(-1)
        if self.rows.ndim == 1 and (rows[: self.shape[0]] >= 0).all():
            return flat[: self.shape[0]]
        return flat[np.flatnonzero(rows >= 0)]

    def put(self, x: Any) -> Any:
        """The inverse of `take`; padding is zero."""
        rows = self.rows.reshape(-1)
        real = (rows >= 0).reshape(-1, *(1,) * (x.ndim - 1))
        padded = jnp.where(real, x[np.maximum(rows, 0)], jnp.zeros((), x.dtype))
        return padded.reshape(*self.rows.shape, *x.shape[1:])

    def clear(self, x: Array) -> Array:
        """A stored array with zeros in its padding."""
        real = (self.rows >= 0).reshape(*self.rows.shape, *(1,) * (x.ndim - self.rows.ndim))
        return jnp.where(real, x, jnp.zeros((), x.dtype)) if self.padded else x

    def take_shard(self, x: Array) -> Array:
        """`take` of what a device holds, within a `shard_map` from `split.sharded` to `spec`."""
        axes, dim = tuple(Axis(name) for name in self.axes), self.rows.ndim - 1
        x = collectives.all_gather(x, axes, dim) if self.dim is None else collectives.exchange(x, axes, dim, self.dim)
        return self.take(x)

    def put_shard(self, x: Array) -> Array:
        """The inverse of `take_shard`."""
        axes, dim, x = tuple(Axis(name) for name in self.axes), self.rows.ndim - 1, self.put(x)
        if self.dim is not None:
            return collectives.exchange(x, axes, self.dim, dim)
        length = x.shape[dim] // collectives.size(axes)
        return jax.lax.dynamic_slice_in_dim(x, collectives.index(axes) * length, length, dim)

    def sent(self, itemsize: int) -> float:
        """Bytes that a device sends to change all rows into the other form; back, only where `dim` is not None."""
        n = self._count(self.axes)
        held = math.prod(self.split.shape) // self._count(sum(_axes(self.split), ()))
        return (n - 1) * held * itemsize / (1 if self.dim is None else n)

    def _count(self, axes: Axes) -> int:
        return math.prod(self.mesh.shape[name] for name in axes)


Views = Mapping[str, View]
"""By path, the parameters that are stored otherwise than the model has them."""


def views(config: "TransformerConfig", splits: Mapping[str, Split], stages: Stages, mesh: Any) -> dict[str, View]:
    """The views of a model's parameters."""
    found = {}
    vocabulary = np.arange(config.padded_vocab_size, dtype=np.int32)
    vocabulary = np.where(vocabulary < config.vocab_size, vocabulary, -1)
    for path, split in splits.items():
        if split.stacked and stages.arranged:
            found[path] = View(split, stages.rows, mesh)
        elif split.dims[:1] == ("vocab",) and config.padded_vocab_size != config.vocab_size:
            found[path] = View(split, vocabulary, mesh)
    return found


def layers(given: Views) -> dict[str, View]:
    """Those of stacked layers."""
    return {path: view for path, view in given.items() if view.split.stacked}


def owner(keys: tuple[Any, ...], paths: Mapping[str, Any]) -> str | None:
    """The parameter to which a leaf of any tree belongs: its path ends in the parameter's."""
    names = [str(getattr(key, "key", "")) for key in keys]
    ends = ("/".join(names[start:]) for start in range(len(names)))
    return next((end for end in ends if end in paths), None)


def as_model(tree: Any, given: Views, manual: bool) -> Any:
    """Stored arrays as the model has them: parameters, gradients, and what in an optimizer's state is like them.

    Args:
        tree: of global arrays, traced under `jax.jit`.
        given: the views; what is like no parameter of theirs stays as it is.
        manual: whether to write out what is sent, or to leave that to the compiler.
    """
    return _change(tree, given, manual, back=False)


def as_stored(tree: Any, given: Views, manual: bool) -> Any:
    """The inverse of `as_model`."""
    return _change(tree, given, manual, back=True)


def cleared(tree: Any, given: Views) -> Any:
    """Stored arrays with zeros in their padding."""

    def clear(keys: tuple[Any, ...], x: Any) -> Any:
        path = owner(keys, given)
        return given[path].clear(x) if path is not None and x.shape == given[path].split.shape else x

    return jax.tree_util.tree_map_with_path(clear, tree)


def _change(tree: Any, given: Views, manual: bool, back: bool) -> Any:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    result, moving = [x for _, x in leaves], {}
    for i, (keys, x) in enumerate(leaves):
        path = owner(keys, given)
        if path is None:
            continue
        view = given[path]
        if x.shape != (view.shape if back else view.split.shape):
            continue
        if view.axes and manual:
            moving[i] = view
            continue
        x = view.put(x) if back else view.take(x)
        sharding = NamedSharding(view.mesh, view.split.sharded if back else view.spec)
        result[i] = jax.lax.with_sharding_constraint(x, sharding) if view.mesh.size > 1 else x
    if moving:
        stored, model = ({i: f(v) for i, v in moving.items()} for f in (lambda v: v.split.sharded, lambda v: v.spec))
        change = jax.shard_map(
            lambda xs: {i: moving[i].put_shard(x) if back else moving[i].take_shard(x) for i, x in xs.items()},
            mesh=next(iter(moving.values())).mesh,
            in_specs=(model if back else stored,),
            out_specs=stored if back else model,
            check_vma=False,  # the type system takes a gathered array for one that varies
        )
        for i, x in change({i: result[i] for i in moving}).items():
            result[i] = x
    return jax.tree.unflatten(treedef, result)


def _axes(split: Split) -> tuple[Axes, ...]:
    """The mesh axes that split each dim of its gradient."""
    spec = tuple(split.sharded) + (None,) * (len(split.shape) - len(split.sharded))
    return tuple(() if names is None else (names,) if isinstance(names, str) else tuple(names) for names in spec)
