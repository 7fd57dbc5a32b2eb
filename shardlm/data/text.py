"""Documents of text: where they come from, and which of them are held out for evaluation."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import sysconfig
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from shardlm.data import lines
from shardlm.data.apart import check_once
from shardlm.runtime.paths import local_path

_EXCLUDE = frozenset({"__pycache__"})
_STANDARD_LIBRARY_EXCLUDE = _EXCLUDE | {"test", "tests", "idle_test", "site-packages", "dist-packages"}
_NAMES_SHOWN = 5


class Document(NamedTuple):
    """One text and the name that identifies it.

    Attributes:
      name: a path relative to what was read, with forward slashes, so that it is the same on every machine.
      text: the whole text, line endings as in the file; it may be empty.
    """

    name: str
    text: str


def standard_library() -> list[Document]:
    """Reads the sources of Python's own standard library, which every machine that runs this has.

    All ``*.py`` files except tests and installed packages: about 700 documents and 12 MB for Python 3.11.

    Returns:
      The documents, sorted by name.

    Raises:
      ValueError: this Python was installed without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "os.py").is_file():
        raise ValueError(
            f"this Python has no standard library sources in {str(root)!r}, which are the default text; "
            "pass a file or folder of your own"
        )
    return read_documents(root, pattern="*.py", exclude=_STANDARD_LIBRARY_EXCLUDE)


def read_documents(
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    pattern: str = "*",
    exclude: Collection[str] = _EXCLUDE,
) -> list[Document]:
    """Reads UTF-8 text files, each as one document; of .jsonl files of {"text": "..."} lines, each line is one.

    Folders are read recursively. Files and folders whose name starts with a dot are left out, as shells do, and links
    to folders are not followed. A file named in `paths` must be UTF-8; one found in a folder that is not is skipped,
    with one warning that counts and names those skipped.

    Args:
      paths: a file, a folder, or several of either.
      pattern: shell pattern that the name of a file found in a folder must match, such as ``"*.txt"``.
      exclude: names of folders that are never entered.

    Returns:
      The documents, sorted by name. A name is the file's path relative to the folder that was read (to the common
      folder, of several paths). An empty file is a document with an empty text.

    Raises:
      ValueError: a path does not exist, a file comes up twice or a named one is not UTF-8, or no text was found.

    Example:
      >>> documents = read_documents("notes", pattern="*.md")  # doctest: +SKIP
    """
    given = [Path(os.path.abspath(local_path(path, "paths"))) for path in _as_list(paths)]
    if missing := [str(path) for path in given if not path.exists()]:
        raise ValueError(f"no such file or folder: {', '.join(missing)}")
    if not given:
        raise ValueError("no documents: the list of paths is empty; pass at least one file or folder")

    root = os.path.commonpath([path if path.is_dir() else path.parent for path in given])
    files, others = Counter(), Counter()
    for path in given:
        for file in _walk(path, exclude) if path.is_dir() else [path]:
            wanted = file == path or fnmatch.fnmatchcase(file.name, pattern)
            (files if wanted else others)[file] += 1
    check_once(files.elements(), hard_links=False)

    documents, undecodable, named = [], [], set(given)
    for file in files:
        name = file.relative_to(root).as_posix()
        held = lines.kind(file)
        if held == "examples" and file in named:
            raise ValueError(
                f"{str(file)!r} holds examples, prompts and completions, and no text: read it with "
                "sl.data.load_examples"
            )
        if held == "documents":
            documents += [Document(f"{name}:{number}", text) for number, text in lines.texts(file)]
            continue
        try:
            documents.append(Document(name, file.read_bytes().decode("utf-8")))
        except UnicodeDecodeError as error:
            if file in named:
                raise ValueError(
                    f"{str(file)!r} is not UTF-8 text: {error.reason} at byte {error.start}; convert it or leave it out"
                ) from error
            undecodable.append(name)
    if undecodable:
        warnings.warn(
            f"skipped {len(undecodable)} of {len(files)} files that are not UTF-8 text: "
            f"{_shorten(sorted(undecodable))}; a pattern such as '*.txt' leaves them out without this warning",
            stacklevel=2,
        )
    if not documents:
        suffixes = Counter(file.suffix or file.name for file in others).most_common(_NAMES_SHOWN)
        held = ", ".join(f"{count} {suffix}" for suffix, count in suffixes) or "nothing else"
        raise ValueError(
            f"no documents: no UTF-8 file in {_shorten([str(path) for path in given])} matches pattern={pattern!r}; "
            f"found {len(undecodable)} file(s) that are not UTF-8, and of other names {held}"
        )
    if not any(document.text for document in documents):
        raise ValueError(f"no text: all {len(documents)} file(s) read are empty: {_shorten(sorted(map(str, files)))}")
    return sorted(documents)


