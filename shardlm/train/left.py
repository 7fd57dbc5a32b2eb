"""The state that a `fit` leaves when an error or Ctrl-C ends it: always there to go on with, checkpoints or not."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from shardlm._arguments import is_used_up
from shardlm.runtime.preemption import Preempted
from shardlm.train.state import TrainState

if TYPE_CHECKING:
    from shardlm.train.trainer import Trainer


def leave(
    trainer: "Trainer",
    state: TrainState,
    step: int,
    error: BaseException,
    kept: int | None,
    say: Callable[[str], None] | None,
) -> None:
    """Put the state into `trainer.state`, and say so in a note of the error and in the run's log.

    Args:
        trainer: of the run.
        state: after the last update.
        step: the number of that update.
        error: ends the run.
        kept: the step that a checkpoint has, or that the run began with; of the same step there is nothing to say.
        say: shows a line in the run's log; None where the log says already what became of the step.
    """
    if is_used_up(state):
        text = f"The step after {step} failed half-way and has used up the state: nothing is left of it."
    else:
        trainer.state = state
        text = (
            f"The state after step {step} is in trainer.state: go on with trainer.fit(..., state=trainer.state), or "
            "keep it with sl.save(path, trainer.state)."
        )
        # Nothing goes on from a loss that is no number, nor in a process that is told to end.
        if kept == step or isinstance(error, Preempted | ArithmeticError):
            return
    error.add_note(text)
    if say is not None:
        say(text)
