"""What a picture says of devices is what JAX does with them; its bars are as long as the report's numbers; and its
words do not run into each other."""

import dataclasses
import itertools
import re
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from IPython.core.formatters import DisplayFormatter
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure

import shardlm as sl
from shardlm.inspect import bars, shards
from shardlm.inspect.pictures import draw_array

AXES = ("pipe", "data", "fsdp", "expert", "context", "tensor")
CONFIG = sl.TransformerConfig(
    vocab_size=257, num_layers=3, d_model=64, num_heads=8, num_kv_heads=4, d_ff=96, dtype="float32"
)
LAYOUTS = (
    "data=8",
    "fsdp=8",
    "fsdp=8,zero=1",
    "tensor=8",
    "data=2,fsdp=2,tensor=2",
    "fsdp=4,tensor=2,zero=2",
    "data=1",
)
QUERY = "layers/attention/query/kernel"
EVERY_AXIS = {"pipe": 4, "data": 4, "fsdp": 8, "expert": 2, "context": 4, "tensor": 8}
EXPERTS = ((64, 8, 4096, 16384), (("pipe",), ("expert",), ("fsdp", "data"), ("tensor",)))


def mesh_of(sizes):
    return Mesh(np.array(jax.devices()).reshape([sizes.get(axis, 1) for axis in AXES]), AXES)


def trainer_of(layout):
    layout = sl.Layout.parse(layout)
    return sl.Trainer(CONFIG, layout, devices=jax.devices()[: layout.num_devices])


def held(sharding, shape):
    """By device id the index ranges that JAX gives it."""
    indices = sharding.devices_indices_map(tuple(shape))
    return {
        device.id: tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))
        for device, index in indices.items()
    }


def texts(figure):
    """All texts that are seen, those of ticks beyond the picture left out."""
    found = []
    for axes in figure.axes:
        low, high = axes.get_xlim()
        found += axes.texts
        if axes.axison:
            found += [label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
    return [text for text in found if text.get_text().strip()]


def words(figure):
    return [text.get_text() for text in texts(figure)]


def cells(figure):
    """By index, the text of every cell."""
    return {
        tuple(map(int, filter(None, text.get_gid()[5:].split(",")))): text.get_text()
        for text in texts(figure)
        if (text.get_gid() or "").startswith("cell ")
    }


def devices_in(text):
    """The devices that a cell names: "device 3", or "4 devices" and then "0–2, 5"."""
    if match := re.fullmatch(r"device (\d+)", text):
        return {int(match[1])}
    count, _, listed = text.partition(" devices\n")
    assert "…" not in listed, text
    runs = [part.split("–") for part in listed.replace("\n", " ").split(", ")]
    devices = {i for run in runs for i in range(int(run[0]), int(run[-1]) + 1)}
    assert len(devices) == int(count), text
    return devices


def lengths(figure):
    """By name, how long every bar is."""
    return {bar.get_gid(): bar.get_width() for axes in figure.axes for bar in axes.patches if bar.get_gid()}


def collisions(figure):
    """Pairs of texts that overlap, and texts that leave the picture or their cell."""
    figure.canvas.draw()
    page = figure.bbox
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    found = [(a, b) for (a, first), (b, second) in itertools.combinations(boxes, 2) if first.overlaps(second)]
    outside = [t for t, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > page.width or box.y1 > page.height]
    places = {patch.get_gid(): patch.get_window_extent() for patch in figure.axes[0].patches}
    for text in texts(figure):
        if (text.get_gid() or "").startswith("cell "):
            box, cell = text.get_window_extent(), places[text.get_gid()]
            if box.x0 < cell.x0 or box.x1 > cell.x1 or box.y0 < cell.y0 or box.y1 > cell.y1:
                outside.append(text.get_text())
    return found + outside


@pytest.fixture(scope="module")
def reports():
    return {
        "ZeRO-1": trainer_of("fsdp=8,zero=1").explain(8, 32),
        "mixed": trainer_of("data=2,fsdp=2,tensor=2,sequence_parallel").explain(8, 32, compile=True),
        "one device": trainer_of("data=1").explain(8, 32),
    }


@pytest.fixture(scope="module")
def automatic():
    trainer = sl.Trainer(CONFIG, sl.Layout(fsdp=8), engine="auto")
    return {"unknown": trainer.explain(8, 32), "compiled": trainer.explain(8, 32, compile=True)}


# --- which device holds what ---


@pytest.mark.parametrize(
    ("shape", "axes", "sizes"),
    [
        ((12,), ((),), {"data": 8}),
        ((16,), (("data", "tensor"),), {"data": 4, "tensor": 2}),
        ((16,), (("tensor", "data"),), {"data": 4, "tensor": 2}),  # the order matters
        ((6, 8), (("pipe",), ("tensor", "fsdp")), {"pipe": 2, "fsdp": 2, "tensor": 2}),
        ((3, 4, 10), ((), ("context",), ("expert",)), {"data": 2, "expert": 2, "context": 2}),
        ((2, 6, 4, 5), (("pipe",), ("expert",), ("fsdp",), ()), {"pipe": 2, "fsdp": 2, "expert": 2}),
    ],
)
def test_slices_are_those_of_jax(shape, axes, sizes):
    mesh = mesh_of(sizes)
    spec = PartitionSpec(*(names or None for names in axes))
    assert shards.slices(shape, axes, dict(mesh.shape)) == held(NamedSharding(mesh, spec), shape)


def test_holders_are_the_devices_of_each_part():
    parts = shards.slices((4, 6), [("tensor",), ()], {"data": 2, "tensor": 2})
    assert shards.holders(parts) == {((0, 2), (0, 6)): [0, 2], ((2, 4), (0, 6)): [1, 3]}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ((("tensor",),), r"shape \(4, 6\) has 2 dims, and axes for 1 are given"),
        ((("tenser",), ()), "axis 'tenser' is not in the mesh, which has data, tensor"),
        ((("tensor",), ("tensor",)), r"axis 'tensor' splits the shape \(4, 6\) twice: tensor=4 x tensor=4"),
        (((), ("tensor",)), "a dim of 6 does not divide over tensor=4"),
        ((("data", "tensor"), ()), "a dim of 4 does not divide over data=2 x tensor=4"),
    ],
)
def test_a_split_that_cannot_be_is_an_error(axes, message):
    with pytest.raises(ValueError, match=message):
        shards.slices((4, 6), axes, {"data": 2, "tensor": 4})


