"""One update: gradients, the optimizer on global arrays, and the metrics that come for free."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax import Array

from shardlm.train.engine import Parameters, flatten, unflatten
from shardlm.train.frozen import put_back, trained
from shardlm.train.program import Program
from shardlm.train.state import TrainState
from shardlm.train.update import Update
from shardlm.train.view import as_model, layers

Metrics = dict[str, Array]
"""Scalars by name: loss (mean over weights), tokens or weight (sum of weights), grad_norm (before any clipping)."""


def make_step(
    program: Program, optimizer: optax.GradientTransformation, seed: int
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """A function (state, batch) -> (state after one update, metrics), to be compiled with the state donated.

    How the optimizer is run is told in `update.py`.
    """
    rule = Update(program, optimizer)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = dropout_key(seed, state.step)
        total, weight, grads, variables, assigned = program.gradients(state.params, state.variables, batch, key)
        held = unflatten(flatten(state.params) | flatten(assigned)) if assigned else state.params
        with jax.named_scope("update"):
            splits = program.plan.splits
            before, shardings = (trained(x, splits) for x in (held, program.plan.shardings("sharded")))
            shards = jax.lax.with_sharding_constraint(before, shardings)
            after, opt_state = rule(grads, state.opt_state, shards, total / weight)
            after = program.stored(cast(Parameters, after))
            params = put_back(held, after, splits)
        metrics = {"loss": total / weight, program.weight_name: weight, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state, variables, state.layer_rows), metrics

    return step


def make_gradients(program: Program, seed: int) -> Callable[[TrainState, Any], tuple[Array, Parameters]]:
    """A function (state, batch) -> (mean loss, its gradients) under the step's randomness.

    Layers are in the model's order, whatever the layout stores.
    """

    def gradients(state: TrainState, batch: Any) -> tuple[Array, Parameters]:
        key = dropout_key(seed, state.step)
        found = program.gradients(state.params, state.variables, batch, key)
        return found.total / found.weight, as_model(found.grads, layers(program.plan.views), program.engine == "manual")

    return gradients


def dropout_key(seed: int, step: Array) -> Array:
    """The key of a step's dropout masks: a function of the run's seed and the step alone."""
    return jax.random.fold_in(jax.random.key(seed), jnp.asarray(step))
