"""Floating-point operations of a traced program, counted in its matrix products and convolutions.

A product of [m, k] with [k, n] counts 2 m n k. Element-by-element work and reductions are left out, as in every
published figure of a model's FLOPs. Inside a manual region shapes are per device and are counted as they are; outside,
on global arrays, the work is taken to be split evenly.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from shardlm.inspect.walk import Place, equations


@dataclass(frozen=True)
class Flops:
    """FLOPs of one step on one device.

    Attributes:
        forward: of the forward pass.
        backward: of the backward pass, without what it recomputes.
        recomputed: what backward makes again because `remat` kept it out of memory.
        update: of the optimizer's own matrix products (Muon's); 0 for AdamW.
        masked: what a stage of a pipeline computes where it has no microbatch, or no layer; dropped.
        endless: whether some are in a `while` loop, and so counted once although it may run more often.
    """

    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0
    update: float = 0.0
    masked: float = 0.0
    endless: bool = False

    @property
    def model(self) -> float:
        """Forward and backward, nothing recomputed or dropped: what utilisation (MFU) counts."""
        return self.forward + self.backward

    @property
    def total(self) -> float:
        """All that the device computes: what hardware utilisation (HFU) counts."""
        return self.model + self.recomputed + self.update + self.masked


def count_flops(function: Callable[..., Any], *arguments: Any, num_devices: int = 1) -> Flops:
    """FLOPs of any function on one device, traced with arrays or `jax.ShapeDtypeStruct`s; nothing is allocated.

    Example:
        >>> a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 5), (5, 7)))
        >>> count_flops(jnp.matmul, a, b).total
        210.0
    """
    return of(jax.make_jaxpr(function)(*arguments), num_devices)


def of(jaxpr: Any, num_devices: int, used: Callable[[Place], float] = lambda place: 1.0) -> Flops:
    """Count a traced program, which `jax.make_jaxpr` gives, laid out over `num_devices` devices.

    Args:
        jaxpr: see there.
        num_devices: see there.
        used: of what is computed at a place, which part is not dropped.
    """
    sums = {"forward": 0.0, "backward": 0.0, "recomputed": 0.0, "update": 0.0, "masked": 0.0}
    endless = False
    for equation, place in equations(jaxpr):
        count = of_equation(equation) * place.times / (1 if place.mesh else num_devices)
        if count:
            part = used(place)
            sums["recomputed" if place.recomputed else place.phase] += count * part
            sums["masked"] += count * (1 - part)
            endless = endless or place.endless
    return Flops(**sums, endless=endless)


def of_equation(equation: Any) -> float:
    """FLOPs of one operation as its operands are."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        left, out = equation.invars[0].aval, equation.outvars[0].aval
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * math.prod(out.shape) * math.prod(left.shape[dim] for dim in contracted)
    if name == "conv_general_dilated":
        kernel, out = equation.invars[1].aval, equation.outvars[0].aval
        out_features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(out.shape) * math.prod(kernel.shape) / out_features
    if name.startswith("dot_product_attention"):
        # cuDNN's fused attention: q [b, s, heads, d] and k [b, s, kv heads, d] come first. Backward makes the scores
        # again (one product) and four more, forward two.
        query, key = equation.invars[0].aval.shape, equation.invars[1].aval.shape
        products = 5 if "bwd" in name or "backward" in name else 2
        return 2.0 * products * query[0] * query[2] * query[1] * key[1] * query[3]
    return 0.0