@pytest.mark.parametrize(
    ("devices", "text"),
    [
        ([3], "3"),
        ([0, 1], "0, 1"),
        ([0, 1, 2], "0–2"),
        ([0, 1, 4, 5], "0, 1, 4, 5"),
        ([*range(8), *range(64, 72)], "0–7, 64–71"),
        (range(0, 512, 64), "0, 64, … 448"),
        ([i for i in range(512) if i % 64 < 8], "0–7, 64–71, 128–135, 192–199, 256–263, 320–327, 384–391, 448–455"),
    ],
)
def test_numbers_of_devices_in_few_characters(devices, text):
    assert shards.numbers(devices, most=4 if "…" in text else 8) == text


# --- the mesh ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mesh_shows_every_device_where_it_is(layout):
    trainer = trainer_of(layout)
    figure = sl.inspect.draw_mesh(trainer.layout)
    assert isinstance(figure, Figure)
    places = {tuple(i for i, n in zip(place, trainer.mesh.devices.shape, strict=True) if n > 1): device.id
              for place, device in np.ndenumerate(trainer.mesh.devices)}  # fmt: skip
    assert {index: int(text.split("\n")[0]) for index, text in cells(figure).items()} == places
    assert collisions(figure) == []


def test_the_mesh_names_the_groups_of_device_0_and_what_axes_split():
    figure = sl.inspect.draw_mesh(sl.Layout(data=2, fsdp=2, tensor=2, zero=2))
    named = {text for text in cells(figure).values() if "\n" in text}
    assert named == {"1\ntensor", "2\nfsdp", "4\ndata"}
    assert words(figure)[0] == "8 devices: data=2 x fsdp=2 x tensor=2"
    assert "batch split; ZeRO-2: gradients and optimizer state split" in words(figure)


