"""The largest difference of every leaf of two trees, relative to the leaf's largest element, on every device."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from shardlm.verification.copies import Copies
from shardlm.verification.tolerance import Arithmetic


@dataclass(frozen=True)
class Difference:
    """How far one leaf is from the reference's.

    Attributes:
        quantity: "loss", "gradients", "parameters" or "optimizer state".
        leaf: its path.
        update: updates made before it was compared.
        value: the largest difference on any device over the largest element.
        tolerance: what is allowed.
    """

    quantity: str
    leaf: str
    update: int
    value: float
    tolerance: float

    @property
    def fails(self) -> bool:
        """Whether it is beyond the tolerance; a NaN or infinity where the reference has a number is."""
        return not self.value <= self.tolerance

    @property
    def share(self) -> float:
        """Of the tolerance, how much is used."""
        return self.value / self.tolerance if self.tolerance else np.inf if self.value else 0.0


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b|; equal infinities and NaN in both places count as equal, NaN in one as infinitely far."""
    if not np.size(a):
        return 0.0
    with np.errstate(invalid="ignore"):
        gap = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
    gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, gap)
    return float(np.nan_to_num(gap, nan=np.inf, posinf=np.inf).max())


def size(x: np.ndarray) -> float:
    """The largest finite |x|; 1 where there is nothing but zeros."""
    finite = np.abs(np.asarray(x, np.float64))[np.isfinite(x)]
    return float(finite.max(initial=0.0)) or 1.0


def leaves(tree: Any) -> dict[str, Any]:
    """The leaves of any tree by path, "0/mu/layers/mlp/up/kernel"."""

    def name(key: Any) -> str:
        found = [str(getattr(key, kind)) for kind in ("key", "idx", "name") if hasattr(key, kind)]
        return found[0] if found else str(key)

    return {"/".join(map(name, keys)): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def furthest(expected: np.ndarray, found: Any, mesh: Mesh) -> float:
    """The largest difference of any device's part of `found` from its part of `expected`."""
    return max(distance(expected[part.index], part.data) for part in Copies.of(found, mesh).parts)


def compare(
    quantity: str,
    expected: Any,
    found: Any,
    near: Any,
    mesh: Mesh,
    arithmetic: Arithmetic,
    fixed: float | None,
    parameters: frozenset[str],
    update: int = 0,
) -> Iterator[Difference]:
    """A `Difference` for each leaf.

    A gradient that is zero in exact arithmetic (of a bias on attention's keys, say) consists of rounding noise, and so
    do its moments: these are measured not by themselves but by the largest gradient, or moment of their kind, there is.

    Args:
        quantity, update: see `Difference`.
        expected: the reference's tree, on the host.
        found: the layout's, of global arrays.
        near: the reference's from parameters moved by rounding; see `tolerance`.
        mesh: of the arrays found.
        arithmetic: gives the tolerance.
        fixed: the tolerance asked for, or None.
        parameters: their paths.
    """
    base = arithmetic.step()
    wanted, moved, got = leaves(expected), leaves(near), leaves(found)
    assert list(wanted) == list(got), (list(wanted), list(got))
    families: dict[str, float] = {}
    for path, value in wanted.items():
        family = _family(quantity, path, parameters)
        families[family] = max(families.get(family, 0.0), size(value))
    for path, value in wanted.items():
        scale, largest = size(value), families[_family(quantity, path, parameters)]
        scale = largest if scale <= base * largest else scale
        reaction = arithmetic.reaction * distance(value, moved[path]) / scale
        tolerance = 0.0 if value.dtype.kind in "iub" else max(base, reaction) if fixed is None else fixed
        yield Difference(quantity, path, update, furthest(value, got[path], mesh) / scale, tolerance)


def _family(quantity: str, path: str, parameters: frozenset[str]) -> str:
    """Leaves of one kind: all gradients, all first moments; a parameter is of its own kind."""
    if quantity == "gradients":
        return ""
    names = path.split("/")
    ends = ("/".join(names[start:]) for start in range(1, len(names)))
    end = next((end for end in ends if end in parameters), "") if quantity == "optimizer state" else ""
    return path.removesuffix(end)


def worst(differences: list[Difference]) -> Difference:
    """The one that uses most of its tolerance."""
    return max(differences, key=lambda d: (d.share, d.value))
