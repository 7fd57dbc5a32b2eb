"""Running a stack of equal layers: one scan over their stacked parameters, and what the caller may change about it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from shardlm.parallel import remat


@dataclass(frozen=True)
class Execution:
    """How a call of the model is executed; it changes nothing in what is computed.

    Attributes:
        remat: what a layer keeps for its backward, a name of `parallel.remat`.
        sequence_parallel: split the residual stream along its sequence over the tensor axis.
        prepare: makes one layer's parameters ready for use from (its parameters as the module holds them, its slice of
            `beside`). ZeRO gathers here.
        beside: a tree of arrays with a leading layer dim, scanned beside the parameters.
    """

    remat: str = "none"
    sequence_parallel: bool = False
    prepare: Callable[[dict[str, Any], Any], dict[str, Any]] | None = None
    beside: Any = None


PLAIN = Execution()


class Stack(NamedTuple):
    """Layers taken apart, for whoever runs them one at a time.

    Attributes:
        layer: (one layer's parameters, x, its slice of `inputs`) -> x of the same shape.
        parameters: a nested dict of arrays with a leading layer dim.
        inputs: a tree of arrays with a leading layer dim.
    """

    layer: Callable[[Any, Array, Any], Array]
    parameters: dict[str, Any]
    inputs: Any

    def run(self, x: Array) -> Array:
        """What the last layer returns."""
        return jax.lax.scan(lambda x, one: (self.layer(one[0], x, one[1]), None), x, (self.parameters, self.inputs))[0]


def scan_layers(
    layers: nnx.Module,
    x: Array,
    apply: Callable[[Any, Array, Any], Array],
    per_layer: Any,
    execution: Execution,
    runs: Array | None = None,
) -> Array:
    """Run stacked layers one after another: `stack` of the same arguments, on `x`, which the first layer receives."""
    return stack(layers, apply, per_layer, execution, runs).run(x)


def stack(
    layers: nnx.Module,
    apply: Callable[[Any, Array, Any], Array],
    per_layer: Any,
    execution: Execution,
    runs: Array | None = None,
) -> Stack:
    """Stacked layers, ready to be run.

    Args:
        layers: a module whose parameters have a leading layer dim.
        apply: (one layer as a module, x, its slice of `per_layer`) -> x of the same shape.
        per_layer: a tree of arrays with a leading layer dim, such as window sizes.
        execution: see there.
        runs: bool[layers], which layers to run; past the others x goes unchanged. None: all.
    """
    graph, state = nnx.split(layers)

    def layer(x: Array, parameters: Any, beside: Any, inputs: Any) -> Array:
        if execution.prepare is not None:
            parameters = execution.prepare(parameters, beside)
        return apply(nnx.merge(graph, nnx.State(parameters)), x, inputs)

    # The loop itself keeps the compiler from merging forward and recomputed work, so no barrier is needed against it.
    if execution.remat != "none" or execution.prepare is not None:
        layer = jax.checkpoint(layer, policy=remat.policy(execution.remat), prevent_cse=False)

    def one(parameters: Any, x: Array, given: tuple[Any, Any, Array | None]) -> Array:
        beside, inputs, run = given
        y = layer(x, parameters, beside, inputs)
        # Every device computes every layer, as communication in a branch may hang; the result is dropped.
        return y if run is None else jnp.where(run, y, x)

    return Stack(one, nnx.to_pure_dict(state), (execution.beside, per_layer, runs))
