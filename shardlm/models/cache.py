"""Keys and values of the tokens that a row has seen, so that a further token costs one token's work.

Each row of a batch has its own length. Slot p mod slots of a layer holds what the token at position p left there, so
which position a slot holds follows from the row's length alone. A layer without a sliding window has a slot for every
position, and one with a window w only for the last w positions, and for as many more as are added at a time but one:
the oldest query of those still sees w keys.

Shape letters: Batch, Kv heads, Sequence (of the new tokens), head Dim.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from shardlm.models.config import TransformerConfig


@dataclass(frozen=True)
class CacheVisibility:
    """Which cached keys a query sees: those at its position and before it, in its window.

    Attributes:
        queries: int32[batch, queries], the position of each query in its row.
        keys: int32[batch, slots], the position that each slot holds; negative where it holds none.
        window: the layer's sliding window in tokens, or None.
    """

    queries: Array
    keys: Array
    window: int | None

    def mask(self, rows: Array | None = None) -> Array:
        """Boolean [batch, 1, queries, slots].

        Args:
            rows: int32[queries], which of the queries; None: all, in order.
        """
        query = (self.queries if rows is None else self.queries[:, rows])[:, :, None]
        key = self.keys[:, None, :]
        visible = (key >= 0) & (key <= query)
        if self.window is not None:
            visible = visible & (query - key < self.window)
        return visible[:, None]


@dataclass(frozen=True)
class LayerCache:
    """The cache as one layer uses it: that of all layers of its kind, and which of them it is.

    Attributes:
        keys, values: [layers of the kind, batch, kv heads, slots, head dim]; whole, so that a loop over layers changes
            them in place.
        index: int32 scalar, which layer of the kind.
        slots: int32[batch, sequence], where each new token goes; beyond the last slot for one that is not kept.
        visibility: which slots the new tokens see, once they are there.
    """

    keys: Array
    values: Array
    index: Array
    slots: Array
    visibility: CacheVisibility

    def add(self, k_BKSD: Array, v_BKSD: Array) -> "LayerCache":
        """The cache with the new tokens' keys and values in their slots."""
        rows = jnp.arange(self.slots.shape[0])[:, None]

        def put(cache: Array, new_BKSD: Array) -> Array:
            # Indices on both sides of a slice come first in what they index: [batch, sequence, kv heads, head dim].
            return cache.at[self.index, rows, :, self.slots].set(
                new_BKSD.swapaxes(1, 2).astype(cache.dtype), mode="drop"
            )

        return dataclasses.replace(self, keys=put(self.keys, k_BKSD), values=put(self.values, v_BKSD))

    def read(self) -> tuple[Array, Array]:
        """This layer's keys and values: two arrays [batch, kv heads, slots, head dim]."""
        keys, values = (jax.lax.dynamic_index_in_dim(x, self.index, keepdims=False) for x in (self.keys, self.values))
        return keys, values


@partial(jax.tree_util.register_dataclass, data_fields=("keys", "values", "length"), meta_fields=("windows",))
@dataclass(frozen=True)
class Cache:
    """What a batch of rows has left in every layer.

    Attributes:
        keys, values: for each kind of layer an array [layers of the kind, batch, kv heads, slots, head dim].
        length: int32[batch], how many tokens each row has seen.
        windows: the kinds, in the order of `keys`: the sliding window of their layers, None for none.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Array
    windows: tuple[int | None, ...]

    @classmethod
    def empty(cls, config: TransformerConfig, rows: int, kv_heads: int, max_length: int, added: int) -> "Cache":
        """A cache of rows that have seen nothing.

        Args:
            config: the model.
            rows: of the batch.
            kv_heads: heads to hold; more than the model has where devices hold copies of one.
            max_length: tokens that a row may come to have.
            added: at most so many tokens are added at a time.
        """

        def zeros(window: int | None) -> Array:
            slots = slots_of(window, max_length, added)
            shape = (config.windows.count(window), rows, kv_heads, slots, config.head_dim)
            return jnp.zeros(shape, config.dtype)

        windows = kinds_of(config.windows)
        keys, values = (tuple(zeros(window) for window in windows) for _ in range(2))
        return cls(keys, values, jnp.zeros(rows, jnp.int32), windows)

    def layer(self, kind: int, index: Array, keys: Array, values: Array, places: Array, counts: Array) -> LayerCache:
        """A layer's view of the cache while tokens are added.

        Args:
            kind, index: which layer of which kind.
            keys, values: the kind's arrays as they are now.
            places: int32[batch, sequence], positions of the new tokens.
            counts: int32[batch], how many of them are real; they come first.
        """
        slots, window = keys.shape[3], self.windows[kind]
        real = jnp.arange(places.shape[1]) < counts[:, None]
        last = (self.length + counts - 1)[:, None]
        held = last - (last - jnp.arange(slots)) % slots
        target = jnp.where(real, places % slots, slots)
        return LayerCache(keys, values, index, target, CacheVisibility(places, held, window))


def kinds_of(windows: Sequence[int | None]) -> tuple[int | None, ...]:
    """The different sliding windows, in the order in which layers first have them."""
    return tuple(dict.fromkeys(windows))


def slots_of(window: int | None, max_length: int, added: int) -> int:
    """How many slots a layer with this window has; see the top of this file."""
    return max_length if window is None else min(max_length, window + added - 1)
