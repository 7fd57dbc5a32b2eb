"""Which of the parameters a step trains: all, or those that are not frozen."""

from collections.abc import Mapping
from typing import Any

from shardlm.dims import Split
from shardlm.train.engine import flatten, unflatten


def trained(tree: Any, splits: Mapping[str, Split]) -> Any:
    """Of a nested dict like the parameters, what belongs to those that are trained; the tree itself where all are."""
    if not any(split.frozen for split in splits.values()):
        return tree
    return unflatten({path: x for path, x in flatten(tree).items() if not splits[path].frozen})


def put_back(params: Any, part: Any, splits: Mapping[str, Split]) -> Any:
    """`params` with `part`, of `trained`, in its place."""
    if not any(split.frozen for split in splits.values()):
        return part
    return unflatten(flatten(params) | flatten(part))
