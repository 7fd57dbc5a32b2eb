"""A kill at any change of the disk leaves whole checkpoints, and nothing that the next save does not clear away."""

import itertools
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from shardlm.checkpoint import Checkpoints, SaveError, command, read_metadata, record, save
from shardlm.checkpoint.hashes import damage
from shardlm.checkpoint.retention import Retention
from shardlm.runtime import folders
from tests.kills import Killed, killed_at

# Where the kill falls into the removal of older checkpoints, the save itself is done.
pytestmark = pytest.mark.filterwarnings("ignore::shardlm.CheckpointWarning")

STATE = {"x": jnp.ones(3)}


def ours(path: str) -> bool:
    """Not Orbax's own writes, which come in an order of their own, all before the folder has its name."""
    return "/state" not in path


def which(path: Path) -> str:
    """The metadata's text of a checkpoint, every byte of which is as it was written."""
    said = read_metadata(path)["is"]
    assert damage(path, record.read_record(path)["files"]) == []
    return said


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("kills") / "old"
    save(path, STATE, {"is": "old"})
    return path


@pytest.mark.parametrize("exchanges", [True, False])
def test_overwriting_leaves_the_old_or_the_new_checkpoint(old, tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    found = []
    for number in itertools.count():
        parent = tmp_path / str(number)
        shutil.copytree(old, parent / "c")
        with killed_at(monkeypatch, number, ours) as made:
            try:
                save(parent / "c", STATE, {"is": "new"}, overwrite=True)
            except (Killed, SaveError):
                assert made.dead
        assert not exchanges or (parent / "c").exists(), made
        found.append(which(parent / "c"))
        if not made.dead:
            break
        if number % 4 == 0:  # the next save clears away what is left
            save(parent / "c", STATE, {"is": "next"}, overwrite=True)
            assert (which(parent / "c"), os.listdir(parent)) == ("next", ["c"]), made
    assert os.listdir(parent) == ["c"]
    assert len(found) > 15 and found[0] == "old" and found[-1] == "new"
    assert found == sorted(found, reverse=True)


def test_a_run_saves_a_step_whole_or_not_at_all(old, tmp_path, monkeypatch):
    found = []
    for number in itertools.count():
        directory = tmp_path / str(number)
        directory.mkdir()
        for step in (1, 2):
            shutil.copytree(old, directory / str(step))
        with killed_at(monkeypatch, number, ours) as made:
            try:
                with Checkpoints(directory, keep=2) as checkpoints:
                    checkpoints.save(3, STATE, {"is": "new"})
            except (Killed, SaveError):
                assert made.dead
        steps = record.steps_in(directory)
        assert steps in ([1, 2], [1, 2, 3], [2, 3]), made
        assert [which(directory / str(step)) for step in steps] == ["old", "old", "new"][: len(steps)] or steps == [
            2,
            3,
        ]
        found.append(steps)
        with Checkpoints(directory) as checkpoints:
            checkpoints.claim()
        assert sorted(os.listdir(directory)) == list(map(str, steps)), made
        if not made.dead:
            break
    assert found == sorted(found, key=[[1, 2], [1, 2, 3], [2, 3]].index) and found[-1] == [2, 3]
    assert found[0] == [1, 2] and [1, 2, 3] in found


def test_exporting_and_pruning_leave_whole_checkpoints(old, tmp_path, monkeypatch):
    for number in itertools.count():
        run, to = tmp_path / f"run-{number}", tmp_path / f"to-{number}/best"
        run.mkdir()
        for step in (1, 2):
            shutil.copytree(old, run / str(step))
        with killed_at(monkeypatch, number) as made:
            try:
                command.export(run / "1", to)
                command.prune(run, Retention(1))
            except Killed:
                assert made.dead
        if to.exists():
            assert which(to) == "old", made
        for step in record.steps_in(run):
            assert which(run / str(step)) == "old", made
        if not made.dead:
            break
    assert number > 20 and os.listdir(to.parent) == ["best"] and os.listdir(run) == ["2"]
