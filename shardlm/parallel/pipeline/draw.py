"""The stage-by-time chart of a simulation: as a figure, and as text for a terminal."""

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


def chart(simulation: Simulation, title: str | None = None) -> Any:
    """The chart as a `matplotlib.figure.Figure`; `savefig("chart.svg")` writes it, and a notebook shows it.

    One row per stage, time to the right; the number is the microbatch, its subscript the chunk if there are several,
    its colour one of five in turn. Forwards are light, backwards dark, gradients of weights hatched as well.
    Thin lines are the bounds of synchronous ticks, grey what a tick spends on embedding and head.

    Raises:
        ImportError: without matplotlib, which the extra plots brings.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError(f"charts need matplotlib: {install('plots')}") from error
    stages, longest = len(simulation.work), simulation.makespan
    shortest = min(span.end - span.start for span in simulation.spans if span.end > span.start)
    width = min(max(6.0, 0.3 * longest / shortest), 24.0)
    figure = Figure(figsize=(width, 0.45 * stages + 1.5), layout="constrained")
    axes = figure.add_subplot()
    chunked = any(span.operation.chunk for span in simulation.spans)
    for stage, operation, start, end in simulation.spans:
        face, ink = _paint(operation)
        axes.barh(
            stage, end - start, left=start, height=0.86, color=face, edgecolor="white", linewidth=0.8,
            hatch="////" if operation.kind is Kind.WEIGHT_GRADIENT else None,
        )  # fmt: skip
        label = str(operation.microbatch) + (str(operation.chunk).translate(_SUBSCRIPTS) if chunked else "")
        room = (end - start) / longest * width * 72 / (0.62 * len(label))  # the font size that fills the bar's width
        axes.text(
            (start + end) / 2, stage, label, ha="center", va="center", color=ink, fontsize=min(9.0, 0.9 * room),
            bbox={"facecolor": face, "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
    for stage, start, end in simulation.shared:
        axes.barh(stage, end - start, left=start, height=0.86, color=_GREY, edgecolor="white", linewidth=0.8)
    for tick in simulation.ticks:
        axes.axvline(tick.end, color="#999999", linewidth=0.4, zorder=0)
    axes.set_yticks(range(stages), [f"stage {stage}" for stage in range(stages)])
    axes.set_ylim(stages - 0.4, -0.6)
    axes.set_xlim(0, longest)
    axes.set_xlabel("time")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(f"{title}\n{_caption(simulation)}" if title else _caption(simulation), fontsize=9, loc="left")
    seen = {span.operation.kind for span in simulation.spans}
    handles = [
        Patch(
            facecolor=_paint(Operation(kind, 0))[0],
            edgecolor="white",
            hatch="////" if kind is Kind.WEIGHT_GRADIENT else None,
            label=name,
        )
        for kind, name in _NAMES.items()
        if kind in seen
    ]
    if simulation.shared:
        handles.append(Patch(facecolor=_GREY, edgecolor="white", label="embedding and head"))
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), frameon=False, fontsize=8)
    vars(figure)["_repr_png_"] = partial(_png, figure)  # for notebooks that have not imported pyplot
    return figure


def text_chart(simulation: Simulation) -> str:
    """The chart as text: F3 is the forward of microbatch 3, F3.1 that by chunk 1, and so B, I and W; dashes are time.

    Equals signs are embedding and head, in synchronous ticks that spend time on them.

    >>> from shardlm.parallel.pipeline import asynchronous, orders
    >>> print(text_chart(asynchronous(orders("1f1b", stages=2, microbatches=3))))
    time    0              5              10
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
    lines = [f"{'time':<{head}}" + "".join(axis)]
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


def _paint(operation: Operation) -> tuple[tuple[float, float, float], str]:
    """Colour of the bar and of the number on it."""
    code = _COLOURS[operation.microbatch % len(_COLOURS)]
    red, green, blue = (int(code[n : n + 2], 16) / 255 for n in (1, 3, 5))
    if operation.kind is Kind.FORWARD:
        return (0.58 + 0.42 * red, 0.58 + 0.42 * green, 0.58 + 0.42 * blue), "black"
    return (0.78 * red, 0.78 * green, 0.78 * blue), "white"
