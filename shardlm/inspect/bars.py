"""What reports say of memory and communication, as bars side by side."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardlm.inspect import canvas, render
from shardlm.inspect.ledger import KINDS, Ledger, total_bytes
from shardlm.inspect.pictures import AXIS_COLORS
from shardlm.inspect.report import Comparison, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Reports = Report | Comparison | Mapping[str, Report]

# Colours of the palette, and a hatch, for each part of a bar.
_MEMORY = {
    "parameters": (("blue",), ""),
    "optimizer state": (("sky",), "//"),
    "batch": (("grey",), ""),
    "gradients": (("orange",), "\\\\"),
    "activations": (("green",), ".."),
    "temporaries": (("purple",), "xx"),
    "the rest, by the compiler": (("grey",), "++"),
}
_AXIS_HATCHES = {"pipe": "oo", "data": "//", "fsdp": "\\\\", "expert": "..", "context": "xx", "tensor": "--"}
_KINDS = {
    "all-reduce": (("vermilion",), "//"),
    "all-gather": (("sky",), "\\\\"),
    "reduce-scatter": (("green",), ".."),
    "all-to-all": (("yellow",), "xx"),
    "collective-permute": (("purple",), "oo"),
    "broadcast": (("orange",), "--"),
}
_ADDED = "added by the compiler"
_FAR = 4  # how many times the longest bar a limit may be and still be drawn

_PLOT, _BAR, _THIN, _SLOT, _EDGE, _LINE = 5.2, 0.3, 0.1, 0.52, 0.2, 0.23  # inches


@dataclass(frozen=True)
class _Row:
    """One bar.

    Attributes:
        name: left of it.
        parts: the lengths of its segments, in order.
        text: right of it.
        theory: the segments of the thin bar below it; None draws none.
        limit: where its dashed line is; None draws none.
        mark: where its bold line is, the total where the segments do not add up to it; None draws none.
    """

    name: str
    parts: Mapping[str, float]
    text: str
    theory: Mapping[str, float] | None = None
    limit: float | None = None
    mark: float | None = None


@dataclass(frozen=True)
class _Chart:
    title: str
    rows: Sequence[_Row]
    styles: Mapping[str, tuple[tuple[str, ...], str]]
    notes: Sequence[str] = field(default=())


def draw_memory(reports: Reports) -> "Figure":
    """Draw the memory of one device as bars, and the hardware's as a dashed line where it is known and near.

    The segments are the fields of `Memory`. Where they do not add up to the peak, because not all gradients are alive
    at the worst moment, a bold line marks it. Of a step that the compiler partitions only the sum of the rest is known,
    if it was compiled.

    Args:
        reports: one, or several by name.

    Raises:
        ValueError: there is none.
        TypeError: something else than reports.
        ImportError: matplotlib is not installed.
    """
    named, rows = _named(reports), []
    for name, report in named.items():
        memory = report.memory
        values = [memory.parameters, memory.optimizer, memory.batch]
        if memory.peak is None and memory.compiled is not None:
            values += [0, 0, 0, memory.compiled - sum(values)]
        else:
            values += [memory.gradients, memory.activations, memory.temporaries, 0]
        parts = {part: value for part, value in zip(_MEMORY, values, strict=True) if value}
        limit = None if report.hardware is None else report.hardware.memory
        peak = report.peak
        if peak is None:
            text = "peak not known: explain(..., compile=True)"
        else:
            whose = "peak" if memory.peak is not None else "peak by the compiler"
            text = f"{whose} {render.size(peak)}" + {True: ", fits", False: ", TOO MUCH", None: ""}[report.fits]
        apart = peak is not None and abs(sum(parts.values()) - peak) > 0.005 * peak
        rows.append(_Row(name, parts, text, limit=limit, mark=peak if apart else None))
    notes = _limits(named, rows)
    if any(row.mark is not None for row in rows):
        notes.append("bold line: the peak, where the parts are not all alive at once")
    return _draw(_Chart("memory on one device", rows, _MEMORY, notes))


def draw_communication(reports: Reports, by: str = "axis") -> "Figure":
    """Draw the bytes that one device sends in one step as bars, and what the textbook says as a thin bar below each.

    Args:
        reports: one, or several by name.
        by: what the segments are: "axis", the mesh axes that take part together, or "kind" of collective.

    Raises:
        ValueError: there is no report; `by` is something else.
        TypeError: something else than reports.
        ImportError: matplotlib is not installed.
    """
    if by not in ("axis", "kind"):
        raise ValueError(f'by={by!r}; it is "axis" or "kind"')
    named, rows = _named(reports), []
    for name, report in named.items():
        parts, theory = (_by_axis if by == "axis" else _by_kind)(report)
        sent, expected = sum(parts.values()), None if theory is None else sum(theory.values())
        if report.ledger.added:
            parts[_ADDED] = total_bytes(report.ledger.added)
        if not report.ledger.entries and not report.ledger.compiled and report.num_devices > 1:
            text = "not known: explain(..., compile=True)"
        elif not sent and not expected:
            text = render.size(sum(parts.values()))
        elif expected is None:
            text = f"{render.size(sum(parts.values()))}, no theory"
        else:
            ratio = f", {sent / expected:.3f} of theory" if expected else f", theory {render.size(expected)}"
            text = render.size(sum(parts.values())) + ratio
        rows.append(_Row(name, parts, text, theory))
    styles = _KINDS if by == "kind" else {key: _axes_style(key) for key in _axes_of(named, rows)}
    notes = ["thin bars: theory"] if any(row.theory is not None for row in rows) else []
    return _draw(_Chart(f"sent by one device in one step, by {by}", rows, styles | {_ADDED: (("grey",), "++")}, notes))


def _named(reports: Reports) -> Mapping[str, Report]:
    if isinstance(reports, Report):
        return {reports.layout: reports}
    named = reports.reports if isinstance(reports, Comparison) else reports
    if not isinstance(named, Mapping) or not all(isinstance(report, Report) for report in named.values()):
        raise TypeError(
            f"reports are a Report or a dict of them by name, not {type(reports).__name__}: {reports!r:.80}"
        )
    if not named:
        raise ValueError("no report to draw: give one, or several by name as in {'a': a, 'b': b}")
    return named


def _by_axis(report: Report) -> tuple[dict[str, float], dict[str, float] | None]:
    both = {" x ".join(axes): values for axes, values in report.against_theory().items()}
    known = {key: expected for key, (_, expected) in both.items() if expected is not None}
    theory = known if report.theory is not None and len(known) == len(both) else None
    return {key: found for key, (found, _) in both.items()}, theory


def _by_kind(report: Report) -> tuple[dict[str, float], dict[str, float] | None]:
    kinds = dict.fromkeys(KINDS.values())
    entries = Ledger(report.ledger.entries)
    parts = {kind: entries.bytes(kind=kind) for kind in kinds}
    theory = None
    lines = [(line.kind, line.bytes) for line in report.theory or () if line.bytes is not None]
    if report.theory is not None and len(lines) == len(report.theory):
        theory = {kind: sum(count for of, count in lines if of == kind) for kind in kinds}
    return {kind: n for kind, n in parts.items() if n}, theory


def _axes_of(named: Mapping[str, Report], rows: Sequence[_Row]) -> list[str]:
    """The keys of all rows, in mesh order."""
    mesh = list(next(iter(named.values())).sizes)
    keys = {key for row in rows for key in (*row.parts, *(row.theory or ())) if key != _ADDED}
    return sorted(keys, key=lambda key: [mesh.index(axis) for axis in key.split(" x ")])


def _axes_style(key: str) -> tuple[tuple[str, ...], str]:
    axes = key.split(" x ")
    return tuple(AXIS_COLORS[axis] for axis in axes), "".join(_AXIS_HATCHES[axis] for axis in axes)


def _limits(named: Mapping[str, Report], rows: Sequence[_Row]) -> list[str]:
    """What the dashed lines are; a line too far away for the picture is only named."""
    longest = _longest(rows)
    hardware = {report.hardware.name: report.hardware.memory for report in named.values() if report.hardware}
    near = [f"{name}, {render.size(n)}" for name, n in hardware.items() if n <= _FAR * longest]
    far = [
        f"{name} has {render.size(n)}, {n / longest:,.0f} times the longest bar"
        for name, n in hardware.items()
        if n > _FAR * longest
    ]
    return [f"dashed line: memory of {'; '.join(near)}"] * bool(near) + far


def _longest(rows: Sequence[_Row]) -> float:
    lengths = (max(sum(row.parts.values()), sum((row.theory or {}).values()), row.mark or 0) for row in rows)
    return max(lengths) or 1.0


def _draw(chart: _Chart) -> "Figure":
    rows, longest = chart.rows, _longest(chart.rows)
    used = [part for part in chart.styles if any(row.parts.get(part) or (row.theory or {}).get(part) for row in rows)]
    right = max([longest, *(row.limit for row in rows if row.limit and row.limit <= _FAR * longest)]) * 1.03
    left = _EDGE + max(canvas.width(row.name) for row in rows) + 0.12
    labels = {part: part if _visible(part, rows, right) else f"{part} (too small to see)" for part in used}
    texts = max(canvas.width(row.text) for row in rows)
    width = left + _PLOT + 0.15 + texts + _EDGE
    legend = _legend(labels.values(), width - 2 * _EDGE)
    lines = len(chart.notes) + (max((line for _, line, _ in legend), default=-1) + 1)
    top = _EDGE + 0.35 + _LINE * lines + 0.1
    height = top + _SLOT * len(rows) + 0.45
    figure, axes = canvas.sheet(width, height)
    canvas.write(axes, _EDGE, _EDGE + 0.1, chart.title, fontsize=11, weight="bold")
    for i, note in enumerate(chart.notes):
        canvas.write(axes, _EDGE, _EDGE + 0.35 + _LINE * (i + 0.5), note, color=canvas.FAINT)
    for part, (label, line, x) in zip(used, legend, strict=True):
        y = _EDGE + 0.35 + _LINE * (len(chart.notes) + line + 0.5)
        _box(axes, chart.styles[part], (_EDGE + x, y - 0.075), (0.28, 0.15))
        canvas.write(axes, _EDGE + x + 0.34, y, label)
    plot = figure.add_axes((left / width, 0.45 / height, _PLOT / width, _SLOT * len(rows) / height))
    _scale(plot, right, _SLOT * len(rows))
    for i, row in enumerate(rows):
        y = _SLOT * i + (0.06 if row.theory is not None else (_SLOT - _BAR) / 2)
        canvas.write(axes, left - 0.12, top + y + _BAR / 2, row.name, ha="right")
        canvas.write(axes, left + _PLOT + 0.15, top + y + _BAR / 2, row.text, gid=f"{row.name}/text")
        _bar(plot, chart, row, y, right)
        if row.limit and row.limit <= right:
            plot.plot(
                [row.limit] * 2, [_SLOT * i, _SLOT * (i + 1)], "--", color=canvas.INK, lw=1.2, gid=f"{row.name}/limit"
            )
        if row.mark:
            plot.plot([row.mark] * 2, [y - 0.05, y + _BAR + 0.05], color=canvas.INK, lw=2.5, gid=f"{row.name}/peak")
    return figure


def _bar(plot: "Axes", chart: _Chart, row: _Row, y: float, right: float) -> None:
    start = 0.0
    for part in chart.styles:
        length = row.parts.get(part, 0.0)
        if not length:
            continue
        _box(plot, chart.styles[part], (start, y), (length, _BAR), gid=f"{row.name}/{part}")
        text = render.size(length)
        if canvas.width(text, 8) + 0.1 < length / right * _PLOT:
            around = {"facecolor": canvas.tint(*chart.styles[part][0], white=0.7), "edgecolor": "none", "pad": 1.0}
            middle = (start + length / 2, y + _BAR / 2)
            canvas.write(plot, *middle, text, fontsize=8, ha="center", bbox=around)
        start += length
    start = 0.0
    for part in chart.styles:
        length = (row.theory or {}).get(part, 0.0)
        if length:
            corner = (start, y + _BAR + 0.02)
            _box(plot, chart.styles[part], corner, (length, _THIN), gid=f"{row.name}/theory/{part}")
            start += length


def _box(axes: "Axes", style: tuple[tuple[str, ...], str], corner: tuple, size: tuple, gid: str | None = None) -> None:
    from matplotlib.patches import Rectangle

    colors, hatch = style
    fill, line = canvas.tint(*colors), canvas.tint(*colors, white=0.0)
    axes.add_patch(Rectangle(corner, *size, facecolor=fill, edgecolor=line, hatch=hatch, linewidth=0.6, gid=gid))


def _visible(part: str, rows: Sequence[_Row], right: float) -> bool:
    longest = max(max(row.parts.get(part, 0.0), (row.theory or {}).get(part, 0.0)) for row in rows)
    return longest / right * _PLOT > 0.02


def _legend(labels: Iterable[str], room: float) -> list[tuple[str, int, float]]:
    """(label, line, inches from the left) of each entry, in as many lines as it takes."""
    found, line, x = [], 0, 0.0
    for label in labels:
        wide = 0.34 + canvas.width(label) + 0.25
        if x and x + wide > room:
            line, x = line + 1, 0.0
        found.append((label, line, x))
        x += wide
    return found


def _scale(plot: "Axes", right: float, height: float) -> None:
    """Bytes from 0 along the bottom, and nothing else around the bars."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    plot.set(xlim=(0, right), ylim=(height, 0), yticks=[], facecolor="none")
    plot.xaxis.set_major_locator(MaxNLocator(5))
    plot.xaxis.set_major_formatter(FuncFormatter(lambda value, _: render.size(value)))
    plot.tick_params(axis="x", labelsize=8, colors=canvas.FAINT, length=3)
    plot.grid(axis="x", color="#DDDDDD", lw=0.8)
    plot.set_axisbelow(True)
    plot.spines[["top", "right", "left"]].set_visible(False)
    plot.spines["bottom"].set_color(canvas.FAINT)
