"""Ctrl-C between the steps of a run, and not in the middle of one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends; pressed a second time, it interrupts the block.

    A step donates its state: an interruption between that and the new state's assignment would leave neither.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is None:
        yield  # signals are delivered to the main thread, or handled outside of Python
        return
    held: list[int] = []

    def hold(number: int, frame: Any) -> None:
        if held:
            signal.default_int_handler(number, frame)
        held.append(number)

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)
