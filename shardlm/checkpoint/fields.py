"""What each field of metadata.json must be. Anybody can write one, with its seal: nothing in it is used unchecked."""

import datetime
import json
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_ARRAY = re.compile(r"([a-z0-9_]{1,40})\[((?:[0-9]{1,18}(?:,[0-9]{1,18}){0,31})?)\] ([0-9a-f]{8})")
_FILE = re.compile(r"[0-9]{1,18} [0-9a-f]{32}")
_MOST = 1 << 24  # rows of layers, padding included: far more than there are


def describe_array(array: Any, digest: str) -> str:
    """An array as metadata.json has it: `float32[18,64] 5ab71cc6`."""
    return f"{array.dtype}[{','.join(map(str, array.shape))}] {digest}"


def parse_array(text: Any) -> tuple[jax.ShapeDtypeStruct, str]:
    """Shape and dtype, and the digest, of what `describe_array` wrote. Raises ValueError for anything else."""
    match = _ARRAY.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{text!r} describes no array")
    name, shape, digest = match.groups()
    try:
        dtype = jnp.dtype(name)
    except TypeError as error:
        raise ValueError(f"{text!r} describes no array: there is no dtype {name}") from error
    if not (jnp.issubdtype(dtype, jnp.number) or dtype == jnp.bool_):
        raise ValueError(f"{text!r} describes no array of numbers")
    return jax.ShapeDtypeStruct([int(size) for size in shape.split(",") if size], dtype), digest


def problem(record: dict[str, Any]) -> str:
    """What is wrong with a metadata.json of this format, for a sentence that begins with its name; empty if nothing."""
    for name, check in _FIELDS.items():
        value = record.get(name)
        if not check(value):
            return f"has {name}={_shown(value)}, which is not {_WANTED[name]}"
    for kind, is_one in (("arrays", _is_array), ("files", _is_file)):
        if wrong := [key for key, text in record[kind].items() if not (is_one(text) and _is_name(key))]:
            return f"does not say what {', '.join(wrong[:5])} is"
    return ""


def finite(value: Any) -> bool:
    """Whether it is a number, and neither a bool nor NaN nor infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and _fits(value)


def _fits(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _is_time(value: Any) -> bool:
    try:
        return datetime.datetime.fromisoformat(value).tzinfo is not None
    except (TypeError, ValueError):
        return False


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_array(text: Any) -> bool:
    try:
        parse_array(text)
    except ValueError:
        return False
    return True


def _is_name(key: str) -> bool:
    """Whether it can be a path of an array, or of a file of Orbax's, as far as its length goes."""
    return len(key) <= 2000 and key.count("/") <= 60


def _is_file(text: Any) -> bool:
    return isinstance(text, str) and _FILE.fullmatch(text) is not None


def _are_generators(value: Any) -> bool:
    return value is None or isinstance(value, dict) and all(isinstance(name, str) for name in value.values())


def _are_layers(value: Any) -> bool:
    """Whether it is a list of rows, or lists of as many for each chunk, in which each layer from 0 on comes once."""
    if value is None:
        return True
    if not isinstance(value, list) or not value or len(value) > _MOST:
        return False
    chunks = value if all(isinstance(chunk, list) for chunk in value) else [value]
    lengths = {len(chunk) for chunk in chunks}
    if len(lengths) != 1 or lengths == {0} or len(chunks) * lengths.pop() > _MOST:
        return False
    rows = [row for chunk in chunks for row in chunk]
    if not all(isinstance(row, int) and not isinstance(row, bool) and -1 <= row < _MOST for row in rows):
        return False
    layers = sorted(row for row in rows if row >= 0)
    return bool(layers) and layers == list(range(len(layers)))


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:60]}..."


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "saved": _is_time,
    "metadata": lambda value: isinstance(value, dict),
    "arrays": lambda value: isinstance(value, dict),
    "files": lambda value: isinstance(value, dict),
    "processes": lambda value: value is None or _is_whole(value),
    "step": lambda value: value is None or _is_whole(value),
    "loss": lambda value: value is None or isinstance(value, int | float) and not isinstance(value, bool),
    "layer_rows": _are_layers,
    "keys": _are_generators,
}
_WANTED = {
    "saved": "a time with its zone",
    "metadata": "an object",
    "arrays": "an object",
    "files": "an object",
    "processes": "a number of processes",
    "step": "a step",
    "loss": "a number",
    "layer_rows": "which layer each row is",
    "keys": "which generator the random keys of an array are of",
}
