"""How much memory there is for arrays: on an accelerator what it may use, on CPU devices what the machine has free."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Room:
    """Memory for arrays.

    Attributes:
        bytes: of one device; or, where `shared`, of all devices of this process together.
        shared: whether the devices of this process share it, as CPU devices do.
        devices: how many of them there are in this process.
        what: the memory in words.
    """

    bytes: int
    shared: bool
    devices: int
    what: str

    @property
    def each(self) -> float:
        """Bytes that each device may take."""
        return self.bytes / self.devices if self.shared else self.bytes


def available(devices: Sequence[Any]) -> Room | None:
    """The memory of devices, those of other processes left out; None where nothing is known.

    Of a CPU it is what can be given out without swapping now, within the limits of the process's control groups.

    Args:
        devices: of one kind.
    """
    try:
        own = [device for device in devices if device.process_index == device.client.process_index()]
    except (AttributeError, NotImplementedError, RuntimeError):  # devices to compile for, which are not there
        own = []
    if not own:
        return None
    if own[0].platform == "cpu":
        free = host_memory()
        return None if free is None else Room(free, True, len(own), "free on this machine")
    limits = [stats["bytes_limit"] for stats in map(_stats, own) if stats.get("bytes_limit")]
    return Room(min(limits), False, len(own), f"of {own[0].device_kind} that JAX may use") if limits else None


def host_memory() -> int | None:
    """Bytes that this process can take on its machine; None where the machine does not say."""
    found = [_of_machine(), *_of_control_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    return min((value for value in found if value is not None), default=None)


def _stats(device: Any) -> dict[str, Any]:
    try:
        return device.memory_stats() or {}
    except Exception:  # not every platform has them, nor raises the same
        return {}


def _of_machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:  # macOS says only how much there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _of_control_groups(memberships: Path, mounts: Path) -> list[int]:
    """What is left of each limit on this process's group or a group around it; of both versions of control groups."""
    found = []
    try:
        lines = memberships.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, names = mounts, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = mounts / "memory"
        else:
            continue
        folder = root / group.lstrip("/")
        # In a container the group's path may be the host's, and the mount the group itself.
        for at in {folder, *folder.parents, root}:
            if at == root or root in at.parents:
                found += _left(at, *names)
    return found


def _left(folder: Path, limit: str, used: str, cached: str) -> list[int]:
    """The limit less what is used and cannot be taken back; nothing where there is no limit."""
    try:
        most = (folder / limit).read_text(encoding="ascii").strip()
        if not most.isdecimal() or int(most) >= 1 << 60:  # "max", or the largest number of pages
            return []
        stat = dict(line.split()[:2] for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        held = int((folder / used).read_text(encoding="ascii")) - int(stat.get(cached, 0))
        return [max(0, int(most) - held)]
    except (OSError, ValueError):
        return []
