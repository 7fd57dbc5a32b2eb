"""Examples to fine-tune on, from JSON lines: what is given, and what the model is to learn to answer.

One JSON object a line, in one of two forms; other keys are ignored, and so are empty lines:

    {"prompt": "Translate: chat\n", "completion": "cat"}
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

The completion, and the end token after it, are learned; the prompt is only read. Nothing is put between the two: a
space or a line break that belongs there is written there. Roles are system, user and assistant; messages become

    role: content<line break>        of system and user, only read
    assistant: content<end>          "assistant: " read, the rest learned

so every turn of the assistant's is learned. A model with a chat template of its own wants that: write such a
conversation as a prompt and a completion.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from shardlm.data.apart import check_once
from shardlm.data.lines import SHOWN as _SHOWN
from shardlm.data.lines import SUFFIX, kind, numbered
from shardlm.runtime.paths import local_path

_FORMS = 'a line is {"prompt": "...", "completion": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'
_ROLES = ("system", "user", "assistant")


class Piece(NamedTuple):
    """A part of an example's text, and whether it is learned; an end token follows what is."""

    text: str
    learned: bool


class Example(NamedTuple):
    """One example.

    Attributes:
      where: the file and line that it is from, for errors.
      pieces: its text in order, neighbours joined by nothing.
    """

    where: str
    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        """All of its text."""
        return "".join(piece.text for piece in self.pieces)


def are_examples(paths: Any) -> bool:
    """Whether these are files of examples: their names end in `.jsonl`, and their lines hold no {"text": ...}.

    Raises:
      ValueError: some are and some are not.
    """
    items = [paths] if isinstance(paths, str | os.PathLike) else list(paths or ())
    named = [
        isinstance(item, str | os.PathLike)
        and os.fspath(item).endswith(SUFFIX)
        and kind(local_path(item, "data")) != "documents"
        for item in items
    ]
    if any(named) and not all(named):
        others = ", ".join(repr(str(item)) for item, is_named in zip(items, named, strict=True) if not is_named)
        raise ValueError(f"examples (.jsonl) and text are not mixed: leave out {others}, or train on one after another")
    return any(named)


def read_examples(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Example]:
    """Reads files of examples, in the order given.

    Args:
      paths: a UTF-8 file of JSON lines, or several.

    Returns:
      The examples of all lines that are not empty.

    Raises:
      ValueError: a file is missing, given twice (by a link too), not UTF-8 or without an example; or lines are no
        examples, all counted in one error that names the first of them.

    Example:
      >>> read_examples("questions.jsonl")[0].pieces  # doctest: +SKIP
      (Piece(text='2 + 2? ', learned=False), Piece(text='4', learned=True))
    """
    files = [local_path(path, "data") for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ValueError(f"no such file: {', '.join(missing)}")
    check_once(files, hard_links=True)
    if not files:
        raise ValueError("no examples: the list of files is empty; pass at least one file of JSON lines")
    examples: list[Example] = []
    problems: list[str] = []
    lines = 0
    for file in files:
        count = 0
        for where, line in numbered(file):
            count += 1
            try:
                examples.append(Example(where, tuple(_pieces(line))))
            except ValueError as error:
                problems.append(f"{where}: {error}")
        if not count:
            raise ValueError(f"no examples: {str(file)!r} is empty; {_FORMS}")
        lines += count
    if problems:
        rest = len(problems) - _SHOWN
        shown = "\n  ".join(problems[:_SHOWN]) + (f"\n  and {rest} more" if rest > 0 else "")
        raise ValueError(f"{len(problems)} of {lines} lines are no examples:\n  {shown}\n{_FORMS}")
    return examples


def _pieces(line: str) -> list[Piece]:
    """What an example's line says; ValueError for what is wrong with it."""
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{_kind(given)}, not an object")
    if "messages" in given:
        if both := [name for name in ("prompt", "completion") if name in given]:
            raise ValueError(f"has messages and {' and '.join(both)}: which of them?")
        return _conversation(given["messages"])
    if absent := [name for name in ("prompt", "completion") if name not in given]:
        if "text" in given:
            raise ValueError('{"text": ...} is a document, and no example: files of them go to sl.data.load')
        keys = ", ".join(map(repr, given)) or "none"
        raise ValueError(f"no {' and no '.join(map(repr, absent))}; its keys are {keys}")
    prompt, completion = (_string(given[name], repr(name)) for name in ("prompt", "completion"))
    if not completion:
        raise ValueError("the completion is empty: nothing to learn")
    return [Piece(prompt, False), Piece(completion, True)]


def _conversation(messages: Any) -> list[Piece]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'messages' is {_kind(messages)}, not a list of at least one message")
    pieces = []
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where} is no object with 'role' and 'content'")
        role, content = message["role"], _string(message["content"], f"the content of {where}")
        if role not in _ROLES:
            raise ValueError(f"{where} has the role {role!r}; roles are {', '.join(_ROLES)}")
        if role != "assistant":
            pieces.append(Piece(f"{role}: {content}\n", False))
            continue
        if not content:
            raise ValueError(f"{where}, of the assistant, is empty: nothing to learn")
        pieces += [Piece("assistant: ", False), Piece(content, True)]
    if not any(piece.learned for piece in pieces):
        raise ValueError("no message of the assistant: nothing to learn")
    return pieces


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {_kind(value)}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
        raise ValueError(f"{what} is no Unicode text: half of a surrogate pair at character {error.start}") from error
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number") if value != [] else "an empty list"
