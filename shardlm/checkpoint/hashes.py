"""Sizes and hashes of files: what tells a file that was truncated, lost or changed on the disk."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from shardlm.runtime.strangers import inside, printable

from .processes import exchange

_BLOCK = 1 << 22  # bytes read at once; hashlib lets other threads run meanwhile
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EROFS)


def digest_bytes(content: bytes) -> str:
    """128 bits of BLAKE2b (RFC 7693), as hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def digest_file(path: Any, flush: bool = False) -> str:
    """`size hash` of a file; with `flush`, once it is on the disk and not only in the system's memory."""
    hasher, size = hashlib.blake2b(digest_size=16), 0
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(path))
        if flush:
            sync(file)
        while block := file.read(_BLOCK):
            hasher.update(block)
            size += len(block)
    return f"{size} {hasher.hexdigest()}"


def digest_files(directory: Any, names: list[str]) -> dict[str, str]:
    """`size hash` by name of files just written, each flushed to the disk."""
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(lambda name: digest_file(directory / name, flush=True), names), strict=True))


def names_in(directory: Any, prefix: str = "") -> list[str]:
    """Paths of all files below a folder, relative to it, sorted; links to folders are not followed."""
    names = []
    for entry in sorted(directory.iterdir()) if directory.is_dir() else ():
        name = f"{prefix}{entry.name}"
        names += names_in(entry, f"{name}/") if entry.is_dir() else [name]
    return names


def damage(directory: Any, expected: Mapping[str, str]) -> list[str]:
    """What is wrong with the files of a folder, a line for each. In a run of several processes each reads a share.

    What is no plain file inside the folder, or has another size, is not read. Links anywhere in the folder are wrong,
    as what reads the arrays would follow them.

    Args:
        directory: the folder.
        expected: `size hash` by name, from a file that anybody may have written.

    Raises:
        PermissionError: a file may not be read, which says nothing about what is in it.
    """
    # Largest first to one process after the other, so that all have about the same to read.
    names = sorted(expected, key=lambda name: -_size(expected[name]))
    mine = names[jax.process_index() :: jax.process_count()]
    with ThreadPoolExecutor(4) as pool:
        problems = list(pool.map(lambda name: _wrong(directory, name, expected[name]), mine))
    if jax.process_index() == 0:
        problems += [problem for name, problem in _odd(directory) if name not in expected]
    forbidden = [problem for problem in problems if isinstance(problem, PermissionError)]
    said = exchange([[str(error) for error in forbidden], [text for text in problems if isinstance(text, str)]])
    if denied := sum((errors for errors, _ in said), []):
        raise PermissionError("; ".join(denied))
    return sorted(sum((texts for _, texts in said), []))


def sync(file: Any) -> None:
    """Ask the system to write a local file to its disk now."""
    try:
        os.fsync(file.fileno())
    except (OSError, AttributeError) as error:
        # Objects in a store are written when they are closed, and some file systems have nothing to flush.
        if isinstance(error, OSError) and error.errno not in (None, *_CANNOT_SYNC):
            raise


def wrong_size(directory: Any, name: str, expected: str) -> str | None:
    """What is wrong with a file as far as can be told without reading it; None if nothing."""
    try:
        size = inside(directory, name).stat().st_size
    except FileNotFoundError:
        return f"{printable(name)} is missing"
    except ValueError as error:  # outside of the folder, a link, a pipe, a device, a folder
        return f"{printable(name)} cannot be read ({str(error).removeprefix(f'{directory}/')})"
    wanted = _size(expected)
    return None if size == wanted else f"{name} has {size} of {wanted} bytes"


def _wrong(directory: Any, name: str, expected: str) -> str | PermissionError | None:
    try:
        if text := wrong_size(directory, name, expected):
            return text
        found = digest_file(directory / name)
    except PermissionError as error:
        return error
    except OSError as error:  # the disk cannot read it
        return f"{name} cannot be read ({error.strerror or error})"
    return None if found == expected else f"{name} has other bytes"


def _odd(directory: Any) -> Iterator[tuple[str, str | PermissionError]]:
    """Names of links, pipes, devices and sockets below a folder, and what is wrong with each."""
    folders = [("", os.fspath(directory))]
    while folders:
        prefix, folder = folders.pop()
        try:
            with os.scandir(folder) as found:
                entries = list(found)
        except PermissionError as error:
            yield prefix, error
            continue
        except OSError as error:
            yield prefix, f"{printable(prefix)} cannot be read ({error.strerror or error})"
            continue
        for entry in entries:
            name = f"{prefix}{entry.name}"
            if entry.is_symlink():
                yield name, f"{printable(name)} is a symbolic link, which may lead anywhere: put the file itself there"
            elif entry.is_dir(follow_symlinks=False):
                folders.append((f"{name}/", entry.path))
            elif not entry.is_file(follow_symlinks=False):
                yield name, f"{printable(name)} is no plain file"


def _size(entry: str) -> int:
    return int(entry.split()[0])


def total(expected: Mapping[str, str]) -> int:
    """Bytes of all files."""
    return sum(map(_size, expected.values()))
