"""Where the user's word for a place on the disk becomes a path: one gate for all arguments that name files or folders.

This file imports nothing of shardlm, so that every part of it may use the gate.
"""

import os
import re
from pathlib import Path

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:/")  # gs://, and gs:/ of a Path; a drive's letter is one letter


def local_path(path: str | os.PathLike, what: str = "path") -> Path:
    """The absolute path of what the user names; `~` is the home folder, text and `Path` are taken alike.

    Paths in an object store (gs://, s3://, hf://, ...) are refused. shardlm locks a run's folder and gives a checkpoint
    its name in one step, and an object store has neither of these operations.

    Args:
        path: what the user gave.
        what: how the user calls it, for the errors: "checkpoint_dir".

    Raises:
        TypeError: it is neither text nor a path.
        ValueError: it is empty, an address, has a character that no path has, or the home of an unknown user.

    Example:
        >>> local_path("~/runs/a", "checkpoint_dir")
        PosixPath('/home/ada/runs/a')
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str):
        raise TypeError(f"{what}={path!r}; it is a path on the local disk, as text or a pathlib.Path")
    if not text.strip():
        raise ValueError(f"{what}={text!r} is empty: name a path, or '.' for the current folder")
    if "\0" in text:
        raise ValueError(f"{what}={text!r} has a zero byte, which no path has")
    if _ADDRESS.match(text):
        raise ValueError(
            f"{what}={text!r} is an address: give a local folder. Of an object store, mount the bucket as a folder "
            "(gcsfuse, mountpoint-s3, rclone mount), or write locally and copy what is complete"
        )
    try:
        found = Path(text).expanduser().absolute()
    except RuntimeError as error:  # ~nobody
        raise ValueError(f"{what}={text!r}: {error}") from error
    # A name that ends in `..` has no name of its own; elsewhere the system resolves it, through links too.
    return found.resolve() if ".." in found.parts else found