def test_a_large_mesh_is_shortened_and_says_so():
    figure = sl.inspect.draw_mesh(sl.Layout(data=2, fsdp=32, tensor=8))
    found = cells(figure)
    assert len(found) == 2 * 7 * 3 and found[1, 31, 7] == "511" and found[0, 5, 1] == "41"
    assert "…" in words(figure) and "⋮" in words(figure) and "fsdp 31" in words(figure)
    assert collisions(figure) == []


def test_a_mesh_of_all_six_axes():
    figure = sl.inspect.draw_mesh(EVERY_AXIS)
    found = cells(figure)
    sizes = tuple(EVERY_AXIS.values())
    for index, text in found.items():
        assert text.split("\n")[0] == str(np.ravel_multi_index(index, sizes))
    assert {text.split("\n")[1] for text in found.values() if "\n" in text} == set(EVERY_AXIS)
    assert collisions(figure) == []
    assert max(figure.get_size_inches()) < 12


def test_a_mesh_that_cannot_be_drawn():
    with pytest.raises(sl.LayoutError, match="fsdp=-1 is not filled yet"):
        sl.inspect.draw_mesh(sl.Layout(fsdp=-1))
    with pytest.raises(ValueError, match="cannot draw a mesh with tenser=2, data=0: axes are pipe, data, fsdp"):
        sl.inspect.draw_mesh({"tenser": 2, "data": 0})


# --- parameters ---


def claims(figure):
    """By device, {dim: (first, last)}: what the labels of the rows and columns in which it stands say."""
    every = texts(figure)
    columns, rows = {}, {}
    for text in every:
        x, y = (round(float(value), 3) for value in text.get_position())
        if re.fullmatch(r"\d+:\d+", text.get_text()):
            columns[x] = tuple(map(int, text.get_text().split(":")))
        elif match := re.fullmatch(r"(\S+) (\d+):(\d+)", text.get_text()):
            rows[y] = (match[1], (int(match[2]), int(match[3])))
    [across] = [t.get_text() for t in every if t.get_weight() == "bold" and round(t.get_position()[1], 3) in
                {round(t.get_position()[1], 3) for t in every if re.fullmatch(r"\d+:\d+", t.get_text())}]  # fmt: skip
    found = {}
    for text in every:
        if (text.get_gid() or "").startswith("cell "):
            x, y = (round(float(value), 3) for value in text.get_position())
            ranges = {across: columns[x]} | ({rows[y][0]: rows[y][1]} if y in rows else {})
            for device in devices_in(text.get_text()):
                assert device not in found, f"device {device} is in two cells"
                found[device] = ranges
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_parameter_is_where_the_picture_says(layout):
    trainer = trainer_of(layout)
    drawn = set()
    for path, split in trainer.plan.splits.items():
        figure = sl.inspect.draw_parameter(trainer, path)
        real = held(NamedSharding(trainer.mesh, split.stored), split.shape)
        said = claims(figure)
        assert said.keys() == real.keys()
        for device, ranges in said.items():
            whole = {dim: (0, n) for dim, n in zip(split.dims, split.shape, strict=True)}
            assert whole | ranges == dict(zip(split.dims, real[device], strict=True)), path
        assert collisions(figure) == []
        drawn.add(len(split.shape))
    assert drawn == {1, 2, 3, 4}


def test_three_split_dims_make_panels():
    sizes = {axis: 2 if axis in ("pipe", "fsdp", "tensor") else 1 for axis in AXES}
    shape, axes = (4, 6, 3, 10), (("pipe",), ("fsdp",), (), ("tensor",))
    figure = draw_array("kernel", shape, "float32", axes, sizes, ("layer", "embed", "head_dim", "mlp"))
    spec = PartitionSpec(*(names or None for names in axes))
    real = held(NamedSharding(mesh_of(sizes), spec), shape)
    said = {
        device: ((2 * i, 2 * i + 2), (3 * j, 3 * j + 3), (0, 3), (5 * k, 5 * k + 5))
        for (i, j, k), text in cells(figure).items()
        for device in devices_in(text)
    }
    assert said == real
    assert collisions(figure) == []


