"""A checksum of each array, the same on every layout: what tells a damaged file from a state."""

import jax
import jax.numpy as jnp
from jax import lax


def digests(arrays: dict[str, jax.Array]) -> dict[str, str]:
    """The digest of each array as text."""
    return as_text(start(arrays))


def start(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The digest of each array as a scalar that may still be on its way."""
    found = {}
    for name, array in arrays.items():
        found[name] = digest(array)
        # On fake CPU devices, programs with collectives that overlap can wait for one another for ever.
        if len(array.sharding.device_set) > 1 and next(iter(array.sharding.device_set)).platform == "cpu":
            found[name].block_until_ready()
    return found


def as_text(started: dict[str, jax.Array]) -> dict[str, str]:
    """What `start` returned, waited for."""
    return {name: f"{int(value):08x}" for name, value in jax.device_get(started).items()}


@jax.jit
def digest(x: jax.Array) -> jax.Array:
    """A checksum of values and their places: sum over i of mix(bits_i ^ mix(i)) - mix(mix(i)), modulo 2^32.

    As a sum it is the same on every layout, and computed where the shards are. Zeros add nothing, so padding with zeros
    does not change it. One wrong element is always seen, because `mix` is a bijection; several pass with odds of 2^-32.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    elif jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], axis=-1)
    word = jnp.dtype(f"uint{min(8 * x.dtype.itemsize, 32)}")  # 64 bits become two words in a trailing dim
    bits = lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for dim, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
    key = _mix(place + jnp.uint32(0x9E3779B9))
    return jnp.sum(_mix(bits ^ key) - _mix(key), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
