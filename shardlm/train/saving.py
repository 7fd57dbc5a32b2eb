"""The checkpoints of `fit`: the newest good one to start from, and saves that may fail without ending the run."""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shardlm.checkpoint import Checkpoints, DamagedCheckpoint, SaveError
from shardlm.train import resume
from shardlm.train.state import TrainState

if TYPE_CHECKING:
    from shardlm.train.trainer import Trainer


class CheckpointWarning(UserWarning):
    """A checkpoint was damaged, or could not be saved, and the run goes on without it."""


def newest_good(trainer: "Trainer", checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any], list[str]]:
    """The newest checkpoint that is whole, its metadata, and lines that say what resuming changes.

    Damaged ones that are newer are renamed, with a warning.

    Raises:
        DamagedCheckpoint: there is none that is whole.
        ValueError: the newest whole one is of another model.
    """
    damaged: list[tuple[int, DamagedCheckpoint]] = []
    for step in reversed(checkpoints.steps()):
        where = f"{checkpoints.directory}, step {step}"
        try:
            metadata = checkpoints.metadata(step)
            lines = resume.changes(trainer, metadata, where)
            state = checkpoints.restore(step, trainer)
        except DamagedCheckpoint as error:
            damaged.append((step, error))
            continue
        for bad, error in damaged:
            try:
                name = f"It is now called {checkpoints.set_aside(bad)}."
            except SaveError as second:
                name = str(second)
            text = f"{error}. {name} The run goes on from step {step}"
            warnings.warn(text, CheckpointWarning, stacklevel=2)
            lines.append(text)
        return state, metadata, lines
    raise DamagedCheckpoint(
        "\n  ".join([f"no checkpoint in {checkpoints.directory} is whole:", *(str(error) for _, error in damaged)])
        + "\nTo start anew, choose another checkpoint_dir or remove this one"
    )


class Saver:
    """Saves in the background; a save that fails is said, and the next one tried.

    Args:
        checkpoints: where to.
        say: shows a line in the run's log.
        saved: the newest step that has a checkpoint.
        texts: files of the run's tokenizer, which every checkpoint keeps.

    Attributes:
        saved: the newest step known to have a checkpoint.
    """

    def __init__(self, checkpoints: Checkpoints, say: Callable[[str], None], saved: int | None, texts: Any = None):
        self.checkpoints, self.saved, self._texts = checkpoints, saved, texts
        self._say = say
        self._started: int | None = None

    def has(self, step: int) -> bool:
        """Whether this step is saved or on its way."""
        return step in (self.saved, self._started)

    def save(self, step: int, state: TrainState, metadata: dict[str, Any], loss: float | None) -> None:
        """Start to save, unless this step is saved or on its way."""
        if self.has(step):
            return
        try:
            self.wait()
        except SaveError as error:
            self._warn(error)
        try:
            self.checkpoints.save(step, state, metadata, loss=loss, texts=self._texts)
            self._started = step
        except SaveError as error:
            self._warn(error)

    def wait(self) -> None:
        """Return when what was started is saved. Raises SaveError if it is not."""
        started, self._started = self._started, None
        self.checkpoints.wait()
        self.saved = self.saved if started is None else started

    def finish(self, step: int, state: TrainState, metadata: dict[str, Any], loss: float | None) -> None:
        """Save the last state of a run, once more if that fails.

        Raises:
            SaveError: that failed too; its `state` is the one that is not saved.
        """
        self.save(step, state, metadata, loss)
        try:
            self.wait()
        except SaveError as error:
            self._warn(error)
        if self.saved == step:
            return
        try:
            self.checkpoints.save(step, state, metadata, loss=loss, texts=self._texts)
            self._started = step
            self.wait()
        except SaveError as error:
            error.state = state
            error.args = (f"{error}. This was the last step, tried twice: {self._newest()}", *error.args[1:])
            error.add_note("The error's attribute `state` holds what is not saved: sl.save(another_path, error.state)")
            raise

    def _warn(self, error: SaveError) -> None:
        text = f"{error}. The run goes on; {self._newest()}"
        warnings.warn(text, CheckpointWarning, stacklevel=3)
        self._say(text)

    def _newest(self) -> str:
        return "there is no checkpoint yet" if self.saved is None else f"the newest checkpoint is step {self.saved}"
