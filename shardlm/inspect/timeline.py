"""How long a step takes at best on given hardware, and what keeps it from being faster.

Three times, each as if nothing else were to be done: arithmetic at the peak, memory traffic at full bandwidth, and
communication in rings at the links' bandwidth. With perfect overlap a step lasts as long as the longest (`overlapped`),
with none as long as their sum, arithmetic and memory traffic of the same operation overlapping always (`serial`).
Real steps lie between, or above where operations are too small to fill a device.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardlm.inspect.flops import Flops
from shardlm.inspect.hardware import Hardware
from shardlm.inspect.ledger import Ledger, total_bytes
from shardlm.inspect.walk import elements, equations

_MOVES = ("dot_general", "conv_general_dilated", "gather", "scatter", "scatter-add", "sort", "cumsum")


@dataclass(frozen=True)
class Timeline:
    """Seconds of one step on one device, by what they are spent on.

    Attributes:
        hardware: on what.
        arithmetic: FLOPs over the peak.
        memory: bytes read and written by products, and by the update, over memory bandwidth; a lower bound, as work
            element by element is taken to be fused.
        communication: by mesh axes, bytes over the bandwidth of the links that the axes use.
        links: by mesh axes, "fast", "slow" or "given".
        intensity: FLOPs per byte of memory traffic.
        ridge: the hardware's FLOP/s per byte/s: below it memory bounds the arithmetic.
        model_flops: of one device, nothing recomputed.
    """

    hardware: Hardware
    arithmetic: float
    memory: float
    communication: Mapping[tuple[str, ...], float]
    links: Mapping[tuple[str, ...], str]
    intensity: float
    ridge: float
    model_flops: float
    peak_flops: float

    @property
    def overlapped(self) -> float:
        """Seconds of a step in which everything overlaps."""
        return max(self.arithmetic, self.memory, sum(self.communication.values()))

    @property
    def serial(self) -> float:
        """Seconds of a step in which communication overlaps with nothing."""
        return max(self.arithmetic, self.memory) + sum(self.communication.values())

    @property
    def bound(self) -> str:
        """What takes longest: "arithmetic", "memory", or "communication over ..."."""
        moved = sum(self.communication.values())
        if moved > max(self.arithmetic, self.memory):
            axes = max(self.communication, key=lambda axes: self.communication[axes])
            return f"communication over {' x '.join(axes)} ({self.links[axes]} links)"
        return "arithmetic" if self.arithmetic >= self.memory else "memory"

    def utilisation(self, seconds: float) -> float:
        """Model FLOPs utilisation (MFU) of a step that took `seconds`: its FLOPs over what the peak could do."""
        if not seconds > 0 or not math.isfinite(seconds):
            raise ValueError(f"a step time of {seconds!r} s; it is above 0")
        return self.model_flops / (seconds * self.peak_flops)


def estimate(
    jaxpr: Any, flops: Flops, ledger: Ledger, state_bytes: int, hardware: Hardware, sizes: Mapping[str, int], dtype: str
) -> Timeline:
    """The times of a traced step.

    Args:
        jaxpr: the traced step.
        flops, ledger: of the same.
        state_bytes: parameters and optimizer state of a device, which the update reads and writes.
        hardware: on what.
        sizes: devices along each mesh axis, in mesh order.
        dtype: of the products.
    """
    peak = hardware.peak(dtype)
    bandwidth = hardware.memory_bandwidth * hardware.efficiency
    moved = _traffic(jaxpr, math.prod(sizes.values())) + 2 * state_bytes
    communication, links = {}, {}
    for axes, entries in ledger.by_axes().items():
        speed, links[axes] = hardware.bandwidth(axes, sizes)
        communication[axes] = total_bytes(entries) / speed
    return Timeline(
        hardware=hardware,
        arithmetic=flops.total / peak,
        memory=moved / bandwidth,
        communication=communication,
        links=links,
        intensity=flops.total / moved,
        ridge=peak / bandwidth,
        model_flops=flops.model,
        peak_flops=hardware.flops.get(dtype, peak),
    )


def _traffic(jaxpr: Any, num_devices: int) -> float:
    """Bytes that products, gathers and scatters read and write on one device."""
    total = 0.0
    for equation, place in equations(jaxpr):
        name = equation.primitive.name
        if name in _MOVES or name.startswith("dot_product_attention"):
            arrays = [v.aval for v in (*equation.invars, *equation.outvars)]
            size = sum(elements(a) * getattr(getattr(a, "dtype", None), "itemsize", 0) for a in arrays)
            total += size * place.times / (1 if place.mesh is not None else num_devices)
    return total
