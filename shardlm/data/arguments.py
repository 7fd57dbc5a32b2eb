"""Numbers that users give: whole ones that are whole numbers, and nothing that merely could be read as one."""

import operator
from typing import Any

import numpy as np


def whole(name: str, value: Any) -> int:
    """The number as an int. Raises TypeError for a boolean, a fraction, a string, an array."""
    try:
        if isinstance(value, bool | np.bool_ | np.ndarray):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; it is a whole number") from None


def positive(name: str, value: Any, unit: str) -> int:
    """The same of a number of something, at least 1. Raises ValueError for one that is smaller."""
    if (number := whole(name, value)) < 1:
        raise ValueError(f"{name} must be at least 1 {unit}, got {number}")
    return number
