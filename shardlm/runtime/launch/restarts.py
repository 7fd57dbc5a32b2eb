"""What to do when an attempt has failed: start again, on how many processes, after how long, or give up."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from shardlm.runtime.processes import TRANSIENT

AT_ONCE = 120.0  # seconds; who fails sooner than this twice in the same way has not been unlucky
_LONGEST_WAIT = 60.0  # seconds


@dataclass(frozen=True)
class Failure:
    """How an attempt failed.

    Attributes:
        statuses: exit status of those that ended by themselves in failure, by number of the process; first the first.
        lines: the last lines of the first.
        seconds: how long the attempt ran.
        progressed: whether it saved a checkpoint of a later step than all attempts before it.
    """

    statuses: dict[int, int]
    lines: Sequence[str]
    seconds: float
    progressed: bool = False

    @property
    def was_killed(self) -> bool:
        """Whether it came from outside: by a signal, or by an error that asks for another try."""
        status = next(iter(self.statuses.values()))
        return status < 0 or status > 128 or status == TRANSIENT

    @property
    def signature(self) -> tuple[int, str]:
        """What two failures of the same kind have in common."""
        last = next((line for line in reversed(self.lines) if line.strip()), "")
        return next(iter(self.statuses.values())), re.sub(r"\d+", "#", last)


@dataclass
class Restarts:
    """Decides after each failed attempt.

    Args:
        allowed: how many restarts without progress; an attempt that saved a later checkpoint gives all of them back, so
            that a long run is not ended by faults that are days apart.
        minimum, count: fewest processes, and how many there are now.
        backoff: seconds before the first restart; each further one waits twice as long.
    """

    allowed: int
    minimum: int
    count: int
    backoff: float = 1.0
    made: int = 0
    _before: Failure | None = None
    _shrunk: bool = field(default=False, repr=False)

    def after(self, failure: Failure) -> str:
        """Returns why to give up; empty: start again, on `count` processes after `wait` seconds."""
        before, self._before = self._before, failure
        if failure.progressed:
            before, self.made, self._shrunk = None, 0, False
        does_not_fit = self._shrunk and not failure.was_killed and failure.seconds < AT_ONCE
        if does_not_fit and self.count > self.minimum:  # this number of processes is not one that the layout can use
            self.count -= 1
            return ""
        same = before is not None and before.signature == failure.signature
        at_once = before is not None and max(before.seconds, failure.seconds) < AT_ONCE
        if same and at_once and not failure.was_killed:
            return "it has failed in the same way twice, at once: starting it again would not help"
        if self.made >= self.allowed:
            without = f"{self.made} restarts without a new checkpoint were allowed"
            return without if self.allowed else "no restarts are allowed (--restarts 0)"
        self.made += 1
        if failure.was_killed and self.count > self.minimum:
            self.count, self._shrunk = max(self.minimum, self.count - len(failure.statuses)), True
        return ""

    @property
    def wait(self) -> float:
        """Seconds before the next attempt."""
        return min(self.backoff * 2 ** max(self.made - 1, 0), _LONGEST_WAIT)
