"""A grid of cells with up to six dims, drawn flat: the last dim goes across, the one before it down, earlier ones are
panels of panels, across and down in turn. Long dims are shortened by "…".
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shardlm.inspect.canvas import FAINT, INK, PLAIN, width, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GAP, _BAND, _LINE = 0.3, 0.24, 0.16  # inches: of what is left out, of a line of labels, of a line in a cell
# How many places the dims of one direction get, outermost first, "…" included.
_PLACES = ((), (8,), (3, 4), (3, 3, 3))
_BETWEEN = (0.05, 0.2, 0.4)  # inches between neighbours, innermost dim first

Index = tuple[int, ...]


@dataclass(frozen=True)
class Level:
    """One dim of a grid.

    Attributes:
        name: for the end of its labels.
        labels: one for each index.
    """

    name: str
    labels: Sequence[str]


@dataclass(frozen=True)
class Cell:
    """How one cell looks.

    Attributes:
        text: in it.
        fill: its colour.
        marked: whether its edge is drawn.
    """

    text: str
    fill: Any = PLAIN
    marked: bool = False


@dataclass
class _Direction:
    """Where the cells of the dims of one direction are.

    Attributes:
        levels: outermost first.
        places: of each level, the indices that are shown; None is "…".
        cell: inches of one.
        cells: (index, start) of each.
        bands: of each level (its index or None, start, end).
    """

    levels: Sequence[Level]
    cell: float
    cells: list[tuple[Index, float]] = field(default_factory=list)
    bands: list[list[tuple[int | None, float, float]]] = field(default_factory=list)
    size: float = 0.0

    def __post_init__(self):
        self.places = [_places(level, most) for level, most in zip(self.levels, _PLACES[len(self.levels)], strict=True)]
        self.bands = [[] for _ in self.levels]
        self.size = self._fill((), 0.0)

    def _fill(self, prefix: Index, start: float) -> float:
        depth = len(prefix)
        if depth == len(self.levels):
            self.cells.append((prefix, start))
            return start + self.cell
        between, end, places = _BETWEEN[len(self.levels) - 1 - depth], start, self.places[depth]
        for before, index in zip([0, *places], places, strict=False):
            beside_gap = before is None or index is None
            begin = end if index == 0 else end + (0.05 if beside_gap else between)
            end = begin + _GAP if index is None else self._fill((*prefix, index), begin)
            self.bands[depth].append((index, begin, end))
        return end


class Grid:
    """The arrangement of a grid; `draw` draws it.

    Args:
        levels: its dims, outermost first; six at most.
        cell: the look of each, from its index, one number for each level.

    Attributes:
        width, height: inches, labels included.
    """

    def __init__(self, levels: Sequence[Level], cell: Callable[[Index], Cell]):
        assert len(levels) <= 6, f"{len(levels)} levels"
        order = range(len(levels))
        self._across, self._down = sorted(order[::-1][0::2]), sorted(order[::-1][1::2])
        across, down = [levels[i] for i in self._across], [levels[i] for i in self._down]
        rough = _Direction(across, 1.0), _Direction(down, 1.0)
        self.cells: Mapping[Index, Cell] = {
            index: cell(index) for x, _ in rough[0].cells for y, _ in rough[1].cells for index in [self._index(x, y)]
        }
        texts = [look.text for look in self.cells.values()]
        heads = [level.labels[i] for level in across for i in _places(level, 8) if i is not None]
        # Any cell may be marked, and then is bold.
        wide = max(
            [0.42, *(width(text, weight="bold") + 0.16 for text in texts), *(width(head) + 0.1 for head in heads)]
        )
        high = max(0.42, max(text.count("\n") + 1 for text in texts) * _LINE + 0.14)
        self._x, self._y = _Direction(across, wide), _Direction(down, high)
        self._margins = [max(width(_row(level, i)) for i in range(len(level.labels))) + 0.14 for level in down]
        self._left, self._top = sum(self._margins), _BAND * len(across)
        names = max((width(level.name, weight="bold") + 0.1 for level in across), default=0.0)
        self.width, self.height = self._left + self._x.size + names, self._top + self._y.size

    def draw(self, axes: "Axes", left: float, top: float) -> None:
        """Draw it with its upper left corner at a point, in inches."""
        from matplotlib.patches import Rectangle

        left, top = left + self._left, top + self._top
        for x, start in self._x.cells:
            for y, above in self._y.cells:
                index = self._index(x, y)
                look = self.cells[index]
                edge = 1.6 if look.marked else 0.0
                corner = (left + start, top + above)
                box = Rectangle(corner, self._x.cell, self._y.cell, facecolor=look.fill, edgecolor=INK, linewidth=edge)
                box.set_gid("cell " + ",".join(map(str, index)))
                axes.add_patch(box)
                middle = (corner[0] + self._x.cell / 2, corner[1] + self._y.cell / 2)
                weight = "bold" if look.marked else "normal"
                write(axes, *middle, look.text, ha="center", gid=box.get_gid(), weight=weight, linespacing=1.3)
        self._label(axes, left, top)

    def _label(self, axes: "Axes", left: float, top: float) -> None:
        for depth, level in enumerate(self._x.levels):
            y = top - _BAND * (len(self._x.levels) - depth - 0.5)
            for index, start, end in self._x.bands[depth]:
                text = "…" if index is None else level.labels[index]
                write(axes, left + (start + end) / 2, y, text, ha="center")
            write(axes, left + self._x.size + 0.1, y, level.name, weight="bold")
        for depth, level in enumerate(self._y.levels):
            x = left - sum(self._margins[depth + 1 :]) - 0.12
            for index, start, end in self._y.bands[depth]:
                text = "⋮" if index is None else _row(level, index)
                write(axes, x, top + (start + end) / 2, text, ha="right")
        # "…" in the rows and columns themselves
        for index, start, end in self._x.bands[-1] if self._x.bands else ():
            for _, above in self._y.cells if index is None else ():
                write(axes, left + (start + end) / 2, top + above + self._y.cell / 2, "…", ha="center", color=FAINT)
        for index, start, end in self._y.bands[-1] if self._y.bands else ():
            for _, begin in self._x.cells if index is None else ():
                write(axes, left + begin + self._x.cell / 2, top + (start + end) / 2, "⋮", ha="center", color=FAINT)

    def _index(self, across: Index, down: Index) -> Index:
        places = dict(zip((*self._across, *self._down), (*across, *down), strict=True))
        return tuple(places[i] for i in range(len(places)))


def _places(level: Level, most: int) -> list[int | None]:
    count = len(level.labels)
    return [*range(count)] if count <= most else [*range(most - 2), None, count - 1]


def _row(level: Level, index: int) -> str:
    return f"{level.name} {level.labels[index]}"
