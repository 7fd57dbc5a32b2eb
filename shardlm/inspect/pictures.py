"""Where devices are in the mesh, and which of them holds which part of a parameter, as pictures."""

import difflib
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shardlm._layout_table import uses
from shardlm.inspect import canvas, render, shards
from shardlm.inspect.grid import Cell, Grid, Index, Level
from shardlm.inspect.report import Report, parameters_of
from shardlm.layout import Axis, Layout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Each axis has its colour wherever axes are told apart.
AXIS_COLORS: Mapping[str, str] = {
    "pipe": "vermilion",
    "data": "orange",
    "fsdp": "sky",
    "expert": "yellow",
    "context": "purple",
    "tensor": "green",
}

_EDGE, _ROW = 0.2, 0.23  # inches: around a picture, of a line below it


def draw_mesh(layout: Layout | str | Mapping[str, int]) -> "Figure":
    """Draw the mesh: which device is where along which axis, and what each axis splits.

    Devices are numbered by their place in the mesh. The last axis of more than one device goes across, the one before
    it down, and earlier ones make panels of these; long axes are shortened by "…". The devices that differ from device
    0 along one axis alone have that axis's colour and name.

    Args:
        layout: its sizes all known; or devices by axis, in mesh order, for axes that no layout has yet.

    Raises:
        ValueError: a size that is not filled in or not positive, or an axis that no mesh has.
        ImportError: matplotlib is not installed.
    """
    layout = layout if isinstance(layout, Mapping) else Layout.of(layout)
    if isinstance(layout, Layout):
        assert layout.num_devices  # an error while a size is -1
    sizes = {str(axis): size for axis, size in (layout.sizes if isinstance(layout, Layout) else layout).items()}
    known = [str(axis) for axis in Axis]
    wrong = [f"{axis}={n}" for axis, n in sizes.items() if axis not in known or n < 1]
    if wrong:
        raise ValueError(
            f"cannot draw a mesh with {', '.join(wrong)}: axes are {', '.join(known)}, of 1 or more devices"
        )
    live = {axis: n for axis, n in sizes.items() if n > 1}

    def cell(index: Index) -> Cell:
        device = 0
        for i, n in zip(index, live.values(), strict=True):
            device = device * n + i
        away = [axis for axis, i in zip(live, index, strict=True) if i]
        if len(away) != 1:
            return Cell(str(device), marked=not away)
        return Cell(f"{device}\n{away[0]}", canvas.tint(AXIS_COLORS[away[0]]))

    count = math.prod(live.values())
    title = f"{count:,} devices: {_product(live)}" if live else "one device: no axis splits anything"
    notes = ["coloured: the devices of device 0's group along each axis"] if live else []
    means = uses(layout.zero if isinstance(layout, Layout) else None)
    rows = [(axis, f"{n:,}", means[known.index(axis)]) for axis, n in live.items()]
    fills = [canvas.tint(AXIS_COLORS[axis]) for axis in live]
    return _sheet(
        title, notes, Grid([Level(axis, [*map(str, range(n))]) for axis, n in live.items()], cell), rows, fills
    )


def draw_parameter(subject: Any, path: str, device: int = 0) -> "Figure":
    """Draw a parameter as it is stored between steps: its parts, and the devices that hold each.

    The two last dims that are split go down and across; earlier ones make panels. Parts are drawn equal in size, and
    long rows of them are shortened by "…".

    Args:
        subject: a `Report`, or a `Trainer`, whose pictures have the dims' names.
        path: of the parameter, such as "layers/attention/query/kernel".
        device: the one whose part is marked, by its place in the mesh.

    Raises:
        ValueError: there is no such parameter, or no such device.
        ImportError: matplotlib is not installed.
    """
    if isinstance(subject, Report):
        parameters, sizes, dims = subject.parameters, subject.sizes, {}
    else:
        parameters = parameters_of(subject.abstract_state.params)
        sizes = {str(axis): n for axis, n in subject.layout.sizes.items()}
        dims = {name: split.dims for name, split in subject.plan.splits.items()}
    if path not in parameters:
        raise ValueError(f"no parameter {path!r}: {_hint(path, list(parameters))}")
    shape, dtype, axes = parameters[path]
    names = [name or f"dim {i}" for i, name in enumerate(dims.get(path, (None,) * len(shape)))]
    return draw_array(f"{path}, {dtype}", shape, dtype, axes, sizes, names, device)


