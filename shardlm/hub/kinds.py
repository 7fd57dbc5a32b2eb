"""What kind of value a field of a JSON file must have, before anything computes with it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MOST = 2**31 - 1  # elements along one dim
MOST_LAYERS = 1_000_000


@dataclass(frozen=True)
class Kind:
    """A kind of JSON value.

    Attributes:
        said: what it must be, in a message.
        fits: whether a value is one.
    """

    said: str
    fits: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _integer(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


SIZE = Kind(f"it is a positive integer up to {MOST:,}", _integer(1, MOST))
LAYERS = Kind(f"it is a positive integer up to {MOST_LAYERS:,}", _integer(1, MOST_LAYERS))
INDEX = Kind(f"it is an integer from 0 to {MOST:,}", _integer(0, MOST))
NUMBER = Kind("it is a positive number", lambda value: is_number(value) and value > 0)
SPREAD = Kind("it is a number, 0 or more", lambda value: is_number(value) and value >= 0)
FLAG = Kind("it is true or false", lambda value: isinstance(value, bool))
TEXT = Kind("it is text", lambda value: isinstance(value, str))
TEXTS = Kind(
    "it is a list of texts", lambda value: isinstance(value, list) and all(isinstance(entry, str) for entry in value)
)
OBJECT = Kind("it is an object of names and values", lambda value: isinstance(value, dict))
ANY = Kind("", lambda value: True)
