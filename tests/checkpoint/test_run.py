"""Of a run's checkpoints the right ones stay, and one run at a time saves to a folder."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from shardlm.checkpoint import Checkpoints, CheckpointWarning, DamagedCheckpoint, SaveError, command, run
from shardlm.checkpoint.retention import Retention

ROOT = Path(__file__).parents[2]
LOSSES = {10: 3.0, 20: 1.0, 30: None, 40: 1.0, 50: 2.0, 60: 5.0}


@pytest.mark.parametrize(
    ("rules", "stay"),
    [
        ({"keep": 2}, [50, 60]),
        ({"keep": 9}, [10, 20, 30, 40, 50, 60]),
        ({"keep": None, "keep_best": 1}, [10, 20, 30, 40, 50, 60]),
        ({"keep": 1, "keep_every": 30}, [30, 60]),
        ({"keep": 1, "keep_every": 7}, [60]),
        ({"keep": 1, "keep_best": 1}, [40, 60]),  # of two as good the newer
        ({"keep": 1, "keep_best": 3}, [20, 40, 50, 60]),
        ({"keep": 1, "keep_best": 9, "keep_every": 30}, [10, 20, 30, 40, 50, 60]),
    ],
)
def test_a_checkpoint_stays_that_any_rule_names(rules, stay):
    surplus = Retention(**rules).surplus(LOSSES)
    assert sorted(LOSSES.keys() - surplus) == stay
    assert surplus == sorted(surplus)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"keep": 0}, "keep=0: expected how many checkpoints stay, at least 1, or None for all"),
        ({"keep_every": 0}, "keep_every=0: expected a number of steps, at least 1, or None"),
        ({"keep_best": -1}, "keep_best=-1: expected how many checkpoints of lowest loss, at least 1, or None"),
    ],
)
def test_a_rule_out_of_range_is_an_error(tmp_path, rules, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path, **rules)


def test_rules_hold_over_runs_and_leave_what_is_damaged(tmp_path):
    state = {"x": jnp.ones(3)}
    for losses in ({1: 1.0, 2: 2.0}, {3: 3.0, 4: 0.5}):
        with Checkpoints(tmp_path, keep=1, keep_best=1) as checkpoints:
            for step, loss in losses.items():
                checkpoints.save(step, state, loss=loss)
                if step == 1:
                    checkpoints.wait()
                    (tmp_path / "0").mkdir()
    assert sorted(os.listdir(tmp_path)) == ["0", "4"]


HOLD = """
import sys, jax.numpy as jnp
from shardlm.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"x": jnp.ones(3)})
checkpoints.wait()
print("saved", flush=True)
sys.stdin.read()
"""


def test_two_runs_do_not_save_to_one_folder(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=-1, stdout=-1) as other:
        assert other.stdout.readline() == "saved\n"
        with Checkpoints(tmp_path) as checkpoints:
            message = rf"cannot save to {tmp_path}: OSError: another run is saving there: process {other.pid} on "
            with pytest.raises(SaveError, match=message):
                checkpoints.claim()
            assert checkpoints.restore(1, {"x": jnp.zeros(3)})["x"].tolist() == [1, 1, 1]  # any number may read
            other.kill()
            other.wait()
            checkpoints.save(2, {"x": jnp.ones(3)})  # the dead hold nothing
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_a_damaged_step_is_set_aside_as_often_as_it_is(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        names = []
        for _ in range(2):
            (tmp_path / "5").mkdir()
            names.append(checkpoints.set_aside(5))
        assert names == ["5.damaged", "5.damaged-2"]
        assert checkpoints.steps() == []
        with pytest.raises(SaveError, match="the damaged .*/7 could not be renamed: FileNotFoundError"):
            checkpoints.set_aside(7)


def test_an_error_in_its_block_is_raised_and_the_save_is_complete(tmp_path):
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(3)})
        raise ZeroDivisionError
    assert sorted(os.listdir(tmp_path)) == ["1"]


def test_two_runs_of_one_process_do_not_save_to_one_folder(tmp_path):
    first = Checkpoints(tmp_path)
    first.save(1, {"x": jnp.ones(3)})
    with Checkpoints(tmp_path) as second:
        for _ in range(2):
            with pytest.raises(
                SaveError, match=f"another run is saving there: process {os.getpid()} on .* is this one"
            ):
                second.save(2, {"x": jnp.ones(3)})
        first.close()
        second.save(2, {"x": jnp.ones(3)})
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_a_step_is_looked_for_once_the_folder_is_claimed(tmp_path, monkeypatch):
    """Another run saves and ends between this one's first look and its save."""
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        with Checkpoints(tmp_path) as other:
            other.save(1, {"x": jnp.ones(3)})
        with pytest.raises(ValueError, match="cannot save step 1 to .*steps only go up"):
            checkpoints.save(1, {"x": jnp.ones(3)})
        checkpoints.save(2, {"x": jnp.ones(3)})


def test_a_step_that_is_a_link_does_not_end_the_run(tmp_path):
    with Checkpoints(tmp_path / "large") as checkpoints:
        checkpoints.save(3, {"x": jnp.ones(3)})
    run = tmp_path / "run"
    run.mkdir()
    (run / "3").symlink_to(tmp_path / "large/3")
    (run / "4").symlink_to(tmp_path / "nowhere")
    (run / "5").touch()
    with Checkpoints(run, keep=1) as checkpoints:
        assert checkpoints.restore(3, {"x": jnp.zeros(3)})["x"].tolist() == [1, 1, 1]
        with pytest.raises(DamagedCheckpoint, match="/4 is damaged: it is a link to .*nowhere, which is missing"):
            checkpoints.metadata(4)
        assert checkpoints.set_aside(4) == "4.damaged"
        for step in (6, 7):
            checkpoints.save(step, {"x": jnp.ones(3)})
    assert sorted(os.listdir(run)) == ["4.damaged", "5", "7"]
    assert os.listdir(tmp_path / "large") == ["3"]  # the link alone is removed


def test_what_a_link_that_stays_leads_to_stays_as_well(tmp_path):
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"x": jnp.ones(3)})
    (tmp_path / "7").symlink_to("1")
    (tmp_path / "3").symlink_to("2")
    assert run.surplus(tmp_path, Retention(1)) == [2, 3]
    assert command.prune(tmp_path, Retention(1)) == [2, 3]
    assert sorted(os.listdir(tmp_path)) == ["1", "7"]


def test_an_error_after_the_commit_is_a_warning_and_the_step_is_saved(tmp_path, monkeypatch):
    def broken(path):
        raise RuntimeError("no older ones today")

    monkeypatch.setattr(run, "discard", broken)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(3)})
        checkpoints.save(2, {"x": jnp.ones(3)})
        with pytest.warns(
            CheckpointWarning, match="/2 is saved, and older ones could not be removed: RuntimeError: no ol"
        ):
            checkpoints.wait()
        assert checkpoints.steps() == [1, 2]


def test_a_file_that_is_not_the_lock_of_a_run_is_left(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.saving").symlink_to(tmp_path / "victim")
    with pytest.raises(SaveError, match=r"/run/\.saving is a symbolic link, which is not followed: remove it"):
        Checkpoints(tmp_path / "run").claim()
    assert (tmp_path / "victim").read_text() == "precious"
