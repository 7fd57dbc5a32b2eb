"""How long a step takes at best on given hardware, and what keeps it from being faster.

Times as if nothing else were to be done: arithmetic at the peak, memory traffic at full bandwidth, and communication in
rings at the links' bandwidth, of each kind of links. With perfect overlap a step lasts as long as the longest
(`overlapped`), with none as long as their sum, arithmetic and memory traffic of the same operation overlapping always
(`serial`). Real steps take longer than `overlapped`: operations do not fill a device, and wait for each other.

All three count what the program does, so the bubble of a pipeline is in each: the ticks in which a stage has no
microbatch compute on masked arrays, and read, write and send them (`Timeline.bubble` is its part of the arithmetic).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardlm.inspect.flops import Flops, of_equation
from shardlm.inspect.hardware import Hardware
from shardlm.inspect.ledger import Ledger, total_bytes
from shardlm.inspect.walk import elements, equations

_MOVES = ("dot_general", "conv_general_dilated", "gather", "scatter", "scatter-add", "sort", "cumsum")


@dataclass(frozen=True)
class Timeline:
    """Seconds of one step on one device, by what they are spent on.

    Attributes:
        hardware: on what.
        arithmetic: FLOPs over the peak, without what a fused attention kernel leaves out.
        bubble: seconds of `arithmetic` that a pipeline computes on masked arrays.
        memory: bytes read and written by products, and by the update, over memory bandwidth. Work element by element is
            taken to be fused, and the scores of attention to stay on the chip where they are made in pieces ("chunked")
            or by a kernel ("cudnn"); products take their operands from memory, not from a cache.
        communication: by mesh axes, bytes over the bandwidth of the links that the axes use.
        links: by mesh axes, "fast", "slow" or "given".
        intensity: FLOPs per byte of memory traffic.
        ridge: the hardware's FLOP/s per byte/s: below it memory bounds the arithmetic.
        model_flops: of one device, nothing recomputed.
    """

    hardware: Hardware
    arithmetic: float
    bubble: float
    memory: float
    communication: Mapping[tuple[str, ...], float]
    links: Mapping[tuple[str, ...], str]
    intensity: float
    ridge: float
    model_flops: float
    peak_flops: float

    @property
    def overlapped(self) -> float:
        """Seconds of a step in which everything overlaps, transfers over links of different kinds too."""
        return max(self.arithmetic, self.memory, *self._sums().values())

    @property
    def serial(self) -> float:
        """Seconds of a step in which communication overlaps with nothing."""
        return max(self.arithmetic, self.memory) + sum(self.communication.values())

    @property
    def bound(self) -> str:
        """What takes longest: "arithmetic", "memory", or "communication over ..."."""
        sums = self._sums()
        link = max(sums, key=lambda name: sums[name])
        if sums[link] > max(self.arithmetic, self.memory):
            axes = max((a for a in self.links if self.links[a] == link), key=lambda axes: self.communication[axes])
            return f"communication over {' x '.join(axes)} ({link} links)"
        return "arithmetic" if self.arithmetic >= self.memory else "memory"

    def _sums(self) -> dict[str, float]:
        """Seconds of communication by kind of links."""
        sums = {"fast": 0.0}
        for axes, seconds in self.communication.items():
            sums[self.links[axes]] = sums.get(self.links[axes], 0.0) + seconds
        return sums

    def utilisation(self, seconds: float) -> float:
        """Model FLOPs utilisation (MFU) of a step that took `seconds`: its FLOPs over what the peak could do."""
        if not seconds > 0 or not math.isfinite(seconds):
            raise ValueError(f"a step time of {seconds!r} s; it is above 0")
        return self.model_flops / (seconds * self.peak_flops)


def estimate(
    jaxpr: Any,
    flops: Flops,
    ledger: Ledger,
    state_bytes: int,
    hardware: Hardware,
    sizes: Mapping[str, int],
    dtype: str,
    attended: float = 1.0,
) -> Timeline:
    """The times of a traced step.

    Args:
        jaxpr: the traced step.
        flops, ledger: of the same.
        state_bytes: parameters and optimizer state of a device, which the update reads and writes.
        hardware: on what.
        sizes: devices along each mesh axis, in mesh order.
        dtype: of the products.
        attended: which part of a fused attention kernel's products it computes.
    """
    peak = hardware.peak(dtype)
    bandwidth = hardware.memory_bandwidth * hardware.efficiency
    traffic, fused = _traffic(jaxpr, math.prod(sizes.values()))
    moved, computed = traffic + 2 * state_bytes, flops.total - (1 - attended) * fused
    communication, links = {}, {}
    for axes, entries in ledger.by_axes().items():
        speed, links[axes] = hardware.bandwidth(axes, sizes)
        communication[axes] = total_bytes(entries) / speed
    return Timeline(
        hardware=hardware,
        arithmetic=computed / peak,
        bubble=computed / peak * flops.masked / flops.total if flops.masked else 0.0,
        memory=moved / bandwidth,
        communication=communication,
        links=links,
        intensity=computed / moved,
        ridge=peak / bandwidth,
        model_flops=flops.model,
        peak_flops=hardware.flops.get(dtype, peak),
    )


def _traffic(jaxpr: Any, num_devices: int) -> tuple[float, float]:
    """Bytes that products, gathers and scatters read and write on one device, and FLOPs of fused attention."""
    total = fused = 0.0
    for equation, place in equations(jaxpr):
        name, share = equation.primitive.name, 1 if place.mesh is not None else num_devices
        kernel = name.startswith("dot_product_attention")
        if place.on_chip or kernel:
            fused += of_equation(equation) * place.times / share
        if (name in _MOVES and not place.on_chip) or kernel:
            arrays = [v.aval for v in (*equation.invars, *equation.outvars)]
            size = sum(elements(a) * getattr(getattr(a, "dtype", None), "itemsize", 0) for a in arrays)
            total += size * place.times / share
    return total, fused
