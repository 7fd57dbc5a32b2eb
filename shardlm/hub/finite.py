"""Weights that are not finite, which no loading or saving hides."""

import warnings
from collections.abc import Iterable

import numpy as np

from shardlm.runtime.strangers import printable

_EXPONENT = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F80_0000, "float64": 0x7FF0_0000_0000_0000}
_PIECE = 1 << 18  # elements looked at together, so that they stay in a core's cache


def all_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite: whether none has an exponent of ones alone, as only these have."""
    mask = np.array(_EXPONENT[str(array.dtype)], f"u{array.dtype.itemsize}")
    bits = np.ascontiguousarray(array).reshape(-1).view(mask.dtype)
    pieces = (bits[start : start + _PIECE] for start in range(0, bits.size, _PIECE))
    return not any(((piece & mask) == mask).any() for piece in pieces)


def warn_of(names: Iterable[str], where: str, dtype: str, done: str) -> None:
    """Say which tensors hold NaN or infinity, if any do.

    Args:
        names: of those tensors.
        where: they are.
        dtype: in which they are not finite.
        done: with them, such as "was read".
    """
    if found := sorted(set(names)):
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        warnings.warn(
            f"{where} {done} as it is, with NaN or infinity in {dtype} in {len(found)} of its tensors: "
            f"{printable(', '.join(found[:5]))}{more}. Such a model gives no finite loss",
            stacklevel=3,
        )
