"""`python -m shardlm.bench faults`: what becomes of a run whose processes are killed and whose files are damaged."""

import argparse
import contextlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import jax

import shardlm as sl
from shardlm.bench import faulty, strikes

_HELP = """
Disturb runs of a tiny model in many ways, each drawn from the seed, and look at how they end.

Faults of processes (two processes of two fake CPU devices, under `python -m shardlm launch`): SIGKILL at a random
moment, of either, of the coordinator, while a checkpoint is being saved, and while the run starts; SIGTERM, after which
the same command is given again; SIGSTOP. Faults of files (one process, resumed after the damage): a file of a
checkpoint deleted, cut, or with one bit flipped; and a disk, a small tmpfs, that is full.

Each must end in the losses of the undisturbed run, equal to the last bit, or, of files alone, in an error that names
the place. Not so are: HANG, still running after its time; ORPHAN, processes left; WRONG, other losses or an error that
says nothing. The exit status is 1 if there is one of these. NOT RUN, where a tmpfs may not be mounted, is not counted.
"""

_TIME = 240.0  # seconds for one fault
_GOOD = ("same losses", "clear error")
_NOT_RUN = "NOT RUN"


@dataclass(frozen=True)
class Case:
    """One fault and how it ended."""

    what: str
    outcome: str
    detail: str
    seconds: float


