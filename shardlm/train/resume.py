"""Going on with a run: what a checkpoint says of its run, what may have changed since, and the very next batch."""

import itertools
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardlm.train.trainer import Trainer


def metadata(trainer: "Trainer", step: int) -> dict[str, Any]:
    """What a checkpoint of `step` carries beside the arrays."""
    return {
        **trainer.program.identity(),
        "layout": str(trainer.layout),
        "seed": trainer.seed,
        "next_batch": step,
        "versions": {name: _version(name) for name in ("shardlm", "jax", "flax", "optax", "orbax-checkpoint")},
    }


def changes(trainer: "Trainer", metadata: Mapping[str, Any], where: str) -> list[str]:
    """Lines that say what resuming from a checkpoint with `metadata` changes.

    Raises:
        ValueError: the checkpoint is of a model that computes something else, listing each difference.
    """
    legal = trainer.program.changes(metadata, where)
    legal |= {"layout": (metadata.get("layout"), str(trainer.layout)), "seed": (metadata.get("seed"), trainer.seed)}
    lines = [f"  {what} was {before}, is now {after}" for what, (before, after) in legal.items() if before != after]
    return [f"resumed from {where}", *lines]


def iterate(batches: Any, start: int) -> Iterator[Mapping[str, Any]]:
    """The batches from step `start` on, so that a resumed run continues with the very next one.

    Args:
        batches: something with `iterate(start)` (as `shardlm.data.Batches`), something indexed by step, or an iterable,
            whose first `start` items are then taken and dropped.
        start: updates made so far.
    """
    if hasattr(batches, "iterate"):
        return iter(batches.iterate(start))
    if hasattr(batches, "__getitem__"):
        steps = range(start, len(batches)) if hasattr(batches, "__len__") else itertools.count(start)
        return (batches[step] for step in steps)
    return itertools.islice(batches, start, None)  # which cannot be closed: a generator of the caller's stays open


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # shardlm run from its sources
        return "not installed"
