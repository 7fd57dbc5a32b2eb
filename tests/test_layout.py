import dataclasses
import itertools
import warnings
from dataclasses import dataclass, field
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from shardlm._placement import deal, place
from shardlm.layout import Axis, Layout, LayoutError

NOT_YET = [Axis.EXPERT, Axis.CONTEXT]


def config(**changes):
    sizes = dict(vocab_size=257, num_layers=3, d_model=24, num_heads=12, num_kv_heads=6, head_dim=2, d_ff=60)
    return SimpleNamespace(**(sizes | changes))


def conflicts(error: pytest.ExceptionInfo) -> list[str]:
    """The lines of a LayoutError that lists conflicts."""
    return str(error.value).split("\n  - ")[1:]


@dataclass(frozen=True)
class Device:
    """What `mesh_utils` and our placement read of a device that is no TPU."""

    id: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "an H100, say"


@dataclass(frozen=True)
class SliceDevice(Device):
    """A device that knows its slice or NVLink domain."""

    slice_index: int = 0


@dataclass(frozen=True)
class TpuDevice(SliceDevice):
    """A TPU v4 chip, at `coords` of its slice's torus."""

    platform: str = "tpu"
    device_kind: str = "TPU v4"
    coords: tuple[int, int, int] = field(default=(0, 0, 0))
    core_on_chip: int = 0


def tpu_slices(count: int, shape: tuple[int, int, int]) -> list[TpuDevice]:
    coords = [(x, y, z) for z, y, x in itertools.product(*map(range, reversed(shape)))]
    return [
        TpuDevice(id=s * len(coords) + i, process_index=s, slice_index=s, coords=xyz)
        for s in range(count)
        for i, xyz in enumerate(coords)
    ]


# Construction


def test_the_fields_start_with_the_axes_in_mesh_order():
    assert [f.name for f in dataclasses.fields(Layout)][: len(Axis)] == list(Axis)
    assert Layout(fsdp=2, tensor=3).sizes == dict(pipe=1, data=1, fsdp=2, expert=1, context=1, tensor=3)
    assert list(Layout().sizes) == ["pipe", "data", "fsdp", "expert", "context", "tensor"]


def test_one_error_lists_every_conflict():
    with pytest.raises(LayoutError) as error:
        Layout(data=-1, fsdp=-1, tensor=0, zero=4, accumulate=0, remat="some", reduce_gradients="late")
    assert conflicts(error) == [
        "tensor=0 is not a positive integer, nor -1 (fill from the number of devices)",
        "data and fsdp are -1, but only one size can be filled from the others",
        "zero=4 is not one of 1, 2, 3",
        "accumulate=0 is not a positive integer (microbatches per step)",
        "remat='some' is not one of 'none', 'dots', 'full'",
        "reduce_gradients='late' is not one of 'layer', 'step', or None",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(data=-2), "data=-2 is not a positive integer"),
        (dict(data=2.0), "data=2.0 is not a positive integer"),
        (dict(data=True), "data=True is not a positive integer"),
        (dict(zero=True), "zero=True is not one of 1, 2, 3"),
        (dict(sequence_parallel=1, tensor=2), "sequence_parallel=1 is not True or False"),
        (dict(sequence_parallel=True), "sequence_parallel=True has no effect on tensor=1"),
    ],
)
def test_a_setting_out_of_range_is_an_error(settings, message):
    with pytest.raises(LayoutError, match=message):
        Layout(**settings)


@pytest.mark.parametrize("axis", NOT_YET)
@pytest.mark.parametrize("size", [2, -1])
def test_an_axis_that_is_not_available_yet_is_the_only_thing_said_about_it(axis, size):
    with pytest.raises(LayoutError) as error:
        Layout(data=-1, **{axis: size})
    assert conflicts(error) == [
        f"{axis}={size}: the {axis} axis is not available yet; available are pipe, data, fsdp, tensor"
    ]


