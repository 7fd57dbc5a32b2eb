"""Starts the processes of a run, watches them, and starts all again when one dies."""

import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from shardlm.runtime import clusters
from shardlm.runtime.launch.gang import Gang
from shardlm.runtime.launch.output import Output
from shardlm.runtime.launch.restarts import Failure, Restarts
from shardlm.runtime.processes import TRANSIENT
from shardlm.runtime.saved import SAVED, read_saved

_TICK = 0.05  # seconds between two looks at the processes
_CASCADE = 0.5  # seconds in which those die that a first death takes along
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


@dataclass
class Supervisor:
    """One run.

    Attributes:
        command: what each process runs.
        restarts: how many processes, and what to do when one dies.
        devices: fake CPU devices, or accelerators, of each process; None leaves it to them.
        grace: seconds that processes have to save and end after Ctrl-C or SIGTERM.
        extra: environment for all of them.
    """

    command: Sequence[str]
    restarts: Restarts
    devices: int | None = None
    grace: float = 30.0
    extra: dict[str, str] = field(default_factory=dict)
    output: Output = field(default_factory=Output)

    def run(self) -> int:
        """Returns the exit status: 0 when all ended with 0, else the first failure's; 128 + a signal's number."""
        with _signals() as received, tempfile.TemporaryDirectory(prefix="shardlm-launch-") as folder:
            told, furthest = Path(folder) / "saved", -1
            while True:
                count = self.restarts.count
                began = time.monotonic()
                environments = [each | {SAVED: str(told)} for each in self._environments(count)]
                with Gang(self.command, environments, self.output) as gang:
                    failure = self._watch(gang, received, began)
                    if isinstance(failure, int):
                        return failure
                    stopped = gang.stopped()
                    gang.kill()
                    first = next(iter(failure.statuses))
                    # Only now has all that it printed been read.
                    failure = Failure(
                        failure.statuses, gang.readers[first].last_lines(), failure.seconds, read_saved(told) > furthest
                    )
                    furthest = max(furthest, read_saved(told))
                self._report(failure, count, stopped)
                status = next(iter(failure.statuses.values()))
                if why := self.restarts.after(failure):
                    self._say(f"not started again: {why}")
                    return status if status > 0 else 128 - status
                wait, made = self.restarts.wait, self.restarts.made
                self._say(
                    f"restart {made} of {self.restarts.allowed} in {wait:g} s, on {_processes(self.restarts.count)}"
                )
                until = time.monotonic() + wait
                while time.monotonic() < until:
                    if received:
                        return 128 + received[0]
                    time.sleep(_TICK)

    def _watch(self, gang: Gang, received: list[int], began: float) -> int | Failure:
        """Wait until all are done, one fails, or the supervisor is told to end."""
        told_of: set[int] = set()
        alone_since: float | None = None
        victims_until = 0.0
        while True:
            statuses = gang.statuses()
            ended = {index: status for index, status in enumerate(statuses) if status is not None}
            if failed := {index: status for index, status in ended.items() if status != 0}:
                # A process whose peer died may be seen to end before that peer.
                if all(_is_victim(status) for status in failed.values()) and time.monotonic() < victims_until:
                    time.sleep(_TICK)
                    continue
                return Failure(_culprits(failed), [], time.monotonic() - began)
            victims_until = time.monotonic() + _CASCADE
            if len(ended) == len(statuses):
                return 0
            if gang.keeper_is_gone():
                self._say("the guard of the process group was ended from outside")
                return Failure({0: -signal.SIGKILL}, [], time.monotonic() - began)
            if received or self.output.closed:
                return self._end(gang, received)
            for index in gang.stopped():
                if index not in told_of:
                    told_of.add(index)
                    self._say(f"process {index} is stopped (SIGSTOP, or a debugger): the others wait for it")
            if ended and alone_since is None:
                alone_since = time.monotonic()
            if ended and alone_since is not None and time.monotonic() - alone_since > 60 and -1 not in told_of:
                told_of.add(-1)
                running = ", ".join(str(i) for i, status in enumerate(statuses) if status is None)
                self._say(f"{_named(ended)} ended with status 0 a minute ago, and still running: {running}")
            time.sleep(_TICK)

    def _end(self, gang: Gang, received: list[int]) -> int:
        """Let the processes save and end, and kill those that do not; a second signal kills all at once."""
        number = received[0] if received else signal.SIGTERM
        if received:
            self._say(f"{signal.Signals(number).name}: the processes have {self.grace:g} s to save and end")
        gang.send(signal.SIGTERM)
        until, seen = time.monotonic() + self.grace, len(received)
        while time.monotonic() < until and None in gang.statuses():
            if len(received) > seen:
                break
            time.sleep(_TICK)
        statuses = gang.statuses()
        if left := [index for index, status in enumerate(statuses) if status is None]:
            self._say(f"{_named(left)} did not end, and {'is' if len(left) == 1 else 'are'} killed")
        # As `fit` does: 0 where everything was saved.
        return 0 if statuses == [0] * len(statuses) and number == signal.SIGTERM else 128 + number

    def _environments(self, count: int) -> list[dict[str, str]]:
        shared = dict(self.extra)
        if self.devices:
            shared[clusters.DEVICES] = str(self.devices)
        shared |= {clusters.COORDINATOR: f"127.0.0.1:{_free_port()}", clusters.PROCESSES: str(count)}
        return [
            shared | {clusters.PROCESS: str(i), clusters.LOCAL_PROCESS: str(i), clusters.LOCAL_PROCESSES: str(count)}
            for i in range(count)
        ]

    def _report(self, failure: Failure, count: int, stopped: list[int]) -> None:
        [(first, status), *others] = failure.statuses.items()
        self._say(f"process {first} of {count} {_how(status)} after {failure.seconds:.1f} s; its last lines:")
        for line in failure.lines or ["(it printed nothing)"]:
            self._say(f"  | {line}")
        for index, other in others:
            self._say(f"process {index} {_how(other)} with it")
        if stopped:
            self._say(f"{_named(stopped)} had been stopped (SIGSTOP, or a debugger)")

    def _say(self, text: str) -> None:
        try:
            print(f"launch: {text}", file=sys.stderr, flush=True)
        except (BrokenPipeError, ValueError):
            self.output.closed = True


def _is_victim(status: int) -> bool:
    """Whether a process ended because another did: JAX then raises an error, or ends it by SIGABRT."""
    return status in (-signal.SIGABRT, TRANSIENT)


def _culprits(failed: dict[int, int]) -> dict[int, int]:
    """Those that ended on their own; all, where each says that it was another."""
    return {index: status for index, status in failed.items() if not _is_victim(status)} or failed


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _named(indices: Sequence[int] | dict[int, int]) -> str:
    return f"process{'es' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"


def _processes(count: int) -> str:
    return f"{count} process{'es' if count > 1 else ''}"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that ask the supervisor to end, as they come; those that were ignored stay so."""
    received: list[int] = []
    before = {}
    for name in _SIGNALS:
        number = getattr(signal, name)
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
