"""Faults, each with its seed: what is done to a run's processes or to its files, and when."""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shardlm.bench.faulty import EVERY, STEPS

PROCESS = ("kill", "kill-saving", "kill-coordinator", "kill-starting", "term", "stop")
FILE = ("truncate", "delete", "flip")
FULL = "full"


@dataclass(frozen=True)
class Strike:
    """A fault of a process: when it comes, and to which process.

    Attributes:
        kind: one of `PROCESS`.
        number: the signal that is sent.
        process: which process of the run gets it.
        step: it comes once this step is recorded, or, where `saving`, being saved.
        delay: seconds after that.
    """

    kind: str
    number: int
    process: int
    step: int
    saving: bool
    delay: float

    @classmethod
    def draw(cls, kind: str, processes: int, chance: random.Random) -> "Strike":
        """A fault of a kind at a random moment."""
        number = {"term": signal.SIGTERM, "stop": signal.SIGSTOP}.get(kind, signal.SIGKILL)
        process = 0 if kind == "kill-coordinator" else chance.randrange(processes)
        saving = kind == "kill-saving"
        step = chance.randrange(EVERY, STEPS, EVERY) if saving else chance.randrange(1, STEPS - 1)
        if kind == "kill-starting":
            return cls(kind, number, process, 0, False, chance.uniform(0.0, 3.0))
        return cls(kind, number, process, step, saving, chance.uniform(0.0, 0.1 if saving else 0.3))

    def __str__(self) -> str:
        when = "while it starts" if not self.step else f"{'saving' if self.saving else 'after'} step {self.step}"
        return f"{signal.Signals(self.number).name} to process {self.process} {when} (+{self.delay:.2f} s)"

    def due(self, folder: Path, recorded: int) -> bool:
        """Whether its moment has come, before the delay."""
        if not self.saving:
            return recorded >= self.step
        return any(folder.glob(f"{self.step}.saving-*")) or (folder / str(self.step)).exists()

    def strike(self, marker: str) -> bool:
        """Send the signal; returns whether the process was there."""
        time.sleep(self.delay)
        for pid in processes_with(marker):
            if _environment(pid).get("SHARDLM_PROCESS") == str(self.process):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, self.number)
                    return True
        return False


def processes_with(
    marker: str, also: Callable[[list[str]], bool] = lambda words: "faulty" in " ".join(words)
) -> list[int]:
    """Processes that run and have `marker` among the words of their command line, from Linux's /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            state = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            continue
        if marker in words and "launch" not in words and state != "Z" and also(words):
            found.append(int(entry.name))
    return sorted(found)


def _environment(pid: int) -> dict[str, str]:
    try:
        items = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    pairs = (item.partition("=") for item in items)
    return {name: value for name, _, value in pairs}


def damage(kind: str, folder: Path, chance: random.Random) -> str:
    """Damage one file of one checkpoint in a run's folder; returns in words what was done."""
    steps = sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal())
    # The newest more often than not: it is the one that a resumed run reads.
    step = steps[-1] if chance.random() < 0.75 else chance.choice(steps)
    files = sorted(p for p in (folder / str(step)).rglob("*") if p.is_file() and p.stat().st_size > 0)
    path = chance.choice(files)
    name, size = path.relative_to(folder), path.stat().st_size
    if kind == "delete":
        path.unlink()
        return f"{name} deleted"
    if kind == "truncate":
        left = chance.randrange(size)
        os.truncate(path, left)
        return f"{name} cut to {left} of {size} bytes"
    data, offset, bit = bytearray(path.read_bytes()), chance.randrange(size), chance.randrange(8)
    data[offset] ^= 1 << bit
    path.write_bytes(data)
    return f"{name}: bit {bit} of byte {offset} of {size} flipped"


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A tmpfs of `size` bytes on `folder`. Raises PermissionError where this may not be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise PermissionError("there is no program called mount") from error
    if done.returncode:
        raise PermissionError(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)