def test_a_zero_level_without_its_axis_warns():
    with pytest.warns(UserWarning, match="zero=1 has no effect.* fsdp=1") as caught:
        Layout(data=8, zero=1)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Layout(data=8)
        Layout(fsdp=-1, zero=1)


# Text


def test_parse_reads_the_documented_form():
    layout = Layout.parse("data=2,fsdp=2,tensor=2,zero=3,sequence_parallel")
    assert layout == Layout(data=2, fsdp=2, tensor=2, zero=3, sequence_parallel=True)
    assert Layout.parse("") == Layout.parse(" , ") == Layout()
    assert Layout.parse(" data = -1 , tensor=2,sequence_parallel = False,") == Layout(data=-1, tensor=2)
    assert Layout.parse("tensor=2,sequence_parallel=true").sequence_parallel


def test_parse_reads_back_what_str_writes():
    choices = dict(
        data=[1, 3, -1],
        fsdp=[2, 5],
        tensor=[1, 4],
        zero=[1, 2, 3],
        sequence_parallel=[False, True],
        accumulate=[1, 7],
        remat=["none", "dots", "full"],
        reduce_gradients=[None, "layer", "step"],
    )
    texts = set()
    for values in itertools.product(*choices.values()):
        settings = dict(zip(choices, values, strict=True))
        if settings["sequence_parallel"] and settings["tensor"] == 1:
            continue
        layout = Layout(**settings)
        assert Layout.parse(str(layout)) == layout
        texts.add(str(layout))
    assert len(texts) == 3 * 2 * 3 * 3 * 2 * 3 * 3  # tensor and sequence_parallel: three legal pairs; all texts differ
    assert Layout.parse(str(Layout())) == Layout()


def test_parse_lists_every_mistake():
    with pytest.raises(LayoutError) as error:
        Layout.parse("tenosr=2,fsdp=x,data,sequence_parallel=maybe,zero=1,zero=2,quux=1")
    legal = (
        "legal are pipe, data, fsdp, expert, context, tensor, "
        "zero, sequence_parallel, accumulate, remat, reduce_gradients, pipeline"
    )
    assert conflicts(error) == [
        f"unknown setting 'tenosr': did you mean 'tensor'? {legal}",
        "'fsdp=x': fsdp takes an integer, as in fsdp=2",
        "'data': data takes an integer, as in data=2",
        "'sequence_parallel=maybe': sequence_parallel is a flag, bare or with =true or =false",
        "zero is given twice",
        f"unknown setting 'quux': {legal}",
    ]


def test_parse_checks_the_values_as_the_constructor_does():
    with pytest.raises(LayoutError, match="remat='all' is not one of"):
        Layout.parse("remat=all")


# Sizes


def test_resolve_fills_the_free_size():
    layout = Layout(data=3, fsdp=-1, tensor=2)
    assert layout.resolve(30) == Layout(data=3, fsdp=5, tensor=2)
    assert layout.resolve(30).num_devices == 30
    assert layout.resolve(6).fsdp == 1
    assert Layout(data=3).resolve(3) == Layout(data=3)


@pytest.mark.parametrize(
    ("layout", "devices", "message"),
    [
        (Layout(data=2, fsdp=3), 8, r"^data=2 x fsdp=3 = 6 devices, but there are 8\. .*\(fsdp=4\).*devices\(\)\[:6\]"),
        (Layout(data=4, tensor=4), 8, r"^data=4 x tensor=4 = 16 devices.*\(data=2 or tensor=2\).*fake_devices\(16\)"),
        (Layout(data=3, fsdp=-1), 8, r"^fsdp=-1 cannot be filled: data=3 = 3 does not divide the 8.*: 1, 2, 4, 8$"),
        (Layout(data=16, fsdp=-1), 8, r"^fsdp=-1 cannot be filled: data=16 = 16 does not divide the 8 devices"),
    ],
)
def test_resolve_shows_the_arithmetic_and_what_to_do(layout, devices, message):
    with pytest.raises(LayoutError, match=message):
        layout.resolve(devices)


