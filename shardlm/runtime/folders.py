"""Folders that get their name once they are whole, and are replaced and removed without a moment without either.

What is being written stands beside its target in a folder of our own, `name.saving-1f0c9a2e`:

    owner   says which process writes here, and is locked as long as that lives
    new     what is written; `publish` gives it the target's name, in one step
    old     what was at the target, where the system cannot exchange two folders in one step

The number is random and the folder is made exclusively, so that it is never somebody else's. One whose owner is dead
was left by a kill: the next look at its target removes it, and gives `old` its name back where the kill fell between
two renames. This file imports nothing of shardlm but `claims`, so that every part of it may use it.
"""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .claims import Claim, Taken

SAVING, REMOVED = "saving", "removed"  # why there is a folder of our own
OWNER, NEW, OLD, DOOMED = "owner", "new", "old", "doomed"
_OURS = re.compile(rf"(.+)\.({SAVING}|{REMOVED})-[0-9a-f]{{8}}", re.DOTALL)
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux: fcntl.h, fs.h


class Work:
    """A folder of our own beside `target`, to write in what will have that name.

    Args:
        target: an absolute path, whose parents are made.
        why: part of the folder's name.

    Attributes:
        folder: of our own.
        new: a path in it, which is to be made.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, target: Path, why: str = SAVING):
        self.target = target
        if target.parent.exists() and not target.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target.parent))
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(100):
            self.folder = target.parent / f"{target.name}.{why}-{secrets.token_hex(4)}"
            try:
                self.folder.mkdir()
                self._claim = Claim(self.folder / OWNER, _mark(self.folder))
            except (FileExistsError, FileNotFoundError, Taken):
                continue  # the name is there; or a look at the target took a folder without an owner for a killed one's
            except BaseException:
                with contextlib.suppress(OSError):
                    self.folder.rmdir()
                raise
            break
        else:
            raise FileExistsError(f"no folder can be made beside {target}")
        self.new = self.folder / NEW

    def publish(self, *, replace: bool = False) -> None:
        """Give `new` the target's name, and remove what had it.

        At every moment one of them, whole, is at the target; where the system cannot exchange folders, between two
        renames it is only what `recover` brings back.

        Raises:
            OSError: it could not be renamed; what was at the target is there. Among others: something is there, which
                is not to be replaced.
        """
        sync_folder(self.new)
        if not replace or not os.path.lexists(self.target):
            os.replace(self.new, self.target)  # of a file, what is there; of a folder, nothing but an empty one
        elif not exchange(self.new, self.target):
            old = self.folder / OLD
            os.rename(self.target, old)
            try:
                os.rename(self.new, self.target)
            except BaseException:
                os.rename(old, self.target)
                raise
        sync_folder(self.target.parent)
        with contextlib.suppress(OSError):  # it is there, whatever becomes of the rest
            self.remove()

    def remove(self) -> None:
        """Remove the folder with all that is in it, the owner's mark last."""
        if not self.folder.is_dir():
            self._claim.release()
            return
        _empty(self.folder, self.target)
        self._claim.release()
        self.folder.rmdir()


def discard(path: Path) -> None:
    """Remove a folder so that a kill on the way leaves it whole, or nothing of its name; of a link, the link alone."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    work = Work(path, REMOVED)
    try:
        os.rename(path, work.folder / DOOMED)
    finally:
        work.remove()


def recover(target: Path) -> None:
    """Give a folder its name back whose owner was killed between two renames; errors are left to who looks next."""
    with contextlib.suppress(OSError):
        if not os.path.lexists(target):
            sweep(target.parent, lambda name: name == target.name)


def sweep(parent: Path, of: Callable[[str], bool]) -> None:
    """Remove what killed processes of ours have left in a folder; what others made, or are making, stays.

    Args:
        parent: the folder to look in.
        of: whether to look at what was to have this name.

    Raises:
        OSError: something of ours cannot be removed.
    """
    for entry in list(parent.iterdir()) if parent.is_dir() else ():
        match = _OURS.fullmatch(entry.name)
        if match and of(match[1]) and entry.is_dir() and not entry.is_symlink():
            _sweep(entry, parent / match[1])


def is_ours(name: str) -> bool:
    """Whether a folder's name is one of those that `Work` makes."""
    return _OURS.fullmatch(name) is not None


def _sweep(folder: Path, target: Path) -> None:
    try:
        claim = Claim(folder / OWNER, _mark(folder), make=False)
    except FileNotFoundError:
        with contextlib.suppress(OSError):  # only if it is empty: killed before its owner had signed
            folder.rmdir()
        return
    except OSError:  # at work, or not ours
        return
    if not claim.locked:  # whether it is dead is not known
        claim.release(remove=False)
        return
    try:
        _empty(folder, target)
    except BaseException:
        claim.release(remove=False)
        raise
    claim.release()
    folder.rmdir()


def exchange(one: Path, other: Path) -> bool:
    """Let two folders swap their names in one step; False, and nothing done, where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux, or with an old C library
        return False
    flags = ctypes.c_uint(_RENAME_EXCHANGE)
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def write_file(path: Path, content: Iterable[bytes]) -> None:
    """Write a file in one step, in a folder of our own first; a link at `path` is replaced, not followed."""
    sweep(path.parent, lambda name: name == path.name)
    work = Work(path)
    try:
        with work.new.open("xb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        work.publish()
    except BaseException:
        with contextlib.suppress(OSError):
            work.remove()
        raise


def keep_others(folder: Path, new: Path, replaced: Sequence[str]) -> None:
    """Make a folder that holds what is in another one, where there is one, but for files that are to be replaced.

    Files are linked, not copied, where the system can: both folders then hold the same ones.
    """
    if not folder.is_dir():
        new.mkdir()
        return

    def link(source: str, to: str) -> None:
        try:
            os.link(source, to, follow_symlinks=False)
        except (OSError, NotImplementedError):
            shutil.copy2(source, to, follow_symlinks=False)

    def left_out(inside: str, names: list[str]) -> list[str]:
        return [name for name in names if name in replaced] if Path(inside) == folder else []

    shutil.copytree(folder, new, symlinks=True, ignore=left_out, copy_function=link)


def sync_folder(folder: Path) -> None:
    """Ask the system to write a folder's names to its disk now, where it can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _mark(folder: Path) -> str:
    return f"{folder.name} is being written by "


def _empty(folder: Path, target: Path) -> None:
    """Remove all but the owner's mark; what was at the target goes back there if nothing is."""
    if os.path.lexists(folder / OLD) and not os.path.lexists(target):
        os.rename(folder / OLD, target)
    for entry in list(folder.iterdir()):
        if entry.name == OWNER:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
