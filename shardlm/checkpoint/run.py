"""The checkpoints of a run: one for each step, saved in the background."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardlm.runtime.folders import discard, sweep

from .fields import finite
from .files import read_metadata, restore
from .lock import Lock
from .processes import SaveError, errors_of_all, exchange, is_first
from .record import absolute, known_steps, read_record, steps_in
from .retention import Retention
from .rows import Rows
from .write import Write, checked

ASIDE = ".damaged"  # what a folder's name ends in that `set_aside` has renamed


class Checkpoints:
    """The checkpoints of a run: one folder per step in `directory`, of which some stay.

    `save` returns as soon as the arrays have left the devices, and goes on in the background; every other method waits
    for it first. A program must close() before it ends, or it does not learn of a save that failed: use `with`. After a
    kill at any moment `latest` is complete, for a step gets its name last; what is half-written is removed by the next
    run's first save. One run at a time may save to a directory, from `claim` or its first save on until it closes or
    dies; any number may read. In a run of several processes all of them call every method.

    Args:
        directory: created by the first save.
        keep: how many of the newest checkpoints stay; None keeps all.
        keep_every: those of steps that this divides stay too, for good.
        keep_best: so many with the lowest loss stay too, of those saved with one.

    Example:
        >>> with Checkpoints("runs/a", keep=3, keep_every=10_000) as checkpoints:
        ...     if (step := checkpoints.latest()) is not None:
        ...         state = checkpoints.restore(step, trainer)
        ...     checkpoints.save(int(state.step), state, {"tokens_seen": 1_000_000})
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int | None = 3,
        keep_every: int | None = None,
        keep_best: int | None = None,
    ):
        self.retention = Retention(keep, keep_every, keep_best)
        self.directory = absolute(directory, "checkpoints")
        self._running: Write | None = None
        self._lock: Lock | None = None
        self._claimed = False

    def claim(self) -> None:
        """Makes the directory this run's to save to, and removes what killed runs have left unfinished in it.

        Raises:
            SaveError: it cannot be written to, or another run has claimed it.
        """
        if self._claimed:
            return
        error = None
        if is_first():
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._lock = Lock(self.directory)
                self._sweep()
            except OSError as caught:
                error = caught
        if text := errors_of_all(error):
            self._release()
            raise SaveError(f"cannot save to {self.directory}: {text}") from error
        self._claimed = True

    def save(
        self,
        step: int,
        state: Any,
        metadata: dict | None = None,
        *,
        loss: float | None = None,
        texts: Mapping[str, bytes] | None = None,
    ) -> None:
        """Starts to save, once the previous save has ended; `state` may be donated as soon as this returns.

        Args:
            step: beyond the latest one.
            state, metadata: see `shardlm.save`.
            loss: what `keep_best` compares.
            texts: files of the tokenizer, by name.

        Raises:
            ValueError: `step` is not beyond the latest one; `metadata` is not JSON.
            TypeError: a leaf of `state` is not a `jax.Array`.
            SaveError: this save cannot be started, or the previous one failed. After either the next may be tried.
        """
        step = int(step)
        self.claim()  # before the look, or another run could save what is not seen
        if step <= max(self.steps(), default=-1):
            where = f"{self.directory}{known_steps(self.directory)}"
            raise ValueError(f"cannot save step {step} to {where}: steps only go up; after going back use another")
        arrays, record = checked(state, metadata)
        record |= {"step": step, "loss": loss}
        self._running = Write(self.directory / str(step), arrays, record, after=self._remove_surplus, texts=texts)

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, ascending; any of them may turn out to be damaged."""
        self.wait()
        return exchange(steps_in(self.directory))[0]

    def latest(self) -> int | None:
        """Returns the last step that has a checkpoint; None if there is none."""
        return max(self.steps(), default=None)

    def restore(
        self,
        step: int,
        target: Any,
        *,
        only: str | None = None,
        mapping: Mapping[str, str | None] | None = None,
        ignore: Sequence[str] = (),
        rows: Rows | None = None,
    ) -> Any:
        """Loads the checkpoint of `step`, as `shardlm.restore` does."""
        self.wait()
        return restore(self.directory / str(step), target, only=only, mapping=mapping, ignore=ignore, rows=rows)

    def metadata(self, step: int) -> dict:
        """Returns the metadata saved with `step`, as `read_metadata` does."""
        self.wait()
        return read_metadata(self.directory / str(step))

    def set_aside(self, step: int) -> str:
        """Renames the folder of a damaged `step`, so that the run may come to it again; returns the new name."""
        claimed = self._claimed
        self.claim()
        path, error, name = self.directory / str(step), None, ""
        try:
            if is_first():
                number = 1
                while os.path.lexists(to := self.directory / f"{step}{ASIDE}{'' if number == 1 else f'-{number}'}"):
                    number += 1
                path.rename(to)
                name = to.name
        except OSError as caught:
            error = caught
        if not claimed:
            self._release()
        if text := errors_of_all(error):
            raise SaveError(f"the damaged {path} could not be renamed: {text}") from error
        return exchange(name)[0]

    def wait(self) -> None:
        """Returns when no save is running. Raises SaveError if it failed."""
        running, self._running = self._running, None
        if running is not None:
            running.wait()

    def close(self) -> None:
        """Waits for a running save, and lets other runs save here."""
        try:
            self.wait()
        finally:
            self._release()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception) -> None:
        if kind is None:
            self.close()
            return
        # The other processes may be elsewhere, as the error may be this one's alone: they are told nothing.
        try:
            if self._running is not None:
                self._running.join()
        finally:
            self._running = None
            self._release()

    def _remove_surplus(self) -> None:
        """Removes what is not to stay. What is seen to be damaged stays, and is not counted."""
        if self.retention.keep is None:
            return
        for step in surplus(self.directory, self.retention):
            with contextlib.suppress(OSError):  # a full or read-only disk is said by the save that meets it
                discard(self.directory / str(step))

    def _release(self) -> None:
        if self._lock is not None:
            # Of a save that failed; where this fails, the next run's claim removes it.
            with contextlib.suppress(OSError):
                self._sweep()
            self._lock.release()
        self._lock, self._claimed = None, False

    def _sweep(self) -> None:
        sweep(self.directory, str.isdecimal)


def surplus(directory: Path, retention: Retention) -> list[int]:
    """Steps of a run's folder that are not to stay, ascending.

    What is damaged stays, and is not counted. What a link that stays leads to stays as well.
    """
    losses: dict[int, float | None] = {}
    for step in steps_in(directory):
        with contextlib.suppress(ValueError, OSError):
            loss = read_record(directory / str(step)).get("loss")
            losses[step] = loss if finite(loss) else None
    gone = retention.surplus(losses)
    needed = {(directory / str(step)).resolve() for step in losses.keys() - set(gone)}
    return [
        step for step in gone if (directory / str(step)).is_symlink() or directory.resolve() / str(step) not in needed
    ]
