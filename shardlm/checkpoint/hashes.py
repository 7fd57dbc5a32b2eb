"""Sizes and hashes of files: what tells a file that was truncated, lost or changed on the disk."""

import errno
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from .processes import exchange

_BLOCK = 1 << 22  # bytes read at once; hashlib lets other threads run meanwhile
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EROFS)


def digest_bytes(content: bytes) -> str:
    """128 bits of BLAKE2b (RFC 7693), as hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def digest_file(path: Any, flush: bool = False) -> str:
    """`size hash` of a file; with `flush`, once it is on the disk and not only in the system's memory."""
    hasher, size = hashlib.blake2b(digest_size=16), 0
    with path.open("rb") as file:
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

    Args:
        directory: the folder.
        expected: `size hash` by name.

    Raises:
        PermissionError: a file may not be read, which says nothing about what is in it.
    """
    # Largest first to one process after the other, so that all have about the same to read.
    names = sorted(expected, key=lambda name: -_size(expected[name]))
    mine = names[jax.process_index() :: jax.process_count()]
    with ThreadPoolExecutor(4) as pool:
        problems = list(pool.map(lambda name: _wrong(directory / name, name, expected[name]), mine))
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


def _wrong(path: Any, name: str, expected: str) -> str | PermissionError | None:
    try:
        found = digest_file(path)
    except PermissionError as error:
        return error
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:  # a folder in its place, or the disk cannot read it
        return f"{name} cannot be read ({error.strerror or error})"
    if found == expected:
        return None
    sizes = _size(found), _size(expected)
    return f"{name} has {sizes[0]} of {sizes[1]} bytes" if sizes[0] != sizes[1] else f"{name} has other bytes"


def _size(entry: str) -> int:
    return int(entry.split()[0])


def total(expected: Mapping[str, str]) -> int:
    """Bytes of all files."""
    return sum(map(_size, expected.values()))
