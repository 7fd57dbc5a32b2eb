"""Holding a place on the disk for one owner at a time, by a lock that the system takes back when its holder dies.

This file imports nothing of shardlm, so that every part of it may claim a place.
"""

import contextlib
import os
import socket
import stat
import threading
import weakref
from pathlib import Path

_LONGEST = 400  # bytes of a file that says who holds it

# A record lock is the whole process's: what this process holds is known here, by device and inode.
_held: "weakref.WeakValueDictionary[tuple[int, int], Claim]" = weakref.WeakValueDictionary()
_looking = threading.Lock()


class Taken(BlockingIOError):
    """Somebody else holds it. The message is who."""


class Claim:
    """Holds a file until `release`: against other processes by a record lock (fcntl), against this one by a list.

    Systems without such locks protect against this process alone.

    Args:
        path: the file, in a folder that exists; made if it is not there. It says who holds it.
        mark: what its text begins with. A file with another text is not ours, and is left as it is.
        make: False, to claim only a file that is there, such as a killed process's.

    Raises:
        Taken: another owner holds it.
        FileNotFoundError: the folder is gone, or the file where it is not to be made.
        OSError: it cannot be written; or what is there is a link, no plain file, or not ours.
    """

    def __init__(self, path: Path, mark: str = "", *, make: bool = True):
        self._path, self._handle = path, -1
        self.locked = False
        beginning = f"{mark}process "
        with _looking:
            while self._handle < 0:
                self._look()
                handle = self._open(make)
                try:
                    self._check(handle, beginning)
                    self.locked = _lock(handle)
                    if not self._is_at_its_path(handle):  # its holder has removed it since it was opened
                        os.close(handle)
                        continue
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"{beginning}{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                except BaseException:
                    os.close(handle)
                    raise
                self._handle = handle
            held = os.fstat(self._handle)
            _held[held.st_dev, held.st_ino] = self

    def _look(self) -> None:
        """Raise where this process holds it: to open and close the file once more would end that lock."""
        with contextlib.suppress(FileNotFoundError):
            found = os.lstat(self._path)
            if (found.st_dev, found.st_ino) in _held:
                raise Taken(f"process {os.getpid()} on {socket.gethostname()}, which is this one")

    def _open(self, make: bool) -> int:
        flags = os.O_RDWR | (os.O_CREAT if make else 0)
        for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"):  # a pipe would wait; not all systems have each
            flags |= getattr(os, name, 0)
        if self._path.is_symlink():
            raise OSError(f"{self._path} is a symbolic link, which is not followed: remove it")
        return os.open(self._path, flags, 0o666)

    def _check(self, handle: int, beginning: str) -> None:
        found = os.fstat(handle)
        text = os.pread(handle, _LONGEST, 0) if stat.S_ISREG(found.st_mode) else None
        ours = text is not None and found.st_nlink <= 1 and found.st_size <= _LONGEST
        if not ours or (text and not text.startswith(beginning.encode())):
            raise OSError(f"{self._path} was not made by shardlm, and is left as it is: remove or rename it")

    def _is_at_its_path(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.lstat(self._path))
        except FileNotFoundError:
            return False

    def release(self, *, remove: bool = True) -> None:
        """Let others claim it; the file is removed, unless it is to stay."""
        if self._handle < 0:
            return
        with _looking:
            held = os.fstat(self._handle)
            if remove and self._is_at_its_path(self._handle):
                with contextlib.suppress(OSError):  # a disk that has become read-only
                    os.unlink(self._path)
            os.close(self._handle)
            self._handle = -1
            _held.pop((held.st_dev, held.st_ino), None)

    def __del__(self):
        if getattr(self, "_handle", -1) >= 0:  # the file stays; the system takes the lock back
            with contextlib.suppress(OSError):
                os.close(self._handle)


def _lock(handle: int) -> bool:
    """Whether the system's lock is held; False where it has none. Raises Taken where another process holds it."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        return False
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # some systems say it in one way, some in the other
        holder = os.pread(handle, _LONGEST, 0).decode(errors="replace").partition("process ")[2].strip()
        known = holder and holder.isprintable()
        raise Taken(f"process {holder}" if known else "another process") from None
    except OSError:  # no locks on this file system
        return False
    return True
