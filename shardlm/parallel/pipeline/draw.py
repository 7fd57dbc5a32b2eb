"""The stage-by-time chart of a simulation: as a figure, and as text for a terminal."""

from collections.abc import Mapping
from functools import partial
from io import BytesIO
from typing import Any

from ..._extras import install
from .schedule import Kind, Operation
from .simulate import Simulation

# Of Okabe and Ito's colours, which readers with any kind of colour vision tell apart, those that stay so when made
# lighter and darker.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")
_GREY = "#BBBBBB"
_NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT_GRADIENT: "gradient of the input",
    Kind.WEIGHT_GRADIENT: "gradient of the weights",
}
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
# Inches: of a stage's row; of what is above, below, left and right of the rows; of the legend; a plot's least and most.
_ROW, _ABOVE, _BELOW, _LEFT, _RIGHT, _LEGEND = 0.45, 0.55, 0.55, 0.8, 0.2, 0.35
_NARROW, _WIDE, _WIDEST = 5.0, 20.0, 40.0
_MICROBATCH = 0.9  # inches for a stage's work on one microbatch, where that makes no plot too wide


def chart(simulation: Simulation, title: str | None = None) -> Any:
    """The chart as a `matplotlib.figure.Figure`; `savefig("chart.svg")` writes it, and a notebook shows it.

    One row per stage, time to the right; the number is the microbatch, its subscript the chunk if there are several,
    its colour one of five in turn. Forwards are light, backwards dark, gradients of weights pale in a dark frame. Thin
    lines are the bounds of synchronous ticks, grey what a tick spends on embedding and head.

    A stage's work on one microbatch has the same length in every chart of as many stages and microbatches, whatever the
    schedule, so that lengths compare between pictures too; `charts` puts them below each other.

    Raises:
        ImportError: without matplotlib, which the extra plots brings.
    """
    return charts({title or "": simulation})


