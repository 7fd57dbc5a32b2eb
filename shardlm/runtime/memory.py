"""What a device has of memory, so that what cannot fit is refused before anything is compiled."""

import os
from collections.abc import Sequence
from typing import Any

import jax


def memory_of(devices: Sequence[Any]) -> int | None:
    """Bytes that each of these devices may hold at most; None where that is not known.

    CPU devices of one process share its machine's memory: each has its part.
    """
    mine = [device for device in devices if device.process_index == jax.process_index()]
    if not mine:
        return None
    try:
        stats = mine[0].memory_stats()
    except Exception:  # a device that is only compiled for has none, and each backend says so in its own way
        return None
    if stats and stats.get("bytes_limit"):
        return int(stats["bytes_limit"])
    if mine[0].platform != "cpu":
        return None
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(mine)
    except (AttributeError, OSError, ValueError):  # not on this system
        return None
