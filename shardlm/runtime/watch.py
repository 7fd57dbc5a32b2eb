"""Says when a step takes far longer than those before it, with what every thread does; and ends it if asked to."""

import faulthandler
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median_low
from typing import IO, Self

HANG = "SHARDLM_HANG"
ABORT = "SHARDLM_HANG_ABORT"
FACTOR, LEAST = 10.0, 60.0
FIRST = 30.0  # times `LEAST` for what has no history: compilation may take long
_REMEMBERED = 20  # durations of each kind

Hints = Callable[[], str]


class Watch:
    """Watches the phases of a loop from a thread of its own. Use it in a `with` statement.

    A phase that takes more than `factor` times the median of its last 20, and more than `least` seconds, is reported
    on the standard error with the Python stacks of all threads; again each time it has taken twice as long. Every
    process watches itself: where one is late, all others report the collective that they wait in.

    Args:
        name: of this process, for the report.
        factor, least: see above; default `SHARDLM_HANG`, as in "10:60".
        abort: end the process after the report, by SIGABRT; default whether `SHARDLM_HANG_ABORT` is set to 1.
        stream: where reports go, with a file descriptor; default the standard error.

    Example:
        >>> with Watch("process 0 of 2") as watch:
        ...     for step in range(1, 101):
        ...         with watch.phase("step", step):
        ...             state, metrics = trainer.step(state, batches[step])
    """

    def __init__(
        self,
        name: str,
        *,
        factor: float | None = None,
        least: float | None = None,
        abort: bool | None = None,
        stream: IO[str] | None = None,
        end: Callable[[], None] = os.abort,
    ):
        given = limits(os.environ)
        self._name, self._stream, self._end = name, stream, end
        self._factor = given[0] if factor is None else factor
        self._least = given[1] if least is None else least
        self._abort = os.environ.get(ABORT) == "1" if abort is None else abort
        self._lock = threading.Lock()
        self._now: tuple[str, int, float, Hints | None] | None = None  # kind, step, since when
        self._limit = 0.0
        self._history: dict[str, deque[float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shardlm-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    @contextmanager
    def phase(self, kind: str, step: int, hints: Hints | None = None) -> Iterator[None]:
        """What is done in this block, and at which step; its duration is remembered for the next of its kind.

        `hints` is called for what to add to a report.
        """
        past = self._history.setdefault(kind, deque(maxlen=_REMEMBERED))
        began = time.monotonic()
        with self._lock:
            self._now = (kind, step, began, hints)
            self._limit = max(self._least, self._factor * median_low(past)) if past else FIRST * self._least
        try:
            yield
        finally:
            with self._lock:
                self._now = None
        past.append(time.monotonic() - began)

    def _run(self) -> None:
        while not self._stop.wait(min(1.0, self._least / 4)):
            with self._lock:
                now, late = self._now, self._now is not None and time.monotonic() - self._now[2] > self._limit
                if late:
                    self._limit *= 2
            if now is not None and late:
                self._report(*now)
                if self._abort:
                    self._end()

    def _report(self, kind: str, step: int, began: float, hints: Hints | None) -> None:
        stream = self._stream or sys.stderr
        past = self._history[kind]
        usual = (
            f"the median of the last {len(past)} is {median_low(past):.3g} s" if past else "it is the first of its kind"
        )
        print(
            f"{self._name} has been in its {kind} of step {step} for {time.monotonic() - began:.0f} s; {usual}."
            f"{' It is ended now.' if self._abort else ''} Its threads:",
            file=stream,
            flush=True,
        )
        faulthandler.dump_traceback(file=stream, all_threads=True)
        if hints is not None:
            print(hints(), file=stream, flush=True)


def limits(environment: Mapping[str, str]) -> tuple[float, float]:
    """Factor and seconds from `SHARDLM_HANG`, or their defaults. Raises ValueError."""
    text = environment.get(HANG)
    if not text:
        return FACTOR, LEAST
    try:
        factor, least = (float(part) for part in text.split(":"))
    except ValueError:
        factor = least = 0.0
    if not (factor >= 1 and 0 < least < float("inf")):
        raise ValueError(f"{HANG}={text!r} is not FACTOR:SECONDS, as in 10:60 (at least 1, and more than 0)")
    return factor, least
