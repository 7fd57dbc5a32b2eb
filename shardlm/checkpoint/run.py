"""The checkpoints of a run: one for each step, saved in the background."""

import contextlib
import os
from typing import Any, cast

import orbax.checkpoint as ocp

from .files import absolute, known_steps, read_metadata, reason, restore, save_args, steps_in
from .rows import Rows


class Checkpoints:
    """The checkpoints of a run: one folder per step in `directory`, of which the last `keep` stay.

    `save` returns as soon as the arrays have left the devices, and goes on in the background; every other method waits
    for it first. A program must close() before it ends, or it loses a save still running: use `with`. After a kill at
    any moment `latest` is complete, for a step gets its name last; what is half-written is removed by the next run's
    first save. One run at a time may save to a directory; any number may read.

    Args:
        directory: created by the first save.
        keep: how many of the newest checkpoints stay; None keeps all.

    Example:
        >>> with Checkpoints("runs/a", keep=3) as checkpoints:
        ...     if (step := checkpoints.latest()) is not None:
        ...         state = checkpoints.restore(step, trainer)
        ...     checkpoints.save(int(state.step), state, {"tokens_seen": 1_000_000})
    """

    def __init__(self, directory: str | os.PathLike, keep: int | None = 3):
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep}: expected how many checkpoints stay, at least 1, or None for all")
        self.directory = absolute(directory)
        self.keep = keep
        self._manager: ocp.CheckpointManager | None = None

    def save(self, step: int, state: Any, metadata: dict | None = None) -> None:
        """Starts to save, once the previous save has ended; `state` may be donated as soon as this returns.

        Raises:
            ValueError: `step` is not beyond the latest one; `metadata` is not JSON.
            TypeError: a leaf of `state` is not a `jax.Array`.
            RuntimeError: this save cannot be started, or the previous one failed.
        """
        step = int(step)
        if step <= max(self.steps(), default=-1):
            where = f"{self.directory}{known_steps(self.directory)}"
            raise ValueError(f"cannot save step {step} to {where}: steps only go up; after going back use another")
        args = save_args(state, metadata)
        # Orbax's classic interface and not v1, which is still under `orbax.checkpoint.experimental`, where module paths
        # move; both stand on the same code. Opened here and not before, because it removes unfinished saves, which to a
        # mere reader may be another run's work.
        policy = ocp.checkpoint_managers.LatestN(self.keep)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True)
        self._manager = self._manager or ocp.CheckpointManager(self.directory, options=options)
        with self._errors_of_saving():
            self._manager.save(step, args=args, force=True)

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, ascending."""
        self.wait()
        return steps_in(self.directory)

    def latest(self) -> int | None:
        """Returns the last step that has a checkpoint, always a complete one; None if there is none."""
        return max(self.steps(), default=None)

    def restore(self, step: int, target: Any, *, rows: Rows | None = None) -> Any:
        """Loads the checkpoint of `step`, as `shardlm.restore` does."""
        self.wait()
        return restore(self.directory / str(step), target, rows=rows)

    def metadata(self, step: int) -> dict:
        """Returns the metadata saved with `step`, as `read_metadata` does."""
        self.wait()
        return read_metadata(self.directory / str(step))

    def wait(self) -> None:
        """Returns when no save is running. Raises RuntimeError if it failed."""
        if self._manager is not None:
            with self._errors_of_saving():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for a running save and ends the threads behind it."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @contextlib.contextmanager
    def _errors_of_saving(self):
        try:
            yield
        except Exception as error:
            manager, self._manager = self._manager, None
            with contextlib.suppress(Exception):  # it may raise the same once more
                cast(ocp.CheckpointManager, manager).close()
            raise RuntimeError(f"a save to {self.directory} failed: {reason(error)}") from error
