"""Which device holds which part of an array: plain arithmetic on shapes and mesh sizes, with no device and no array.

Devices are numbered by their place in the mesh, counted along its last axis first. On CPUs that is the device's id.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

Ranges = tuple[tuple[int, int], ...]
"""For each dim the first index and the one after the last."""


def coordinates(sizes: Mapping[str, int]) -> dict[int, dict[str, int]]:
    """For every device of a mesh its coordinate along each axis.

    Args:
        sizes: devices along each axis, in mesh order.
    """
    places = itertools.product(*(range(n) for n in sizes.values()))
    return {device: dict(zip(sizes, place, strict=True)) for device, place in enumerate(places)}


def blocks(shape: Sequence[int], axes: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Into how many parts each dim is split.

    Args:
        shape: of the array.
        axes: for each dim, the axes that split it, the first one into the largest pieces.
        sizes: devices along each axis of the mesh, in mesh order.

    Raises:
        ValueError: an axis that the mesh has not or that is used twice, or a dim that does not divide.
    """
    if len(axes) != len(shape):
        raise ValueError(f"an array of shape {tuple(shape)} has {len(shape)} dims, and axes for {len(axes)} are given")
    used = [axis for names in axes for axis in names]
    for axis in used:
        if axis not in sizes:
            raise ValueError(f"axis {axis!r} is not in the mesh, which has {', '.join(sizes)}")
        if used.count(axis) > 1:
            raise ValueError(f"axis {axis!r} splits the shape {tuple(shape)} twice: {_product(used, sizes)}")
    parts = tuple(math.prod(sizes[axis] for axis in names) for names in axes)
    for n, count, names in zip(shape, parts, axes, strict=True):
        if n % count:
            raise ValueError(f"a dim of {n} does not divide over {_product(names, sizes)}")
    return parts


def slices(shape: Sequence[int], axes: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> dict[int, Ranges]:
    """For every device the index ranges of the part that it holds.

    They are those of `jax.sharding.NamedSharding.devices_indices_map`. Arguments and errors are those of `blocks`.

    Example:
        >>> slices((4, 6), [("tensor",), ()], {"data": 2, "tensor": 2})
        {0: ((0, 2), (0, 6)), 1: ((2, 4), (0, 6)), 2: ((0, 2), (0, 6)), 3: ((2, 4), (0, 6))}
    """
    steps = [n // count for n, count in zip(shape, blocks(shape, axes, sizes), strict=True)]
    found = {}
    for device, place in coordinates(sizes).items():
        index = (_block(names, place, sizes) for names in axes)
        found[device] = tuple((i * step, (i + 1) * step) for i, step in zip(index, steps, strict=True))
    return found


def holders(parts: Mapping[int, Ranges]) -> dict[Ranges, list[int]]:
    """For every part of an array the devices that hold it; more than one hold replicas."""
    found: dict[Ranges, list[int]] = {}
    for device, ranges in parts.items():
        found.setdefault(ranges, []).append(device)
    return found


def numbers(devices: Sequence[int], most: int = 4) -> str:
    """Device numbers in few characters: "3", "0, 2", "0–7", "0–7, 64–71, … 448–455".

    Args:
        devices: in ascending order.
        most: how many runs of neighbours to list before leaving out those in the middle.
    """
    runs: list[list[int]] = []
    for device in devices:
        if runs and device == runs[-1][-1] + 1:
            runs[-1].append(device)
        else:
            runs.append([device])
    texts = [part for run in runs for part in ([f"{run[0]}–{run[-1]}"] if len(run) > 2 else map(str, run))]
    return ", ".join(texts if len(texts) <= most else [*texts[:2], f"… {texts[-1]}"])


def _block(names: Sequence[str], place: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    index = 0
    for axis in names:
        index = index * sizes[axis] + place[axis]
    return index


def _product(axes: Sequence[str], sizes: Mapping[str, Any]) -> str:
    return " x ".join(f"{axis}={sizes[axis]}" for axis in axes)
