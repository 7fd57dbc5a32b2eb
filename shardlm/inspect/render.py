"""How a report looks: the same sections as text, for rich, and as HTML; and as plain data."""

import dataclasses
import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.text import Text

from shardlm import _text as texts
from shardlm._text import size

__all__ = ["QUANTITIES", "Section", "as_dict", "as_html", "as_rich", "as_text", "comparison", "flop", "percent",
           "seconds", "sections", "size"]  # fmt: skip

_WIDTH = 118  # columns where there is no terminal
_LINES = 14  # of the ledger, largest first; `to_dict` has all


@dataclass(frozen=True)
class Section:
    """A table with a title, and lines of text below it.

    Attributes:
        title: above it.
        columns: their heads; those that begin with ">" are numbers, set to the right.
        rows: cells; a float between 0 and 1 is drawn as a bar.
        notes: below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    notes: tuple[str, ...] = ()


def sections(report: Any) -> list[Section]:
    """A report's sections."""
    shape = f"{report.batch_size} x {report.sequence} tokens" if report.sequence else f"{report.batch_size} rows"
    head = f"{report.model}: {report.num_parameters:,} parameters, computing in {report.dtype}"
    live = " x ".join(f"{axis}={n}" for axis, n in report.sizes.items() if n > 1) or "one device"
    title = Section(
        f"{head}\nlayout {report.layout}: {live} = {report.num_devices} devices, {shape} a step", (), (), report.notes
    )
    parts = [title, _memory(report)]
    if report.remat:
        parts.append(_remat(report))
    if report.pipeline is not None:
        parts += report.pipeline.sections(report.flops.masked)
    parts += [_communication(report), _ledger(report), _flops(report)]
    if report.timeline is not None:
        parts.append(_timeline(report))
    return parts


def comparison(reports: Mapping[str, Any]) -> list[Section]:
    """Reports side by side."""
    rows = []
    for name, (function, form) in QUANTITIES.items():
        values = [function(report) for report in reports.values()]
        if any(value not in (None, 0) for value in values):
            rows.append((name, *(form(value) for value in values)))
    return [Section("side by side, on one device and in one step", ("", *(f">{n}" for n in reports)), tuple(rows))]


def as_text(parts: Sequence[Section], width: int | None = None) -> str:
    """Sections as plain text, in the terminal's width unless another is given."""
    return "\n".join(line for text, _ in _blocks(parts, width or texts.width() or _WIDTH) for line in text.splitlines())


def as_rich(parts: Sequence[Section]) -> "_Shown":
    """Sections as what rich prints."""
    return _Shown(tuple(parts))


@dataclass(frozen=True)
class _Shown:
    """The same text in the width of rich's console, with titles in bold."""

    parts: tuple[Section, ...]

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Text]:
        for text, style in _blocks(self.parts, options.max_width):
            yield Text(text, style=style, no_wrap=True, overflow="ignore")


def _blocks(parts: Sequence[Section], width: int) -> Iterator[tuple[str, str]]:
    """Pieces of text that stand below each other, each with its style."""
    for i, part in enumerate(parts):
        yield ("\n" if i else "") + texts.fold(part.title, width), "bold"
        if part.columns:
            cells = [[_bar(cell) if isinstance(cell, float) else str(cell) for cell in row] for row in part.rows]
            shown = texts.table(part.columns, cells, width - 1, rule=True)
            yield "\n" + "\n".join(f" {line}".rstrip() for line in shown.splitlines()), ""
        for n, note in enumerate(part.notes):
            yield ("\n" if part.columns and not n else "") + texts.fold(f"  {note}", width, hang=4), ""


def as_html(parts: Sequence[Section]) -> str:
    """Sections as HTML, for notebooks; no scripts and no outside styles."""
    out = ['<div style="font-variant-numeric:tabular-nums">']
    for part in parts:
        out.append(
            f'<p style="margin:0.8em 0 0.2em"><b>{"<br>".join(map(html.escape, part.title.splitlines()))}</b></p>'
        )
        if part.columns:
            heads = "".join(_cell("th", name.removeprefix(">"), name.startswith(">")) for name in part.columns)
            rows = "".join(
                "<tr>"
                + "".join(_cell("td", cell, name.startswith(">")) for cell, name in zip(row, part.columns, strict=True))
                + "</tr>"
                for row in part.rows
            )
            out.append(f"<table><tr>{heads}</tr>{rows}</table>")
        out += [f"<div>{html.escape(note)}</div>" for note in part.notes]
    return "".join([*out, "</div>"])


