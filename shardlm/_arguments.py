"""What arguments may be, checked where users give them: numbers that are numbers, and arrays that are still there."""

import math
from numbers import Integral, Real
from typing import Any

import jax
import numpy as np

LARGEST_SEED = 2**32 - 1  # JAX drops the upper half of larger ones, so that two seeds would be one

USED_UP = (
    "this state was used up by a step, which writes the new state in its place: go on with what the step returned, as "
    "in `state, metrics = trainer.step(state, batch)`"
)


def is_used_up(tree: Any) -> bool:
    """Whether a step has taken the arrays of a state or of parameters, or some of them.

    Scalars are left when a checkpoint is being written.
    """
    leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)]
    return any(leaf.is_deleted() for leaf in leaves)


def check_usable(tree: Any, what: str = "") -> None:
    """Raise ValueError for a state, or parameters, that a step has used up: on their arrays XLA would crash.

    Args:
        tree: given by a user.
        what: is done with it, for the message.
    """
    if is_used_up(tree):
        raise ValueError(f"{what}: {USED_UP}" if what else USED_UP)


def seed_of(seed: Any, what: str = "seed") -> int:
    """The seed as an int. Raises ValueError for what is no whole number from 0 to 2**32 - 1."""
    if problem := not_integer(what, seed, 0, LARGEST_SEED):
        raise ValueError(problem)
    return int(seed)


def not_integer(name: str, value: Any, least: int, most: float = math.inf) -> str:
    """What is wrong with a whole number between these, in words; empty where nothing is."""
    if isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most:
        return ""
    limits = f"from {least} on" if most == math.inf else f"from {least} to {most}"
    return f"{name}={_shown(value)}; it is a whole number {limits}"


def not_number(name: str, value: Any, least: float, most: float = math.inf, *, open_end: bool = False) -> str:
    """The same of a finite number; `open_end` excludes the upper limit."""
    is_real = isinstance(value, Real) and not isinstance(value, bool | np.bool_) and _is_finite(value)
    if is_real and least <= float(value) and (float(value) < most if open_end else float(value) <= most):  # type: ignore[arg-type]
        return ""
    upper = f" {'below' if open_end else 'to'} {most:g}" if most < math.inf else " on"
    return f"{name}={_shown(value)}; it is a number from {least:g}{upper}"


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


def is_masked(value: Any) -> bool:
    """Whether an array has a mask, which NumPy drops in silence wherever the array is used as a plain one."""
    return isinstance(value, np.ma.MaskedArray)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
