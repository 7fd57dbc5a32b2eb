"""The small files that a checkpoint keeps of its tokenizer, beside the arrays and held to the same hashes."""

import os
from collections.abc import Mapping
from typing import Any

from shardlm.runtime.strangers import read_small

from .hashes import damage
from .record import absolute, damaged, read_record

TEXTS = "tokenizer"  # their folder in a checkpoint


def read_texts(path: str | os.PathLike) -> dict[str, bytes]:
    """The files of a checkpoint's tokenizer by name, compared with their hashes; empty where it has none.

    In a run of several processes all call this.

    Raises:
        FileNotFoundError, ValueError, DamagedCheckpoint: as of `restore`.
    """
    path = absolute(path)
    files = {name: text for name, text in read_record(path)["files"].items() if name.startswith(f"{TEXTS}/")}
    if wrong := damage(path, files) or [f"{name!r} is in a folder" for name in files if name.count("/") > 1]:
        raise damaged(path, "; ".join(wrong))
    return {name.removeprefix(f"{TEXTS}/"): read_small(path, name) for name in files}


def as_texts(tokenizer: Any) -> dict[str, bytes]:
    """A tokenizer's files by name; empty for None.

    Args:
        tokenizer: None, the files, or what has a method `to_files` that returns them.

    Raises:
        TypeError, ValueError: it is none of these; a name is that of another folder.
    """
    files = tokenizer.to_files() if callable(getattr(tokenizer, "to_files", None)) else tokenizer
    if not isinstance(files, Mapping | None):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}, which has no files to keep: give sl.data.files_of(tokenizer)"
        )
    if wrong := [name for name in files or () if name in ("", ".", "..") or os.path.basename(name) != name]:
        raise ValueError(f"tokenizer: {', '.join(map(repr, wrong))} are no names of files")
    return {name: text if isinstance(text, bytes) else text.encode("utf-8") for name, text in (files or {}).items()}