def test_a_filled_size_is_checked_again():
    with pytest.raises(LayoutError, match="sequence_parallel=True has no effect on tensor=1"):
        Layout(data=8, tensor=-1, sequence_parallel=True).resolve(8)


def test_an_unresolved_layout_has_no_numbers():
    layout = Layout(data=-1)
    for number in ("num_devices", "batch_axes", "batch_shards"):
        with pytest.raises(LayoutError, match="data=-1 is not filled yet: give data a size"):
            getattr(layout, number)
    with pytest.raises(LayoutError, match="data=-1 is not filled yet"):
        layout.check(config())


def test_batch_axes_leave_out_axes_of_one_device():
    assert Layout(data=2, fsdp=3, tensor=2).batch_axes == ("data", "fsdp")
    assert Layout(data=2, fsdp=3, tensor=2).batch_shards == 6
    assert Layout(fsdp=3).batch_axes == ("fsdp",)
    assert Layout(tensor=2).batch_axes == () and Layout(tensor=2).batch_shards == 1
    assert {type(axis) for axis in Layout(data=2, fsdp=3).batch_axes} == {str}


def test_gradients_are_reduced_by_layer_unless_accumulated():
    assert Layout().gradient_reduction == "layer"
    assert Layout(accumulate=5).gradient_reduction == "step"
    assert Layout(accumulate=5, reduce_gradients="layer").gradient_reduction == "layer"


# Model and batch


def test_a_layout_that_divides_everything_passes():
    Layout(data=2, fsdp=3, tensor=4, sequence_parallel=True, accumulate=5).check(
        config(num_kv_heads=2, padded_vocab_size=384), batch_size=60, sequence=8
    )
    Layout(tensor=6).check(config(num_kv_heads=12))  # the vocabulary of 257 is padded, so it does not conflict
    Layout(data=7).check(config())


def test_check_lists_every_conflict_with_the_legal_values():
    layout = Layout(data=2, fsdp=5, tensor=8, sequence_parallel=True, accumulate=3)
    with pytest.raises(LayoutError) as error:
        layout.check(config(padded_vocab_size=260), batch_size=50, sequence=9)
    assert conflicts(error) == [
        "num_heads=12 is not a positive multiple of tensor=8: tensor can be 1, 2, 3, 4, 6, 12, or num_heads 8 or 16",
        "d_ff=60 is not a positive multiple of tensor=8: tensor can be 3, 4, 5, 6, 10, 12, or d_ff 56 or 64",
        "d_model=24 is not a positive multiple of fsdp=5: fsdp can be 1, 2, 3, 4, 6, 8, or d_model 20 or 25",
        "num_kv_heads=6 and tensor=8: one must be a multiple of the other; tensor can be 1, 2, 3, 6, 12",
        "sequence=9 is not a positive multiple of tensor=8: tensor can be 1, 3, 9, or sequence 8 or 16",
        "batch_size=50 is not a positive multiple of data=2 x fsdp=5 x accumulate=3 = 30: it would leave "
        "1.67 rows per device and microbatch; use 30 or 60",
    ]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_every_zero_level_needs_d_model_to_divide(zero):
    with pytest.raises(LayoutError, match=r"d_model=24 is not a positive multiple of fsdp=5"):
        Layout(fsdp=5, zero=zero).check(config())


@pytest.mark.parametrize(
    ("kv", "tensor", "fits"), [(6, 3, True), (2, 4, True), (1, 12, True), (6, 4, False), (4, 6, False)]
)
def test_kv_heads_are_split_or_replicated_whole(kv, tensor, fits):
    layout, model = Layout(tensor=tensor), config(num_kv_heads=kv)
    if fits:
        layout.check(model)
    else:
        with pytest.raises(LayoutError, match=f"num_kv_heads={kv} and tensor={tensor}: one must be a multiple"):
            layout.check(model)


def test_the_sequence_divides_only_where_it_is_split():
    Layout(tensor=2).check(config(), sequence=9)
    with pytest.raises(LayoutError, match="sequence=9 is not a positive multiple of tensor=2"):
        Layout(tensor=2, sequence_parallel=True).check(config(), sequence=9)


