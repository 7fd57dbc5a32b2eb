"""Logical dims to mesh axes to PartitionSpecs: one frozen table, derived from the layout and printed on request.

A parameter names its dims by meaning (`("embed", "head", "head_dim")`); the table alone knows which mesh axes split
them. Specs mention only axes of more than one device, so a layout's specs read as what it really splits.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import PartitionSpec

from shardlm.layout import Axis, Layout, LayoutError

PARAMETER_DIMS = ("chunk", "layer", "vocab", "embed", "head", "kv_head", "head_dim", "mlp", "rank", "expert")
STACKED = ("chunk", "layer")
"""The leading dims of what the stacked layers hold; a device uses one layer of it at a time."""
ACTIVATION_DIMS = ("batch", "sequence")

Dims = tuple[str | None, ...]
"""The logical dims of one array; None is a dim that no layout splits."""


@dataclass(frozen=True)
class Split:
    """How one parameter is split over the mesh.

    Attributes:
        path: where it is among the parameters, "layers/attention/query/kernel".
        shape: its global shape.
        dims: its logical dims.
        model: the axes that split each dim whatever the ZeRO level (tensor parallelism).
        zero_axes: the axes of ZeRO that split it further, empty where there are none or no dim divides.
        zero_dim: the dim that `zero_axes` split; None where `zero_axes` is empty.
        stored_sharded: whether the parameter itself is stored split by ZeRO (level 3), and not its gradient and
            optimizer state alone.
        frozen: whether it is used and not trained: it has no gradient and no optimizer state.
    """

    path: str
    shape: tuple[int, ...]
    dims: Dims
    model: tuple[tuple[str, ...], ...]
    zero_axes: tuple[str, ...]
    zero_dim: int | None
    stored_sharded: bool
    frozen: bool = False

    @property
    def stacked(self) -> int:
        """How many of the dims stack layers."""
        return sum(dim in STACKED for dim in self.dims)

    @property
    def whole(self) -> PartitionSpec:
        """The spec without ZeRO: what a device needs of the parameter to compute with it."""
        return _spec(self.model)

    @property
    def sharded(self) -> PartitionSpec:
        """The spec with ZeRO: of the gradient and the optimizer state, and at level 3 of the parameter."""
        axes = list(self.model)
        if self.zero_dim is not None:
            axes[self.zero_dim] = axes[self.zero_dim] + self.zero_axes
        return _spec(axes)

    @property
    def stored(self) -> PartitionSpec:
        """The spec in which the parameter lives between steps."""
        return self.sharded if self.stored_sharded else self.whole


@dataclass(frozen=True)
class DimTable:
    """The rules of one layout: for every logical dim the mesh axes that split it.

    Attributes:
        rules: dim to axes of more than one device; every known dim has an entry.
        sizes: devices along each axis named in the rules.
        zero: the axes of ZeRO, and its level.
    """

    rules: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, int]
    zero_axes: tuple[str, ...]
    zero: int

    @classmethod
    def of(cls, layout: Layout, num_kv_heads: int | None = None) -> "DimTable":
        """The table of `layout`, whose sizes are resolved.

        Key/value heads fewer than the tensor axis has devices are not split: every device holds them all and uses its
        own.
        """
        sizes = {str(axis): n for axis, n in layout.sizes.items() if n > 1}

        def live(*axes: Axis) -> tuple[str, ...]:
            return tuple(str(axis) for axis in axes if axis in sizes)

        tensor = live(Axis.TENSOR)
        whole_kv = num_kv_heads is not None and num_kv_heads % layout.tensor != 0
        rules = {
            "batch": live(Axis.DATA, Axis.FSDP, Axis.EXPERT),
            "sequence": live(Axis.CONTEXT),
            "chunk": (),
            "layer": live(Axis.PIPE),
            "vocab": live(*layout.vocabulary_axes),
            "embed": (),
            "head": tensor,
            "kv_head": () if whole_kv else tensor,
            "head_dim": (),
            "mlp": tensor,
            "rank": (),
            "expert": live(Axis.EXPERT),
        }
        return cls(rules, sizes, live(Axis.FSDP, Axis.EXPERT), layout.zero)

    def split(self, path: str, shape: Sequence[int], dims: Sequence[str | None]) -> Split:
        """How the parameter at `path` is split.

        ZeRO takes the `embed` dim, or, in a parameter without one, the largest other dim that divides.

        Raises:
            LayoutError: an unknown dim, as many dims as the shape has not, an axis used twice, a dim that does not
                divide.
        """
        where = f"parameter {path!r} of shape {tuple(shape)} with dims {tuple(dims)}"
        if len(dims) != len(shape):
            raise LayoutError(f"{where}: {len(shape)} dims of the array, {len(dims)} names")
        unknown = [d for d in dims if d is not None and d not in PARAMETER_DIMS]
        if unknown:
            raise LayoutError(
                f"{where}: unknown dim {unknown[0]!r}; a parameter's dims are {', '.join(PARAMETER_DIMS)}, or None"
            )
        model = tuple(self.rules[d] if d else () for d in dims)
        used = [axis for axes in model for axis in axes]
        for axis in used:
            if used.count(axis) > 1:
                raise LayoutError(
                    f"{where}: the rules split two of its dims over the axis {axis!r}: {self._rules_of(dims)}"
                )
        for n, name, axes in zip(shape, dims, model, strict=True):
            if n % self._count(axes):
                raise LayoutError(f"{where}: {name}={n} does not divide over {self._product(axes)}")
        zero_axes = tuple(axis for axis in self.zero_axes if axis not in used)
        zero_dim = self._zero_dim(shape, dims, model, zero_axes)
        if zero_dim is None:
            zero_axes = ()
        return Split(path, tuple(shape), tuple(dims), model, zero_axes, zero_dim, self.zero == 3)

    def splits(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """A `Split` for each of the parameters: the same nested dict, whose leaves come as (shape, dims).

        Raises:
            LayoutError: as `split`; and a rule for parameters that splits none of them.
        """
        result: dict[str, Any] = {}
        leaves = list(_leaves(parameters, ()))
        for keys, (shape, dims) in leaves:
            node = result
            for key in keys[:-1]:
                node = node.setdefault(key, {})
            node[keys[-1]] = self.split("/".join(keys), shape, dims)
        named = {dim for _, (_, dims) in leaves for dim in dims}
        for axis in dict.fromkeys(a for dim in PARAMETER_DIMS for a in self.rules[dim]):
            dims = [dim for dim in PARAMETER_DIMS if axis in self.rules[dim]]
            if not named.intersection(dims):
                raise LayoutError(
                    f"axis {axis}={self.sizes[axis]} splits the dims {dims}, and no parameter has one of them: "
                    f"use {axis}=1"
                )
        return result

    def activation(self, *dims: str) -> PartitionSpec:
        """The spec of an activation or a batch array with these dims, such as `("batch", "sequence")`."""
        return _spec([self.rules[dim] for dim in dims])

    def __str__(self) -> str:
        rows = [f"{dim:<9} -> {self._product(axes) if axes else '(whole)'}" for dim, axes in self.rules.items()]
        if self.zero_axes:
            rows.append(
                f"ZeRO-{self.zero}    -> {self._product(self.zero_axes)}, on embed or the largest dim that divides"
            )
        return "\n".join(rows)

    def _zero_dim(
        self, shape: Sequence[int], dims: Sequence[str | None], model, zero_axes: tuple[str, ...]
    ) -> int | None:
        count = self._count(zero_axes)
        if count == 1:
            return None
        local = [n // self._count(axes) for n, axes in zip(shape, model, strict=True)]
        fits = [i for i, dim in enumerate(dims) if dim not in STACKED and local[i] % count == 0]
        embed = [i for i in fits if dims[i] == "embed"]
        return embed[0] if embed else max(fits, key=lambda i: local[i], default=None)

    def _count(self, axes: Sequence[str]) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    def _product(self, axes: Sequence[str]) -> str:
        return " x ".join(f"{axis}={self.sizes[axis]}" for axis in axes)

    def _rules_of(self, dims: Sequence[str | None]) -> str:
        return ", ".join(f"{dim} -> {'/'.join(self.rules[dim]) or 'whole'}" for dim in dims if dim)


def _spec(axes: Sequence[tuple[str, ...]]) -> PartitionSpec:
    entries = [None if not names else names[0] if len(names) == 1 else names for names in axes]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _leaves(tree: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*keys, str(key)))
        else:
            yield (*keys, str(key)), value
