"""Rematerialisation: what a layer keeps from its forward for its backward, by name.

| name   | kept                                                            | made again in backward            |
|--------|-----------------------------------------------------------------|-----------------------------------|
| `none` | everything                                                      | nothing but the weights           |
| `dots` | matrix products without a batch, results of tensor collectives  | norms, activations, attention     |
| `full` | the layer's input                                               | the layer, communication included |

Whole weights are never kept: they are cheap to make again from what the device stores, and with ZeRO-3 keeping them
would undo it. So ZeRO-3 gathers twice, as arXiv:1910.02054 section 7.2.2 counts.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from shardlm.layout import Axis

NAMES = ("none", "dots", "full")
_WEIGHT_AXES = frozenset({Axis.DATA, Axis.FSDP, Axis.EXPERT})
_FREE = frozenset({"pcast", "pvary", "reshape"})  # kept, such a result of a whole weight would be the weight itself
_COLLECTIVES = frozenset({"all_gather", "psum", "psum_invariant", "reduce_scatter"})


def policy(name: str) -> Callable[..., bool]:
    """A policy for `jax.checkpoint`: of each operation's result, whether it is kept."""
    if name == "none":
        return lambda primitive, *_, **options: not _makes_weights(primitive, options)
    if name == "dots":
        return _keeps_products
    if name == "full":
        return jax.checkpoint_policies.nothing_saveable
    raise ValueError(f"remat={name!r}; it is one of {', '.join(map(repr, NAMES))}")


def _makes_weights(primitive: Any, options: dict[str, Any]) -> bool:
    if primitive.name == "custom_vjp_call":  # `zero.use` is one, seen as a whole
        return any(not _WEIGHT_AXES.isdisjoint(_axes(equation.params)) for equation in _equations(options))
    return primitive.name in _FREE


def _keeps_products(primitive: Any, *avals: Any, **options: Any) -> bool:
    if primitive.name in _COLLECTIVES:
        return True
    if primitive.name == "custom_vjp_call":
        names = {equation.primitive.name for equation in _equations(options)}
        return not _makes_weights(primitive, options) and not names.isdisjoint(_COLLECTIVES)
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *avals, **options)


def _equations(options: dict[str, Any]) -> Iterator[Any]:
    for equation in options["call_jaxpr"].jaxpr.eqns:
        yield equation
        if equation.primitive.name == "custom_vjp_call":
            yield from _equations(equation.params)


def _axes(options: dict[str, Any]) -> frozenset[Any]:
    names = options.get("axis_name", options.get("axes", ()))
    return frozenset(names if isinstance(names, tuple | list | set | frozenset) else (names,))
