"""The catalogue, a user's own hardware, and which links a group of devices uses."""

import dataclasses

import pytest

from shardlm.inspect import CATALOGUE, Hardware
from shardlm.inspect.hardware import get, of_device

MINE = Hardware(
    name="mine", flops={"bfloat16": 1e14}, memory=24e9, memory_bandwidth=1e12, fast_bandwidth=25e9, domain=4,
    slow_bandwidth=1e9,
)  # fmt: skip
SIZES = {"pipe": 1, "data": 4, "fsdp": 2, "expert": 1, "context": 1, "tensor": 4}


def test_names_are_found_in_the_ways_people_write_them():
    assert get("h100") is get("H100") is get("NVIDIA H100") is CATALOGUE["h100"]
    assert get("tpu v5p") is get("v5p") is get("TPU_v5p")
    assert get(MINE) is MINE


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown hardware 'h1000': did you mean 'h100'\? known are a100, h100, h200"):
        get("h1000")
    with pytest.raises(ValueError, match=r"or describe your own with shardlm\.inspect\.Hardware\(name="):
        get("abacus")
    with pytest.raises(TypeError, match="hardware=3 is a int; it is a name, or a Hardware"):
        get(3)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"memory": 0}, "memory=0 is not above 0"),
        ({"flops": {}}, "flops is empty: give the peak FLOP/s of at least one dtype"),
        ({"flops": {"bfloat16": -1}}, r"flops\['bfloat16'\]=-1 is not above 0"),
        ({"efficiency": 1.5}, "efficiency=1.5 is not above 0 and at most 1"),
        ({"torus": 0}, "torus=0 is not a number of dims, at least 1"),
        ({"domain": 0}, "domain=0 is neither None nor a number of devices"),
        ({"axis_bandwidth": {"data": 0}}, r"axis_bandwidth\['data'\]=0 is not above 0"),
    ],
)
def test_figures_that_make_no_sense_are_named(changes, text):
    with pytest.raises(ValueError, match=f"hardware 'mine': {text}"):
        dataclasses.replace(MINE, **changes)


def test_a_dtype_without_a_figure_is_an_error_that_says_how_to_add_it():
    assert MINE.peak("bfloat16") == MINE.peak("float16") == 1e14
    with pytest.raises(ValueError, match="has no peak FLOP/s for float32; it has bfloat16. Add one"):
        MINE.peak("float32")


@pytest.mark.parametrize(
    ("axes", "speed"), [(("tensor",), 25e9), (("fsdp",), 1e9), (("data",), 1e9), (("data", "tensor"), 4e9)]
)
def test_a_group_sends_over_the_cards_of_its_members_in_a_domain(axes, speed):
    """4 devices a domain: tensor=4 stays within one, fsdp=2 has one member in each, data x tensor all four."""
    assert MINE.bandwidth(axes, SIZES)[0] == speed


@pytest.mark.parametrize(
    ("sizes", "axes", "speed", "links"),
    [
        ({"fsdp": 8}, ("fsdp",), 450e9, "fast"),
        ({"fsdp": 16}, ("fsdp",), 400e9, "slow"),  # eight cards of 50 GB/s
        ({"data": 8, "fsdp": 8}, ("data",), 50e9, "slow"),  # one member in each host
        ({"data": 8, "fsdp": 8}, ("data", "fsdp"), 400e9, "slow"),
        ({"data": 16, "tensor": 2}, ("data",), 200e9, "slow"),  # four in each
        ({"pipe": 2, "fsdp": 4, "tensor": 4}, ("pipe", "fsdp"), 100e9, "slow"),
        ({"data": 4, "tensor": 6}, ("tensor",), 450e9, "fast"),
    ],
)
def test_a_group_over_several_hosts_has_all_its_cards(sizes, axes, speed, links):
    assert CATALOGUE["h100"].bandwidth(axes, sizes) == (speed, links)


def test_links_are_never_faster_beyond_a_domain_than_within():
    quick = dataclasses.replace(MINE, slow_bandwidth=20e9)
    assert quick.bandwidth(("data", "tensor"), SIZES) == (25e9, "fast")


def test_a_group_over_several_dims_of_a_torus_has_the_links_of_each():
    v5p = CATALOGUE["v5p"]
    speeds = [v5p.bandwidth(("fsdp",), {"fsdp": n, "tensor": 2})[0] for n in (2, 3, 4, 8, 64)]
    assert speeds == [200e9, 200e9, 400e9, 600e9, 600e9]
    assert CATALOGUE["v5e"].bandwidth(("fsdp",), {"fsdp": 256}) == (200e9, "fast")


def test_one_domain_for_all_and_figures_by_axis():
    assert dataclasses.replace(MINE, domain=None).bandwidth(("data",), SIZES) == (25e9, "fast")
    own = dataclasses.replace(MINE, axis_bandwidth={"data": 3e9})
    assert own.bandwidth(("data",), SIZES) == (3e9, "given")
    assert own.bandwidth(("tensor",), SIZES) == (25e9, "fast")
    half = dataclasses.replace(own, efficiency=0.5)
    assert half.bandwidth(("data",), SIZES)[0] == 1.5e9
    assert half.peak("bfloat16") == 5e13


@pytest.mark.parametrize(
    ("kind", "name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "h100", 989.4e12),
        ("NVIDIA H100 PCIe", None, 756.5e12),
        ("TPU v5 lite", "v5e", 197e12),
        ("TPU v6 lite", "v6e", 918e12),
        ("NVIDIA A100-SXM4-80GB", "a100", 312e12),
    ],
)
def test_devices_are_recognised(kind, name, peak):
    class Device:
        device_kind = kind

    found = of_device(Device())
    assert found.flops["bfloat16"] == peak
    if name is not None:
        assert found is CATALOGUE[name]


def test_a_cpu_is_not():
    import jax

    assert of_device(jax.devices()[0]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": "80"}, "memory='80' is not above 0"),
        ({"memory": True}, "memory=True is not above 0"),
        ({"memory": float("inf")}, "memory and flops are finite"),
        ({"memory": float("nan")}, "memory=nan is not above 0"),
        ({"flops": {"bfloat16": None}}, r"flops\['bfloat16'\]=None is not above 0"),
        ({"domain": "8"}, "domain='8' is neither None nor a number of devices"),
        ({"domain": 1.5}, "domain=1.5 is neither"),
        ({"efficiency": "1"}, "efficiency='1' is not above 0 and at most 1"),
        ({"axis_bandwidth": {"nope": 3.0}}, "axis_bandwidth names nope; axes are pipe, data"),
        ({"axis_bandwidth": None}, "axis_bandwidth is None; it is a dict"),
        ({"flops": 3}, "flops is 3; it is a dict"),
    ],
)
def test_numbers_of_another_kind_are_one_error(changes, message):
    right = dict(name="x", flops={"bfloat16": 1e12}, memory=1e9, memory_bandwidth=1e9, fast_bandwidth=1e9, domain=2)
    with pytest.raises((ValueError, TypeError), match=message):
        Hardware(**(right | {"slow_bandwidth": 1e9} | changes))
