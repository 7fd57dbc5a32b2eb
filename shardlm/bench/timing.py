"""Timing on a machine that others use too: calls interleaved, medians, and the spread that goes with them."""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Sample:
    """Measured values of one quantity, in the order they were taken."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the values are below it."""
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the values are below the first, a quarter above the second."""
        values = self.values if len(self.values) > 1 else self.values * 2
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return low, high

    def __truediv__(self, other: "Sample") -> "Sample":
        """Ratios of values taken in the same round: what slowed the machine down for a round cancels."""
        return Sample(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def show(self, unit: str = "", scale: float = 1.0, digits: int = 3) -> str:
        """As text, values multiplied by `scale`: the median, its unit, the quartiles in parentheses."""
        median, low, high = (_significant(scale * x, digits) for x in (self.median, *self.quartiles))
        return f"{median}{unit and ' ' + unit} ({low} to {high})"


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int, *, until_done: bool = True) -> dict[str, Sample]:
    """Time each call once per round, in an order that turns round from one round to the next (A B, B A, ...).

    Args:
        calls: functions by name; each returns what it computes, arrays that may still be on their way.
        rounds: values per call.
        until_done: time until the result is there, or else until the call returns. The device is idle when a call
            starts either way.

    Returns:
        Seconds by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(rounds):
        for name in order:
            began = time.perf_counter()
            result = calls[name]()
            returned = time.perf_counter()
            jax.block_until_ready(result)
            done = time.perf_counter()
            seconds[name].append((done if until_done else returned) - began)
        order.reverse()
    return {name: Sample(tuple(values)) for name, values in seconds.items()}


def machine(device: Any) -> str:
    """What was measured on, and how busy the processor is: a load above its cores disturbs every time."""
    load = f"load average {os.getloadavg()[0]:.1f} on " if hasattr(os, "getloadavg") else ""
    return f"{device.device_kind}, jax {jax.__version__}; {load}{os.cpu_count()} cores"


def _significant(value: float, digits: int) -> str:
    exponent = math.floor(math.log10(abs(value))) if value else 0
    decimals = max(0, digits - 1 - exponent)
    return f"{value:,.{decimals}f}"
