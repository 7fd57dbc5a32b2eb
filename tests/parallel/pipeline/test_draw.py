"""Charts of simulations, as text and as figures."""

import doctest
import sys

import matplotlib.colors
import pytest
from IPython.core.formatters import PNGFormatter
from matplotlib.backends.backend_agg import FigureCanvasAgg

from shardlm.parallel.pipeline import (
    SCHEDULES,
    Kind,
    Operation,
    Times,
    asynchronous,
    chart,
    charts,
    draw,
    make_table,
    orders,
    synchronous,
    text_chart,
)


def simulations(name):
    v = 2 if name == "interleaved" else 1
    return asynchronous(orders(name, 4, 8, v)), synchronous(make_table(name, 4, 8, v))


def test_text_of_ticks():
    assert text_chart(synchronous(make_table("1f1b", 3, 4))).splitlines() == [
        "time    0              5              10             15  (a forward takes 1)",
        "stage 0 F0 F1 F2       F3          B0---    B1--- B2--- B3---",
        "stage 1    F0 F1       F2 B0--- F3 B1---    B2--- B3---",
        "stage 2       F0 B0--- F1 B1--- F2 B2--- F3 B3---",
        "synchronous, 9 ticks: bubble 6 (50.0% of ideal), at most 4 stage inputs held",
    ]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("packed", [False, True])
def test_text_has_every_operation_once_in_its_stage_s_order(name, packed):
    simulation = simulations(name)[packed]
    rows = text_chart(simulation).splitlines()[1:-1]
    assert [row.split()[:2] for row in rows] == [["stage", str(s)] for s in range(4)]
    for stage, row in enumerate(rows):
        spans = sorted((span for span in simulation.spans if span.stage == stage), key=lambda span: span.start)
        assert [cell.rstrip("-") for cell in row.split()[2:]] == [str(span.operation) for span in spans]


def test_text_is_in_proportion():
    """Equal times are equally wide, and what is at the same time is in the same column."""
    first, second, *_ = (row[8:] for row in text_chart(asynchronous(orders("gpipe", 2, 4))).splitlines()[1:])
    assert second.index("F1") == first.index("F2") and first.index("B0") == second.index("B1")
    assert first.index("B1") - first.index("B0") == 2 * (first.index("F1") - first.index("F0"))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_figure_has_a_bar_for_every_operation(name, packed):
    simulation = simulations(name)[packed]
    figure = chart(simulation, title=name)
    [axes] = figure.axes
    bars = {(round(bar.get_y() + 0.43), bar.get_x(), bar.get_width()) for bar in axes.patches}
    assert bars == {(span.stage, span.start, span.end - span.start) for span in simulation.spans}
    assert [text.get_text() for text in axes.get_yticklabels()] == [f"stage {s}" for s in range(4)]
    assert len(axes.texts) == len(simulation.spans)
    assert axes.texts[0].get_text() == ("0₀" if name == "interleaved" else "0")
    assert axes.get_title(loc="left").startswith(name)


def test_a_figure_is_written_as_svg(tmp_path):
    chart(asynchronous(orders("zb-h1", 3, 4))).savefig(tmp_path / "chart.svg")
    assert "<svg" in (tmp_path / "chart.svg").read_text(encoding="utf-8")


def test_a_notebook_shows_a_figure_without_pyplot():
    figure = chart(asynchronous(orders("1f1b", 2, 3)))
    picture = PNGFormatter()(figure)
    assert picture.startswith(b"\x89PNG")


def test_forward_and_backward_differ_in_lightness():
    def lightness(kind, microbatch):
        (red, green, blue), *_ = draw._paint(Operation(kind, microbatch))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    darkest = min(lightness(Kind.FORWARD, i) for i in range(5))
    assert all(lightness(Kind.BACKWARD, i) < darkest - 0.05 for i in range(5))


