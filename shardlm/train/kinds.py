"""What a user gave where a state, a trainer or an optimizer belongs: the right kind, or an error that says how."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from shardlm.models.kinds import kind
from shardlm.train.optimizer import adamw
from shardlm.train.paths import flatten

_MOST = 10  # differences in one error


def require_optimizer(optimizer: Any) -> Any:
    """The Optax transformation, the default one for None; raises TypeError for anything else."""
    if optimizer is None:
        return adamw(3e-4, steps=1000)
    made = isinstance(optimizer, optax.GradientTransformation) or not (
        callable(optimizer) or isinstance(optimizer, type)
    )
    if made and callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None)):
        return optimizer
    if isinstance(optimizer, str):
        how = f"make one: optax.{optimizer.strip().lower() or 'adam'}(1e-3), or sl.adamw(1e-3, steps=1000)"
    elif getattr(optimizer, "__name__", "") in ("<lambda>", "schedule"):
        how = "a schedule goes into one: optax.adam(schedule)"
    elif callable(optimizer) and hasattr(optimizer, "__name__"):
        steps = ", steps=1000" if optimizer.__module__.startswith("shardlm") else ""
        how = f"call it: {optimizer.__name__}(1e-3{steps})"
    elif hasattr(optimizer, "tx"):  # nnx.Optimizer, and TrainState of Flax's examples
        how = f"it holds a model of its own: give the transformation inside, the {type(optimizer).__name__}'s .tx"
    else:
        how = "as optax.adam(1e-3) and sl.adamw(1e-3, steps=1000) make one"
    raise TypeError(f"optimizer is {kind(optimizer)}, not an Optax transformation: {how}")


def require_state(state: Any, like: Any) -> None:
    """Raise TypeError, with the way to one, for what is no state.

    Args:
        state: what a user gave.
        like: the trainer's abstract state.
    """
    if isinstance(state, type(like)):
        return
    if isinstance(state, Mapping):
        how = "parameters alone are no state: trainer.init(params) makes one of them, with a new optimizer's"
    elif isinstance(state, tuple):
        how = "trainer.step returns two things: state, metrics = trainer.step(state, batch)"
    elif isinstance(state, str):
        how = "sl.restore(path, trainer) reads one"
    else:
        how = "trainer.init() makes one, trainer.step and trainer.fit return one, sl.restore(path, trainer) reads one"
    raise TypeError(f"state is {kind(state)}, not a sl.TrainState: {how}")


def require_same_model(state: Any, like: Any) -> None:
    """Raise ValueError for a state whose parameters are those of another model; arguments as of `require_state`."""
    leaves, tree = jax.tree.flatten(state.params)
    others, expected = jax.tree.flatten(like.params)
    if tree == expected and all(np.shape(x) == y.shape for x, y in zip(leaves, others, strict=True)):
        return
    given, wanted = ({path: np.shape(leaf) for path, leaf in flatten(x.params).items()} for x in (state, like))
    problems = [f"{path}: missing" for path in wanted if path not in given]
    problems += [f"{path}: not expected" for path in given if path not in wanted]
    problems += [f"{path}: {given[path]}, expected {x}" for path, x in wanted.items() if given.get(path, x) != x]
    more = " ..." * (len(problems) > _MOST)
    raise ValueError(
        f"this state is of another model than the trainer: {'; '.join(problems[:_MOST])}{more}. A trainer goes on with "
        "states of its own init, step and fit, or of sl.restore(path, trainer)"
    )


def require_trainer(trainer: Any) -> None:
    """Raise TypeError for what is no trainer."""
    if not (hasattr(trainer, "abstract_state") and hasattr(trainer, "program")):
        raise TypeError(f"trainer is {kind(trainer)}, not a sl.Trainer: sl.Trainer(config, layout) makes one")
