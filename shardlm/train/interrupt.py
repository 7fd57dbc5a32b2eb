"""Ctrl-C between the steps of a run, and not in the middle of one."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ONE_PRESS = 1.0  # seconds


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends; pressed again a second later or more, it interrupts the block.

    A step donates its state: an interruption between that and the new state's assignment would leave neither. Two
    signals at once are one Ctrl-C, which the terminal has sent to all of its processes, and a launcher has passed on.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) in (None, signal.SIG_IGN):
        # Signals are delivered to the main thread; they may be handled outside of Python, or ignored, as in a shell's
        # background jobs.
        yield
        return
    held: list[float] = []

    def hold(number: int, frame: Any) -> None:
        held.append(time.monotonic())
        if held[-1] - held[0] >= _ONE_PRESS:
            signal.default_int_handler(number, frame)

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)
