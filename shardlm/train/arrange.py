"""Trees of parameters, gradients and optimizer state, between the model's order of layers and that of their stages.

What belongs to stacked layers is known by its path, of which `layers` is a component, and by its leading dims.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from shardlm.dims import Split
from shardlm.parallel.pipeline.stages import Stages

LAYERS = "layers"


def in_order(tree: Any, stages: Stages) -> Any:
    """Stored arrays, of JAX or NumPy, with their layers as [num_layers, ...] in the model's order, without padding."""
    if not stages.arranged:
        return tree
    return _map(stages.in_order, tree, stages.rows.shape)


def arrange(tree: Any, stages: Stages) -> Any:
    """The inverse of `in_order`."""
    if not stages.arranged:
        return tree
    return _map(stages.arrange, tree, (sum(stages.counts),))


def gathered(tree: Any, stages: Stages) -> Any:
    """`in_order` of arrays on devices, one after another; every stage then holds all layers."""
    if stages.stages == 1:
        return tree

    def gather(x: Any) -> Any:
        if not isinstance(x.sharding, NamedSharding):
            return stages.in_order(x)
        spec = PartitionSpec(None, *x.sharding.spec[stages.rows.ndim :])
        out = NamedSharding(x.sharding.mesh, spec)
        return jax.block_until_ready(jax.jit(_in_order(stages), out_shardings=out)(x))

    return _map(gather, tree, stages.rows.shape)


@functools.lru_cache(maxsize=64)
def _in_order(stages: Stages) -> Callable[[jax.Array], jax.Array]:
    return stages.in_order  # the same object each time, so that arrays of one shape are compiled for once


def without_padding(tree: Any, stages: Stages) -> Any:
    """The same arrays with zeros where rows are padding."""

    def clear(x: jax.Array) -> jax.Array:
        real = (stages.rows >= 0).reshape(*stages.rows.shape, *(1,) * (x.ndim - stages.rows.ndim))
        return jnp.where(real, x, jnp.zeros((), x.dtype))

    return _map(clear, tree, stages.rows.shape)


def split_in_order(split: Split, stages: Stages) -> Split:
    """The split of a parameter that is `gathered`: as it was, but for the layers, which are whole."""
    lead = split.stacked
    if stages.stages == 1 or not lead:
        return split
    return dataclasses.replace(
        split,
        shape=(sum(stages.counts), *split.shape[lead:]),
        dims=(split.dims[lead - 1], *split.dims[lead:]),
        model=((), *split.model[lead:]),
        zero_dim=None if split.zero_dim is None else split.zero_dim - lead + 1,
    )


def _map(function: Any, tree: Any, lead: tuple[int, ...]) -> Any:
    def convert(keys: tuple[Any, ...], x: Any) -> Any:
        belongs = any(getattr(key, "key", None) == LAYERS for key in keys)
        return function(x) if belongs and x.shape[: len(lead)] == lead else x

    return jax.tree_util.tree_map_with_path(convert, tree)
