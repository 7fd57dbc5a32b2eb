"""metrics.jsonl: what a run records, line by line, for one run at a time."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardlm.runtime.claims import Claim, Taken
from shardlm.runtime.folders import write_file

NAME, _LOCK = "metrics.jsonl", ".recording"
_LONGEST = 1 << 20  # bytes that are read of a line at once; a longer one is none of ours


class Record:
    """The file metrics.jsonl of a folder, held for one run until `close`.

    Args:
        folder: made if it does not exist.

    Raises:
        OSError: another run records there; the file is a link, which is not followed, or no plain file.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._claim = Claim(folder / _LOCK)
        except Taken as error:
            raise OSError(f"{self.path}: another run records there: {error}") from None
        try:
            with contextlib.suppress(FileNotFoundError):
                os.close(_open(self.path, os.O_RDONLY))
        except BaseException:
            self._claim.release()
            raise

    def drop(self, start: int) -> int:
        """Drop the lines of steps after `start`, and a last line cut short, in one step; returns their number."""
        try:
            found = [(kept, line.endswith(b"\n")) for line, kept in self._lines(start)]
        except FileNotFoundError:
            return 0
        if not all(kept and ended for kept, ended in found):
            write_file(self.path, self._kept(start))
        return sum(not kept for kept, _ in found)

    def append(self, line: str) -> str:
        """Add a line; on a full disk leave the file as it was. Returns what went wrong, or nothing."""
        size = None
        try:
            # Closed again, so that the line outlives a kill.
            with os.fdopen(_open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
                size = os.fstat(file.fileno()).st_size
                file.write(line.encode())
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)
            return f"{self.path}: the line above is not recorded: {error.strerror or error}"
        return ""

    def close(self) -> None:
        """Let other runs record there. Closing twice does no harm."""
        self._claim.release()

    def _kept(self, start: int) -> Iterator[bytes]:
        line = b"\n"
        for line, kept in self._lines(start):
            if kept:
                yield line
        if not line.endswith(b"\n") and _is_kept(line, start):
            yield b"\n"

    def _lines(self, start: int) -> Iterator[tuple[bytes, bool]]:
        """The file's lines, and whether each stays; of a line that is too long to be ours the parts, which stay."""
        with os.fdopen(_open(self.path, os.O_RDONLY), "rb") as file:
            begins = True
            while line := file.readline(_LONGEST):
                ends = line.endswith(b"\n")
                yield line, _is_kept(line, start) if begins and (ends or len(line) < _LONGEST) else True
                begins = ends


def _open(path: Path, flags: int) -> int:
    """The file, which is no link and no pipe."""
    if path.is_symlink():
        raise OSError(f"{path} is a symbolic link, which is not followed: remove it")
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    handle = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{path} is no plain file: remove it")
    return handle


def _is_kept(line: bytes, start: int) -> bool:
    try:
        found: Any = json.loads(line)
        return found["step"] <= start
    except (ValueError, TypeError, KeyError, RecursionError):
        return line.endswith(b"\n")  # not a line of ours: leave it, unless a kill cut it short
