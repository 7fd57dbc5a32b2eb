"""Running a stack of equal layers: one scan over their stacked parameters, and what the caller may change about it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from shardlm.parallel import remat


@dataclass(frozen=True)
class Execution:
    """How a call of the model is executed; but for `layers` it changes nothing in what is computed.

    Attributes:
        remat: what a layer keeps for its backward, a name of `parallel.remat`.
        sequence_parallel: split the residual stream along its sequence over the tensor axis.
        prepare: makes one layer's parameters ready for use from (its parameters as the module holds them, its slice of
            `beside`). ZeRO gathers here.
        beside: a tree of arrays with a leading layer dim, scanned beside the parameters.
        layers: stop after so many layers (an integer scalar, which may be traced); None runs all.
    """

    remat: str = "none"
    sequence_parallel: bool = False
    prepare: Callable[[dict[str, Any], Any], dict[str, Any]] | None = None
    beside: Any = None
    layers: Array | None = None

    def stopping(self, layers: Array) -> "Execution":
        """The same, stopping after so many layers."""
        return dataclasses.replace(self, layers=layers)


PLAIN = Execution()


def scan_layers(
    layers: nnx.Module,
    x: Array,
    apply: Callable[[Any, Array, Any], Array],
    per_layer: Any,
    execution: Execution,
) -> Array:
    """Run stacked layers one after another.

    Args:
        layers: a module whose parameters have a leading layer dim.
        x: what the first layer receives.
        apply: (one layer as a module, x, its slice of `per_layer`) -> x of the same shape.
        per_layer: a tree of arrays with a leading layer dim, such as window sizes.
        execution: see there.

    Returns:
        What the last layer returned, or the one at which `execution.layers` stops.
    """
    graph, state = nnx.split(layers)
    parameters = nnx.to_pure_dict(state)

    def layer(x: Array, parameters: Any, beside: Any, inputs: Any) -> Array:
        if execution.prepare is not None:
            parameters = execution.prepare(parameters, beside)
        return apply(nnx.merge(graph, nnx.State(parameters)), x, inputs)

    # The loop itself keeps the compiler from merging forward and recomputed work, so no barrier is needed against it.
    if execution.remat != "none" or execution.prepare is not None:
        layer = jax.checkpoint(layer, policy=remat.policy(execution.remat), prevent_cse=False)

    def body(x: Array, inputs: Any) -> tuple[Array, None]:
        return layer(x, *inputs), None

    layers_run = execution.layers
    if layers_run is None:
        return jax.lax.scan(body, x, (parameters, execution.beside, per_layer))[0]

    def counted(carry: tuple[Array, Array], inputs: Any) -> tuple[tuple[Array, Array], None]:
        x, done = carry
        # Every device runs every layer, as communication in a branch may hang; the result is dropped.
        return (jnp.where(done < layers_run, layer(x, *inputs), x), done + 1), None

    start = (x, jnp.zeros((), jnp.int32))
    return jax.lax.scan(counted, start, (parameters, execution.beside, per_layer))[0][0]
