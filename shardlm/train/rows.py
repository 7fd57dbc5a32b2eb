"""Batches of a module of one's own: any pytree of arrays whose dim 0 is the batch."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from shardlm._arguments import is_masked
from shardlm.layout import Layout
from shardlm.train.batch import global_rows as global_count

__all__ = ["count", "global_count", "is_placed", "place", "problems", "shapes"]


def count(batch: Any, *, may_be_abstract: bool = False) -> int:
    """Check the batch's leaves, which costs nothing, and return the number of rows.

    Raises:
        TypeError, ValueError: one error that lists the leaves that are no arrays of numbers, have no dim, or have other
            numbers of rows than the first.
    """
    types = (np.ndarray, Array, *([jax.ShapeDtypeStruct] if may_be_abstract else []))
    leaves = list(_named(batch))
    if not leaves:
        raise ValueError("batch: it holds no arrays; it is a pytree of arrays [batch, ...]")
    wrong = [f"{path} is a {type(leaf).__name__}" for path, leaf in leaves if not isinstance(leaf, types)]
    wrong += [f"{path} is a masked array, whose mask is not read" for path, leaf in leaves if is_masked(leaf)]
    wrong += [
        f"{path} has dtype {leaf.dtype}"
        for path, leaf in leaves
        if isinstance(leaf, types) and not _is_number(leaf.dtype)
    ]
    if wrong:
        raise TypeError(f"batch: {'; '.join(wrong)}; every leaf is an array of numbers, of NumPy or JAX")
    scalars = [f"{path} is a scalar" for path, leaf in leaves if not leaf.shape]
    if scalars:
        raise ValueError(f"batch: {'; '.join(scalars)}; every leaf is [batch, ...], one row for each example")
    if len({leaf.shape[0] for _, leaf in leaves}) > 1:
        sizes = ", ".join(f"{path} {leaf.shape}" for path, leaf in leaves)
        raise ValueError(f"batch: the leaves differ in dim 0, the batch: {sizes}")
    return leaves[0][1].shape[0]


def problems(batch_size: int, layout: Layout) -> list[str]:
    """What is wrong with so many rows on `layout`."""
    parts = layout.batch_shards * layout.accumulate
    if batch_size > 0 and batch_size % parts == 0:
        return []
    sizes = [f"{axis}={getattr(layout, axis)}" for axis in layout.batch_axes] + [f"accumulate={layout.accumulate}"]
    near = [n for n in (batch_size // parts * parts, (batch_size // parts + 1) * parts) if n > 0]
    return [
        f"{batch_size} rows are not a positive multiple of {' x '.join(sizes)} = {parts}: they would leave "
        f"{batch_size / parts:.3g} rows per device and microbatch; use {' or '.join(map(str, near))}"
    ]


def is_placed(batch: Any, sharding: NamedSharding) -> bool:
    """Whether every leaf is on the devices, split as a batch is."""
    return all(isinstance(x, Array) and x.sharding == sharding for x in jax.tree.leaves(batch))


def place(batch: Any, sharding: NamedSharding) -> Any:
    """The batch as global arrays; each of several processes gives the rows that its devices hold.

    NumPy arrays are copied first: JAX may read the host's memory after it was told to move it.
    """
    host = jax.tree.unflatten(jax.tree.structure(batch), [_to_host(path, leaf) for path, leaf in _named(batch)])
    if jax.process_count() == 1:
        return jax.device_put(host, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), host)


def shapes(batch: Any, sharding: NamedSharding, rows: int) -> Any:
    """The batch as `jax.ShapeDtypeStruct`s of `rows` rows."""

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype), sharding=sharding)

    return jax.tree.map(shape, batch)


def _to_host(path: str, leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if jnp.issubdtype(dtype, jnp.integer) and array.dtype != dtype and array.size:
        info = jnp.iinfo(dtype)
        if array.min() < info.min or array.max() > info.max:
            raise ValueError(f"batch: {path} holds numbers beyond {dtype}, which is what JAX computes in")
    return array.astype(dtype)


def _named(batch: Any) -> Iterator[tuple[str, Any]]:
    for keys, leaf in jax.tree_util.tree_leaves_with_path(batch):
        yield jax.tree_util.keystr(keys, simple=True, separator="/") or "the batch", leaf


def _is_number(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)
