"""The processes of one attempt: started together, ended together, whatever happens to the supervisor."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from shardlm.runtime.launch.output import Output, Reader

# Leads the process group of the attempt and ends it when its standard input does: when the supervisor closes it, or
# dies by whatever means. Workers' own children are in the group too.
_KEEPER = "trap '' HUP INT QUIT TERM; read -r _; kill -KILL 0"


class Gang:
    """Running processes, in a process group of their own. Use it in a `with` statement, which leaves none of them.

    Args:
        command: what each runs.
        environments: of each, beside this process's own.
        output: where what they print goes.
    """

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]], output: Output):
        self.command, self.environments, self.output = list(command), environments, output
        self.workers: list[subprocess.Popen] = []
        self.readers: list[Reader] = []
        self._keeper: subprocess.Popen | None = None

    def __enter__(self) -> "Gang":
        self._keeper = subprocess.Popen(["/bin/sh", "-c", _KEEPER], stdin=subprocess.PIPE, process_group=0)
        try:
            for index, environment in enumerate(self.environments):
                self._start(index, environment)
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def _start(self, index: int, environment: Mapping[str, str]) -> None:
        assert self._keeper is not None
        read, write = os.pipe()
        try:
            worker = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=write,
                stderr=write,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                process_group=self._keeper.pid,
            )
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
        reader = Reader(index, read, self.output)
        reader.start()
        self.workers.append(worker)
        self.readers.append(reader)

    def statuses(self) -> list[int | None]:
        """The exit status of each, negative for a signal; None of those that run."""
        return [worker.poll() for worker in self.workers]

    def keeper_is_gone(self) -> bool:
        """Whether somebody has ended what guards the group."""
        return self._keeper is not None and self._keeper.poll() is not None

    def stopped(self) -> list[int]:
        """Which are stopped by SIGSTOP or a debugger, where the system says so."""
        return [i for i, worker in enumerate(self.workers) if _state(worker.pid) in ("T", "t")]

    def send(self, number: int) -> None:
        """Send a signal to each that runs."""
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(number)

    def kill(self) -> None:
        """End all of them, their children and the keeper, and wait until they are gone."""
        if self._keeper is None:
            return
        with contextlib.suppress(OSError):  # all have gone already
            os.killpg(self._keeper.pid, signal.SIGKILL)
        for process in (*self.workers, self._keeper):
            process.wait()
        assert self._keeper.stdin is not None
        with contextlib.suppress(OSError):
            self._keeper.stdin.close()
        self._keeper = None
        for reader in self.readers:
            reader.join(timeout=5.0)


def _state(pid: int) -> str:
    """The letter by which Linux tells what a process does; empty elsewhere."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
