"""Going on with a run: what a checkpoint says of its run, what has changed since, and the very next batch."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from shardlm.train.run_record import OWN, digest_of

if TYPE_CHECKING:
    from shardlm.train.trainer import Trainer


def metadata(trainer: "Trainer", step: int, run: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint of `step` carries beside the arrays; `run` is of `run_record.describe_run`, and more."""
    return {
        **trainer.program.identity(),
        "layout": str(trainer.layout),
        "seed": trainer.seed,
        "next_batch": step,
        "run": dict(run),
        "versions": {name: _version(name) for name in ("shardlm", "jax", "flax", "optax", "orbax-checkpoint")},
    }


ACCEPT = "accept_changes=True (--accept-changes)"
_ORDER = {"digest": "content", "rows": "rows in an epoch", "sequence": "sequence", "seed": "seed of their order"}


@dataclass
class Resumption:
    """How a run goes on from a checkpoint.

    Attributes:
        lines: what to say: where from, and each difference.
        refused: differences with which the run is another one, so that going on needs an explicit word.
        first_row: the next row of `shardlm.data.Batches`, counted from the first of the first epoch; None: as many as
            the steps made have used.
        saved: what the checkpoint says of its run; empty where it says nothing.
        same: whether the last batch that was used is still there, so that the batches are those of the run before.
    """

    lines: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    first_row: int | None = None
    saved: Mapping[str, Any] = field(default_factory=dict)
    same: bool = False

    def check(self, accepted: bool) -> None:
        """Raise ValueError for what is refused, unless the user accepts it; then it is one more thing to say."""
        if self.refused and not accepted:
            raise ValueError(
                "fit: this run cannot go on as it began:\n  - "
                + "\n  - ".join(self.refused)
                + f"\nTo go on all the same, say {ACCEPT}; to start anew, choose another checkpoint_dir"
            )
        self.lines += [f"  {line}" for line in self.refused]
        self.refused = []


def changes(trainer: "Trainer", metadata: Mapping[str, Any], now: Mapping[str, Any], where: str) -> Resumption:
    """What resuming from a checkpoint with `metadata` changes.

    Args:
        trainer, metadata, where: the run that goes on, and what it goes on from.
        now: `run_record.describe_run` of the run.

    Raises:
        ValueError: the checkpoint is of a model that computes something else, listing each difference.
    """
    legal = trainer.program.changes(metadata, where)
    legal |= {"layout": (metadata.get("layout"), str(trainer.layout)), "seed": (metadata.get("seed"), trainer.seed)}
    result = Resumption([f"resumed from {where}"], saved=metadata.get("run") or {})
    before = result.saved
    if not before:
        result.lines += _differences(legal)
        result.lines.append(
            "  it does not say with which batches, steps and optimizer it was made: whether they are the same is not "
            "known"
        )
        return result
    legal |= {name: (before.get(name), now[name]) for name in ("processes", "steps")}
    result.lines += _differences(legal) + _optimizers(before.get("optimizer"), now["optimizer"], metadata)
    if None not in (held := (before.get("held_out"), now["held_out"])) and held[0] != held[1]:
        result.lines.append("  held-out batches are others: their losses cannot be compared with those before")
    _compare_batches(result, before.get("batches") or {"kind": OWN}, now["batches"])
    return result


