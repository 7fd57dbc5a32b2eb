"""Running a stack of equal layers: one scan over their stacked parameters, and what the caller may change about it."""

import itertools
from collections.abc import Callable, Sequence
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


def fold_layers(
    layers: nnx.Module,
    x: Array,
    states: Sequence[Any],
    apply: Callable[[Any, Array, Any, int, Array], tuple[Array, Any]],
    kinds: Sequence[int],
    execution: Execution,
) -> tuple[Array, tuple[Any, ...]]:
    """Run stacked layers one after another, each changing the state that all layers of its kind share.

    Layers of one kind are compiled once for each run of them in a repeated pattern: a model of five local layers and
    one global, over and over, is two layers to the compiler, and two more where the last pattern is cut short.

    Args:
        layers: a module whose parameters have a leading layer dim.
        x: what the first layer receives.
        states: for each kind a tree of arrays.
        apply: (one layer as a module, x, the state of its kind, the kind, which layer of its kind it is) -> (x of the
            same shape, the state).
        kinds: of each layer, an index into `states`.
        execution: `prepare` and `beside` hold; nothing is differentiated, so `remat` has nothing to keep.

    Returns:
        What the last layer returned, and the states.
    """
    graph, state = nnx.split(layers)
    stacked = (nnx.to_pure_dict(state), execution.beside)

    def layer(carry: tuple[Array, tuple[Any, ...]], kind: int, number: Array, index: Array):
        x, states = carry
        parameters, beside = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, number, keepdims=False), stacked)
        if execution.prepare is not None:
            parameters = execution.prepare(parameters, beside)
        x, changed = apply(nnx.merge(graph, nnx.State(parameters)), x, states[kind], kind, index)
        return x, (*states[:kind], changed, *states[kind + 1 :])

    carry, first, done = (x, tuple(states)), 0, [0] * len(states)
    for repeats, runs in pattern(kinds):
        length = sum(count for _, count in runs)
        per_kind = [sum(count for kind, count in runs if kind == each) for each in range(len(states))]

        def once(turn: Array, carry: Any, first=first, done=tuple(done), runs=runs, length=length, per_kind=per_kind):
            number, index = first + turn * length, [d + turn * n for d, n in zip(done, per_kind, strict=True)]
            for kind, count in runs:
                start = (number, index[kind])

                def body(i: Array, carry: Any, kind=kind, start=start):
                    return layer(carry, kind, start[0] + i, start[1] + i)

                carry = jax.lax.fori_loop(0, count, body, carry) if count > 1 else body(jnp.int32(0), carry)
                number, index[kind] = number + count, index[kind] + count
            return carry

        carry = jax.lax.fori_loop(0, repeats, once, carry) if repeats > 1 else once(jnp.int32(0), carry)
        first, done = first + repeats * length, [d + repeats * n for d, n in zip(done, per_kind, strict=True)]
    return carry


def pattern(kinds: Sequence[int]) -> list[tuple[int, list[tuple[int, int]]]]:
    """The sequence as a repeated pattern of runs, and what is left of it: (repeats, [(kind, how many in a row), ...]).

    Example:
        >>> pattern([0, 0, 1, 0, 0, 1, 0])
        [(2, [(0, 2), (1, 1)]), (1, [(0, 1)])]
    """

    def runs(part: Sequence[int]) -> list[tuple[int, int]]:
        return [(kind, len(list(run))) for kind, run in itertools.groupby(part)]

    total = len(kinds)
    period = next(p for p in range(1, total + 1) if all(kinds[i] == kinds[i % p] for i in range(total)))
    repeats, rest = divmod(total, period)
    return [(repeats, runs(kinds[:period])), *([(1, runs(kinds[:rest]))] if rest else [])]