def as_dict(report: Any) -> dict[str, Any]:
    """A report as plain data."""
    memory = _fields(report.memory) | {"state": report.memory.state}
    data = {
        "layout": report.layout,
        "devices": report.num_devices,
        "sizes": dict(report.sizes),
        "model": report.model,
        "num_parameters": report.num_parameters,
        "batch_size": report.batch_size,
        "sequence": report.sequence,
        "dtype": report.dtype,
        "memory": memory,
        "fits": report.fits,
        "flops": _fields(report.flops) | {"model": report.flops.model, "total": report.flops.total},
        "communication": {
            "x".join(axes): {
                "bytes": found,
                "theory": expected,
                "ratio": found / expected if expected else None,
            }
            for axes, (found, expected) in report.against_theory().items()
        },
        "ledger": [_fields(e) | {"bytes": e.bytes, "added": e in report.ledger.added} for e in report.ledger],
        "theory": None if report.theory is None else [_fields(line) for line in report.theory],
        "pipeline": None if report.pipeline is None else _fields(report.pipeline),
        "remat": {name: {"peak": peak, "recomputed": again} for name, (peak, again) in report.remat.items()},
        "advice": list(report.advice),
        "notes": list(report.notes),
        "parameters": {
            path: {"shape": list(shape), "dtype": dtype, "axes": [list(names) for names in axes]}
            for path, (shape, dtype, axes) in report.parameters.items()
        },
        "timeline": None,
    }
    if report.timeline is not None:
        line = report.timeline
        data["timeline"] = {
            "hardware": line.hardware.name,
            "arithmetic": line.arithmetic,
            "bubble": line.bubble,
            "memory": line.memory,
            "communication": {"x".join(axes): seconds for axes, seconds in line.communication.items()},
            "links": {"x".join(axes): name for axes, name in line.links.items()},
            "overlapped": line.overlapped,
            "serial": line.serial,
            "bound": line.bound,
            "intensity": line.intensity,
            "ridge": line.ridge,
        }
    return data


def seconds(value: float | None) -> str:
    """A time: "1.54 s", "230 ms"."""
    if value is None:
        return "-"
    units = ((1, "s"), (1e3, "ms"), (1e6, "us"))
    scale, unit = next(((s, u) for s, u in units if value * s >= texts.NEXT), (1e9, "ns"))
    return f"{texts.three_digits(value * scale)} {unit}"


def _sent(report: Any, axis: str | None = None) -> float:
    return report.ledger.bytes(axis=axis)


def _time(name: str) -> Callable[[Any], Any]:
    return lambda report: None if report.timeline is None else getattr(report.timeline, name)


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def percent(value: float | None) -> str:
    """A ratio: "36.4%"."""
    return "-" if value is None else f"{value:.1%}"


def flop(value: float) -> str:
    """FLOPs: "1.08 PFLOP"."""
    return texts.scaled(value, "FLOP")


QUANTITIES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], str]]] = {
    "devices": (lambda report: report.num_devices, _text),
    "parameters": (lambda report: report.memory.parameters, size),
    "optimizer state": (lambda report: report.memory.optimizer, size),
    "gradients": (lambda report: report.memory.gradients, size),
    "activations kept": (lambda report: report.memory.activations, size),
    "temporaries": (lambda report: report.memory.temporaries, size),
    "peak": (lambda report: report.peak, size),
    "fits": (lambda report: {True: "yes", False: "no", None: None}[report.fits], _text),
    "sent": (_sent, size),
    **{
        f"  over {axis}": (partial(_sent, axis=axis), size)
        for axis in ("pipe", "data", "fsdp", "expert", "context", "tensor")
    },
    "model FLOPs": (lambda report: report.flops.model, flop),
    "recomputed": (lambda report: report.flops.recomputed, flop),
    "on masked arrays": (lambda report: report.flops.masked, flop),
    "bubble, of the ideal time": (lambda report: report.pipeline and report.pipeline.bubble, percent),
    "arithmetic": (_time("arithmetic"), seconds),
    "step, all overlapping": (_time("overlapped"), seconds),
    "step, nothing overlapping": (_time("serial"), seconds),
    "bound by": (_time("bound"), _text),
}


def _memory(report: Any) -> Section:
    memory, hardware = report.memory, report.hardware
    room = None if hardware is None else hardware.memory
    whole = room or report.peak or 1
    rows = [
        (name, size(count), min(1.0, count / whole))
        for name, count in (
            ("parameters", memory.parameters),
            ("optimizer state", memory.optimizer),
            ("batch", memory.batch),
            ("gradients", memory.gradients),
            ("activations kept for backward", memory.activations),
            ("temporaries at the worst moment", memory.temporaries),
        )
        if count is not None
    ]
    if memory.peak is not None:
        rows.append(("peak", size(memory.peak), min(1.0, memory.peak / whole)))
    notes = []
    if memory.peak is not None:
        notes.append(f"the worst moment is at {memory.where}; the largest array is {memory.largest[1]}, "
                     f"{size(memory.largest[0])}, made at {memory.largest[2]}")  # fmt: skip
    if memory.compiled is not None:
        rows.append(("peak, by the compiler here", size(memory.compiled), min(1.0, memory.compiled / whole)))
    if hardware is not None and room is not None and report.peak is not None:
        left = room - report.peak
        verdict = f"fits, {size(left)} to spare" if left >= 0 else f"DOES NOT FIT: {size(-left)} too much"
        notes.append(f"{hardware.name}: {verdict} of {size(room)}")
    notes += report.advice
    return Section("memory on one device", ("", ">bytes", "of all" if room is None else "of the device's"),
                   tuple(rows), tuple(notes))  # fmt: skip


