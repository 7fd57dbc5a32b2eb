"""Files of JSON lines: what their lines hold, and the documents of lines such as {"text": "..."}."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".jsonl"
SHOWN = 5
TEXT = "text"
_EXAMPLES = ("prompt", "completion", "messages")


def numbered(file: Path) -> Iterator[tuple[str, str]]:
    """Where each line of a UTF-8 file that is not empty is, as "file:3", and its text."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if line.strip():
            yield f"{file}:{number}", line


def kind(file: Path) -> str | None:
    """What a file named .jsonl holds, by its first line that is not empty: "documents", "examples", or None."""
    if file.suffix != SUFFIX or not file.is_file():
        return None
    with file.open("rb") as lines:
        first = next((line for line in lines if line.removeprefix(b"\xef\xbb\xbf").strip()), b"")
    try:
        value = json.loads(first.decode("utf-8-sig"))
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    if any(name in value for name in _EXAMPLES):
        return "examples"
    return "documents" if TEXT in value else None


def texts(file: Path) -> list[tuple[str, str]]:
    """The number of each line and its text, of lines such as {"text": "..."}; other keys are ignored.

    Raises:
      ValueError: lines hold something else, all counted in one error that names the first of them.
    """
    found, problems = [], []
    for where, line in numbered(file):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{where}: not JSON: {error.msg} at column {error.colno}")
            continue
        text = value.get(TEXT) if isinstance(value, dict) else None
        if isinstance(text, str) and _is_unicode(text):
            found.append((where.rpartition(":")[2], text))
        else:
            problems.append(f'{where}: no string under "text"')
    if problems:
        rest = len(problems) - SHOWN
        shown = "\n  ".join(problems[:SHOWN]) + (f"\n  and {rest} more" if rest > 0 else "")
        raise ValueError(
            f"{len(problems)} of {len(found) + len(problems)} lines hold no text:\n  {shown}\n"
            'the first line is {"text": "..."}, so all lines are to be'
        )
    return found


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair
        return False
    return True