def split_documents(documents: Sequence[Document], held_out: float = 0.05) -> tuple[list[Document], list[Document]]:
    """Splits documents into those to train on and those held out for evaluation, by a hash of their names.

    A document is held out if the SHA-256 of its name, read as a fraction of 1, is below `held_out`: it stays on its
    side when others come or go, on every machine and in every run. Where that would leave a side without a document,
    the one whose hash is nearest to that side goes there, so two documents are enough.

    Args:
      documents: at least two, unless `held_out` is 0; where only one holds text, its end is held out, from the line
        break on that is nearest before so large a fraction of it.
      held_out: expected fraction of the documents to hold out, 0 <= held_out < 1; 0 holds out none.

    Returns:
      (train, held_out), both in the order given.

    Raises:
      ValueError: the fraction is out of range, or a side would have no text.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be a fraction in 0 <= held_out < 1, got {held_out}")
    if held_out == 0:
        return list(documents), []
    if sum(bool(document.text) for document in documents) == 1:
        return _cut(documents, held_out)
    order = sorted(range(len(documents)), key=lambda i: _hash(documents[i].name))
    count = sum(_hash(document.name) < held_out for document in documents)
    chosen = set(order[: min(max(count, 1), len(documents) - 1)])
    train = [document for i, document in enumerate(documents) if i not in chosen]
    held = [documents[i] for i in sorted(chosen)]
    if not any(document.text for document in train) or not any(document.text for document in held):
        raise ValueError(
            f"cannot hold out documents: held_out={held_out} splits {len(documents)} into {_size(train)} to train on "
            f"and {_size(held)} held out, and both sides need text; name a file or folder of its own as held_out "
            "(--held-out), or pass held_out=0 to train without evaluation"
        )
    return train, held


def _cut(documents: Sequence[Document], held_out: float) -> tuple[list[Document], list[Document]]:
    """The only document with text in two, `held_out` of its characters in the second, at a line break if it can be."""
    [(name, text)] = [document for document in documents if document.text]
    if len(text) < 2:
        raise ValueError(
            f"cannot hold out a part of {name}: it has {len(text)} character, and both sides need text; give more, "
            "or pass held_out=0 (--held-out 0) to train without evaluation"
        )
    wanted = min(max(round(len(text) * (1 - held_out)), 1), len(text) - 1)
    at = text.rfind("\n", 0, wanted) + 1  # behind the break
    if at <= max(0, wanted - (len(text) - wanted)):  # so far before that twice as much would be held out
        at = wanted
    rest = [document for document in documents if not document.text]
    return [*rest, Document(name, text[:at])], [Document(f"{name} (its end)", text[at:])]


def _as_list(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str | os.PathLike]:
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)


def _walk(root: Path, exclude: Collection[str]) -> Iterator[Path]:
    for folder, folders, files in os.walk(root, onerror=_raise):
        folders[:] = sorted(name for name in folders if name not in exclude and not name.startswith("."))
        for name in sorted(files):
            file = Path(folder, name)
            if not name.startswith(".") and file.is_file():  # not a socket or a pipe, which would block
                yield file


def _raise(error: OSError) -> None:
    raise error  # os.walk leaves out folders it may not read, unless told otherwise


def _hash(name: str) -> float:
    """Maps a name to [0, 1), evenly."""
    # 53 bits, so that the quotient is exact and never rounds up to 1
    return (int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8]) >> 11) / 2**53


def _shorten(names: Sequence[str]) -> str:
    rest = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _size(documents: Sequence[Document]) -> str:
    return f"{len(documents)} ({sum(len(document.text) for document in documents)} characters)"
