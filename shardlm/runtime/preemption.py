"""SIGTERM, which schedulers send before they take a machine away: all processes stop after the same step."""

import signal
import threading
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class Preempted(SystemExit):
    """A run was told to end by SIGTERM and has saved its step; not caught, it ends the process with status 0."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(status)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Preemption:
    """Whether the run is to end after this step. Use it in a `with` statement.

    With several processes JAX's coordination service takes SIGTERM to any of them, and has all agree on a step. Alone,
    the signal is held back from here on until the block ends.
    """

    def __init__(self) -> None:
        self._several = jax.distributed.is_initialized()
        self._received = False
        self._before: Any = None

    def __enter__(self) -> Self:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if not self._several and in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._before = signal.signal(signal.SIGTERM, self._hold)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            if self._received and error[0] is None:  # it came after the last step
                signal.raise_signal(signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether `step` is the last one; called after every step, with the same numbers on all processes."""
        return multihost_utils.reached_preemption_sync_point(step) if self._several else self._received

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._received = True
