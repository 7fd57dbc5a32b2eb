"""Trees of parameters, gradients and optimizer state, between the model's order of layers and that of their stages.

What belongs to stacked layers is known by its path, which ends in the path of such a parameter, and by its shape, which
is that parameter's: parts of an optimizer's state of another shape are as the optimizer made them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from shardlm.dims import Split
from shardlm.parallel.pipeline.stages import Stages
from shardlm.train.view import owner

Splits = Mapping[str, Split]
"""For each parameter's path, how it is stored."""


def in_order(tree: Any, stages: Stages, splits: Splits) -> Any:
    """Stored arrays, of JAX or NumPy, with their layers as [num_layers, ...] in the model's order, without padding."""
    if not stages.arranged:
        return tree
    return _map(stages.in_order, tree, splits)


def arrange(tree: Any, stages: Stages, splits: Splits) -> Any:
    """The inverse of `in_order`."""
    if not stages.arranged:
        return tree
    return _map(stages.arrange, tree, {path: split_in_order(split, stages) for path, split in splits.items()})


def gathered(tree: Any, stages: Stages, splits: Splits) -> Any:
    """`in_order` of arrays on devices, one after another; every stage then holds all layers."""
    if stages.stages == 1:
        return tree

    def gather(x: Any) -> Any:
        if not isinstance(x.sharding, NamedSharding):
            return stages.in_order(x)
        spec = PartitionSpec(None, *x.sharding.spec[stages.rows.ndim :])
        out = NamedSharding(x.sharding.mesh, spec)
        return jax.block_until_ready(jax.jit(_in_order(stages), out_shardings=out)(x))

    return _map(gather, tree, splits)


@functools.lru_cache(maxsize=64)
def _in_order(stages: Stages) -> Callable[[jax.Array], jax.Array]:
    return stages.in_order  # the same object each time, so that arrays of one shape are compiled for once


def without_padding(tree: Any, stages: Stages, splits: Splits) -> Any:
    """The same arrays with zeros where rows are padding."""

    def clear(x: jax.Array) -> jax.Array:
        real = (stages.rows >= 0).reshape(*stages.rows.shape, *(1,) * (x.ndim - stages.rows.ndim))
        return jnp.where(real, x, jnp.zeros((), x.dtype))

    return _map(clear, tree, splits)


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


def _map(function: Any, tree: Any, splits: Splits) -> Any:
    def convert(keys: tuple[Any, ...], x: Any) -> Any:
        path = owner(keys, splits)
        belongs = path is not None and splits[path].stacked and x.shape == splits[path].shape
        return function(x) if belongs else x

    return jax.tree_util.tree_map_with_path(convert, tree)
