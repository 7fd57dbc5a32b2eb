"""The vocabulary of communication: every collective of the library, each with its transpose.

Inside a fully manual `jax.shard_map` these functions communicate. Everywhere else (plain mode, auto mode) and on an
axis of size 1 they are the identity, so a layer that calls them reads as, and runs as, single-device code.

Notation: `A[I_X, J]` is an array whose dim I is sharded over axis X; `A{U_X}` holds unreduced partial sums over X.
In `shard_map` terms an array either *varies* over an axis (each device may hold something else) or does not.

| function         | forward                    | transpose        | wire bytes per device, n devices, ring |
|------------------|----------------------------|------------------|----------------------------------------|
| `vary`           | A -> A, now varying        | `all_reduce`     | 0 (transpose 2(n-1)/n of A)             |
| `all_reduce`     | A{U_X} -> A                | `vary`           | 2(n-1)/n of A                           |
| `all_gather`     | A[I_X] -> A[I]             | `reduce_scatter` | (n-1)/n of the gathered A               |
| `reduce_scatter` | A[I]{U_X} -> A[I_X]        | `all_gather`     | (n-1)/n of the unscattered A            |
| `split`          | A[I] -> A[I_X]             | pad, all_reduce  | 0                                       |
| `exchange`       | A[I_X, J] -> A[I, J_X]     | exchange back    | (n-1)/n of the shard                    |
| `shift`          | A of device i -> i + step  | shift back       | A                                       |
| `all_reduce_max` | max over X                 | none             | 2(n-1)/n of A                           |

Sums of bfloat16 and float16 are taken in float32 and rounded once, which is better arithmetic and also what XLA's CPU
backend needs (its bfloat16 all-reduce over a manual axis aborts); gathers move the array's own dtype.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from shardlm.layout import Axis

Axes = Axis | Sequence[Axis]


def active(axes: Axes) -> tuple[str, ...]:
    """The names among `axes` that are manual here and have more than one device; empty in plain and auto mode."""
    mesh = jax.sharding.get_abstract_mesh()
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    return tuple(str(Axis(name)) for name in names if name in mesh.manual_axes and mesh.shape[name] > 1)


def size(axes: Axes) -> int:
    """Number of devices along `axes` where they are manual, else 1."""
    mesh = jax.sharding.get_abstract_mesh()
    product = 1
    for name in active(axes):
        product *= mesh.shape[name]
    return product


def index(axes: Axes) -> Array | int:
    """This device's coordinate along `axes`, the first one major (int32 scalar); 0 where none is manual."""
    names = active(axes)
    return lax.axis_index(names) if names else 0


def varying(x: Array) -> frozenset[str]:
    """The mesh axes over which `x` may differ between devices; empty outside `shard_map`."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary(x: Array, axes: Axes) -> Array:
    """Mark `x` as varying over `axes`: no communication now, one all-reduce of its gradient in backward.

    Axes over which `x` varies already are left alone. This is Megatron's f operator (arXiv:1909.08053, section 3).
    """
    return x if _covers(x, axes) else mark_varying(_widen(x), axes).astype(x.dtype)


def mark_varying(x: Array, axes: Axes) -> Array:
    """`vary` for values whose gradient does not flow back through here, or is summed in x's own dtype."""
    names = tuple(name for name in active(axes) if name not in varying(x))
    return lax.pcast(x, names, to="varying") if names else x


def all_reduce(x: Array, axes: Axes) -> Array:
    """Sum over `axes`: A{U_X} -> A. Megatron's g operator; the transpose communicates nothing."""
    names = active(axes)
    if not names:
        return x
    return lax.psum(_widen(vary(x, axes)), names).astype(x.dtype)


def all_reduce_max(x: Array, axes: Axes) -> Array:
    """Elementwise maximum over `axes`. Not differentiated: callers pass it values without a gradient."""
    names = active(axes)
    return lax.pmax(vary(x, axes), names) if names else x


def all_gather(x: Array, axes: Axes, dim: int) -> Array:
    """Concatenate the shards of dim `dim`: A[I_X] -> A[I], in the array's own dtype."""
    names = active(axes)
    return _all_gather(names, dim, vary(x, axes)) if names else x


def reduce_scatter(x: Array, axes: Axes, dim: int) -> Array:
    """Sum over `axes`, each device keeping its shard of dim `dim`: A[I]{U_X} -> A[I_X]."""
    names = active(axes)
    return _reduce_scatter(names, dim, vary(x, axes)) if names else x


def split(x: Array, axis: Axis, dim: int) -> Array:
    """This device's shard of dim `dim` of an array that every device along `axis` holds whole: A[I] -> A[I_X]."""
    count = size(axis)
    if count == 1:
        return x
    length = x.shape[dim] // count
    return lax.dynamic_slice_in_dim(vary(x, axis), index(axis) * length, length, dim)


def exchange(x: Array, axes: Axes, whole: int, split: int) -> Array:
    """Move the split from dim `whole` to dim `split`, an all-to-all: A[I_X, J] -> A[I, J_X]."""
    names = active(axes)
    return lax.all_to_all(vary(x, axes), names, split, whole, tiled=True) if names else x


def shift(x: Array, axis: Axis, step: int) -> Array:
    """Each device's `x` to the device `step` further along `axis`, round the ends; the transpose shifts back."""
    names = active(axis)
    if not names:
        return x
    count = size(axis)
    return lax.ppermute(vary(x, axis), names[0], [(i, (i + step) % count) for i in range(count)])


def zeros_like(x: Array, dtype: jnp.dtype | None = None) -> Array:
    """Zeros of `x`'s shape that vary over the axes over which `x` does: the start of an accumulation."""
    return mark_varying(jnp.zeros(x.shape, dtype or x.dtype), tuple(Axis(name) for name in varying(x)))


def _covers(x: Array, axes: Axes) -> bool:
    return varying(x).issuperset(active(axes))


def _widen(x: Array) -> Array:
    half = x.dtype in (jnp.bfloat16, jnp.float16)
    return x.astype(jnp.float32) if half else x


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _all_gather(names: tuple[str, ...], dim: int, x: Array) -> Array:
    return lax.all_gather(x, names, axis=dim, tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _reduce_scatter(names: tuple[str, ...], dim: int, x: Array) -> Array:
    return lax.psum_scatter(_widen(x), names, scatter_dimension=dim, tiled=True).astype(x.dtype)


# Without these rules JAX would transpose a bfloat16 gather into a bfloat16 sum, and a sum in float32 into a gather of
# twice the bytes.
_all_gather.defvjp(
    lambda names, dim, x: (_all_gather(names, dim, x), None),
    lambda names, dim, _, gradient: (_reduce_scatter(names, dim, gradient),),
)
_reduce_scatter.defvjp(
    lambda names, dim, x: (_reduce_scatter(names, dim, x), None),
    lambda names, dim, _, gradient: (_all_gather(names, dim, gradient),),
)
