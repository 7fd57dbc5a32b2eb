"""Parameters that two axes split, gathered over one of them before a module of one's own uses them.

XLA splits such a module's program. Where it gathers a matrix over fsdp by itself that tensor splits as well, on data x
fsdp x tensor, it permutes rows of the gradient before it over data and fsdp and does not put them back: gradients are
wrong, and nothing says so (jax 0.10.2 to 0.12 on CPU, small matrices; tests/train/test_module_gathered.py).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax import Array
from jax.sharding import NamedSharding

from shardlm._text import size
from shardlm.dims import Split


def shardings(splits: Mapping[str, Split], mesh: Any, batch_axes: tuple[str, ...]) -> dict[str, NamedSharding]:
    """Of each parameter that an axis of the batch and another one split: how it is split without the batch's axes."""
    sizes, found = dict(mesh.shape), {}
    for path, split in splits.items():
        dims = [(axes,) if isinstance(axes, str) else axes or () for axes in split.stored]
        axes = {axis for dim in dims for axis in dim if sizes[axis] > 1}
        if axes.intersection(batch_axes) and axes.difference(batch_axes):
            rest = [tuple(axis for axis in dim if axis not in batch_axes) or None for dim in dims]
            found[path] = NamedSharding(mesh, jax.sharding.PartitionSpec(*rest))
    return found


def gather(flat: Mapping[str, Array], found: Mapping[str, NamedSharding]) -> dict[str, Array]:
    """All parameters by path, those of `shardings` gathered."""
    return dict(flat) | {path: jax.lax.with_sharding_constraint(flat[path], x) for path, x in found.items()}


def describe(found: Mapping[str, NamedSharding], shapes: Mapping[str, Any]) -> list[str]:
    """What that takes, in a line; none where nothing is gathered."""
    if not found:
        return []
    held = sum(math.prod(x.shard_shape(shapes[path].shape)) * shapes[path].dtype.itemsize for path, x in found.items())
    return [
        f"gathered over fsdp for the whole step, {size(held)} on each device: {len(found)} parameters that another "
        "axis splits too"
    ]
