"""What all pictures share: matplotlib, imported when one is drawn; colours, light enough for text; text and its width.

The palette is Okabe and Ito's, which colour-blind readers can tell apart, lightened so that dark text can stand on it.
"""

from collections.abc import Sequence
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

from shardlm._extras import install

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, PLAIN = "#222222", "#767676", "#ECEFF1"
FONT = 9.0  # points

_OKABE_ITO = {
    "orange": (0xE6, 0x9F, 0x00),
    "sky": (0x56, 0xB4, 0xE9),
    "green": (0x00, 0x9E, 0x73),
    "yellow": (0xF0, 0xE4, 0x42),
    "blue": (0x00, 0x72, 0xB2),
    "vermilion": (0xD5, 0x5E, 0x00),
    "purple": (0xCC, 0x79, 0xA7),
    "grey": (0x80, 0x80, 0x80),
}


def tint(*names: str, white: float = 0.45) -> tuple[float, float, float]:
    """A colour of the palette, or the mean of several, mixed with that much white."""
    mean = [sum(_OKABE_ITO[name][i] for name in names) / len(names) / 255 for i in range(3)]
    red, green, blue = ((1 - white) * channel + white for channel in mean)
    return red, green, blue


def new(width: float, height: float) -> "tuple[Figure, Axes]":
    """An empty figure of that many inches, and axes that fill it.

    It belongs to no window and to no state of pyplot's: a notebook shows it where it is a cell's value.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"pictures need matplotlib: {install('plots')}") from error
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    vars(figure)["_repr_png_"] = partial(_png, figure)  # for notebooks that have not imported pyplot
    return figure, figure.add_axes((0, 0, 1, 1))


def sheet(width: float, height: float) -> "tuple[Figure, Axes]":
    """A figure whose coordinates are inches from its upper left corner."""
    figure, axes = new(width, height)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure, axes


def write(axes: "Axes", x: float, y: float, text: str, **style: Any) -> Any:
    """Text whose left end and middle are at a point, unless `style` says otherwise."""
    return axes.text(x, y, text, **{"fontsize": FONT, "color": INK, "va": "center", "ha": "left"} | style)


def width(text: str, size: float = FONT, weight: str = "normal") -> float:
    """Inches that the longest line of a text takes."""
    try:
        from matplotlib.font_manager import FontProperties
        from matplotlib.textpath import text_to_path
    except ImportError as error:
        raise ImportError(f"pictures need matplotlib: {install('plots')}") from error
    font = FontProperties(size=size, weight=weight)
    lines = text.split("\n")
    return max(text_to_path.get_text_width_height_descent(line, font, ismath=False)[0] for line in lines) / 72


def columns(rows: Sequence[Sequence[str]]) -> list[float]:
    """Inches from the left at which each column of a table begins, and last its whole width."""
    edges = [0.0]
    for column in zip(*rows, strict=True):
        edges.append(edges[-1] + max(map(width, column)) + 0.2)
    return edges


def _png(figure: "Figure") -> tuple[bytes, dict[str, int]]:
    """The picture with twice the pixels that it takes on the page, and its size there."""
    from PIL import Image  # matplotlib brings it

    drawn, file = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png", dpi=2 * figure.dpi)
    picture = Image.open(drawn).convert("RGB")
    picture.quantize(256).save(file, "png", optimize=True)  # half the bytes, in every notebook
    return file.getvalue(), {"width": picture.width // 2, "height": picture.height // 2}
