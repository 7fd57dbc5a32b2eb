"""Which device sits where in the mesh: slow axes across slow links, fast axes inside fast ones.

Devices that talk to each other over a fast network form a *granule*: a TPU slice, an NVLink domain, a GPU host.
The granules are dealt to the axes from the slowest on, so that as few axes as possible cross the slow network.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils


def place(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The array of `devices`, of shape `shape`, in which an index along an axis is a position on that mesh axis.

    Args:
        shape: sizes of the mesh axes, slowest network first; their product is the number of devices.
        devices: devices of one platform. Their order decides nothing where the hardware's topology does.

    Raises:
        ValueError, NotImplementedError, AssertionError: the devices do not form such an array (the last two come from
            `mesh_utils`, for devices that leave a hole in the TPU's torus, or axes that its physical axes do not give).
    """
    if devices[0].platform == "cpu":
        ordered = np.empty(len(devices), dtype=object)
        ordered[:] = sorted(devices, key=lambda device: (device.process_index, device.id))
        return ordered.reshape(shape)
    # GPUs report a slice_index too: the same for all devices of an NVLink domain, or of a host where there is none. It
    # is better than the process, because one process per GPU is common. A TPU without slice_index is a single slice.
    by_process = devices[0].platform != "tpu" and not all(hasattr(device, "slice_index") for device in devices)
    members = Counter(device.process_index if by_process else getattr(device, "slice_index", 0) for device in devices)
    if len(members) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if len(set(members.values())) > 1:
        kind = "process" if by_process else "slice"
        counts = ", ".join(f"{kind} {index} has {count}" for index, count in sorted(members.items()))
        raise ValueError(f"every {kind} must hold equally many of the {len(devices)} devices, but {counts}")
    outer = deal(len(members), shape)
    inner = tuple(size // across for size, across in zip(shape, outer, strict=True))
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, process_is_granule=by_process, allow_split_physical_axes=True
    )


def deal(granules: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """How many granules each axis spans: as many as possible on the first (slowest), the rest on the next, and so on.

    The result's product is `granules` whenever `granules` divides the product of `shape`: per prime factor, an axis
    takes the smaller of what it has and what is left, and together the axes have enough.

    Example:
        >>> deal(8, (1, 4, 6, 1, 1, 2))
        (1, 4, 2, 1, 1, 1)
    """
    outer, left = [], granules
    for size in shape:
        outer.append(math.gcd(left, size))
        left //= outer[-1]
    assert left == 1, (granules, shape)
    return tuple(outer)