def _compare_batches(result: Resumption, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    position = before.get("position")
    if before["kind"] != now["kind"]:
        result.refused.append(
            f"batches were {_kind(before)}, and are {_kind(now)}: which of them the run has used cannot be known"
        )
        result.first_row = 0
        return
    if now["kind"] == OWN:
        return
    different = [name for name in _ORDER if before.get(name) != now.get(name)]
    if different:
        what = "; ".join(
            f"{_ORDER[name]} {'differs' if name == 'digest' else f'was {before.get(name)}, is now {now.get(name)}'}"
            for name in different
        )
        result.refused.append(
            f"the data are others, or in another order ({what}): rows used before may come again, or be left out. If "
            "it goes on, it begins with their first row"
        )
        result.first_row = 0
        return
    result.first_row = position
    if before.get("batch_size") != now["batch_size"]:
        result.lines.append(
            f"  batch size was {before.get('batch_size')} rows, is now {now['batch_size']}: the run goes on with row "
            f"{position}, the very next"
        )


def _kind(batches: Mapping[str, Any]) -> str:
    return f"{OWN} batches" if batches["kind"] == OWN else f"shardlm.data.{batches['kind']}"


def _differences(legal: Mapping[str, tuple[Any, Any]]) -> list[str]:
    return [f"  {what} was {before}, is now {after}" for what, (before, after) in legal.items() if before != after]


def _optimizers(before: Any, now: Any, metadata: Mapping[str, Any]) -> list[str]:
    """A line where the optimizer computes something else: its numbers, of which those of a schedule follow `steps`."""
    if not before or not now:
        return ["  whether the optimizer's settings are the same is not known"]
    if all(before.get(name) == now[name] for name in ("digest", "start")):
        return []
    lost, new = ([n for n in a["numbers"] if n not in b["numbers"]] for a, b in ((before, now), (now, before)))
    versions = metadata.get("versions", {})
    other = [name for name in ("jax", "optax") if versions.get(name) != _version(name)]
    if other and not lost and not new:
        return []  # another way to write the same
    numbers = f": {', '.join(lost) or 'no number'} was in it, and {', '.join(new) or 'no other'} is now"
    kept = "" if before.get("start") == now["start"] else ". What its state holds stays as it was saved"
    return [f"  optimizer computes something else (rates, decays, or the steps of a schedule){numbers}{kept}"]


def compare_shapes(now: Mapping[str, Any], first: int, resumption: Resumption) -> None:
    """Note what differs between a batch of the run before and the first batch of this one.

    Batches whose number of rows has changed within the run before are taken to be what they were.

    Args:
        now: shapes of the global batch by name.
        first: the step of this batch.
        resumption: takes it.
    """
    before, counts = resumption.saved.get("batch"), resumption.saved.get("row_counts") or []
    if not before or before == now:
        return
    rows = [next(iter(shapes.values()))[0] for shapes in (before, now)]
    if rows[1] not in counts and len(counts) == 1 and not resumption.same:
        resumption.refused.append(
            f"batches had {rows[0]} rows, and have {rows[1]}: of {OWN} batches only the number is known, so the run "
            f"goes on with batch {first - 1} (from 0), and rows are left out or come again. shardlm.data.Batches goes "
            "on with the very next row"
        )
    lost, new = ({k: tuple(v[1:]) for k, v in shapes.items()} for shapes in (before, now))
    lines = [f"  shape of {k} was {lost.get(k)}, is now {new.get(k)}" for k in lost | new if lost.get(k) != new.get(k)]
    resumption.lines += lines


def iterate(batches: Any, start: int, resumption: Resumption | None = None) -> Iterator[Mapping[str, Any]]:
    """The batches from step `start` on, so that a resumed run continues with the very next one.

    Args:
        batches: `shardlm.data.Batches`, which goes on with `resumption.first_row`; something else with
            `iterate(start)`; something indexed by step; or an iterable, whose first `start` items are then taken and
            dropped.
        start: updates made so far.
        resumption: where the run goes on from a checkpoint. A line is added to it if the last batch that was used,
            where it is there to be looked at, is not the one that was saved.
    """
    row = None if resumption is None else resumption.first_row
    if row is not None and hasattr(batches, "from_row"):
        return iter(batches.from_row(row))
    if hasattr(batches, "iterate"):
        return iter(batches.iterate(start))
    last = None
    if hasattr(batches, "__getitem__"):
        steps = range(start, len(batches)) if hasattr(batches, "__len__") else itertools.count(start)
        if resumption is not None and resumption.saved.get("last_batch") and 0 < start <= _length(batches, start):
            last = batches[start - 1]
        stream = (batches[step] for step in steps)
    else:
        stream = iter(batches)  # not closed by us: a generator of the caller's stays open
        for used in itertools.islice(stream, start):
            last = used
        stream = itertools.islice(stream, 0, None)
    if resumption is not None and last is not None:
        saved, found = resumption.saved.get("last_batch"), digest_of(last)
        resumption.same = saved is not None and saved == found
        if None not in (saved, found) and saved != found:
            resumption.lines.append(
                f"  batch {start - 1} (from 0), the last that was used, is not what it was: the batches are others, "
                "or in another order"
            )
    return stream


def _length(batches: Any, otherwise: int) -> int:
    return len(batches) if hasattr(batches, "__len__") else otherwise


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # shardlm run from its sources
        return "not installed"
