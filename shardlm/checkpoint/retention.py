"""Which checkpoints of a run stay."""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any


@dataclass(frozen=True)
class Retention:
    """Rules of which each keeps what it names: a checkpoint goes when none of them names it.

    Args:
        keep: the newest, so many; None keeps all.
        keep_every: those of steps that this divides.
        keep_best: so many of lowest loss, those saved with one.
    """

    keep: int | None = 3
    keep_every: int | None = None
    keep_best: int | None = None

    def __post_init__(self):
        if self.keep is not None and not _is_count(self.keep):
            raise ValueError(f"keep={self.keep!r}: expected how many checkpoints stay, at least 1, or None for all")
        for name, what in (("keep_every", "a number of steps"), ("keep_best", "how many checkpoints of lowest loss")):
            value = getattr(self, name)
            if value is not None and not _is_count(value):
                raise ValueError(f"{name}={value!r}: expected {what}, at least 1, or None")

    def surplus(self, losses: Mapping[int, float | None]) -> list[int]:
        """The steps to remove, ascending.

        Args:
            losses: by step; None where a checkpoint has none.
        """
        if self.keep is None:
            return []
        stay = set(sorted(losses)[-self.keep :])
        if self.keep_every is not None:
            stay |= {step for step in losses if step % self.keep_every == 0}
        if self.keep_best is not None:
            ranked = sorted((loss, -step) for step, loss in losses.items() if loss is not None)  # ties: the newer
            stay |= {-step for _, step in ranked[: self.keep_best]}
        return sorted(losses.keys() - stay)


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
