"""What processes print, merged line by line, each line with the number of its process."""

import os
import re
import sys
import threading
from collections import deque
from typing import IO, Any

_LONGEST = 1 << 16  # bytes of a line that is passed on before it ends
_KEPT = 15  # lines of each process to show when it dies
_SHOWN = 400  # characters of each of those
_CONNECTED = re.compile(rb"\[Gloo\] Rank \d+ is connected to \d+ peer ranks\..*")  # JAX's CPU backend, of every group


class Output:
    """Where all processes' lines go; one at a time."""

    def __init__(self, stream: IO[Any] | None = None):
        self._stream = stream
        self._lock = threading.Lock()
        self.closed = False  # nobody reads any more, as in `launch ... | head`

    def write(self, line: bytes) -> None:
        """Write a line, with its newline; after the reader has gone, nothing."""
        stream: Any = self._stream or sys.stdout
        stream = getattr(stream, "buffer", stream)
        with self._lock:
            if self.closed:
                return
            try:
                stream.write(line)
                stream.flush()
            except (BrokenPipeError, ValueError):
                self.closed = True


class Reader(threading.Thread):
    """Passes on what one process prints, by lines; what stays without a newline is passed on when the process ends.

    Left out are the lines by which the CPU backend says, dozens of times, that all is well.

    A thread for each process, so that a reader of ours that is slow holds them up and not the supervisor.
    """

    def __init__(self, index: int, descriptor: int, output: Output):
        super().__init__(name=f"shardlm-output-{index}", daemon=True)
        self._descriptor, self._output = descriptor, output
        self._prefix = f"[{index}] ".encode()
        self._last: deque[bytes] = deque(maxlen=_KEPT)

    def run(self) -> None:
        """Read until all who hold the other end have closed it."""
        part = b""
        while data := os.read(self._descriptor, _LONGEST):
            *lines, part = (part + data).split(b"\n")
            for line in lines:
                self._pass(line)
            if len(part) >= _LONGEST:
                self._pass(part)
                part = b""
        if part:
            self._pass(part)
        os.close(self._descriptor)

    def last_lines(self) -> list[str]:
        """The last lines, shortened."""
        return [line[:_SHOWN].decode(errors="replace") for line in list(self._last)]

    def _pass(self, line: bytes) -> None:
        line = line.rstrip(b"\r")
        if _CONNECTED.fullmatch(line):
            return
        self._last.append(line[: 4 * _SHOWN])
        self._output.write(self._prefix + line + b"\n")
