"""What there is for arrays: of accelerators what they say, of CPU devices the machine's, within every limit."""

from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from shardlm.runtime import memory

NAMES = {
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "v2": ("memory.max", "memory.current", "inactive_file"),
}


def group(folder: Path, version: str, limit: object, used: int = 0, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(NAMES[version][:2], (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"cache 1\n{NAMES[version][2]} {cached}\n")


def device(index=0, process=0, stats=None, platform="gpu"):
    client = SimpleNamespace(process_index=lambda: 0)
    return SimpleNamespace(
        id=index,
        process_index=process,
        client=client,
        platform=platform,
        device_kind="a GPU",
        memory_stats=lambda: stats,
    )


def test_cpu_devices_share_what_the_machine_has_free(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: 800)
    room = memory.available(jax.devices())
    assert (room.bytes, room.shared, room.devices, room.each) == (800, True, 8, 100)
    monkeypatch.setattr(memory, "host_memory", lambda: None)
    assert memory.available(jax.devices()) is None


def test_the_machine_says_something_sensible():
    found = memory.host_memory()
    assert found is None or 1e6 < found < 1e15


@pytest.mark.parametrize("version", NAMES)
def test_the_tightest_control_group_around_the_process_decides(tmp_path, version):
    mounts, line = tmp_path / "cgroup", {"v1": "4:cpu,memory:/a/b", "v2": "0::/a/b"}[version]
    root = mounts / "memory" if version == "v1" else mounts
    (tmp_path / "own").write_text(f"9:pids:/x\n{line}\n")
    assert memory._of_control_groups(tmp_path / "own", mounts) == []
    group(root / "a/b", version, "max" if version == "v2" else 2**63 - 4096)
    assert memory._of_control_groups(tmp_path / "own", mounts) == []
    group(root / "a", version, 1000, used=600, cached=150)
    group(root / "a/b", version, 3000, used=100)
    assert sorted(memory._of_control_groups(tmp_path / "own", mounts)) == [550, 2900]
    # In a container the path may be the host's, and the mount the group.
    (tmp_path / "own").write_text(line.replace("/a/b", "/docker/0a1b") + "\n")
    group(root, version, 700)
    assert memory._of_control_groups(tmp_path / "own", mounts) == [700]
    assert memory._of_control_groups(tmp_path / "none", mounts) == []


def test_an_accelerator_has_what_it_says():
    devices = [device(0, stats={"bytes_limit": 60}), device(1, stats={"bytes_limit": 50}), device(2, process=1)]
    room = memory.available(devices)
    assert (room.bytes, room.shared, room.devices, room.each) == (50, False, 2, 50)
    assert room.what == "of a GPU that JAX may use"
    assert memory.available([device(stats=None)]) is None
    assert memory.available([device(process=1)]) is None

    def refuses():
        raise RuntimeError("UNIMPLEMENTED")

    assert memory.available([SimpleNamespace(**vars(device()) | {"memory_stats": refuses})]) is None
