"""The checkpoints of `fit`: the newest good one to start from, and saves that may fail without ending the run."""

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from shardlm.checkpoint import Checkpoints, CheckpointWarning, DamagedCheckpoint, SaveError
from shardlm.checkpoint.fields import finite
from shardlm.runtime.saved import tell_saved
from shardlm.runtime.strangers import printable
from shardlm.train import resume
from shardlm.train.run_record import is_run
from shardlm.train.state import TrainState

if TYPE_CHECKING:
    from shardlm.train.trainer import Trainer


def claim(checkpoints: Checkpoints, steps: int) -> bool:
    """Make the folder this run's before anything in it is looked at, so that no other run changes what is seen.

    Returns:
        Whether it is; False where it cannot be and need not be, as the run of `steps` is complete.

    Raises:
        SaveError: it cannot be, and is to be saved to.
    """
    try:
        checkpoints.claim()
    except SaveError:
        if (checkpoints.latest() or 0) < steps:
            raise
        return False
    return True


def newest_good(
    trainer: "Trainer", checkpoints: Checkpoints, run: Mapping[str, Any], accept_changes: bool
) -> tuple[TrainState, dict[str, Any], resume.Resumption]:
    """The newest checkpoint that is whole, its metadata, and what resuming changes.

    Args:
        trainer, checkpoints: of the run.
        run: `run_record.describe_run` of it.
        accept_changes: whether to go on where the batches are others.

    Damaged ones that are newer are renamed, with a warning.

    Raises:
        DamagedCheckpoint: there is none that is whole.
        ValueError: the newest whole one is of another model, or of other batches.
    """
    damaged: list[tuple[int, DamagedCheckpoint]] = []
    for step in reversed(checkpoints.steps()):
        where = f"{checkpoints.directory}, step {step}"
        try:
            metadata = checkpoints.metadata(step)
            _check(metadata, where)
            resumption = resume.changes(trainer, metadata, run, where)
            resumption.check(accept_changes)
            resumption.lines = [printable(line, 500) for line in resumption.lines]
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
            resumption.lines.append(text)
        return state, metadata, resumption
    raise DamagedCheckpoint(
        "\n  ".join([f"no checkpoint in {checkpoints.directory} is whole:", *(str(error) for _, error in damaged)])
        + "\nTo start anew, choose another checkpoint_dir or remove this one"
    )


def _check(metadata: dict[str, Any], where: str) -> None:
    """Raise ValueError where what a run reads of a checkpoint's metadata is of a wrong kind."""
    kinds = {"config": dict, "layout": str, "versions": dict, "module": str}
    wrong = [name for name, kind in kinds.items() if name in metadata and not isinstance(metadata[name], kind)]
    if "tokens" in metadata and not (finite(metadata["tokens"]) and metadata["tokens"] >= 0):
        wrong.append("tokens")
    if metadata.get("run") and not is_run(metadata["run"]):
        wrong.append("run")
    if wrong:
        told = ", ".join(f"{name}={printable(repr(metadata[name]), 60)}" for name in wrong)
        raise ValueError(f"the checkpoint of {where} was not saved by fit: its metadata has {told}")


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
        if started is not None:
            self.saved = started
            tell_saved(started)

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
