"""Ending a function at its n-th change of the disk, as a kill would: what it would do afterwards is not done."""

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from shardlm.runtime import claims, folders

_CHANGES = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "link", "symlink", "truncate", "ftruncate",
            "pwrite")  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Killed(BaseException):
    """The process is dead."""


class Made(list):
    """Changes made before the kill; `dead` once it came."""

    dead = False


@contextmanager
def killed_at(monkeypatch: Any, number: int, counts: Callable[[str], bool] = lambda path: True) -> Iterator[Made]:
    """Let the change of this number, and all after it, raise Killed; gives the changes made, which grow.

    Args:
        monkeypatch: of pytest.
        number: from 0 on; beyond the last one nothing is killed.
        counts: whether a change of this path is one of ours.
    """
    made = Made()

    def wrapped(name: str, original: Callable, is_change: Callable[..., bool] = lambda *given, **named: True):
        def call(*given: Any, **named: Any) -> Any:
            if is_change(*given, **named) and counts(str(given[0])):
                if len(made) >= number:
                    made.dead = True
                    raise Killed(name)
                made.append(f"{name} {given[0]}")
            return original(*given, **named)

        return call

    with monkeypatch.context() as patch:
        for name in _CHANGES:
            patch.setattr(os, name, wrapped(name, getattr(os, name)))
        patch.setattr(os, "open", wrapped("open", os.open, lambda path, flags, *rest, **named: flags & _WRITING))
        opened = wrapped("open", io.open, lambda file, mode="r", *rest, **named: not isinstance(file, int)
                         and set(mode) & set("wxa+"))  # fmt: skip
        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        patch.setattr(folders, "exchange", wrapped("exchange", folders.exchange))
        yield made
    for claim in list(claims._held.values()):  # the system takes the locks of the dead back
        claim.release(remove=False)
