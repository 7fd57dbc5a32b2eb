"""What rules.py prints: the table of specs as text and as HTML, and the rules that it suggests.

`table` is a `shardlm.rules.ParameterTable`, `layout` a `shardlm.layout.Layout`; rules.py imports this one.
"""

import html
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from shardlm._text import fold
from shardlm._text import table as set_table


def as_text(table: Any) -> str:
    """Aligned columns, a line for each parameter, and the sum."""
    heads, *rows = _rows(table)
    return f"{set_table(heads, rows, gap=2)}\n{fold(_total(table))}"


def as_html(table: Any) -> str:
    """The same as an HTML table, for notebooks."""
    tags = ["th", *["td"] * len(table.splits)]
    rows = zip(tags, _rows(table), strict=True)
    body = "".join(f"<tr>{''.join(f'<{t}>{html.escape(cell)}</{t}>' for cell in row)}</tr>" for t, row in rows)
    return f"<table>{body}</table>{html.escape(_total(table))}"


def literal(entries: Iterable[tuple[str, ...]]) -> str:
    """A spec's entries as one writes them: P(None, 'tensor')."""
    cells = [repr(None) if not axes else repr(axes[0]) if len(axes) == 1 else repr(tuple(axes)) for axes in entries]
    return f"P({', '.join(cells)})"


def suggestions(
    parameters: Mapping[str, Any], layout: Any, *, catch_all: bool, brief: bool = False, rule: bool = False
) -> str:
    """What to add to the rules for `parameters` (shapes by path): a line for all whose paths differ in numbers only.

    With `brief` a sentence on the first of them, with `rule` its rule alone.
    """
    lines: dict[str, str] = {}
    for path, leaf in parameters.items():
        pattern = "/".join(r"\d+" if part.isdigit() else re.escape(part) for part in path.split("/"))
        lines.setdefault(f"^{pattern}$", _suggested(leaf.shape, layout))
    rules = [f'(r"{pattern}", {spec})' for pattern, spec in lines.items()]
    if rule:
        return rules[0]
    if brief:
        none = f"no dim divides by tensor={layout.tensor}"
        return (
            f"add the rule {rules[0]}" if rules[0].count("tensor") else none if layout.tensor > 1 else "no dim divides"
        )
    named = "".join(
        f"\n      {path} {tuple(leaf.shape)} {leaf.dtype}, {math.prod(leaf.shape) * leaf.dtype.itemsize:,} bytes"
        for path, leaf in parameters.items()
    )
    added = "".join(f"\n      {rule}," for rule in rules)
    which = f"these {len(parameters)} parameters, which have" if len(parameters) > 1 else "this parameter, which has"
    text = f"no rule matches {which} no annotation:{named}\n    add rules, such as{added}"
    return text + ('\n    or leave them all to ZeRO on purpose, by the last rule (r".*", P())' if catch_all else "")


def _suggested(shape: tuple[int, ...], layout: Any) -> str:
    """`tensor` on the largest dim of a matrix that divides, the later one of equals; vectors are left to ZeRO."""
    fits = [d for d, n in enumerate(shape) if n and n % layout.tensor == 0] if layout.tensor > 1 else []
    if len(shape) < 2 or not fits:
        return "P()"
    best = max(fits, key=lambda d: (shape[d], d))
    return literal([("tensor",) if d == best else () for d in range(best + 1)])


def _rows(table: Any) -> list[tuple[str, ...]]:
    apart = any(split.stored != split.sharded for split in table.splits.values())
    rows = [("parameter", "shape", "dtype", "stored as", "bytes per device", "decided by")]
    for path, split in table.splits.items():
        held = f"{table.bytes_per_device(path):,}"
        rows.append(
            (path, str(split.shape), str(table.dtypes[path]), _written(split.stored), held, table.reasons[path])
        )
    if apart:  # ZeRO-1 and 2
        extra = ["optimizer state as", *(_written(split.sharded) for split in table.splits.values())]
        rows = [(*row[:4], cell, *row[4:]) for row, cell in zip(rows, extra, strict=True)]
    return rows


def _written(spec: Any) -> str:
    return f"P({', '.join(map(repr, spec))})"


def _total(table: Any) -> str:
    count = sum(math.prod(split.shape) for split in table.splits.values())
    whole = sum(math.prod(split.shape) * table.dtypes[path].itemsize for path, split in table.splits.items())
    held = sum(map(table.bytes_per_device, table.splits))
    return f"{count:,} parameters of {whole:,} bytes, of which {held:,} on each device"
