"""Where a parameter is in the files: the row of a table says it, and arrays go either way by it.

A row's dims are the parameter's own, in the file's order; dims in parentheses are merged to one there, the first one
major. So "(head head_dim) embed" is a matrix of the file whose transpose, its columns split, is the parameter
[embed, head, head_dim].
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

_BLOCK = 128  # elements along each dim

Read = Callable[[tuple[slice, ...]], np.ndarray]
"""Part of a tensor in a file."""


@dataclass(frozen=True)
class Row:
    """One parameter, in all layers.

    Attributes:
        path: of the parameter, "layers/attention/query/kernel".
        name: in the files, with "{layer}" for the number of the layer.
        dims: in the files' order; see above.
        part: (k, n) where the tensor is n parameters side by side along its last dim, of which this is number k.
    """

    path: str
    name: str
    dims: str
    part: tuple[int, int] = (0, 1)

    @property
    def stacked(self) -> bool:
        """Whether there is one for each layer."""
        return "{layer}" in self.name

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """For each dim of the file, the parameter's dims that are merged into it."""
        found = re.findall(r"\(([^)]*)\)|(\S+)", self.dims)
        return tuple(tuple((merged or single).split()) for merged, single in found)


@dataclass(frozen=True)
class Placed:
    """One row in one model, whose sizes are known.

    Attributes:
        row: see there.
        dims: the parameter's, without `layer`.
        sizes: of those.
        real: of those, in the files, which hold no padding of the vocabulary.
    """

    row: Row
    dims: tuple[str, ...]
    sizes: tuple[int, ...]
    real: tuple[int, ...]

    @classmethod
    def of(cls, row: Row, shape: Sequence[int], dims: Sequence[str | None], vocab_size: int) -> "Placed":
        """The row of a parameter [layer, ...] or [...] of this shape, with these dims."""
        skip = int(row.stacked)
        names = tuple(dim or "position" for dim in dims[skip:])
        assert sorted(names) == sorted(dim for group in row.groups for dim in group), (row, dims)
        sizes = tuple(shape[skip:])
        real = tuple(vocab_size if dim == "vocab" else n for dim, n in zip(names, sizes, strict=True))
        return cls(row, names, sizes, real)

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the files."""
        shape = [math.prod(self._real(group)) for group in self.row.groups]
        shape[-1] *= self.row.part[1]
        return tuple(shape)

    def read(self, read: Read, index: Sequence[slice], dtype: Any) -> np.ndarray:
        """Part of the parameter, of one layer, from the file: no more is read than needed, padding is zero.

        Args:
            read: gives a part of the tensor.
            index: which part, in the parameter's own dims.
            dtype: of the result.
        """
        bounds = {
            dim: (part.indices(n)[0], part.indices(n)[1])
            for dim, part, n in zip(self.dims, index, self.sizes, strict=True)
        }
        real = dict(zip(self.dims, self.real, strict=True))
        bounds = {dim: (min(a, real[dim]), min(b, real[dim])) for dim, (a, b) in bounds.items()}
        wanted = tuple(len(range(*part.indices(n))) for part, n in zip(index, self.sizes, strict=True))
        if any(a == b for a, b in bounds.values()):  # padding alone
            return np.zeros(wanted, dtype)
        slices, inner, shape = [], [], []
        for place, group in enumerate(self.row.groups):
            # Of merged dims the first is cut in the file, the others are read whole and cut afterwards.
            whole = math.prod(real[dim] for dim in group[1:])
            start = self.row.part[0] * math.prod(self._real(group)) if place == len(self.row.groups) - 1 else 0
            first, last = bounds[group[0]]
            slices.append(slice(start + first * whole, start + last * whole))
            shape += [last - first, *(real[dim] for dim in group[1:])]
            inner += [slice(None), *(slice(*bounds[dim]) for dim in group[1:])]
        flat = [dim for group in self.row.groups for dim in group]
        order = [flat.index(dim) for dim in self.dims]
        found = read(tuple(slices)).reshape(shape)[tuple(inner)].transpose(order)
        result = np.empty(wanted, dtype) if found.shape == wanted else np.zeros(wanted, dtype)
        _copy(result[tuple(slice(n) for n in found.shape)], found)
        return result

    def write(self, value: np.ndarray) -> np.ndarray:
        """The tensor of the files, or this parameter's part of it, from the parameter of one layer."""
        real = value[tuple(slice(n) for n in self.real)]
        order = [self.dims.index(dim) for group in self.row.groups for dim in group]
        turned = real.transpose(order)
        result = np.empty(turned.shape, turned.dtype)
        _copy(result, turned)
        return result.reshape([math.prod(self._real(group)) for group in self.row.groups])

    def _real(self, group: Sequence[str]) -> list[int]:
        return [self.real[self.dims.index(dim)] for dim in group]


@dataclass(frozen=True)
class Tensor:
    """One tensor of the files: the parameter of one layer, or several side by side along the last dim.

    Attributes:
        name: in the files.
        shape: in the files.
        parts: (path, how it is placed), in order.
        layer: of which layer; None for what is no layer's.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, Placed], ...]
    layer: int | None


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source, block by block: twice as fast where one is the other's transpose, as memory is read whole.

    Values too large for the target's dtype become infinite; whoever narrows looks for them.
    """
    with np.errstate(over="ignore"):
        if source.flags.c_contiguous:
            target[...] = source
            return
        for corner in itertools.product(*(range(0, n, _BLOCK) for n in source.shape)):
            block = tuple(slice(start, start + _BLOCK) for start in corner)
            target[block] = source[block]


def place(rows: Sequence[Row], parameters: Mapping[str, tuple[Any, Any]], vocab_size: int) -> dict[str, Placed]:
    """For each parameter by path, given as (shape, dims), its place in the files.

    Raises:
        KeyError: there is no row for it.
    """
    by_path = {row.path: row for row in rows}
    return {path: Placed.of(by_path[path], shape, dims, vocab_size) for path, (shape, dims) in parameters.items()}


def tensors(placed: Mapping[str, Placed], num_layers: int) -> list[Tensor]:
    """All tensors of a model, layer by layer."""
    ordered = sorted(placed.items(), key=lambda item: item[1].row.part)
    names: dict[str, list[tuple[str, Placed]]] = {}
    for path, where in ordered:
        names.setdefault(where.row.name, []).append((path, where))
    outside = [name for name in names if "{layer}" not in name]
    inside = [name for name in names if "{layer}" in name]
    made = [(name, name, None) for name in outside]
    made += [(name, name.format(layer=layer), layer) for layer in range(num_layers) for name in inside]
    return [Tensor(name, names[key][0][1].file_shape, tuple(names[key]), layer) for key, name, layer in made]
