"""Dropout whose masks depend on where an element is in the global batch, and on no layout."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


@partial(jax.tree_util.register_dataclass, data_fields=("key", "rows", "columns"), meta_fields=("rate",))
@dataclass(frozen=True)
class Dropout:
    """What one call of the model needs to draw its masks.

    Attributes:
        rate: probability of dropping an element.
        key: a PRNG key, another one for each step.
        rows: int32[batch], for each row held here its index in the global batch.
        columns: int32[sequence], for each position held here its index in the global sequence.
    """

    rate: float
    key: Array
    rows: Array
    columns: Array

    def __call__(self, x: Array, layer: Array | int, site: int) -> Array:
        """Zero elements of x[batch, sequence, embed] with probability `rate` and divide the others by 1 - rate.

        The mask of a token is a function of (key, layer, site, row, column) alone: the same whatever the split into
        devices, microbatches or sequence chunks.
        """
        key = jax.random.fold_in(jax.random.fold_in(self.key, layer), site)

        def mask(row: Array, column: Array) -> Array:
            token = jax.random.fold_in(jax.random.fold_in(key, row), column)
            return jax.random.bernoulli(token, 1.0 - self.rate, x.shape[-1:])

        keep = jax.vmap(lambda row: jax.vmap(lambda column: mask(row, column))(self.columns))(self.rows)
        return jnp.where(keep, x / (1.0 - self.rate), 0).astype(x.dtype)
