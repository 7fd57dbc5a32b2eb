"""`python -m shardlm checkpoints` says what is there, and changes only what it is asked to."""

import json
import os
import re
import shutil

import jax.numpy as jnp
import pytest

from shardlm.__main__ import main
from shardlm.checkpoint import Checkpoints, command, restore
from shardlm.runtime import folders


@pytest.fixture
def run(tmp_path):
    """Steps 1, 2, 3 and 10, the third damaged, and a save that was killed."""
    with Checkpoints(tmp_path / "run", keep=None) as checkpoints:
        for step, loss in ((1, 3.5), (2, 0.25), (3, None), (10, None)):
            checkpoints.save(step, {"x": jnp.full(3, float(step))}, {"layout": "data=2", "loss": 2.0}, loss=loss)
    killed = folders.Work(tmp_path / "run/11")
    (killed.new / "state").mkdir(parents=True)
    (tmp_path / "run/metrics.jsonl").touch()
    largest = max((tmp_path / "run/3/state").rglob("*"), key=lambda entry: entry.stat().st_size * entry.is_file())
    data = bytearray(largest.read_bytes())
    data[7] ^= 4
    largest.write_bytes(data)
    return tmp_path / "run"


def listed(capsys, *arguments: object) -> tuple[int, list[list[str]]]:
    """The exit status, and the lines split into columns."""
    status = main(["checkpoints", *map(str, arguments)])
    return status, [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]


def test_it_lists_and_verifies(run, capsys):
    status, lines = listed(capsys, run)
    assert status == 0
    assert lines[0] == ["step", "age", "size", "loss", "held-out loss", "layout", "state"]
    size = sum(entry.stat().st_size for entry in (run / "1/state").rglob("*") if entry.is_file())
    assert re.fullmatch(r"\d+ s", lines[1][1]) and lines[1][2] == f"{size / 1000:.3g} kB"
    assert [[line[0], *line[3:]] for line in lines[1:-1]] == [
        ["1", "2.0000", "3.5000", "data=2", "complete"], ["2", "2.0000", "0.2500", "data=2", "complete"],
        ["3", "2.0000", "-", "data=2", "complete"], ["10", "2.0000", "-", "data=2", "complete"],
    ]  # fmt: skip
    assert re.fullmatch(r"11\.saving-[0-9a-f]{8}", lines[-1][0]) and lines[-1][-1].startswith("not finished")
    status, lines = listed(capsys, run, "--verify")
    assert status == 1
    assert [line[-1].split()[0] for line in lines[1:-1]] == ["ok", "ok", "damaged:", "ok"]
    assert re.fullmatch(r"damaged: state/.* has other bytes", lines[3][-1])
    (run / "2/metadata.json").unlink()
    (run / "10/state/_METADATA").unlink()
    status, lines = listed(capsys, run)
    assert (status, lines[2][-1]) == (1, "damaged: metadata.json is missing")
    assert lines[4][-1] == "damaged: state/_METADATA is missing"


def test_it_prunes_as_a_run_does(run, capsys):
    (run / "1/metadata.json").unlink()
    status, lines = listed(capsys, run, "--prune", "--keep", 1, "--keep-best", 1)
    assert (status, lines[0]) == (1, ["removed step 3"])
    names = [name.partition("-")[0] for name in os.listdir(run)]
    assert sorted(names) == ["1", "10", "11.saving", "2", "metrics.jsonl"]


def test_what_it_exports_is_a_checkpoint_by_itself(run, tmp_path, capsys):
    status, lines = listed(capsys, run, "--export", 2, tmp_path / "to/best")
    assert (status, lines) == (0, [[f"exported step 2 to {tmp_path}/to/best"]])
    shutil.rmtree(run / "2")
    assert restore(tmp_path / "to/best", {"x": jnp.zeros(3)})["x"].tolist() == [2, 2, 2]
    assert json.loads((tmp_path / "to/best/metadata.json").read_text())["step"] == 2
    assert os.listdir(tmp_path / "to") == ["best"]
    for step, error in ((1, f"{tmp_path}/to/best exists"), (3, "has other bytes"), (7, "no checkpoint at .*/run/7")):
        to = tmp_path / ("to/best" if step == 1 else "elsewhere")
        assert main(["checkpoints", str(run), "--export", str(step), str(to)]) == 2
        assert re.search(error, capsys.readouterr().err)
    assert not (tmp_path / "elsewhere").exists()


def test_a_copy_that_differs_is_not_exported(run, tmp_path, monkeypatch):
    damage, calls = command.damage, []

    def second_time(directory, expected):
        calls.append(directory)
        return damage(directory, expected) if len(calls) == 1 else ["state/_METADATA has other bytes"]

    monkeypatch.setattr(command, "damage", second_time)
    with pytest.raises(ValueError, match=r"elsewhere\.saving-\w+/new is damaged: state/_METADATA has other bytes"):
        command.export(command.absolute(run / "2"), command.absolute(tmp_path / "elsewhere"))
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_without_checkpoints_is_an_error(run, tmp_path, capsys):
    for folder, error in (
        (tmp_path, "has no checkpoints: give the folder that was given to --checkpoint-dir"),
        (run / "1", "is a checkpoint, not a run's folder of them"),
        (run / "nowhere", "no folder"),
    ):
        assert main(["checkpoints", str(folder)]) == 2
        assert error in capsys.readouterr().err
