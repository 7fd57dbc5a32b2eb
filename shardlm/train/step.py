"""One update: gradients, the optimizer on global arrays, and the metrics that come for free."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jax import Array

from shardlm.train import engine
from shardlm.train.engine import Parameters, Plan
from shardlm.train.state import TrainState

Metrics = dict[str, Array]
"""Scalars by name: loss (mean over weights), tokens (sum of weights), grad_norm (before any clipping)."""


def make_step(
    plan: Plan, optimizer: optax.GradientTransformation, seed: int, engine_name: str
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, Metrics]]:
    """A function (state, batch) -> (state after one update, metrics), to be compiled with the state donated.

    The optimizer runs outside the manual region, on global arrays split as gradients are, so any Optax transformation
    is right without knowing of the mesh; what its own global arithmetic needs (a norm over all leaves) the compiler
    adds.
    """
    gradients = engine.loss_and_grads(plan, engine_name)

    def step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, Metrics]:
        total, weight, grads = gradients(state.params, batch, dropout_key(seed, state.step))
        with jax.named_scope("update"):
            shards = jax.lax.with_sharding_constraint(state.params, plan.shardings("sharded"))
            updates, opt_state = optimizer.update(grads, state.opt_state, shards)
            params = _as_stored(plan, cast(Parameters, optax.apply_updates(shards, updates)), engine_name)
        metrics = {"loss": total / weight, "tokens": weight, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def dropout_key(seed: int, step: Array) -> Array:
    """The key of a step's dropout masks: a function of the run's seed and the step alone."""
    return jax.random.fold_in(jax.random.key(seed), jnp.asarray(step))


def _as_stored(plan: Plan, shards: Parameters, engine_name: str) -> Parameters:
    if engine_name == "auto":
        return jax.lax.with_sharding_constraint(shards, plan.shardings("stored"))
    return engine.gather_updated(plan, shards)
