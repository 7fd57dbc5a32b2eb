"""What a batch is, what is wrong with one, and how it gets onto the devices."""

import difflib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

REQUIRED = ("tokens", "targets")
OPTIONAL = ("weights", "segments", "positions")


def check_structure(batch: Mapping[str, Any], max_sequence: int | None = None) -> tuple[int, int]:
    """Check the batch's keys, shapes and dtypes, which costs nothing, and return (rows, sequence).

    Raises:
        ValueError: one error that lists everything that is wrong.
    """
    problems, legal = [], REQUIRED + OPTIONAL
    for name in batch:
        if name not in legal:
            near = difflib.get_close_matches(str(name), legal, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            problems.append(f"unknown key {name!r}{hint} (legal: {', '.join(legal)})")
    problems += [f"the key {name!r} is missing" for name in REQUIRED if name not in batch]
    shape = np.shape(batch["tokens"]) if "tokens" in batch else None
    for name in (name for name in legal if name in batch):
        value = batch[name]
        if np.ndim(value) != 2:
            problems.append(f"{name} has shape {np.shape(value)}; it is [batch, sequence]")
        elif shape is not None and np.shape(value) != shape:
            problems.append(f"{name} has shape {np.shape(value)}, tokens {shape}")
        kind = np.dtype(getattr(value, "dtype", type(value))).kind if hasattr(value, "dtype") else "?"
        if kind not in ("iu" if name != "weights" else "fiub"):
            problems.append(
                f"{name} has dtype {getattr(value, 'dtype', type(value).__name__)}; "
                f"it is {'a float' if name == 'weights' else 'an integer'} array"
            )
    if shape is not None and len(shape) == 2 and max_sequence is not None and shape[1] > max_sequence:
        problems.append(f"a sequence of {shape[1]} tokens; the model has {max_sequence} learned positions")
    _raise(problems)
    assert shape is not None
    return shape[0], shape[1]


def check_values(batch: Mapping[str, np.ndarray], vocab_size: int, max_sequence: int | None, *, may_be_empty: bool) -> None:
    """Check what is in the arrays; called for batches that come from the host.

    Args:
        batch: NumPy arrays of a right structure.
        vocab_size: ids are below it.
        max_sequence: positions are below it; None for no limit.
        may_be_empty: whether all weights may be zero, as in the last batch of an evaluation.

    Raises:
        ValueError: one error that lists everything that is wrong, with the place of the first offender.
    """
    problems = []
    weights = batch.get("weights")
    for name in REQUIRED:
        bad = (batch[name] < 0) | (batch[name] >= vocab_size)
        if name == "targets" and weights is not None:
            bad &= weights != 0  # a target without weight may be anything
        if bad.any():
            row, column = np.argwhere(bad)[0]
            problems.append(
                f"{name}[{row}, {column}] = {batch[name][row, column]} is outside the vocabulary of {vocab_size} ids "
                f"(0 to {vocab_size - 1}); {int(bad.sum())} such ids"
            )
    if weights is not None:
        if not np.isfinite(weights).all() or (weights < 0).any():
            problems.append("weights must be finite and not negative")
        elif not may_be_empty and not weights.any():
            problems.append("all weights are zero: the loss, a mean over weights, has no value")
    positions = batch.get("positions")
    if positions is not None and max_sequence is not None and (positions.min() < 0 or positions.max() >= max_sequence):
        problems.append(f"positions go from {positions.min()} to {positions.max()}; the model has 0 to {max_sequence - 1}")
    _raise(problems)


def is_placed(batch: Mapping[str, Any], sharding: NamedSharding) -> bool:
    """Whether every array is on the devices already, split as the layout splits a batch, with its weights."""
    return "weights" in batch and all(isinstance(x, Array) and x.sharding == sharding for x in batch.values())


def to_host(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The batch as NumPy arrays of the dtypes used (int32, float32), weights filled in with ones."""
    host = {name: np.asarray(value) for name, value in batch.items()}
    for name, value in host.items():
        if name != "weights" and value.size and (value.min() < -(2**31) or value.max() >= 2**31):
            raise ValueError(f"batch: {name} holds numbers beyond int32")
    host = {name: value.astype(np.float32 if name == "weights" else np.int32, copy=False) for name, value in host.items()}
    return host if "weights" in host else host | {"weights": np.ones(host["tokens"].shape, np.float32)}


def place(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, Array]:
    """The batch as global arrays [batch, sequence]; with several processes, each gives the rows that its devices hold."""
    if jax.process_count() == 1:
        return dict(zip(batch, jax.device_put(list(batch.values()), sharding), strict=True))
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def local_rows(sharding: NamedSharding, batch_size: int) -> slice:
    """The rows of a global batch that this process's devices hold.

    Raises:
        ValueError: they are not consecutive, which the mesh's order of devices rules out on one slice or host.
    """
    indices = sharding.addressable_devices_indices_map((batch_size, 1)).values()
    spans = sorted({index[0].indices(batch_size)[:2] for index in indices if index is not None})
    for (_, end), (start, _) in zip(spans, spans[1:], strict=False):
        if end != start:
            raise ValueError(f"this process's rows of the batch are not consecutive: {spans}")
    return slice(spans[0][0], spans[-1][1])


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError("batch: " + "; ".join(problems))


