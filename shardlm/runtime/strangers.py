"""What comes out of files that somebody else may have written: their names pass one gate, their texts another.

A name in an index or in a record may lead out of its folder (`../x`, `/etc/passwd`, a link), or to something that is
never read to its end (`/dev/zero`, a pipe). A text may hold the commands of a terminal. This file imports nothing of
shardlm, so that every part of it may use the gates.
"""

import os
import stat
from pathlib import Path
from typing import Any

SMALL = 1 << 28  # bytes; the largest tokenizer.json known has 35 MB


def inside(folder: str | os.PathLike, name: Any, *, links: bool = False) -> Path:
    """The plain file of this name in a local folder; `Path.stat` gives its size, which is then that of real content.

    Args:
        folder: whose path may hold links, as the user named it.
        name: relative to the folder, with "/" between its parts.
        links: whether parts of the name may be symbolic links, to anywhere: for folders whose owner made them so, as
            caches of Hugging Face models are. The name itself never leads out.

    Raises:
        ValueError: the name is empty, absolute, has a part `..` or `.`, or characters that cannot be printed; a link
            is on the way; or what is there is no plain file.
        FileNotFoundError: nothing is there, or a link is that leads to nothing.

    Example:
        >>> path = inside("runs/a/300", "state/manifest.ocdbt")
    """
    shown = f"the name {printable(name)!r}" if isinstance(name, str) else f"the name {printable(repr(name))}"
    if not isinstance(name, str) or not name:
        raise ValueError(f"{shown} is not a text that names a file")
    if not name.isprintable() or "\\" in name:
        raise ValueError(f"{shown} has characters that no file here has")
    parts = name.split("/")
    if name.startswith("/") or not {"", ".", ".."}.isdisjoint(parts):
        raise ValueError(f"{shown} must be of a file inside {folder}: a relative path without '..' and '.'")
    if any(len(os.fsencode(part)) > 255 for part in parts):
        raise ValueError(f"{shown} is longer than the name of a file can be")
    path = Path(folder)
    for part in parts:
        path = path / part
        if path.is_symlink():
            if not links:
                raise ValueError(f"{path} is a symbolic link, which may lead anywhere: put the file itself there")
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is a symbolic link to {printable(os.readlink(path))}, which is missing"
                )
    try:
        kind = path.stat().st_mode
    except NotADirectoryError as error:
        raise FileNotFoundError(f"{path} does not exist") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist") from error
    if not stat.S_ISREG(kind):
        raise ValueError(f"{path} is {_kind(kind)}, not a plain file")
    return path


def read_small(folder: str | os.PathLike, name: Any, *, links: bool = False, limit: int = SMALL) -> bytes:
    """The content of a plain file in a local folder, of at most `limit` bytes; arguments and errors as of `inside`.

    Raises:
        ValueError: it is larger, too.
    """
    path = inside(folder, name, links=links)
    # Between the look and the opening it may have become a pipe, which would wait for a writer.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | (0 if links else getattr(os, "O_NOFOLLOW", 0)))
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path} is {_kind(found.st_mode)}, not a plain file")
        if found.st_size > limit:
            raise ValueError(f"{path} has {found.st_size:,} bytes; at most {limit:,} are read of such a file")
        return file.read(found.st_size)


def printable(text: Any, limit: int = 200) -> str:
    """A text for a terminal or a log: what is no visible character becomes its escape (`\\x1b`), a long text is cut.

    Newlines, directions of writing and halves of pairs become escapes too: the result is one line.
    """
    whole = str(text)
    made = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in whole[:limit])
    return made if len(whole) <= limit else f"{made}... ({len(whole):,} characters)"


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
