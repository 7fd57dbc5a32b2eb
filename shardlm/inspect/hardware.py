"""What a device can do: peak arithmetic, memory, and the bandwidth of its links; a small catalogue, or the user's own.

Figures are the makers' peaks, per device (one GPU, one TPU chip). NVIDIA: data sheets of A100 80GB SXM, H100 SXM, H200
SXM and HGX B200, arithmetic without sparsity. Google: Cloud TPU's pages of v4, v5e, v5p and v6e. What a program reaches
is less; `Hardware.efficiency` says how much less to expect, and is 1 unless it is set.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from shardlm._dtypes import full_name
from shardlm._errors import is_int
from shardlm.layout import Axis

# Dense bfloat16 FLOP/s of one device, by the start of JAX's `device_kind`.
PEAK_BF16 = MappingProxyType(
    {
        "NVIDIA A100": 312e12,
        "NVIDIA H100": 989.4e12,
        "NVIDIA H100 PCIe": 756.5e12,
        "NVIDIA H100 NVL": 835.5e12,
        "NVIDIA H200": 989.4e12,
        "NVIDIA H200 NVL": 835.5e12,
        "NVIDIA B200": 2250e12,
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5e": 197e12,
        "TPU v5p": 459e12,
        "TPU v5": 459e12,
        "TPU v6 lite": 918e12,
        "TPU v6e": 918e12,
    }
)


def _is_above_0(value: Any) -> bool:
    """Whether it is a number above 0, perhaps infinite, and no bool."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(value > 0)


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A kind of device and how its kind is connected.

    Attributes:
        name: for messages.
        flops: peak FLOP/s of matrix products, by dtype of their operands.
        memory: bytes of device memory.
        memory_bandwidth: of that memory, bytes/s.
        fast_bandwidth: bytes/s that a device sends in a ring within a domain of fast links (NVLink, one dim of a TPU's
            torus in both directions).
        domain: number of devices in such a domain; None where it is as large as the machine (TPU slices).
        slow_bandwidth: bytes/s that a device sends beyond its domain, by a network card of its own (InfiniBand,
            Ethernet). A group of devices uses the cards of all its members in a domain.
        torus: dims of a torus of fast links; a group that spans several of them sends over the links of each.
        axis_bandwidth: bytes/s by mesh axis, for a network that the two figures above do not describe.
        efficiency: what fraction of the peaks to expect, above 0 and at most 1.

    Example:
        >>> mine = Hardware(name="my GPU", flops={"bfloat16": 150e12}, memory=24e9, memory_bandwidth=1e12,
        ...                 fast_bandwidth=25e9, domain=2, slow_bandwidth=1e9)
    """

    name: str
    flops: Mapping[str, float]
    memory: float
    memory_bandwidth: float
    fast_bandwidth: float
    domain: int | None
    slow_bandwidth: float
    axis_bandwidth: Mapping[str, float] = field(default_factory=dict)
    efficiency: float = 1.0
    torus: int = 1

    def __post_init__(self):
        for name in ("flops", "axis_bandwidth"):
            if not isinstance(given := getattr(self, name), Mapping):
                raise TypeError(f"hardware {self.name!r}: {name} is {given!r}; it is a dict of numbers")
        object.__setattr__(self, "flops", {full_name(dtype): value for dtype, value in self.flops.items()})
        numbers = {
            "memory": self.memory,
            "memory_bandwidth": self.memory_bandwidth,
            "fast_bandwidth": self.fast_bandwidth,
            "slow_bandwidth": self.slow_bandwidth,
            **{f"flops[{dtype!r}]": value for dtype, value in self.flops.items()},
            **{f"axis_bandwidth[{axis!r}]": value for axis, value in self.axis_bandwidth.items()},
        }
        wrong = [f"{name}={value!r} is not above 0" for name, value in numbers.items() if not _is_above_0(value)]
        if math.inf in (self.memory, *self.flops.values()):
            wrong.append("memory and flops are finite")
        if unknown := sorted(set(map(str, self.axis_bandwidth)) - set(map(str, Axis))):
            wrong.append(f"axis_bandwidth names {', '.join(unknown)}; axes are {', '.join(map(str, Axis))}")
        if not self.flops:
            wrong.append("flops is empty: give the peak FLOP/s of at least one dtype")
        if self.domain is not None and (not is_int(self.domain) or self.domain < 1):
            wrong.append(f"domain={self.domain!r} is neither None nor a number of devices")
        if not is_int(self.torus) or self.torus < 1:
            wrong.append(f"torus={self.torus!r} is not a number of dims, at least 1")
        if not _is_above_0(self.efficiency) or self.efficiency > 1:
            wrong.append(f"efficiency={self.efficiency!r} is not above 0 and at most 1")
        if wrong:
            raise ValueError(f"hardware {self.name!r}: " + "; ".join(wrong))

    def peak(self, dtype: str) -> float:
        """FLOP/s to expect of products in `dtype`; those of bfloat16 and float16 are the same on all of these.

        Raises:
            ValueError: the dtype has no figure.
        """
        dtype = full_name(dtype)
        for name in (dtype, "bfloat16" if dtype == "float16" else dtype):
            if name in self.flops:
                return self.flops[name] * self.efficiency
        raise ValueError(
            f"hardware {self.name!r} has no peak FLOP/s for {dtype}; it has {', '.join(self.flops)}. "
            f"Add one: dataclasses.replace(hardware, flops={{..., {dtype!r}: ...}})"
        )

    def bandwidth(self, axes: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[float, str]:
        """Bytes/s that a device sends at best in rings over `axes` of a mesh, and the name of the links that decide it.

        Devices are laid out with the mesh's last axis nearest, domain after domain. A group that spans several domains
        runs as many rings at once as it has members in one, each over the network card of another member, while each
        member sends all of its bytes over the fast links too: min(fast, slow x members inside one domain). On a torus a
        group of n is taken to lie along as many dims as it can, one for every factor of 2 in n.

        Args:
            axes: the axes that the group spans.
            sizes: devices along every axis of the mesh, in mesh order.
        """
        if own := [self.axis_bandwidth[axis] for axis in axes if axis in self.axis_bandwidth]:
            return min(own) * self.efficiency, "given"
        places = np.zeros(1, int)  # of the first group's members
        stride = 1
        for axis in reversed(list(sizes)):
            if axis in axes:
                places = (np.arange(sizes[axis])[:, None] * stride + places).reshape(-1)
            stride *= sizes[axis]
        dims = max(1, min(self.torus, int(math.log2(len(places)))))
        fast = self.fast_bandwidth * dims * self.efficiency
        if self.domain is None or stride <= self.domain or self._beside(places) == len(places):
            return fast, "fast"
        slow = self.slow_bandwidth * self._beside(places) * self.efficiency
        return (slow, "slow") if slow < fast else (fast, "fast")

    def _beside(self, places: np.ndarray) -> int:
        """The most members of a group that fit into one domain, wherever it begins."""
        assert self.domain is not None
        return int((np.searchsorted(places, places + self.domain) - np.arange(len(places))).max())


def _nvidia(name: str, kind: str, tf32: float, f32: float, memory: float, bandwidth: float, nvlink: float, nic: float):
    flops = {"bfloat16": PEAK_BF16[kind], "float32": tf32, "float64": f32}
    return Hardware(
        name=name, flops=flops, memory=memory, memory_bandwidth=bandwidth, fast_bandwidth=nvlink, domain=8,
        slow_bandwidth=nic,
    )  # fmt: skip


def _tpu(name: str, kind: str, memory: float, bandwidth: float, ici: float, dcn: float, torus: int) -> Hardware:
    # float32 products take six bfloat16 passes at the highest precision and one at JAX's default.
    flops = {"bfloat16": PEAK_BF16[kind], "float32": PEAK_BF16[kind]}
    return Hardware(
        name=name, flops=flops, memory=memory, memory_bandwidth=bandwidth, fast_bandwidth=ici, domain=None,
        slow_bandwidth=dcn, torus=torus,
    )  # fmt: skip


# NVLink is given for one direction, half of what data sheets print; the network as 200 Gbit/s a GPU on A100 and 400 on
# the others, as in NVIDIA's DGX systems. float32 is TF32, float64 its tensor cores. For TPUs both directions of one
# link: 2400 Gbit/s over 6 links one way (v4), 400 GB/s over 4 (v5e), 1200 over 6 (v5p), 800 over 4 (v6e) both ways. The
# links are those of a torus of 3 dims (v4, v5p) or 2 (v5e, v6e).
CATALOGUE: Mapping[str, Hardware] = MappingProxyType(
    {
        "a100": _nvidia("NVIDIA A100 80GB SXM", "NVIDIA A100", 156e12, 19.5e12, 80e9, 2.039e12, 300e9, 25e9),
        "h100": _nvidia("NVIDIA H100 SXM", "NVIDIA H100", 494.7e12, 66.9e12, 80e9, 3.35e12, 450e9, 50e9),
        "h200": _nvidia("NVIDIA H200 SXM", "NVIDIA H200", 494.7e12, 66.9e12, 141e9, 4.8e12, 450e9, 50e9),
        "b200": _nvidia("NVIDIA B200", "NVIDIA B200", 1125e12, 37e12, 180e9, 8e12, 900e9, 50e9),
        "v4": _tpu("TPU v4", "TPU v4", 32e9, 1.2e12, 100e9, 6.25e9, 3),
        "v5e": _tpu("TPU v5e", "TPU v5e", 16e9, 0.819e12, 100e9, 3.125e9, 2),
        "v5p": _tpu("TPU v5p", "TPU v5p", 95e9, 2.765e12, 200e9, 6.25e9, 3),
        "v6e": _tpu("TPU v6e", "TPU v6e", 32e9, 1.638e12, 200e9, 12.5e9, 2),
    }
)


def get(hardware: "Hardware | str") -> Hardware:
    """A `Hardware`, or the one of that name in the catalogue.

    Raises:
        ValueError: the name is not in the catalogue.
        TypeError: it is neither.
    """
    if isinstance(hardware, Hardware):
        return hardware
    if not isinstance(hardware, str):
        raise TypeError(f"hardware={hardware!r} is a {type(hardware).__name__}; it is a name, or a Hardware")
    name = hardware.lower().removeprefix("tpu").removeprefix("nvidia").strip(" _-")
    if name in CATALOGUE:
        return CATALOGUE[name]
    close = difflib.get_close_matches(name, CATALOGUE, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(
        f"unknown hardware {hardware!r}: {hint}known are {', '.join(CATALOGUE)}; "
        "or describe your own with shardlm.inspect.Hardware(name=..., flops=..., memory=..., ...)"
    )


def of_device(device: Any) -> Hardware | None:
    """The catalogue's entry for a device that is there; None for CPUs and what it does not know."""
    kinds = [kind for kind in PEAK_BF16 if device.device_kind.startswith(kind)]
    if not kinds:
        return None
    kind = max(kinds, key=len)
    name = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}.get(kind, kind.split()[1].lower())
    known = CATALOGUE[name]
    scale = PEAK_BF16[kind] / known.flops["bfloat16"]
    flops = {dtype: peak * scale for dtype, peak in known.flops.items()}
    return known if scale == 1 else dataclasses.replace(known, name=kind, flops=flops)
