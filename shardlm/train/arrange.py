"""Trees of parameters, gradients and optimizer state, between the model's order of layers and that of their stages.

What belongs to stacked layers is known by its path, of which `layers` is a component, and by its leading dims.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

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


def without_padding(tree: Any, stages: Stages) -> Any:
    """The same arrays with zeros where rows are padding."""

    def clear(x: jax.Array) -> jax.Array:
        real = (stages.rows >= 0).reshape(*stages.rows.shape, *(1,) * (x.ndim - stages.rows.ndim))
        return jnp.where(real, x, jnp.zeros((), x.dtype))

    return _map(clear, tree, stages.rows.shape)


def split_in_order(split: Split, stages: Stages) -> Split:
    """The split of a parameter once it is in the model's order: as it was, but for the layers, which are whole."""
    lead = split.stacked
    if not stages.arranged or not lead:
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