def draw_array(
    title: str,
    shape: Sequence[int],
    dtype: str,
    axes: Sequence[Sequence[str]],
    sizes: Mapping[str, int],
    names: Sequence[str],
    device: int = 0,
) -> "Figure":
    """`draw_parameter` from the numbers themselves.

    Args:
        title: above the picture.
        shape, dtype: of the array.
        axes: for each dim, the axes that split it.
        sizes: devices along each axis, in mesh order.
        names: of the dims.
        device: the one whose part is marked.
    """
    import jax.numpy as jnp

    counts = shards.blocks(shape, axes, sizes)
    parts = shards.slices(shape, axes, sizes)
    if device not in parts:
        raise ValueError(f"device={device}: the mesh has devices 0 to {len(parts) - 1}")
    holders = shards.holders(parts)
    copies = len(parts) // len(holders)
    steps = [n // count for n, count in zip(shape, counts, strict=True)]
    shown = _shown(shape, counts, names)

    def cell(index: Index) -> Cell:
        place = dict(zip(shown, index, strict=True))
        ranges = tuple((place.get(d, 0) * step, (place.get(d, 0) + 1) * step) for d, step in enumerate(steps))
        devices = holders[ranges]
        listed = textwrap.fill(shards.numbers(devices), 16, break_long_words=False)
        text = f"device {devices[0]}" if copies == 1 else f"{copies:,} devices\n{listed}"
        mine = device in devices
        return Cell(text, canvas.tint("sky") if mine else canvas.PLAIN, mine)

    def level(d: int) -> Level:
        return Level(names[d], [f"{i * steps[d]}:{(i + 1) * steps[d]}" for i in range(counts[d])])

    whole = math.prod(shape) * jnp.dtype(dtype).itemsize
    each = "one device" if copies == 1 else f"{copies:,} devices"
    notes = [
        f"{render.size(whole)} in {len(holders):,} parts of {render.size(whole / len(holders))}, each held by {each}"
        if len(holders) > 1
        else f"{render.size(whole)}, " + ("on one device" if copies == 1 else f"all of it held by each of {each}"),
        f"marked: what device {device} holds",
    ]
    rows = [
        (name, f"{n:,}", f"over {_product({a: sizes[a] for a in over})}: {step:,} each" if count > 1 else "whole")
        for name, n, over, count, step in zip(names, shape, axes, counts, steps, strict=True)
    ]
    return _sheet(title, notes, Grid([level(d) for d in shown], cell), rows, [])


def _shown(shape: Sequence[int], counts: Sequence[int], names: Sequence[str]) -> list[int]:
    """The dims to draw, in order: those that are split; if there are fewer than two, the largest of the others too."""
    split = [d for d, count in enumerate(counts) if count > 1]
    others = sorted((d for d in range(len(shape)) if d not in split), key=lambda d: (names[d] == "layer", -shape[d], d))
    return sorted([*split, *others[: max(0, 2 - len(split))]])


def _sheet(
    title: str, notes: Sequence[str], grid: Grid, rows: Sequence[tuple[str, ...]], fills: Sequence[Any]
) -> "Figure":
    """The picture: title, notes, grid, and a table, whose rows may have a swatch of colour each."""
    indent = 0.3 if fills else 0.0
    edges = canvas.columns(rows) if rows else [0.0]
    texts = [canvas.width(title, 11, "bold"), *map(canvas.width, notes), indent + edges[-1]]
    top = _EDGE + 0.3 + _ROW * len(notes) + 0.1
    below = top + grid.height + (0.25 if rows else 0.0)
    width = max(grid.width, *texts) + 2 * _EDGE
    figure, axes = canvas.sheet(width, below + _ROW * len(rows) + _EDGE)
    canvas.write(axes, _EDGE, _EDGE + 0.1, title, fontsize=11, weight="bold")
    for i, note in enumerate(notes):
        canvas.write(axes, _EDGE, _EDGE + 0.3 + _ROW * (i + 0.5), note, color=canvas.FAINT)
    grid.draw(axes, _EDGE, top)
    from matplotlib.patches import Rectangle

    for i, row in enumerate(rows):
        y = below + _ROW * (i + 0.5)
        if fills:
            axes.add_patch(Rectangle((_EDGE, y - 0.07), 0.2, 0.14, facecolor=fills[i]))
        for x, text, weight in zip(edges, row, ("bold", *["normal"] * len(row)), strict=False):
            canvas.write(axes, _EDGE + indent + x, y, text, weight=weight)
    return figure


def _hint(path: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(path, known, n=3, cutoff=0.5)
    close += [name for name in known if path and path in name and name not in close][: 3 - len(close)]
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"there are {', '.join(known)}"


def _product(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={n}" for axis, n in sizes.items())
