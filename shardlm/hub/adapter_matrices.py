"""Adapters by matrix of the files and by projection of ours: GPT-2 keeps query, key and value in one matrix.

    W + s B A,  A[rank, in],  B[out, rank]      of the files
    W + s A B,  A[layer, in, rank],  B[layer, rank, out]      of ours, a dim of more than one written as one here

Ours have one rank and one s for all projections and layers. One of smaller rank, or none, has zeros in the rest of A
and of B: the gradient of each is a product with the other, so they stay zero. One of another s has it in B.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from shardlm.hub.match import expected
from shardlm.hub.registry import family_of_config
from shardlm.hub.table import Placed
from shardlm.models.config import TARGETS, TransformerConfig


@dataclass(frozen=True)
class Matrix:
    """One module of the files that can be adapted, in all layers.

    Attributes:
        name: of the module, with "{layer}".
        kernels: our kernels that it holds side by side, by path, in its order.
        width: inputs.
        outputs: of each kernel.
        turned: whether the files hold the weight as [in, out].
    """

    name: str
    kernels: Mapping[str, Placed]
    width: int
    outputs: tuple[int, ...]
    turned: bool

    @property
    def parts(self) -> Iterator[tuple[str, slice]]:
        """The path of each of ours without "/kernel", and its rows of B."""
        start = 0
        for path, out in zip(self.kernels, self.outputs, strict=True):
            yield path.removesuffix("/kernel"), slice(start, start + out)
            start += out


class Piece(NamedTuple):
    """The adapter of one of our projections in one layer: `path` and `layer` say which; W + scale B A."""

    path: str
    layer: int
    a: np.ndarray
    b: np.ndarray
    scale: float


def matrices_of(config: TransformerConfig) -> list[Matrix]:
    """All modules that can be adapted, in the order of our targets."""
    plain = replace(config, lora=None)
    placed, _ = expected(plain, family_of_config(plain))
    modules: dict[str, list[str]] = {}
    for path in (f"layers/{kind}/{target}/kernel" for target in TARGETS for kind in ("attention", "mlp")):
        if path in placed:
            modules.setdefault(placed[path].row.name.removesuffix(".weight"), []).append(path)
    found = []
    for name, paths in modules.items():
        kernels = {path: placed[path] for path in sorted(paths, key=lambda path: placed[path].row.part)}
        sizes = [(math.prod(p.sizes[: _inward(p)]), math.prod(p.sizes[_inward(p) :])) for p in kernels.values()]
        first = next(iter(kernels.values()))
        turned = first.row.groups[0][0] == first.dims[0]
        found.append(Matrix(name, kernels, sizes[0][0], tuple(out for _, out in sizes), turned))
    return found


def other_modules(config: TransformerConfig) -> list[str]:
    """The modules with weights that cannot be adapted: the embedding, the head, norms."""
    rows = family_of_config(replace(config, lora=None)).rows
    names = dict.fromkeys(row.name.rpartition(".")[0] for row in rows if not row.path.endswith(("kernel", "bias")))
    layers = range(config.num_layers)
    return [name.format(layer=layer) for name in names for layer in (layers if "{layer}" in name else (0,))]


def split(matrix: Matrix, layer: int, a: np.ndarray, b: np.ndarray, scale: float) -> Iterator[Piece]:
    """The adapters of our projections that one matrix of the files holds.

    What `join` puts on the diagonal comes off it again: a projection leaves out the rows of A that only others use.
    """
    used = b.any(axis=0)
    for path, rows in matrix.parts:
        kept = b[rows].any(axis=0) | ~used
        yield Piece(path, layer, a[kept], b[rows][:, kept], scale)


def join(matrix: Matrix, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """A and B of one matrix in one layer, of the projections in it: one A where theirs are equal, else all of them.

    Rows that are zero in A and in B are left out.
    """
    rows = dict(matrix.parts)
    shared = all(np.array_equal(piece.a, pieces[0].a) for piece in pieces)
    a = pieces[0].a if shared else np.concatenate([piece.a for piece in pieces])
    b = np.zeros((sum(matrix.outputs), len(a)), a.dtype)
    start = 0
    for piece in pieces:
        b[rows[piece.path], start : start + len(piece.a)] = piece.b
        start += 0 if shared else len(piece.a)
    used = a.any(axis=1) | b.any(axis=0)
    return np.ascontiguousarray(a[used]), np.ascontiguousarray(b[:, used])


def stacked(
    config: TransformerConfig, matrices: Sequence[Matrix], pieces: Sequence[Piece], rank: int, scale: float
) -> dict[str, np.ndarray]:
    """Our parameters by path, of one rank and scale in all layers; `config` is the model's."""
    flat: dict[str, np.ndarray] = {}
    kernels = {path.removesuffix("/kernel"): where for m in matrices for path, where in m.kernels.items()}
    for piece in pieces:
        where = kernels[piece.path]
        inward = _inward(where)
        shapes = {"lora_a": (*where.sizes[:inward], rank), "lora_b": (rank, *where.sizes[inward:])}
        ours = {
            name: flat.setdefault(f"{piece.path}/{name}", np.zeros((config.num_layers, *shape), piece.a.dtype))
            for name, shape in shapes.items()
        }
        ratio, own = piece.scale / scale, len(piece.a)
        b = piece.b if math.isclose(ratio, 1.0, rel_tol=1e-12) else piece.b * piece.b.dtype.type(ratio)
        ours["lora_a"][piece.layer].reshape(-1, rank)[:, :own] = piece.a.T
        ours["lora_b"][piece.layer].reshape(rank, -1)[:own] = b.T
    return flat


def unstacked(
    config: TransformerConfig, matrix: Matrix, flat: Mapping[str, Any], problems: list[str]
) -> Iterator[list[Piece]]:
    """For each layer the adapters in `flat` of the matrix's projections; notes `problems`, and then gives nothing."""
    assert config.lora is not None
    found: list[tuple[str, np.ndarray, np.ndarray]] = []
    before = len(problems)
    for (path, _), (kernel, where) in zip(matrix.parts, matrix.kernels.items(), strict=True):
        if kernel.split("/")[-2] not in config.lora.targets:
            continue
        rank, inward = config.lora.rank, _inward(where)
        shapes = {"lora_a": (*where.sizes[:inward], rank), "lora_b": (rank, *where.sizes[inward:])}
        values = []
        for name, shape in shapes.items():
            value, shape = flat.get(f"{path}/{name}"), (config.num_layers, *shape)
            if value is None:
                problems.append(f"{path}/{name} is missing")
            elif tuple(value.shape) != shape:
                problems.append(f"{path}/{name} is {list(value.shape)}, not {list(shape)}")
            elif not np.isfinite(host := np.asarray(value)).all():
                problems.append(f"{path}/{name} has {int((~np.isfinite(host)).sum())} values that are not finite")
            else:
                values.append(host.reshape(config.num_layers, *((-1, rank) if name == "lora_a" else (rank, -1))))
        if len(values) == 2:
            found.append((path, *values))
    if found and len(problems) == before:
        for layer in range(config.num_layers):
            yield [Piece(path, layer, a[layer].T, b[layer].T, config.lora.scale) for path, a, b in found]


def _inward(where: Placed) -> int:
    """How many of a kernel's dims are its input's; the others are its output's."""
    return 1 if where.dims[0] in ("embed", "mlp") else 2
