"""From a failed comparison to a place and a diagnosis."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from shardlm.models.config import TransformerConfig
from shardlm.train.state import TrainState
from shardlm.train.trainer import Trainer
from shardlm.verification import as_if, locate, symptoms
from shardlm.verification.compare import Difference, leaves, worst
from shardlm.verification.copies import Copies
from shardlm.verification.diagnosis import Diagnosis, Place
from shardlm.verification.groups import Groups
from shardlm.verification.symptoms import Suspect
from shardlm.verification.tolerance import Arithmetic


@dataclass(frozen=True)
class Context:
    """What an explanation can run again."""

    trainer: Trainer
    reference: Trainer
    start: TrainState
    batch: dict[str, np.ndarray]
    arithmetic: Arithmetic


def gradients(
    context: Context, expected: dict[str, Any], found: dict[str, Any], differences: list[Difference]
) -> tuple[Place, Diagnosis]:
    """Why a loss or gradients differ: what the forward says first, then what backward does."""
    trainer, base = context.trainer, context.arithmetic.step()
    ours = isinstance(getattr(trainer, "config", None), TransformerConfig)
    if ours:
        runs = locate.Forwards(trainer, context.reference, context.start, context.batch, context.arithmetic)
        part = locate.forward(runs)
        if part is not None:
            diagnosis = symptoms.look(part.suspect) or as_if.explain(runs, part)
            return part.place, _settle(part.suspect, diagnosis)
    if any(d.fails for d in differences if d.quantity == "loss"):
        agree = "each token's loss agrees" if ours else "the module's own forward is not looked into"
        place = Place("forward", "loss", None, f"the loss, the sum over the batch divided by its weight; {agree}")
        copies = Copies.of(found["loss"], trainer.mesh)
        s = Suspect("the loss", np.asarray(expected["loss"]), copies, (), locate.summed_over(trainer), base)
        leaf = layer = None
    else:
        failed = [d for d in differences if d.quantity == "gradients"]
        if ours:
            leaf, layer, place = locate.backward(expected["gradients"], found["gradients"], failed, trainer)
        else:
            leaf, layer = worst(failed).leaf, None
            place = Place("backward", leaf, None, f"the gradient of {leaf}, the furthest off; the loss agrees")
        s = locate.gradient_suspect(expected["gradients"], found["gradients"], leaf, layer, trainer, base)
    diagnosis = symptoms.look(s)
    if diagnosis is None and ours:
        weights = context.batch.get("weights", np.ones(context.batch["tokens"].shape, np.float32))
        groups = Groups(trainer, context.reference, context.start, context.batch | {"weights": weights})
        diagnosis = groups.explain(s, leaf, layer)
    return place, _settle(s, diagnosis)


def update(
    trainer: Trainer,
    before: TrainState,
    expected: TrainState,
    found: TrainState,
    differences: list[Difference],
    step: int,
) -> tuple[Place, Diagnosis]:
    """Why the state after an update differs, though loss and gradients were right before it."""
    failed = [d for d in differences if d.fails]
    order = ("optimizer state", "parameters", "loss", "gradients")  # what follows from what
    first = min(failed, key=lambda d: order.index(d.quantity))
    if first.quantity not in order[:2]:
        text = f"the loss before update {step}, with the state before it right"
        return Place("update", first.leaf, None, text), Diagnosis("unknown", "the loss is wrong from a right state")
    part = "opt_state" if first.quantity == "optimizer state" else "params"
    rest = "" if part == "opt_state" else "; the optimizer state agrees"
    place = Place(
        "update", first.leaf, None, f"{first.quantity} {first.leaf} after update {step}; gradients agree{rest}"
    )
    wanted = leaves(getattr(expected, part))[first.leaf]
    copies = Copies.of(leaves(getattr(found, part))[first.leaf], trainer.mesh)
    dims = locate.dims_of(trainer, first.leaf, wanted.shape)
    s = Suspect(f"{first.quantity} {first.leaf}", wanted, copies, dims, locate.summed_over(trainer), first.tolerance)
    old = leaves(getattr(before, part))[first.leaf]
    stale = [p for p in copies.parts if not s.close(wanted[p.index], p.data)]
    if stale and all(s.close(old[p.index], p.data) for p in stale):
        axis = symptoms.guilty(s)
        text = f"{s.what} still has the values from before the update{symptoms.scope(s)}"
        return place, Diagnosis("update", text, axis)
    diagnosis = symptoms.look(s)
    if diagnosis is None or diagnosis.kind == "replicas":
        diagnosis = symptoms.rounding(s) or Diagnosis(
            "update", f"{s.what} is wrong where the gradient is right: {symptoms.statistics(s)}", symptoms.guilty(s)
        )
    return place, diagnosis


def _settle(s: Suspect, diagnosis: Diagnosis | None) -> Diagnosis:
    if diagnosis is not None:
        return diagnosis
    small = symptoms.rounding(s)
    return small or Diagnosis("unknown", f"{s.what}: {symptoms.statistics(s)}", symptoms.guilty(s))
