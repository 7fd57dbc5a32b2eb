"""How a layer declares a parameter: a value, the names of its dims, and nothing about any mesh."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


def normal(rngs: nnx.Rngs, dims: Sequence[str | None], shape: Sequence[int], std: float, dtype: str) -> nnx.Param:
    """A parameter drawn from N(0, std^2), drawn in float32 and then rounded to `dtype`.

    The draw is a function of the key and the global position of each element, so it is the same however it is split.
    """
    draw_dtype = jnp.promote_types(jnp.float32, dtype)
    value = std * jax.random.normal(rngs.params(), tuple(shape), jnp.float32).astype(draw_dtype)
    return _param(value.astype(dtype), dims)


def constant(dims: Sequence[str | None], shape: Sequence[int], value: float, dtype: str) -> nnx.Param:
    """A parameter whose every element starts at `value`."""
    return _param(jnp.full(tuple(shape), value, dtype), dims)


def _param(value: jax.Array, dims: Sequence[str | None]) -> nnx.Param:
    # Eager sharding would ask for a mesh here; where the parameter lives is decided by whoever compiles the model.
    return nnx.Param(value, out_sharding=tuple(dims), eager_sharding=False)
