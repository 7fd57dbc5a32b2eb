"""Nothing that happens to a file passes for a checkpoint: each is named, and what is whole beside it is too."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from shardlm.checkpoint import Checkpoints, DamagedCheckpoint, files, hashes, read_metadata, record, restore, save

# Orbax drops the coroutines of its other reads when one fails on a damaged file.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

STATE = {"w": PartitionSpec("a"), "params": PartitionSpec(), "step": PartitionSpec()}


@pytest.fixture(scope="module")
def state() -> dict:
    """Noise, which compression stores as it is."""
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    noise = np.random.default_rng(0).integers(0, 2**32, (64, 256), np.uint32)
    values = {"w": noise, "params": noise[:3, :7].astype(np.float32), "step": np.int32(100)}
    return {name: jax.device_put(value, NamedSharding(mesh, STATE[name])) for name, value in values.items()}


@pytest.fixture(scope="module")
def run(state, tmp_path_factory) -> Path:
    """Two steps, not to be changed."""
    directory = tmp_path_factory.mktemp("damage") / "run"
    with Checkpoints(directory) as checkpoints:
        for step in (20, 100):
            checkpoints.save(step, state, {"step": step})
    return directory


@pytest.fixture
def damaged(run, tmp_path) -> Path:
    """Step 100 of a copy, for a test to damage."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run/100"


def content(path: Path) -> list[str]:
    return sorted(str(entry.relative_to(path)) for entry in path.rglob("*") if entry.is_file())


def flip(file: Path, seed: int) -> None:
    data, source = bytearray(file.read_bytes()), random.Random(seed)
    data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    file.write_bytes(data)


def replace_by_folder(file: Path, seed: int) -> None:
    file.unlink()
    file.mkdir()


ATTACKS: dict[str, Callable[[Path, int], None]] = {
    "flipped": flip,
    "truncated": lambda file, seed: file.write_bytes(file.read_bytes()[: -1 - seed]),
    "emptied": lambda file, seed: file.write_bytes(b""),
    "extended": lambda file, seed: file.write_bytes(file.read_bytes() + b"x"),
    "zeroed": lambda file, seed: file.write_bytes(bytes(file.stat().st_size)),
    "deleted": lambda file, seed: file.unlink(),
    "a folder": replace_by_folder,
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_whatever_happens_to_any_file_is_an_error_that_names_it(run, damaged, state, attack):
    names = content(damaged)
    kinds = {"metadata.json", "state/manifest.ocdbt", "state/_METADATA", "state/_sharding"}
    assert kinds < set(names) and len(names) > 8
    for name in names:
        for seed in range(5 if attack == "flipped" else 1):
            ATTACKS[attack](damaged / name, seed)
            with pytest.raises(
                DamagedCheckpoint, match=rf"/100 is damaged: {name} .*\(steps in {damaged.parent}: 20\)"
            ):
                restore(damaged, state)
            shutil.rmtree(damaged)
            shutil.copytree(run / "100", damaged)
    restore(damaged, state)


def test_what_the_message_says_of_a_file(damaged, state):
    name = max(content(damaged), key=lambda name: (damaged / name).stat().st_size)
    size = (damaged / name).stat().st_size
    for attack, text in {"truncated": f"has {size - 1} of {size} bytes", "flipped": "has other bytes"}.items():
        original = (damaged / name).read_bytes()
        ATTACKS[attack](damaged / name, 0)
        with pytest.raises(DamagedCheckpoint, match=f"{name} {text}"):
            restore(damaged, state)
        (damaged / name).write_bytes(original)
    (damaged / name).unlink()
    (damaged / "state/_METADATA").unlink()
    with pytest.raises(DamagedCheckpoint, match=f"state/_METADATA is missing; {name} is missing"):
        restore(damaged, state)


def test_a_step_that_is_no_folder_or_an_empty_one_is_damaged(damaged, state):
    shutil.rmtree(damaged / "state")
    (damaged / "state").touch()
    with pytest.raises(DamagedCheckpoint, match=r"state/_METADATA is missing"):
        restore(damaged, state)
    for make in (Path.mkdir, Path.touch):
        shutil.rmtree(damaged) if damaged.is_dir() else damaged.unlink()
        make(damaged)
        with pytest.raises(
            DamagedCheckpoint, match=r"metadata.json is missing\. Restore another one \(steps in .*: 20\)"
        ):
            read_metadata(damaged)


def test_arrays_are_compared_too(damaged, state, monkeypatch):
    """With the files' hashes out of the way, the arrays' digests see a flip, and what Orbax cannot read is damage."""
    monkeypatch.setattr(files, "damage", lambda path, expected: [])
    file = damaged / max(content(damaged), key=lambda name: (damaged / name).stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match=r"/100 is damaged: what was read is not what was saved: w\. Restore"):
        restore(damaged, state)
    with monkeypatch.context() as patch:  # nothing but the digest sees it
        digests = {name: text.split()[1] for name, text in record.read_record(damaged)["arrays"].items()}
        patch.setattr(files, "digests", lambda arrays: digests)
        assert int((restore(damaged, state)["w"] != state["w"]).sum()) == 1
    file.write_bytes(bytes(len(data)))
    with pytest.raises(DamagedCheckpoint, match=r"/100 is damaged: its arrays cannot be read \(\w+: .+\)"):
        restore(damaged, state)


def test_a_file_that_may_not_be_read_is_not_damage(damaged, state, monkeypatch):
    digest_file = hashes.digest_file

    def forbidden(path, *arguments):
        if path.name == "_METADATA":
            raise PermissionError(13, "Permission denied", str(path))
        return digest_file(path, *arguments)

    monkeypatch.setattr(hashes, "digest_file", forbidden)
    with pytest.raises(PermissionError, match="Permission denied: '.*/100/state/_METADATA'"):
        restore(damaged, state)


def test_another_format_is_refused(damaged, state):
    content = record.read_record(damaged)
    record.write_record(damaged, {key: value for key, value in content.items() if key != "digest"} | {"format": 3})
    with pytest.raises(ValueError, match="is in format 3; this version of shardlm reads format 2"):
        restore(damaged, state)
    (damaged / "metadata.json").write_text('{"format": 1, "metadata": {}, "digests": {}, "files": {}}')  # had no digest
    with pytest.raises(ValueError, match="is in format 1; this version of shardlm reads format 2"):
        restore(damaged, state)


def test_a_state_saved_again_is_another_checkpoint_with_the_same_digests(state, run, tmp_path):
    save(tmp_path / "c", state)
    first, second = (record.read_record(path)["arrays"] for path in (run / "100", tmp_path / "c"))
    assert first == second
    changed = state | {"step": state["step"] + 1}
    save(tmp_path / "d", changed)
    assert record.read_record(tmp_path / "d")["arrays"]["step"] != first["step"]
    assert isinstance(changed["step"], jax.Array) and changed["step"].dtype == jnp.int32