@pytest.mark.parametrize("batch_size", [0, -4, 3, 5])
def test_a_batch_that_leaves_part_rows_is_an_error(batch_size):
    with pytest.raises(LayoutError, match=f"batch_size={batch_size} is not a positive multiple of .*accumulate=4 = 4"):
        Layout(accumulate=4).check(config(), batch_size=batch_size)


# The mesh


def test_the_mesh_has_all_axes_and_is_auto():
    mesh = Layout(data=2, tensor=-1).mesh()
    assert mesh.axis_names == ("pipe", "data", "fsdp", "expert", "context", "tensor")
    assert {type(name) for name in mesh.axis_names} == {str}
    assert mesh.devices.shape == (1, 2, 1, 1, 1, len(jax.devices()) // 2)
    assert mesh.axis_types == (AxisType.Auto,) * 6


def test_cpu_devices_are_taken_in_order_whatever_order_they_come_in():
    devices = jax.devices()[:6]
    mesh = Layout(data=3, tensor=2).mesh(devices[::-1])
    assert mesh.devices.flatten().tolist() == devices


def test_the_mesh_needs_as_many_devices_as_the_layout():
    with pytest.raises(LayoutError, match=r"data=2 x fsdp=3 = 6 devices, but there are 4"):
        Layout(data=2, fsdp=3).mesh(jax.devices()[:4])


def test_slow_axes_cross_cpu_processes():
    # JAX numbers the CPU devices of process p from 2048 p on.
    devices = [Device(id=2048 * p + i, process_index=p, platform="cpu") for i in range(4) for p in range(2)]
    placed = place((1, 2, 1, 1, 1, 4), devices)
    assert [[d.process_index for d in row] for row in placed.reshape(2, 4)] == [[0] * 4, [1] * 4]
    assert [d.id for d in placed[0, 1].flat] == [2048, 2049, 2050, 2051]


def test_granules_are_dealt_to_the_slowest_axes():
    assert deal(4, (1, 2, 8, 1, 1, 4)) == (1, 2, 2, 1, 1, 1)
    assert deal(3, (1, 2, 6, 1, 1, 4)) == (1, 1, 3, 1, 1, 1)
    assert deal(6, (1, 4, 1, 1, 1, 9)) == (1, 2, 1, 1, 1, 3)
    for shape in itertools.product([1, 2, 3, 6], [1, 4, 5], [1, 2, 12]):
        for granules in range(1, int(np.prod(shape)) + 1):
            if np.prod(shape) % granules == 0:
                outer = deal(granules, shape)
                assert np.prod(outer) == granules and all(n % o == 0 for n, o in zip(shape, outer, strict=True))


@pytest.mark.parametrize("shape", [(1, 3, 2, 1, 1, 4), (1, 6, 1, 1, 1, 4), (1, 1, 6, 1, 1, 4)])
def test_tensor_stays_inside_a_slice(shape):
    placed = place(shape, tpu_slices(3, (2, 4, 1)))
    assert placed.shape == shape
    assert len({d.id for d in placed.flat}) == 24
    rows = placed.reshape(-1, shape[-1])
    assert all(len({d.slice_index for d in row}) == 1 for row in rows)
    # The four devices of a row are a line or a square of the torus.
    for row in rows:
        spans = [len(set(values)) for values in zip(*(d.coords for d in row), strict=True)]
        assert sorted(spans) in ([1, 1, 4], [1, 2, 2])
    # The slowest axis that can take the slices takes them: its index alone decides the slice.
    slowest = next(i for i, size in enumerate(shape) if size > 1)
    for block in np.split(placed, 3, axis=slowest):
        assert len({d.slice_index for d in block.flat}) == 1


def test_physical_axes_are_split_where_they_must_be():
    placed = place((1, 2, 2, 1, 1, 2), tpu_slices(1, (8, 1, 1)))
    assert sorted(d.id for d in placed.flat) == list(range(8))
    for pair in placed.reshape(-1, 2):
        assert abs(pair[0].coords[0] - pair[1].coords[0]) == 1


@pytest.mark.parametrize("with_slices", [False, True])
def test_gpu_hosts_hold_whole_rows_of_the_fast_axis(with_slices):
    # Two hosts of 6 devices; with slices, each device is a process of its own.
    def device(host: int, i: int):
        n = 6 * host + i
        return SliceDevice(id=n, process_index=n, slice_index=host) if with_slices else Device(id=n, process_index=host)

    devices = [device(host, i) for i in range(6) for host in range(2)]
    placed = place((1, 3, 2, 1, 1, 2), devices)
    # 3 is odd: fsdp must cross hosts, data and tensor must not.
    hosts = np.vectorize(lambda d: d.id // 6)(placed).reshape(3, 2, 2)
    assert (hosts == np.array([0, 1])[None, :, None]).all()


def test_gpus_of_one_domain_are_one_granule():
    devices = [SliceDevice(id=i, process_index=i) for i in (2, 0, 3, 1)]
    assert [d.id for d in place((1, 2, 1, 1, 1, 2), devices).flat] == [0, 1, 2, 3]


def test_granules_of_unequal_size_are_an_error_with_the_numbers():
    devices = tpu_slices(2, (2, 2, 1))[:6]
    with pytest.raises(
        LayoutError,
        match=r"data=3,tensor=2 does not fit these 6 devices: every slice must hold equally many of the 6 devices, "
        r"but slice 0 has 4, slice 1 has 2",
    ):
        Layout(data=3, tensor=2).mesh(devices)
    with pytest.raises(LayoutError, match="but process 0 has 1, process 1 has 2"):
        Layout(data=3).mesh([Device(id=i, process_index=min(i, 1)) for i in range(3)])


def test_a_hole_in_the_torus_is_an_error():
    with pytest.raises(LayoutError, match="data=3 does not fit these 3 devices"):
        Layout(data=3).mesh(tpu_slices(1, (2, 2, 1))[:3])


# Printing


def test_describe_says_what_each_axis_does_and_what_is_not_as_asked():
    layout = Layout(data=3, fsdp=2, tensor=4, zero=2, sequence_parallel=True, accumulate=5, remat="full")
    assert layout.describe(config(num_kv_heads=2, padded_vocab_size=384)) == "\n".join(
        [
            "Layout data=3,fsdp=2,tensor=4,zero=2,sequence_parallel,accumulate=5,remat=full",
            "axis    devices  what it does",
            "pipe          1  -",
            "data          3  batch split, gradients summed",
            "fsdp          2  batch split; ZeRO-2: gradients and optimizer state split",
            "expert        1  -",
            "context       1  -",
            "tensor        4  heads, MLP width and vocabulary split",
            "sequence_parallel: activations between blocks split over tensor, by sequence",
            "accumulate 5: gradients of 5 microbatches summed per step",
            "remat full: only each layer's input kept, the rest recomputed in the backward pass",
            "reduce_gradients step: summed over the batch axes once, after the backward pass",
            "kv heads 2 < tensor 4: every device of the tensor axis stores the weights of all 2, and computes with the "
            "one that its query heads share",
            "vocabulary 257 padded to 384",
        ]
    )


def test_describe_leaves_out_what_does_not_matter():
    assert Layout(tensor=6).describe(config(padded_vocab_size=257)).count("\n") == 7
    assert Layout().describe().endswith("tensor        1  -")
    assert "-1 is filled from the number of devices" in Layout(tensor=-1).describe(config())


def test_a_notebook_shows_a_table():
    page = Layout(fsdp=2)._repr_html_()
    assert page.count("<tr>") == 7
    assert (
        "<td>fsdp</td><td>2</td><td>batch split; ZeRO-3: parameters, gradients and optimizer state split</td>" in page
    )
    assert "reduce_gradients layer" in page
