"""Random keys in a state: their numbers are saved, and the name of the generator that they are of beside them."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def is_key(leaf: Any) -> bool:
    """Whether it is an array of `jax.random.key`s, or the shape of one."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def as_numbers(leaf: Any) -> Any:
    """A key's numbers, of a shape their shape; anything else as it is."""
    if not is_key(leaf):
        return leaf
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf)
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def generators(arrays: Mapping[str, Any]) -> dict[str, str]:
    """By path, the generators of the keys among some arrays."""
    return {name: str(jax.random.key_impl(leaf)) for name, leaf in arrays.items() if is_key(leaf)}


def problem(wanted: Any, generator: str | None) -> str | None:
    """Why stored numbers cannot be what is wanted, or None.

    Args:
        wanted: an array or a shape, perhaps of keys.
        generator: of the keys whose numbers are stored; None where they are no keys.
    """
    if not is_key(wanted):
        return None if generator is None else f"expected {wanted.dtype}, found keys of {generator}"
    if generator is None:
        return f"expected keys ({wanted.dtype}), found numbers"
    try:
        made = jax.eval_shape(partial(jax.random.wrap_key_data, impl=generator), _plain(as_numbers(wanted)))
    except (TypeError, ValueError):
        return f"expected keys ({wanted.dtype}), found those of {generator}"
    return None if made.dtype == wanted.dtype else f"expected keys ({wanted.dtype}), found those of {generator}"


def from_numbers(numbers: jax.Array, generator: str, sharding: Any) -> jax.Array:
    """The keys whose numbers these are."""
    return jax.jit(partial(jax.random.wrap_key_data, impl=generator), out_shardings=sharding)(numbers)


def _plain(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
