"""Arrays that two layouts store in other rows: a vocabulary's padding, and the layers of a pipeline's stages.

- A table over the vocabulary ends in rows of padding, as many as its layout needs. `Rows` says how many are real.
- Stacked layers, known by the component `layers` of their path, are [num_layers, ...] in the model's order, unless the
  state's attribute `layer_rows` says otherwise: which layer each row is, -1 for padding, a list for each chunk where
  they have a dim of chunks. It is saved with the state.

Parts of an optimizer's state that belong to a parameter, and have another shape, are the same on every layout.
"""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

Rows = Callable[[str, tuple[int, ...]], int | None]
"""`rows(path of a leaf, its shape in the target)`: how many rows (dim 0) are real and not padding; None: not padded."""

LAYERS = "layers"


class Change(NamedTuple):
    """A leaf that is stored otherwise than the target wants it.

    Attributes:
        load: what is loaded.
        make: from that, what is wanted; to be compiled with the target's sharding.
    """

    load: jax.ShapeDtypeStruct
    make: Callable[[jax.Array], jax.Array]


def changes(
    stored: dict[str, Any], wanted: dict[str, Any], rows: Rows, arranged: tuple[Any, Any]
) -> tuple[dict[str, Change], list[str]]:
    """What to do to the stored leaves, by path, and why it cannot be done.

    Args:
        stored, wanted: shapes and dtypes by path; the latter with shardings.
        rows: of the padded ones.
        arranged: `layer_rows` of what is stored, and of the target.
    """
    found: dict[str, Change] = {}
    problems = []
    for name in sorted(stored.keys() | wanted.keys()):
        if name not in stored or name not in wanted:
            what, array = ("missing, expected", wanted[name]) if name in wanted else ("not expected", stored[name])
            problems.append(f"{name}: {what} {array.dtype} {tuple(array.shape)}")
            continue
        leaf, there = wanted[name], stored[name]
        how = _arrangements(name, there, leaf, arranged, wanted)
        if how is not None:
            before, after = (_rows(x, rows) for x, rows in zip((there, leaf), how, strict=True))
            if before.max() != after.max() or there.shape[before.ndim :] != leaf.shape[after.ndim :]:
                expected, given = (f"{x.shape} of {r.max() + 1} layers" for x, r in ((leaf, after), (there, before)))
                problems.append(f"{name}: shape expected {expected}, found {given}")
            elif not np.array_equal(before, after):
                load = jax.ShapeDtypeStruct(there.shape, leaf.dtype, sharding=_spread(leaf, there.shape, before, after))
                found[name] = Change(load, _rearranged(*(json.dumps(rows.tolist()) for rows in (before, after))))
        elif tuple(leaf.shape) != tuple(there.shape):
            only_rows = len(leaf.shape) == len(there.shape) > 0 and leaf.shape[1:] == there.shape[1:]
            real = rows(name, leaf.shape) if only_rows else None
            if real is not None and real <= min(leaf.shape[0], there.shape[0]):
                found[name] = _padded_anew(leaf, there.shape[0], real)
            else:
                of_which = "" if real is None else f" with {real} real rows"
                problems.append(f"{name}: shape expected {leaf.shape}{of_which}, found {tuple(there.shape)}")
        if jnp.dtype(leaf.dtype) != jnp.dtype(there.dtype):
            problems.append(f"{name}: dtype expected {leaf.dtype}, found {there.dtype}")
    return found, problems


def _padded_anew(leaf: Any, stored_rows: int, real: int) -> Change:
    # Orbax fills rows that are not stored with zeros, and drops surplus ones. A leaf that is to shrink is loaded with
    # all stored rows, rounded up to what its sharding divides, because the digest is that of them all.
    shards = leaf.shape[0] // leaf.sharding.shard_shape(leaf.shape)[0]
    count = -(-max(leaf.shape[0], stored_rows) // shards) * shards
    load = jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)
    return Change(load, _with_rows(real, leaf.shape[0]))


# One function for one change, so that a parameter and the optimizer's moments of it are compiled once.
@functools.lru_cache(maxsize=64)
def _with_rows(real: int, count: int) -> Callable[[jax.Array], jax.Array]:
    def make(x: jax.Array) -> jax.Array:
        kept = lax.broadcasted_iota(jnp.int32, x.shape, 0) < real
        return jnp.where(kept, x, jnp.zeros((), x.dtype))[:count]

    return make


def _arrangements(
    name: str, stored: Any, wanted: Any, arranged: tuple[Any, Any], target: dict[str, Any]
) -> tuple[Any, Any] | None:
    """How each side stores a leaf's layers, None for in order; None where it is not of layers, or in order on both."""
    other = _has_another_shape(name, wanted, target)
    if LAYERS not in name.split("/") or (other and tuple(stored.shape) == tuple(wanted.shape)):
        return None

    def of(x: Any, rows: Any) -> Any:
        return rows if rows is not None and tuple(x.shape[: np.ndim(rows)]) == np.shape(rows) else None

    before, after = of(stored, arranged[0]), None if other else of(wanted, arranged[1])
    return None if before is None and after is None else (before, after)


def _has_another_shape(name: str, leaf: Any, target: dict[str, Any]) -> bool:
    """Whether it belongs to a parameter of the target, by the end of its path, and is not of its shape."""
    parts = name.split("/")
    ends = ("/".join(["params", *parts[start:]]) for start in range(1, len(parts)))
    owner = next((end for end in ends if end in target), None)
    return owner is not None and tuple(target[owner].shape) != tuple(leaf.shape)


def _rows(array: Any, rows: Any) -> np.ndarray:
    """Which layer each row is."""
    return np.arange(array.shape[0]) if rows is None else np.array(rows)


def _spread(leaf: Any, stored: Sequence[int], before: np.ndarray, after: np.ndarray) -> Any:
    """A sharding of the stored shape that splits it over the devices as finely as the target's, where a dim divides."""
    if not isinstance(leaf.sharding, NamedSharding):
        return leaf.sharding
    mesh = leaf.sharding.mesh
    spec = [names if isinstance(names, tuple) else (names,) if names else () for names in leaf.sharding.spec]
    spec += [()] * (len(leaf.shape) - len(spec))
    moving = sum(spec[: after.ndim], ())  # what splits the layers
    spec = [()] * before.ndim + spec[after.ndim :]
    order = [before.ndim - 1, *range(before.ndim - 1), *range(before.ndim, len(spec))]
    for dim in order if moving else ():
        if stored[dim] % np.prod([mesh.shape[name] for name in spec[dim] + moving], dtype=int) == 0:
            spec[dim] += moving
            break
    return NamedSharding(mesh, PartitionSpec(*spec))


@functools.lru_cache(maxsize=64)
def _rearranged(before: str, after: str) -> Callable[[jax.Array], jax.Array]:
    """Rows, given as JSON, in another arrangement."""
    there, here = (np.array(json.loads(rows), np.int32) for rows in (before, after))
    place = np.argsort(np.where(there.ravel() < 0, there.size, there.ravel()), kind="stable")  # of each layer
    rows = here.ravel()

    def make(x: jax.Array) -> jax.Array:
        flat = x.reshape(-1, *x.shape[there.ndim :])[place[np.maximum(rows, 0)]]
        real = (rows >= 0).reshape(-1, *(1,) * (flat.ndim - 1))
        return jnp.where(real, flat, jnp.zeros((), x.dtype)).reshape(*here.shape, *flat.shape[1:])

    return make
