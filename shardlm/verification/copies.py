"""A global array as its devices hold it: every copy of every part, on the host, with the coordinates of its device."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Part:
    """What one device holds: `data`, which is `index` of the global array; `at` is its coordinate on each axis."""

    at: dict[str, int]
    index: Index
    data: np.ndarray


@dataclass(frozen=True)
class Copies:
    """All parts of one global array.

    Attributes:
        shape: of the global array.
        parts: one for each device.
        axes: for each dim the mesh axes that split it.
        sizes: devices along each axis of more than one.
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    axes: tuple[tuple[str, ...], ...]
    sizes: dict[str, int]

    @classmethod
    def of(cls, array: jax.Array, mesh: Mesh) -> "Copies":
        """Fetch every device's part of `array`."""
        sizes = {name: size for name, size in mesh.shape.items() if size > 1}
        places = coordinates(mesh)
        spec = tuple(getattr(array.sharding, "spec", ()))
        spec += (None,) * (array.ndim - len(spec))
        axes = tuple(() if names is None else (names,) if isinstance(names, str) else tuple(names) for names in spec)
        parts = tuple(
            Part(places[shard.device.id], _plain(shard.index, array.shape), np.asarray(shard.data))
            for shard in array.addressable_shards
        )
        return cls(tuple(array.shape), parts, axes, sizes)

    def whole(self) -> np.ndarray:
        """The global array, from the first copy of each part."""
        result = np.empty(self.shape, self.parts[0].data.dtype)
        for part in reversed(self.parts):
            result[part.index] = part.data
        return result

    def minus(self, other: "Copies") -> "Copies":
        """The difference, copy by copy."""
        pairs = zip(self.parts, other.parts, strict=True)
        return replace(self, parts=tuple(replace(a, data=a.data - b.data) for a, b in pairs))

    def layer(self, index: int) -> "Copies":
        """One layer of an array whose leading dim is the layers, which nothing splits."""
        parts = tuple(replace(part, index=part.index[1:], data=part.data[index]) for part in self.parts)
        return Copies(self.shape[1:], parts, self.axes[1:], self.sizes)

    @property
    def copied(self) -> tuple[str, ...]:
        """The axes along which every device should hold the same."""
        split = {axis for axes in self.axes for axis in axes}
        return tuple(axis for axis in self.sizes if axis not in split)

    def groups(self, axes: tuple[str, ...]) -> Iterator[list[Part]]:
        """The parts that differ in nothing but their coordinates along `axes`, which do not split the array."""
        found: dict[Any, list[Part]] = {}
        for part in self.parts:
            key = tuple((axis, at) for axis, at in part.at.items() if axis not in axes)
            found.setdefault(key, []).append(part)
        yield from found.values()

    def disagree(self, closeness: Callable[[np.ndarray, np.ndarray], bool]) -> tuple[str, ...]:
        """The axes along which copies that should be the same are not."""
        return tuple(
            axis
            for axis in self.copied
            if any(not closeness(a.data, b.data) for group in self.groups((axis,)) for a, b in combinations(group, 2))
        )


def coordinates(mesh: Mesh) -> dict[int, dict[str, int]]:
    """For each device's id, its coordinate along every axis of more than one device."""
    return {
        device.id: {name: int(i) for name, i in zip(mesh.axis_names, place, strict=True) if mesh.shape[name] > 1}
        for place, device in np.ndenumerate(mesh.devices)
    }


def _plain(index: Any, shape: tuple[int, ...]) -> Index:
    return tuple(slice(*s.indices(n)) for s, n in zip(index, shape, strict=True))
