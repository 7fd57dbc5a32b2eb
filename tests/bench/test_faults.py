"""A short fault campaign, and that the campaign sees what it is there to see."""

import random
import signal
from pathlib import Path

import pytest

from shardlm.bench import faults, strikes
from shardlm.bench.__main__ import main
from tests import xla


def test_six_faults_end_in_the_same_losses_or_a_clear_error(capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", xla.flags())
    kinds = ["kill-saving", "truncate", "delete", "flip"]
    assert main(["faults", "--processes", "1", "--files", "5", "--seed", "3", "--kinds", *kinds]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[-1].startswith("6 faults: ")
    assert "same losses" in output.splitlines()[0] and "kill-saving: SIGKILL to process " in output


@pytest.fixture
def run(tmp_path) -> tuple[faults.Campaign, Path]:
    """A campaign whose undisturbed run has four losses, and a folder for another."""
    campaign = faults.Campaign(tmp_path, seed=0)
    campaign._curves["one process"] = [4.0, 3.0, 2.0, 1.0]
    return campaign, tmp_path / "case"


def train_to(losses: list[float]):
    def train(folder: Path) -> None:
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(f'{{"step": 1, "loss": {loss}}}\n' for loss in losses))

    return train


def test_other_losses_are_wrong(run, monkeypatch):
    campaign, folder = run
    expected = campaign._curves["one process"]
    monkeypatch.setattr(campaign, "_train", train_to([4.0, 3.0, 2.0 + 1e-15, 1.0]))
    assert campaign._judge(folder, expected) == ("WRONG", "the loss of step 3 differs")
    monkeypatch.setattr(campaign, "_train", train_to(expected[:3]))
    assert campaign._judge(folder.with_name("b"), expected) == ("WRONG", "3 losses of 4")
    monkeypatch.setattr(campaign, "_train", train_to(expected))
    assert campaign._judge(folder.with_name("c"), expected) == ("same losses", "")


def test_an_error_that_does_not_name_the_place_is_wrong(run, monkeypatch):
    campaign, folder = run

    def fails(text: str):
        def train(_: Path) -> None:
            raise ValueError(text)

        monkeypatch.setattr(campaign, "_train", train)
        return campaign._judge(folder, [])[0]

    assert fails(f"the checkpoint {folder}/9 is damaged") == "clear error"
    assert fails("shapes differ") == "WRONG"


def test_draws_follow_the_seed():
    def draw(seed: int) -> list[str]:
        return [str(strikes.Strike.draw(kind, 2, random.Random(f"{seed} {kind}"))) for kind in strikes.PROCESS]

    assert draw(1) == draw(1) != draw(2)
    assert draw(1)[-1].startswith("SIGSTOP to process ")
    assert strikes.Strike.draw("kill-coordinator", 2, random.Random(0)).process == 0
    assert strikes.Strike.draw("term", 2, random.Random(0)).number == signal.SIGTERM


@pytest.mark.parametrize("kind", strikes.FILE)
def test_damage_is_to_one_file(kind, tmp_path):
    for step in ("3", "6"):
        (tmp_path / step).mkdir()
        (tmp_path / step / "a").write_bytes(bytes(100))
    strikes.damage(kind, tmp_path, random.Random(0))
    found = [(tmp_path / step / "a").read_bytes() if (tmp_path / step / "a").exists() else None for step in ("3", "6")]
    assert sum(content == bytes(100) for content in found) == 1


def test_the_plan_takes_turns_and_unknown_kinds_are_refused(capsys):
    plan = faults._plan([*strikes.PROCESS, *strikes.FILE, strikes.FULL], 7, 5)
    assert plan[:7] == [*strikes.PROCESS, "kill"]
    assert plan[7:] == ["full", "truncate", "delete", "flip", "truncate"]
    assert main(["faults", "--kinds", "fire"]) == 2
    assert "unknown kinds fire: they are kill, kill-saving," in capsys.readouterr().err
