"""Text for people: numbers of bytes, the terminal's width, lines folded at words, and tables that fit."""

import os
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

NEXT = 0.9995  # of a unit: from here on three digits round up to 1 of it
_UNIT = re.compile(r"(?<=\d) (?=(?:[kMGTPE]?(?:B|FLOP)|[mun]?s)\b)")  # the space between a number and its unit
_NARROWEST = 20  # columns; below it nothing is folded any more


def size(count: float | None) -> str:
    """Bytes with three digits in decimal units, B, kB, MB, GB, TB, PB and EB: "1.54 GB"; "-" for None."""
    return "-" if count is None else scaled(count, "B")


def scaled(value: float, unit: str) -> str:
    """A number with three digits and a prefix of its unit: "1.08 PFLOP"."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= NEXT * 10**power:
            return f"{three_digits(value / 10**power)} {prefix}{unit}"
    return f"{value:.4g} {unit}"


def three_digits(value: float) -> str:
    """Three significant digits, all of those before the point, and never an exponent for a large number."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def width(stream: Any = None) -> int | None:
    """Columns of the terminal that a stream (default the standard output) writes to; None where it is none.

    The variable COLUMNS comes first, as everywhere. What goes to a file, a pipe or a notebook without it has no width,
    so that the same text is written there whatever the window.
    """
    stream = sys.stdout if stream is None else stream
    given = os.environ.get("COLUMNS", "")
    if given.isascii() and given.isdecimal() and int(given) > 0:
        return max(int(given), _NARROWEST)
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (AttributeError, OSError, ValueError):  # no terminal; no file; closed
        return None
    return max(columns, _NARROWEST) if columns > 0 else None


def fold(text: str, room: int | None = None, hang: int | None = None) -> str:
    """Text with its long lines cut between words; no word is cut, and no number is cut from its unit.

    Args:
        text: of any number of lines, whose own indents stay.
        room: columns of a line; None is the terminal's, and without one the text comes back as it is.
        hang: how far the rest of a cut line is indented; None is two columns more than the line, or than what stands
            behind its "- ".
    """
    room = width() if room is None else room
    if room is None:
        return text
    lines = []
    for line in text.splitlines():
        if len(line) <= room:
            lines.append(line)
            continue
        body = _UNIT.sub("\u00a0", line.lstrip())
        indent = len(line) - len(body)
        lead = body[: len(body) - len(body.removeprefix("- "))]
        further = indent + (len(lead) or 2) if hang is None else hang
        lines += textwrap.wrap(
            body, room, initial_indent=" " * indent, subsequent_indent=" " * min(further, room // 2),
            break_long_words=False, break_on_hyphens=False, replace_whitespace=False,
        )  # fmt: skip
    return "\n".join(lines).replace("\u00a0", " ")


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], room: int | None = None, gap: int = 3, rule: bool = False
) -> str:
    """Aligned columns that fit into `room` columns, as far as their words do.

    What is too wide is given narrower gaps, then cells cut between words, then the last column's text on lines of its
    own. A table of numbers is cut into several, one below the other.

    Args:
        heads: one for each column; those that begin with ">" are set to the right.
        rows: of as many cells each.
        room: columns; None is the terminal's, and without one any width will do.
        gap: columns between two columns where there is room.
        rule: draw a line below the heads.
    """
    room = width() if room is None else room
    right = [head.startswith(">") for head in heads]
    cells = [[head.removeprefix(">") for head in heads], *(list(map(str, row)) for row in rows)]
    natural = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for between in (gap, 2):
        if room is None or sum(natural) + between * (len(natural) - 1) <= room:
            return _set(cells, natural, right, between, rule)
    assert room is not None
    if (narrow := _narrowed(cells, natural, right, room)) is not None:
        return _set(cells, narrow, right, 2, rule)
    if len(heads) > 2 and not right[-1]:
        texts = [fold(f"    {row[-1]}", room, hang=6) for row in cells]
        body = [row[:-1] for row in cells]
        narrow = _narrowed(body, natural[:-1], right[:-1], room) or natural[:-1]
        lines = [_set([row], narrow, right[:-1], 2, False) for row in body]
        shown = [f"{line}\n{text}" if text.strip() else line for line, text in zip(lines, texts, strict=True)]
        if rule:
            shown.insert(1, "─" * min(room, sum(narrow) + 2 * (len(narrow) - 1)))
        return "\n".join(shown)
    if len(heads) > 2:
        fits = next((n for n in range(len(heads) - 1, 1, -1) if sum(natural[:n]) + 2 * (n - 1) <= room), 2)
        parts = [heads[:fits], [heads[0], *heads[fits:]]]
        bodies = [[row[:fits] for row in rows], [[row[0], *row[fits:]] for row in rows]]
        return "\n\n".join(table(part, body, room, gap, rule) for part, body in zip(parts, bodies, strict=True))
    return _set(cells, natural, right, 2, rule)


def _narrowed(cells: list[list[str]], natural: list[int], right: list[bool], room: int) -> list[int] | None:
    """Widths that fit, none below its column's longest word, or number with its unit, the widest cut first; or None."""
    least = []
    for column, whole in zip(zip(*cells, strict=True), right, strict=True):
        kept = [*column[0].split(), *(part for cell in column[1:] for part in ([cell] if whole else cell.split()))]
        least.append(max(map(len, kept), default=0))
    widths, gaps = list(natural), 2 * (len(natural) - 1)
    if sum(least) + gaps > room:
        return None
    while sum(widths) + gaps > room:
        loose = [i for i in range(len(widths)) if widths[i] > least[i]]
        widths[max(loose, key=lambda i: widths[i])] -= 1
    return widths


def _set(cells: Sequence[Sequence[str]], widths: list[int], right: list[bool], gap: int, rule: bool) -> str:
    lines = []
    for row in cells:
        parts = [
            [cell] if len(cell) <= wide else textwrap.wrap(cell, wide, break_long_words=False, break_on_hyphens=False)
            for cell, wide in zip(row, widths, strict=True)
        ]
        for i in range(max(map(len, parts))):
            line = [part[i] if i < len(part) else "" for part in parts]
            set_ = (c.rjust(w) if to_right else c.ljust(w) for c, w, to_right in zip(line, widths, right, strict=True))
            lines.append((" " * gap).join(set_).rstrip())
        if rule and row is cells[0]:
            lines.append("─" * (sum(widths) + gap * (len(widths) - 1)))
    return "\n".join(lines)