def test_replicas_are_counted_and_the_device_is_marked():
    figure = sl.inspect.draw_parameter(trainer_of("data=2,fsdp=2,tensor=2"), "layers/mlp_norm/scale", device=3)
    assert cells(figure) == {(0, 0): "4 devices\n0, 1, 4, 5", (0, 1): "4 devices\n2, 3, 6, 7"}
    assert "768 B in 2 parts of 384 B, each held by 4 devices" in words(figure)
    marked = [box.get_gid() for box in figure.axes[0].patches if box.get_linewidth()]
    assert marked == ["cell 0,1"]


def test_a_report_is_drawn_without_the_names_of_dims(reports):
    figure = sl.inspect.draw_parameter(reports["mixed"], QUERY)
    assert {"dim 1", "dim 1 0:32", "over fsdp=2: 32 each"} <= set(words(figure))
    same = sl.inspect.draw_parameter(trainer_of("data=2,fsdp=2,tensor=2"), QUERY)
    assert cells(figure) == cells(same)


def test_a_parameter_of_a_module_of_ones_own():
    def loss_fn(module, batch):
        return (module(batch["x"]) ** 2).sum(), batch["x"].shape[0]

    rules = [("kernel", PartitionSpec(None, "tensor")), ("bias", PartitionSpec())]
    layout = sl.Layout(fsdp=4, tensor=2)
    trainer = sl.Trainer.from_module(lambda rngs: nnx.Linear(12, 8, rngs=rngs), loss_fn, layout, rules=rules)
    figure = sl.inspect.draw_parameter(trainer, "kernel")
    real = held(trainer.abstract_state.params["kernel"].sharding, (12, 8))
    assert len(set(real.values())) == 8
    assert cells(figure) == {
        (i, j): f"device {device}"
        for device, ((row, _), (column, _)) in real.items()
        for i, j in [(row // 3, column // 4)]
    }
    assert collisions(figure) == []


def test_a_parameter_on_512_devices():
    layout = sl.Layout(data=16, fsdp=4, tensor=8)
    trainer = sl.Trainer(sl.presets.llama3_70b(), layout, devices=512)
    figure = sl.inspect.draw_parameter(trainer, "layers/mlp/down/kernel")
    assert cells(figure)[7, 3] == "16 devices\n31, 63, … 511"
    assert "75.2 GB in 32 parts of 2.35 GB, each held by 16 devices" in words(figure)
    assert collisions(figure) == []
    whole = sl.inspect.draw_parameter(sl.Trainer(CONFIG, sl.Layout(data=512), devices=512), "final_norm/scale")
    assert cells(whole) == {(0,): "512 devices\n0–511"}
    assert "256 B, all of it held by each of 512 devices" in words(whole)


def test_a_parameter_split_over_every_axis():
    shape, axes = EXPERTS
    figure = draw_array("experts/up", shape, "bfloat16", axes, EVERY_AXIS, ("layer", "expert", "embed", "mlp"))
    found = cells(figure)
    parts = shards.holders(shards.slices(shape, axes, EVERY_AXIS))
    steps = (16, 4, 128, 2048)
    for index, text in found.items():
        ranges = tuple((i * step, (i + 1) * step) for i, step in zip(index, steps, strict=True))
        assert devices_in(text) == set(parts[ranges])
    assert {index[2] for index in found} == {0, 1, 31}
    assert collisions(figure) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("layers/attention/query/kernal", "no parameter 'layers/attention/query/kernal': did you mean "
                                          "'layers/attention/query/kernel' or "),
        ("down", "no parameter 'down': did you mean 'layers/mlp/down/kernel'?"),
        ("xyzzy", "no parameter 'xyzzy': there are embedding/table, "),
    ],
)  # fmt: skip
def test_an_unknown_parameter_names_those_like_it(path, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sl.inspect.draw_parameter(trainer_of("fsdp=8"), path)


def test_an_unknown_device():
    with pytest.raises(ValueError, match="device=8: the mesh has devices 0 to 7"):
        sl.inspect.draw_parameter(trainer_of("fsdp=8"), QUERY, device=8)


# --- memory ---


def test_memory_bars_are_as_long_as_the_numbers(reports):
    figure = sl.inspect.draw_memory(reports)
    expected = {}
    for name, report in reports.items():
        memory = report.memory
        values = {
            "parameters": memory.parameters,
            "optimizer state": memory.optimizer,
            "batch": memory.batch,
            "gradients": memory.gradients,
            "activations": memory.activations,
            "temporaries": memory.temporaries,
        }
        assert sum(values.values()) == report.peak
        expected |= {f"{name}/{part}": n for part, n in values.items() if n}
    assert {name: n for name, n in lengths(figure).items() if n > 1} == pytest.approx(expected, rel=1e-12)
    peaks = [text.get_text() for text in texts(figure) if text.get_gid()]
    assert peaks == [f"peak {sl.inspect.render.size(report.peak)}" for report in reports.values()]
    assert collisions(figure) == []


def lines(figure):
    """By name, where every vertical line is."""
    return {line.get_gid(): float(line.get_xdata()[0]) for line in figure.axes[1].lines}


def test_the_hardware_is_a_line_where_it_is_near():
    size = trainer_of("fsdp=8")
    small = dataclasses.replace(sl.inspect.CATALOGUE["a100"], name="a small card", memory=2e6)
    report = size.explain(8, 32, hardware=small)
    enough = dataclasses.replace(small, name="a larger card", memory=2.0 * report.peak)
    figure = sl.inspect.draw_memory({"a": report, "b": size.explain(8, 32, hardware=enough)})
    assert lines(figure) == {"a/limit": 2e6, "b/limit": 2.0 * report.peak}
    assert any(line.startswith("dashed line: memory of a small card, 2 MB; a larger card, ") for line in words(figure))
    assert [word.split(", ")[1] for word in words(figure) if word.startswith("peak ")] == [
        {True: "fits", False: "TOO MUCH"}[report.peak <= 2e6], "fits",
    ]  # fmt: skip
    assert collisions(figure) == []


def test_hardware_far_larger_than_the_bars_is_only_named():
    figure = sl.inspect.draw_memory(trainer_of("fsdp=8").explain(8, 32, hardware="h100"))
    assert lines(figure) == {}
    assert any(re.fullmatch(r"NVIDIA H100 SXM has 80 GB, [\d,]+ times the longest bar", word) for word in words(figure))


def test_a_peak_that_is_not_the_sum_of_the_parts_is_marked(reports):
    report = reports["ZeRO-1"]
    less = dataclasses.replace(report, memory=dataclasses.replace(report.memory, peak=report.peak // 2))
    figure = sl.inspect.draw_memory({"sum": report, "less": less})
    assert lines(figure) == {"less/peak": report.peak // 2}
    assert "bold line: the peak, where the parts are not all alive at once" in words(figure)


def test_memory_of_a_step_that_the_compiler_partitions(automatic):
    figure = sl.inspect.draw_memory(automatic)
    found = lengths(figure)
    assert "unknown/activations" not in found and found["unknown/gradients"] == automatic["unknown"].memory.gradients
    assert sum(n for name, n in found.items() if name.startswith("compiled/")) == automatic["compiled"].memory.compiled
    assert "peak not known: explain(..., compile=True)" in words(figure)
    assert collisions(figure) == []


# --- communication ---


def test_communication_bars_by_axis_are_the_ledger_and_the_theory(reports):
    figure = sl.inspect.draw_communication(reports)
    expected = {}
    for name, report in reports.items():
        for axes, (found, theory) in report.against_theory().items():
            expected |= {f"{name}/{' x '.join(axes)}": found, f"{name}/theory/{' x '.join(axes)}": theory}
    added = sum(entry.bytes for entry in reports["mixed"].ledger.added)
    assert added > 0
    expected["mixed/added by the compiler"] = added
    assert lengths(figure) == pytest.approx(expected, rel=1e-12)
    said = [text.get_text() for text in texts(figure) if text.get_gid()]
    assert said[0].endswith(", 1.000 of theory") and said[1].endswith(", 1.000 of theory") and said[2] == "0 B"
    assert collisions(figure) == []


def test_communication_bars_by_kind(reports):
    report = reports["mixed"]
    figure = sl.inspect.draw_communication(report, by="kind")
    found = lengths(figure)
    own = sl.inspect.Ledger(report.ledger.entries)
    for kind in ("all-reduce", "all-gather", "reduce-scatter"):
        assert found[f"{report.layout}/{kind}"] == pytest.approx(own.bytes(kind=kind), rel=1e-12)
        expected = sum(line.bytes for line in report.theory if line.kind == kind)
        assert found[f"{report.layout}/theory/{kind}"] == pytest.approx(expected, rel=1e-12)
    assert collisions(figure) == []


def test_a_theory_that_is_not_met_shows(reports):
    report = reports["ZeRO-1"]
    half = dataclasses.replace(report, theory=report.theory[: len(report.theory) // 2])
    [text] = [text.get_text() for text in texts(sl.inspect.draw_communication(half)) if text.get_gid()]
    ratio = float(re.search(r", ([\d.]+) of theory", text)[1])
    assert ratio == pytest.approx(report.ledger.bytes() / sum(line.bytes for line in half.theory), abs=5e-4)
    assert ratio > 1.2


def test_communication_of_a_step_that_the_compiler_partitions(automatic):
    figure = sl.inspect.draw_communication(automatic)
    assert lengths(figure) == {"compiled/added by the compiler": automatic["compiled"].ledger.bytes()}
    assert "not known: explain(..., compile=True)" in words(figure)
    assert collisions(figure) == []


# --- all of them ---


@pytest.mark.parametrize("draw", [sl.inspect.draw_memory, sl.inspect.draw_communication])
def test_what_is_not_reports_is_an_error(draw, reports):
    with pytest.raises(ValueError, match="no report to draw: give one, or several by name"):
        draw({})
    with pytest.raises(TypeError, match="reports are a Report or a dict of them by name, not list"):
        draw([reports["mixed"]])
    assert lengths(draw(sl.inspect.compare(reports))) == lengths(draw(reports))


def test_communication_by_something_else(reports):
    with pytest.raises(ValueError, match='by=\'phase\'; it is "axis" or "kind"'):
        sl.inspect.draw_communication(reports, by="phase")


def test_every_axis_and_kind_has_a_style_of_its_own():
    styles = {axis: bars._axes_style(axis) for axis in AXES}
    for table in (styles, bars._KINDS):
        for part in (0, 1):
            assert len({style[part] for style in table.values()}) == len(table)
    hatched = {part: style for part, style in bars._MEMORY.items() if style[1]}
    assert len({hatch for _, hatch in hatched.values()}) == len(hatched) == len(bars._MEMORY) - 2


def test_a_notebook_shows_a_picture_without_pyplot():
    figure = sl.inspect.draw_mesh(sl.Layout(fsdp=8))
    shown, about = DisplayFormatter().format(figure)
    assert shown["image/png"].startswith(b"\x89PNG")
    pixels = [round(100 * inches) for inches in figure.get_size_inches()]
    assert [about["image/png"][side] for side in ("width", "height")] == pytest.approx(pixels, abs=1)


def test_overlapping_text_is_found():
    figure = sl.inspect.draw_mesh(sl.Layout(fsdp=8))
    figure.axes[0].text(0.3, 0.3, "over the title")
    figure.axes[0].text(-0.5, 0.9, "outside")
    assert ("8 devices: fsdp=8", "over the title") in collisions(figure) and "outside" in collisions(figure)


@pytest.mark.parametrize("draw", ["mesh", "parameter", "memory", "communication"])
def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, reports, draw):
    trainer = trainer_of("fsdp=8")
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install -e '.\[plots\]'"):
        {
            "mesh": lambda: sl.inspect.draw_mesh(trainer.layout),
            "parameter": lambda: sl.inspect.draw_parameter(trainer, QUERY),
            "memory": lambda: sl.inspect.draw_memory(reports),
            "communication": lambda: sl.inspect.draw_communication(reports),
        }[draw]()