def _remat(report: Any) -> Section:
    chosen = dict(part.partition("=")[::2] for part in report.layout.split(",")).get("remat", "none")
    rows = tuple(
        (f"{name}{' (this one)' if name == chosen else ''}", size(peak), flop(again))
        for name, (peak, again) in report.remat.items()
    )
    return Section("what remat would change", ("remat", ">peak", ">recomputed"), rows)


def _communication(report: Any) -> Section:
    rows = []
    for axes, (found, expected) in report.against_theory().items():
        entries = report.ledger.by_axes().get(axes, ())
        count = sum(entry.count for entry in entries if entry.source)
        ratio = "-" if not expected else f"{found / expected:.3f}"
        rows.append((" x ".join(axes), str(math.prod(report.sizes[a] for a in axes)), str(count), size(found),
                     size(expected), ratio))  # fmt: skip
    notes = []
    if not rows:
        notes.append("nothing is sent" if report.num_devices == 1 or report.ledger.compiled else "not known")
    if report.ledger.compiled:
        extra = report.ledger.added
        added = sum(entry.bytes for entry in extra)
        count = sum(entry.count for entry in extra)
        notes.append(f"the compiler adds {count} collectives of {size(added)} in all" if extra else
                     "the compiler adds nothing")  # fmt: skip
    return Section(
        "sent by one device in one step",
        ("over", ">devices", ">collectives", ">bytes", ">theory", ">ratio"),
        tuple(rows),
        tuple(notes),
    )


def _ledger(report: Any) -> Section:
    groups: dict[tuple, list] = {}
    for entry in report.ledger:
        again = " again" if entry.recomputed else ""
        key = (entry.phase + again, entry.kind, entry.axes, entry.dtype, entry.source or "the compiler", entry.branch)
        groups.setdefault(key, []).append(entry)
    ordered = sorted(groups.items(), key=lambda item: -sum(entry.bytes for entry in item[1]))
    rows = tuple(
        (phase, kind, " x ".join(axes), dtype, str(sum(e.count for e in entries)), size(sum(e.bytes for e in entries)),
         source + "".join(f", {b.partition(' ')[2]}" for b in branch))
        for (phase, kind, axes, dtype, source, branch), entries in ordered[:_LINES]
    )  # fmt: skip
    rest = len(ordered) - _LINES
    notes = (f"and {rest} smaller lines, all in to_dict()",) if rest > 0 else ()
    heads = ("phase", "collective", "over", "dtype", ">times", ">bytes", "asked for at")
    return Section("the ledger: every collective", heads, rows, notes)


def _flops(report: Any) -> Section:
    flops = report.flops
    rows = [("forward", flop(flops.forward)), ("backward", flop(flops.backward))]
    if flops.recomputed:
        rows.append(("recomputed in backward", flop(flops.recomputed)))
    if flops.update:
        rows.append(("update", flop(flops.update)))
    if flops.masked:
        rows.append(("on masked arrays", flop(flops.masked)))
    rows.append(("all", flop(flops.total)))
    return Section("arithmetic of one device in one step", ("", ">matrix products"), tuple(rows))


def _timeline(report: Any) -> Section:
    line = report.timeline
    peak = "at the peak" + (f"; {seconds(line.bubble)} of it on masked arrays" if line.bubble else "")
    rows = [("arithmetic", seconds(line.arithmetic), peak), ("memory traffic", seconds(line.memory), "")]
    rows += [
        (f"communication over {' x '.join(axes)}", seconds(t), f"{line.links[axes]} links")
        for axes, t in line.communication.items()
    ]
    notes = [
        f"a step takes at least {seconds(line.overlapped)} if all of it overlaps, {seconds(line.serial)} if "
        f"communication does not; {line.bound} bounds it",
        f"{line.intensity:.3g} FLOP per byte of memory traffic; below {line.ridge:.3g} memory bounds the arithmetic",
    ]
    if tokens := report.batch_size * (report.sequence or 0):
        best, worst = line.utilisation(line.overlapped), line.utilisation(line.serial)
        notes.append(f"{tokens / line.overlapped:,.0f} tokens/s at {best:.0%} model FLOPs utilisation, or "
                     f"{tokens / line.serial:,.0f} at {worst:.0%}")  # fmt: skip
    return Section(f"time on {line.hardware.name}", ("", ">alone", ""), tuple(rows), tuple(notes))


def _bar(fraction: float, width: int = 24) -> str:
    return "█" * round(fraction * width) or ("▏" if fraction else "")


def _cell(tag: str, value: Any, right: bool) -> str:
    style = f"text-align:{'right' if right else 'left'};padding:2px 10px 2px 0;white-space:nowrap"
    if isinstance(value, float):
        bar = f"display:inline-block;height:0.8em;background:#0072B2;width:{max(1, round(value * 200))}px"
        return f'<{tag} style="{style}"><span style="{bar}"></span></{tag}>'
    return f'<{tag} style="{style}">{html.escape(str(value))}</{tag}>'


def _fields(value: Any) -> dict[str, Any]:
    result = {}
    for field in dataclasses.fields(value):
        found = getattr(value, field.name)
        result[field.name] = list(found) if isinstance(found, tuple) else found
    return result
