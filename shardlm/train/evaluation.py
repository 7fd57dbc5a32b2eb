"""The mean loss over batches that are not trained on."""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from shardlm.train import state as states
from shardlm.train.state import TrainState

if TYPE_CHECKING:
    from shardlm.train.trainer import Trainer


def evaluate(trainer: "Trainer", state: TrainState, batches: Iterable[Any]) -> dict[str, float]:
    """`Trainer.evaluate`."""
    states.check_usable(state, trainer.abstract_state)
    if problem := not_batches("batches", batches):
        raise ValueError(f"evaluate: {problem}")
    placed = (trainer.place(batch, may_be_empty=True) for batch in batches)
    sums = [trainer._run(trainer._evaluate, state.params, batch, state.variables) for batch in placed]
    total, weight = (math.fsum(float(x) for x in column) for column in zip(*sums, strict=True)) if sums else (0.0, 0.0)
    if weight == 0:
        raise ValueError(f"nothing to evaluate: {len(sums)} batches with a total weight of 0")
    return trainer.program.evaluation(total / weight, weight)


def not_batches(name: str, batches: Any) -> str:
    """What is wrong with batches to evaluate on, in words; empty where nothing is to be seen."""
    kind = type(batches).__name__
    if isinstance(batches, Mapping):
        return f"{name} is one batch: give a list of batches"
    if isinstance(batches, str | bytes) or not any(hasattr(batches, a) for a in ("__iter__", "__getitem__")):
        return f"{name} is a {kind}: give a list of batches"
    if hasattr(batches, "iterate"):
        return f"{name} is a {kind}, which has no end: give a list, or data.held_out"
    return ""