def charts(simulations: Mapping[str, Simulation]) -> Any:
    """Several charts below each other in one figure, on one axis of time; see `chart`.

    Args:
        simulations: by title, in one unit of time.

    Raises:
        ValueError: there is none.
        ImportError: without matplotlib.

    Example:
        >>> from shardlm.parallel.pipeline import asynchronous, charts, orders
        >>> figure = charts({name: asynchronous(orders(name, 4, 8)) for name in ("gpipe", "1f1b")})
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"charts need matplotlib: {install('plots')}") from error
    if not simulations:
        raise ValueError("no simulation to draw: give at least one, by its title, as in {'1f1b': simulation}")
    end = max(simulation.makespan for simulation in simulations.values())
    inch = min(min(map(_inches_per_time, simulations.values())), _WIDEST / end)
    plots = [_ROW * len(simulation.work) for simulation in simulations.values()]
    width = max(_LEFT + inch * end + _RIGHT, _LEFT + _NARROW + _RIGHT)
    height = sum(plots) + (_ABOVE + _BELOW) * len(plots) + _LEGEND
    figure, top = Figure(figsize=(width, height), facecolor="white"), height
    for (title, simulation), high in zip(simulations.items(), plots, strict=True):
        top -= _ABOVE + high
        axes = figure.add_axes((_LEFT / width, top / height, inch * end / width, high / height))
        _draw(axes, simulation, title, inch, end)
        top -= _BELOW
    handles = _legend(list(simulations.values()))
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(_LEFT / width - 0.005, 0),
        ncols=len(handles),
        frameon=False,
        fontsize=8,
    )
    vars(figure)["_repr_png_"] = partial(_png, figure)  # for notebooks that have not imported pyplot
    return figure


def _inches_per_time(simulation: Simulation) -> float:
    """The scale, which stages, microbatches and their work decide, and not the schedule."""
    microbatches = 1 + max(span.operation.microbatch for span in simulation.spans)
    # What 1F1B takes, in units of a stage's work on one microbatch.
    usual = microbatches + len(simulation.work) - 1
    each = min(max(_MICROBATCH, _NARROW / usual), _WIDE / usual)
    return each * microbatches / simulation.ideal


def _draw(axes: Any, simulation: Simulation, title: str, inch: float, end: float) -> None:
    """One chart; `inch` is inches per unit of time, and the axis ends at `end`."""
    stages, chunked = len(simulation.work), any(span.operation.chunk for span in simulation.spans)
    for stage, operation, start, stop in simulation.spans:
        face, edge, ink = _paint(operation)
        framed = edge is not None
        axes.barh(
            stage, stop - start, left=start, height=0.86, color=face, edgecolor=edge or "white",
            linewidth=1.6 if framed else 0.8, zorder=2.1 if framed else 2,
        )  # fmt: skip
        label = str(operation.microbatch) + (str(operation.chunk).translate(_SUBSCRIPTS) if chunked else "")
        room = (stop - start) * inch * 72 / (0.62 * len(label))  # the font size that fills the bar's width
        axes.text(
            (start + stop) / 2, stage, label, ha="center", va="center_baseline", color=ink,
            fontsize=min(9.0, 0.9 * room), zorder=3,
        )  # fmt: skip
    for stage, start, stop in simulation.shared:
        axes.barh(stage, stop - start, left=start, height=0.86, color=_GREY, edgecolor="white", linewidth=0.8)
    for tick in simulation.ticks:
        axes.axvline(tick.end, color="#999999", linewidth=0.4, zorder=0)
    axes.set_yticks(range(stages), [f"stage {stage}" for stage in range(stages)])
    axes.set_ylim(stages - 0.4, -0.6)
    axes.set_xlim(0, end)
    axes.set_xlabel(f"time ({_unit(simulation)})", loc="left", fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(f"{title}\n{_caption(simulation)}" if title else _caption(simulation), fontsize=9, loc="left")


def _legend(simulations: list[Simulation]) -> list[Any]:
    from matplotlib.patches import Patch

    seen = {span.operation.kind for simulation in simulations for span in simulation.spans}
    handles = []
    for kind, name in _NAMES.items():
        if kind in seen:
            face, edge, _ = _paint(Operation(kind, 0))
            handles.append(Patch(facecolor=face, edgecolor=edge or "white", linewidth=1.6 if edge else 0.8, label=name))
    if any(simulation.shared for simulation in simulations):
        handles.append(Patch(facecolor=_GREY, edgecolor="white", label="embedding and head"))
    return handles


def text_chart(simulation: Simulation) -> str:
    """The chart as text: F3 is the forward of microbatch 3, F3.1 that by chunk 1, and so B, I and W; dashes are time.

    Equals signs are embedding and head, in synchronous ticks that spend time on them.

    >>> from shardlm.parallel.pipeline import asynchronous, orders
    >>> print(text_chart(asynchronous(orders("1f1b", stages=2, microbatches=3))))
    time    0              5              10  (a forward takes 1)
    stage 0 F0 F1       B0--- F2 B1---    B2---
    stage 1    F0 B0--- F1 B1--- F2 B2---
    asynchronous: bubble 3 (33.3% of ideal), at most 2 stage inputs held
    """
    bars = [(stage, start, end, str(operation)) for stage, operation, start, end in simulation.spans if end > start]
    # So wide that every label and a space fit into its time.
    scale = max((len(label) + 1) / (end - start) for _, start, end, label in bars)
    rows = [[] for _ in simulation.work]
    shared = [(part.stage, part.start, part.end, "") for part in simulation.shared]
    for stage, start, end, label in sorted([*bars, *shared], key=lambda bar: bar[1]):
        first, last = round(start * scale), round(end * scale)
        rows[stage].extend(" " * (first - len(rows[stage])))
        rows[stage].extend(label.ljust(last - first - 1, "-") + " " if label else "=" * (last - first))
    step = next(n * 10**e for e in range(-9, 99) for n in (1, 2, 5) if n * 10**e * scale >= 8)
    head = len(f"stage {len(rows) - 1} ")
    axis: list[str] = []
    for n in range(int(simulation.makespan / step) + 1):
        axis.extend(" " * (round(n * step * scale) - len(axis)))
        axis.extend(f"{n * step:g}")
    lines = [f"{'time':<{head}}" + "".join(axis) + f"  ({_unit(simulation)})"]
    lines += [f"{f'stage {stage}':<{head}}" + "".join(row).rstrip() for stage, row in enumerate(rows)]
    return "\n".join([*lines, _caption(simulation)])


def _png(figure: Any) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _caption(simulation: Simulation) -> str:
    kind = f"synchronous, {len(simulation.ticks)} ticks" if simulation.ticks else "asynchronous"
    return (
        f"{kind}: bubble {simulation.bubble:g} ({simulation.bubble_fraction:.1%} of ideal), "
        f"at most {max(simulation.peak_activations)} stage inputs held"
    )


def _unit(simulation: Simulation) -> str:
    """What the numbers of time mean: how long a forward takes in them."""
    spans = [span for span in simulation.spans if span.operation.kind is Kind.FORWARD]
    each = sorted({float(f"{span.end - span.start:.3g}") for span in spans})
    what = "forward of a chunk" if any(span.operation.chunk for span in spans) else "forward"
    if not each:
        return "in the unit of the times given"
    return f"a {what} takes {each[0]:g}" + (f" to {each[-1]:g}" if len(each) > 1 else "")


def _paint(operation: Operation) -> tuple[tuple[float, float, float], tuple[float, float, float] | None, str]:
    """Colour of the bar, of its frame where it has one, and of the number on it."""
    code = _COLOURS[operation.microbatch % len(_COLOURS)]
    red, green, blue = (int(code[n : n + 2], 16) / 255 for n in (1, 3, 5))
    light = (0.58 + 0.42 * red, 0.58 + 0.42 * green, 0.58 + 0.42 * blue)
    dark = (0.65 * red, 0.65 * green, 0.65 * blue)  # dark enough for white numbers, orange too
    if operation.kind is Kind.FORWARD:
        return light, None, "black"
    pale = (0.85 + 0.15 * red, 0.85 + 0.15 * green, 0.85 + 0.15 * blue)
    return (pale, dark, "black") if operation.kind is Kind.WEIGHT_GRADIENT else (dark, None, "white")
