"""How a layout says what its pipeline does; `shardlm/parallel/pipeline` does it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from shardlm._errors import LayoutError, is_int, raise_all


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How the stages of a pipeline take turns.

    Attributes:
        schedule: "1f1b", "gpipe", or a function (stages, microbatches, chunks) -> each stage's list of operations
            (`shardlm.parallel.pipeline`). "interleaved" and "zb-h1" can be drawn and simulated, and are not run yet.
        microbatches: into how many parts the rows of a step are cut.
        chunks: pieces of the model per stage; only 1 is run yet.

    Raises:
        LayoutError: a setting out of range, or not available yet.
    """

    schedule: str | Callable[..., Any] = "1f1b"
    microbatches: int = 8
    chunks: int = 1

    def __post_init__(self):
        problems = []
        if isinstance(self.schedule, str) and self.schedule in ("interleaved", "zb-h1"):
            problems.append(f"schedule={self.schedule!r} is not run yet; '1f1b' and 'gpipe' are, and functions")
        elif self.schedule not in ("1f1b", "gpipe") and not callable(self.schedule):
            problems.append(f"schedule={self.schedule!r} is not '1f1b' or 'gpipe', nor a function")
        for name in ("microbatches", "chunks"):
            if not is_int(value := getattr(self, name)) or value < 1:
                problems.append(f"{name}={value!r} is not a positive integer")
        if self.chunks != 1 and not problems:
            problems.append(f"chunks={self.chunks}: several chunks per stage are not available yet; use chunks=1")
        raise_all("this pipeline cannot be", problems)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The pipeline that "1f1b:8" describes: a schedule and, after a colon, the number of microbatches."""
        schedule, _, count = text.partition(":")
        if count and not count.isdecimal():
            raise LayoutError(f"pipeline={text!r}: after the colon goes the number of microbatches, as in 1f1b:8")
        return cls(schedule=schedule, **({"microbatches": int(count)} if count else {}))

    def __str__(self) -> str:
        name = self.schedule if isinstance(self.schedule, str) else getattr(self.schedule, "__name__", "own")
        return f"{name}:{self.microbatches}"