def add(commands: Any) -> None:
    """Add the command to an argparse object of subcommands."""
    parser = commands.add_parser(
        "faults",
        help="kill processes and damage checkpoints, and see that runs end in the same losses",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--processes", type=int, default=24, help="faults of processes (default 24)")
    parser.add_argument("--files", type=int, default=20, help="faults of files (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--seconds", type=float, default=1800, help="begin no fault after this time (default 1800)")
    parser.add_argument(
        "--kinds", nargs="+", help=f"only these: {', '.join((*strikes.PROCESS, *strikes.FILE, strikes.FULL))}"
    )


def run(options: argparse.Namespace) -> int:
    """The campaign; prints a line for each fault, and a table at the end."""
    for name in ("absl", "asyncio"):  # Orbax tells of each failed save in pages
        logging.getLogger(name).setLevel(logging.CRITICAL)
    known = (*strikes.PROCESS, *strikes.FILE, strikes.FULL)
    if wrong := set(options.kinds or ()) - set(known):
        raise ValueError(f"unknown kinds {', '.join(sorted(wrong))}: they are {', '.join(known)}")
    if options.processes and not Path("/proc/self/environ").exists():
        raise ValueError("faults of processes need Linux, whose /proc says which process is which")
    wanted = [kind for kind in known if not options.kinds or kind in options.kinds]
    until = time.monotonic() + options.seconds
    cases: list[Case] = []
    with tempfile.TemporaryDirectory(prefix="shardlm-faults-") as name:
        campaign = Campaign(Path(name).resolve(), options.seed)
        plan = _plan(wanted, options.processes, options.files)
        for number, kind in enumerate(plan):
            if time.monotonic() > until:
                print(f"time is up: {len(plan) - number} of {len(plan)} faults are left out")
                break
            case = campaign.case(number, kind)
            cases.append(case)
            print(
                f"{number + 1:3}/{len(plan)}  {case.outcome:<12}{case.seconds:6.1f} s  {kind}: {case.what}", flush=True
            )
            if case.detail:
                print(f"{'':24}{case.detail}", flush=True)
    counts = Counter(case.outcome for case in cases)
    print(f"{len(cases)} faults: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    return 0 if all(case.outcome in (*_GOOD, _NOT_RUN) for case in cases) else 1


def _plan(wanted: list[str], processes: int, files: int) -> list[str]:
    of_processes = [kind for kind in wanted if kind in strikes.PROCESS]
    of_files = [kind for kind in wanted if kind in strikes.FILE]
    plan = list(islice(cycle(of_processes), processes)) if of_processes else []
    if files and strikes.FULL in wanted:
        plan.append(strikes.FULL)
        files -= 1
    return plan + (list(islice(cycle(of_files), files)) if of_files else [])


class Campaign:
    """What the faults of one campaign share: the undisturbed losses, and what was compiled.

    Args:
        folder: for everything that is written.
        seed: of all draws.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        self._curves: dict[str, list[float]] = {}
        self._alone: sl.Trainer | None = None

    def case(self, number: int, kind: str) -> Case:
        """Draw a fault of this kind, let it happen, and judge the end."""
        chance = random.Random(f"{self.seed} {number} {kind}")
        began = time.monotonic()
        folder = self.folder / f"case-{number}"
        if kind in strikes.PROCESS:
            what, outcome, detail = self._of_process(strikes.Strike.draw(kind, 2, chance), folder)
        elif kind == strikes.FULL:
            what, outcome, detail = self._full_disk(folder, chance)
        else:
            what, outcome, detail = self._of_file(kind, folder, chance)
        shutil.rmtree(folder, ignore_errors=True)
        return Case(what, outcome, detail, time.monotonic() - began)

    # Processes

    def _of_process(self, strike: strikes.Strike, folder: Path) -> tuple[str, str, str]:
        expected = self.curve("two processes", lambda folder: self._launch(folder, None))
        status, hit = self._launch(folder, strike)
        if strike.number == signal.SIGTERM and status == 0:  # saved and ended; the scheduler starts it again
            status, _ = self._launch(folder, None)
        what = str(strike) if hit else f"{strike}: came too late"
        if left := strikes.processes_with(str(folder)):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return what, "ORPHAN", f"{len(left)} processes were left"
        if status is None:
            return what, "HANG", f"see {folder}.log"
        found = _losses(folder)
        if status == 0 and found == expected:
            return what, "same losses", ""
        return what, "WRONG", f"status {status}; {_difference(expected, found)}; {_last_line(folder)}"

    def _launch(self, folder: Path, strike: strikes.Strike | None) -> tuple[int | None, bool]:
        """Run under the launcher, with a fault on the way; returns its status, None after a hang, and if it struck."""
        command = [sys.executable, "-m", "shardlm", "launch", "--processes", "2", "--devices-per-process", "2"]
        command += ["--backoff", "0.1", "-m", "shardlm.bench.faulty", str(folder)]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "SHARDLM_HEARTBEAT": "10",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        hit = False
        with open(f"{folder}.log", "ab") as log:
            launcher = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            until = time.monotonic() + _TIME
            try:
                while launcher.poll() is None and time.monotonic() < until:
                    if strike is not None and not hit and strike.due(folder, len(_losses(folder))):
                        hit = strike.strike(str(folder))
                        strike = strike if hit or strike.step == 0 else None
                    time.sleep(0.01)
            finally:
                if launcher.poll() is None:
                    launcher.kill()  # the guard of its processes ends them
                launcher.wait()
        return (launcher.returncode if launcher.returncode >= 0 else None), hit

    # Files

    def _of_file(self, kind: str, folder: Path, chance: random.Random) -> tuple[str, str, str]:
        expected = self.curve("one process", self._train)
        # As if the run had been ended after the last checkpoint but one.
        shutil.copytree(self.folder / "one process", folder)
        shutil.rmtree(folder / str(faulty.STEPS))
        what = strikes.damage(kind, folder, chance)
        return what, *self._judge(folder, expected)

    def _full_disk(self, folder: Path, chance: random.Random) -> tuple[str, str, str]:
        expected = self.curve("one process", self._train)
        one = sum(p.stat().st_blocks * 512 for p in (self.folder / "one process" / str(faulty.EVERY)).rglob("*"))
        size = int(one * chance.uniform(1.2, 2.8))
        what = f"a disk of {size} bytes, for checkpoints of {one}"
        try:
            with strikes.small_disk(folder, size):
                return what, *self._judge(folder, expected)
        except PermissionError as error:
            return what, _NOT_RUN, str(error)

    def _judge(self, folder: Path, expected: list[float]) -> tuple[str, str]:
        """Go on with the run in `folder`, and look at how that ends."""
        try:
            self._train(folder)
        except (ValueError, RuntimeError, OSError) as error:
            text = " ".join(str(error).split())
            return ("clear error" if str(folder) in text else "WRONG"), f"{type(error).__name__}: {text[:300]}"
        found = _losses(folder)
        # On a full disk the last lines of the record may be missing too: those that are there must be right.
        return ("same losses", "") if found == expected else ("WRONG", _difference(expected, found))

    def _train(self, folder: Path) -> None:
        with jax.enable_x64(True), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            if self._alone is None:
                with contextlib.suppress(RuntimeError):  # there are others, and enough of them
                    sl.fake_devices(4)
                self._alone = faulty.make_trainer(devices=jax.devices()[:4])
            faulty.train(self._alone, folder)

    def curve(self, name: str, train: Callable[[Path], Any]) -> list[float]:
        """The losses of an undisturbed run, made once; its folder stays."""
        if name not in self._curves:
            folder = self.folder / name
            train(folder)
            self._curves[name] = _losses(folder)
            if len(self._curves[name]) != faulty.STEPS:
                raise ValueError(f"the undisturbed run of {name} did not end: {_last_line(folder)}")
        return self._curves[name]


def _losses(folder: Path) -> list[float]:
    """What is recorded, step by step."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    except (OSError, ValueError):  # not yet there, or a line is being written
        return []


def _difference(expected: list[float], found: list[float]) -> str:
    if len(expected) != len(found):
        return f"{len(found)} losses of {len(expected)}"
    step = next((i for i, (a, b) in enumerate(zip(expected, found, strict=True), 1) if a != b), None)
    return "the losses are the same" if step is None else f"the loss of step {step} differs"


def _last_line(folder: Path) -> str:
    log = Path(f"{folder}.log")
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return lines[-1] if lines else "it printed nothing"
