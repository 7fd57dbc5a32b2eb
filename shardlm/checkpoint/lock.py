"""One run at a time saves to a folder: a lock that the system takes back when its holder dies."""

import os
import socket
from pathlib import Path
from typing import Any

NAME = ".saving"


class Lock:
    """Holds a folder for one process until `release`, by a record lock (fcntl) on a file that says who holds it.

    Object stores and systems without such locks are not protected.

    Args:
        directory: the folder, which exists.

    Raises:
        OSError: another process holds it; the folder is read-only.
    """

    def __init__(self, directory: Any):
        self._file = None
        if "://" in str(directory):
            return
        try:
            import fcntl  # not on Windows
        except ImportError:
            return
        self._path = Path(str(directory)) / NAME
        while self._file is None:
            file = self._path.open("a+")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise OSError(f"another run is saving there: {holder}") from None
            except PermissionError:  # as some systems say the same
                file.close()
                raise OSError("another run is saving there") from None
            except OSError:  # no locks on this file system
                file.close()
                return
            try:
                same = os.path.samestat(os.fstat(file.fileno()), self._path.stat())
            except FileNotFoundError:
                same = False
            if not same:  # its holder has removed it since it was opened
                file.close()
                continue
            self._file = file
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        """Let others save there."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None
