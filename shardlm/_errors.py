"""The error of everything that a layout cannot be, and how it lists its reasons."""

from collections.abc import Iterable
from typing import Any


class LayoutError(ValueError):
    """A layout that contradicts itself, the model, the batch or the devices; the message lists every conflict."""


def raise_all(title: str, problems: Iterable[str]) -> None:
    """Raise one LayoutError that lists the problems, if there are any."""
    if lines := "".join(f"\n  - {problem}" for problem in problems):
        raise LayoutError(f"{title}:{lines}")


def is_int(value: Any) -> bool:
    """Whether it is an int, and not a bool, which Python counts among them."""
    return isinstance(value, int) and not isinstance(value, bool)
