"""What is written gets its name in one step, what is replaced is never missing, and nothing of others is touched."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shardlm.runtime import claims, folders
from shardlm.runtime.claims import Claim, Taken
from shardlm.runtime.folders import Work, discard, recover, sweep, write_file
from tests.kills import Killed, killed_at

# What these files need is in the standard library alone, and a process without JAX starts at once.
ALONE = f"""
import pathlib, sys, types
for name in ("shardlm", "shardlm.runtime"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [{str(Path(__file__).parents[2])!r} + "/" + name.replace(".", "/")]
from shardlm.runtime.claims import Claim
from shardlm.runtime.folders import Work
there = pathlib.Path(sys.argv[1])
"""


def fill(folder: Path, text: str) -> None:
    (folder / "deep").mkdir(parents=True)
    for name in ("a", "deep/b"):
        (folder / name).write_text(text)


def text(folder: Path) -> str:
    """What all files of a folder that `fill` made hold; an error if one is missing, or another."""
    [found] = {(folder / name).read_text() for name in ("a", "deep/b")}
    return found


def put(path: Path, new: str, replace: bool) -> None:
    """As `sl.save` and `sl.save_hf` do."""
    sweep(path.parent, lambda name: name == path.name)
    work = Work(path)
    fill(work.new, new)
    work.publish(replace=replace)


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_kill_at_any_change_of_the_disk_leaves_the_old_or_the_new_whole(tmp_path, monkeypatch, exchanges):
    if not exchanges:  # as on systems and disks that have no such call
        monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    found = []
    for number in itertools.count():
        parent = tmp_path / str(number)
        fill(parent / "c", "old")
        with killed_at(monkeypatch, number) as made:
            try:
                put(parent / "c", "new", replace=True)
                survived = True
            except Killed:
                survived = False
        if exchanges:
            assert (parent / "c").is_dir(), made  # at every moment
        recover(parent / "c")
        found.append(text(parent / "c"))
        put(parent / "c", "next", replace=True)
        assert (text(parent / "c"), os.listdir(parent)) == ("next", ["c"]), made  # what was left is gone
        if survived:
            break
    assert len(found) > 12 and found[0] == "old" and found[-1] == "new"
    assert found == sorted(found, reverse=True)


def test_a_kill_at_any_change_leaves_a_removed_folder_whole_or_gone(tmp_path, monkeypatch):
    for number in itertools.count():
        parent = tmp_path / str(number)
        fill(parent / "7", "old")
        with killed_at(monkeypatch, number):
            try:
                discard(parent / "7")
                break
            except Killed:
                pass
        assert not (parent / "7").exists() or text(parent / "7") == "old"
        there = (parent / "7").exists()
        sweep(parent, str.isdecimal)
        assert os.listdir(parent) == ["7"] * there  # what was to be removed does not come back
    assert number > 6 and os.listdir(parent) == []


def test_a_kill_at_any_change_leaves_a_file_old_or_new(tmp_path, monkeypatch):
    file = tmp_path / "f"
    for number in itertools.count():
        file.write_bytes(b"old")
        with killed_at(monkeypatch, number):
            try:
                write_file(file, [b"n", b"ew"])
                break
            except Killed:
                pass
        assert file.read_bytes() in (b"old", b"new")
    assert number > 4 and file.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["f"]


def test_nothing_of_others_is_removed_or_followed(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/thesis").write_text("?")
    others = ("c.saving", "c.new", "c.old", "c.removed", "c.saving-1", "c.saving-0123ABCD", "c.saving-0123abcd")
    for name in others:  # the last as ours are called, without the mark of an owner
        fill(tmp_path / name, name)
    (tmp_path / "c.saving-00000000").symlink_to(tmp_path / "victim")
    fill(tmp_path / "c.saving-11111111", "signed by another")
    (tmp_path / "c.saving-11111111/owner").write_text("c.saving-22222222 is being written by process 1 on a\n")
    fill(tmp_path / "c.saving-33333333", "signed by a link")
    (tmp_path / "c.saving-33333333/owner").symlink_to(tmp_path / "victim/thesis")
    before = sorted(os.listdir(tmp_path))
    for new in ("one", "two"):
        put(tmp_path / "c", new, replace=True)
        assert text(tmp_path / "c") == new
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "c"])
    assert (tmp_path / "victim/thesis").read_text() == "?"
    assert [text(tmp_path / name) for name in others] == list(others)


def test_what_is_being_written_now_is_left_to_its_owner(tmp_path):
    work = Work(tmp_path / "c")
    fill(work.new, "slow")
    put(tmp_path / "c", "fast", replace=False)
    with pytest.raises(OSError, match="not empty"):
        work.publish()
    work.remove()
    command = [sys.executable, "-c", f"{ALONE}\nwork = Work(there)\nprint(flush=True)\ninput()", str(tmp_path / "d")]
    with subprocess.Popen(command, stdin=-1, stdout=-1) as other:
        other.stdout.readline()
        put(tmp_path / "d", "mine", replace=False)
        assert len(os.listdir(tmp_path)) == 3
        other.kill()
        other.wait()
    put(tmp_path / "d", "mine", replace=True)
    assert sorted(os.listdir(tmp_path)) == ["c", "d"]


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path):
    fill(tmp_path / "there", "kept")
    (tmp_path / "5").symlink_to(tmp_path / "there")
    (tmp_path / "6").symlink_to(tmp_path / "nowhere")
    discard(tmp_path / "5")
    discard(tmp_path / "6")
    assert os.listdir(tmp_path) == ["there"] and text(tmp_path / "there") == "kept"
    file = tmp_path / "f"
    file.symlink_to(tmp_path / "there/a")
    write_file(file, [b"own"])
    assert not file.is_symlink() and text(tmp_path / "there") == "kept"


def test_one_owner_at_a_time_in_one_process_and_over_several(tmp_path):
    claim = Claim(tmp_path / "lock")
    for _ in range(2):  # a look must not end the lock
        with pytest.raises(Taken, match=f"process {os.getpid()} on .*, which is this one"):
            Claim(tmp_path / "lock")
        command = [sys.executable, "-c", f"{ALONE}\nClaim(there)", str(tmp_path / "lock")]
        other = subprocess.run(command, capture_output=True, text=True, check=False)
        assert f"Taken: process {os.getpid()} on " in other.stderr
    claim.release()
    assert os.listdir(tmp_path) == []
    claim = Claim(tmp_path / "lock")
    del claim  # what is forgotten holds nothing
    Claim(tmp_path / "lock").release()


def test_without_locks_of_the_system_one_process_is_still_held_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_lock", lambda handle: False)
    claim = Claim(tmp_path / "lock")
    with pytest.raises(Taken):
        Claim(tmp_path / "lock")
    claim.release()
    work = Work(tmp_path / "c")
    work._claim.release(remove=False)
    sweep(tmp_path, lambda name: True)
    assert work.folder.exists()  # whether its owner is dead cannot be known


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder", "other", "large"])
def test_a_lock_file_that_is_not_ours_is_refused_and_left(tmp_path, kind):
    (tmp_path / "victim").write_text("precious")
    make = {
        "link": lambda path: path.symlink_to(tmp_path / "victim"),
        "hard link": lambda path: path.hardlink_to(tmp_path / "victim"),
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
        "other": lambda path: path.write_text("my notes"),
        "large": lambda path: path.write_text("process 1 on a\n" * 1000),
    }
    make[kind](tmp_path / "lock")
    with pytest.raises(OSError):
        Claim(tmp_path / "lock")
    assert os.path.lexists(tmp_path / "lock") and (tmp_path / "victim").read_text() == "precious"


def test_adapters_beside_others_are_replaced_alone(tmp_path):
    fill(tmp_path / "a", "old")
    (tmp_path / "a/link").symlink_to("a")
    work = Work(tmp_path / "a")
    folders.keep_others(tmp_path / "a", work.new, ["a"])
    assert sorted(os.listdir(work.new)) == ["deep", "link"] and (work.new / "deep/b").read_text() == "old"
    (work.new / "a").write_text("new")
    work.publish(replace=True)
    assert (tmp_path / "a/link").read_text() == "new" and (tmp_path / "a/deep/b").read_text() == "old"
    shutil.rmtree(tmp_path / "a")