def luminance(color):
    """Relative luminance, of WCAG 2.1."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_number_can_be_read_on_its_bar(name):
    """Nothing is drawn across a number, and it stands out from its bar by the 4.5 to 1 that WCAG asks of small text."""
    [axes] = chart(simulations(name)[0]).axes
    for bar, text in zip(axes.patches, axes.texts, strict=True):
        assert bar.get_x() < text.get_position()[0] < bar.get_x() + bar.get_width()
        assert not bar.get_hatch()
        darker, lighter = sorted((luminance(bar.get_facecolor()), luminance(text.get_color())))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5


def length_of_a_microbatch(figure, simulation):
    """Inches in the picture for a stage's work on one of 8 microbatches."""
    axes = figure.axes[-1]
    first, last = axes.get_xlim()
    return axes.get_position().width * figure.get_figwidth() / (last - first) * simulation.ideal / 8


def test_lengths_compare_between_schedules():
    """The work of a stage is equally long in the pictures of all schedules, with each its own picture and in one."""
    all_of_them = {name: simulations(name)[packed] for name in SCHEDULES for packed in (False, True)}
    lengths = [length_of_a_microbatch(chart(simulation, "x"), simulation) for simulation in all_of_them.values()]
    assert lengths == pytest.approx([lengths[0]] * len(lengths))
    times = {name: Times(forward=1 / v, backward=2 / v) for name, v in (("gpipe", 1), ("interleaved", 2))}
    same = {name: asynchronous(orders(name, 4, 8, 1 if name == "gpipe" else 2), times[name]) for name in times}
    figure = charts(same)
    assert {axes.get_xlim() for axes in figure.axes} == {(0, max(s.makespan for s in same.values()))}
    assert len({(axes.get_position().x0, axes.get_position().width) for axes in figure.axes}) == 1
    assert [axes.get_title(loc="left").splitlines()[0] for axes in figure.axes] == list(same)
    with pytest.raises(ValueError, match="no simulation to draw"):
        charts({})


def test_the_unit_of_time_is_said():
    for name, said in (("1f1b", "a forward takes 1"), ("interleaved", "a forward of a chunk takes 1")):
        simulation = simulations(name)[0]
        assert chart(simulation).axes[0].get_xlabel() == f"time ({said})"
        assert text_chart(simulation).splitlines()[0].endswith(f"  ({said})")
    uneven = asynchronous(orders("1f1b", 2, 3), Times(forward=[1, 2.5], backward=2))
    assert chart(uneven).axes[0].get_xlabel() == "time (a forward takes 1 to 2.5)"


def test_everything_is_inside_the_picture():
    for name in SCHEDULES:
        figure = chart(simulations(name)[0], "a title that is somewhat longer than the names of schedules are")
        tight, (wide, high) = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer()), figure.get_size_inches()
        assert tight.x0 >= 0 and tight.y0 >= 0 and tight.x1 <= wide and tight.y1 <= high


def test_weight_gradients_alone_have_a_frame():
    figure = chart(asynchronous(orders("zb-h1", 3, 4)))
    assert sum(bar.get_linewidth() > 1 for bar in figure.axes[0].patches) == 3 * 4
    [legend] = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["forward", "gradient of the input", "gradient of the weights"]


def test_embedding_and_head_are_no_bubble():
    times = Times(forward=1, backward=1, embedding=3, head=6)
    simulation = synchronous(make_table("1f1b", 3, 2), times)
    *_, last, _ = text_chart(simulation).splitlines()
    # All stages share: 1 for an embedding and 2 for a head, where forward and backward take 1.
    assert last == "stage 2 ===   ===   F0 ======B0 F1 ======B1"
    assert len(chart(simulation).axes[0].patches) == 3 * 2 * 2 + 3 * 4
    [legend] = chart(simulation).legends
    assert [text.get_text() for text in legend.get_texts()] == ["forward", "backward", "embedding and head"]


def test_operations_that_take_no_time_are_not_drawn():
    lines = text_chart(asynchronous(orders("1f1b", 2, 3), Times(forward=0, backward=1))).splitlines()
    assert lines[1].split() == ["stage", "0", "B0", "B1", "B2"]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install -e '.\[plots\]'"):
        chart(asynchronous(orders("1f1b", 2, 3)))


def test_the_example_runs():
    result = doctest.testmod(draw)
    assert result.attempted and not result.failed
