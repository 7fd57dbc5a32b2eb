"""What a batch is, what is wrong with one, and how it gets onto the devices."""

import difflib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from shardlm._arguments import is_masked

MASKED = "give the plain array (.data or .filled(0)), and weights that are 0 where it is masked"
REQUIRED = ("tokens", "targets")
OPTIONAL = ("weights", "segments", "positions")


def check_structure(
    batch: Mapping[str, Any], max_sequence: int | None = None, *, may_be_abstract: bool = False
) -> tuple[int, int]:
    """Check the batch's keys, shapes and dtypes, which costs nothing, and return (rows, sequence).

    `may_be_abstract` allows `jax.ShapeDtypeStruct`s among the arrays.

    Raises:
        TypeError: it is no dict.
        ValueError: one error that lists everything that is wrong.
    """
    problems, legal = [], REQUIRED + OPTIONAL
    types = (np.ndarray, Array, *([jax.ShapeDtypeStruct] if may_be_abstract else []))
    if not isinstance(batch, Mapping):
        hint = "; of token ids alone sl.data.batch(tokens) makes one" if isinstance(batch, types + (list,)) else ""
        raise TypeError(f"batch: a {type(batch).__name__}; it is a dict of arrays, {', '.join(legal)}{hint}")
    for name in batch:
        if name not in legal:
            near = difflib.get_close_matches(str(name), legal, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            problems.append(f"unknown key {name!r}{hint} (legal: {', '.join(legal)})")
    problems += [f"the key {name!r} is missing" for name in REQUIRED if name not in batch]
    if problems and "tokens" in batch and "targets" not in batch:
        problems[-1] += ": the token after each of tokens; sl.data.batch(tokens) makes a batch with them"
    shape = getattr(batch.get("tokens"), "shape", None)
    for name in (name for name in legal if name in batch):
        value = batch[name]
        if is_masked(value):
            problems.append(f"{name} is a masked array, whose mask is not read: {MASKED}")
            continue
        if not isinstance(value, types):
            problems.append(f"{name} is a {type(value).__name__}; it is an array of NumPy or JAX")
            continue
        if value.ndim != 2 or not value.size:
            problems.append(f"{name} has shape {value.shape}; it is [batch, sequence], with something in it")
        elif value.shape != shape and shape is not None:
            problems.append(f"{name} has shape {value.shape}, tokens {shape}")
        kinds = (jnp.floating, jnp.integer, jnp.bool_) if name == "weights" else (jnp.integer,)
        if not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
            expected = "a float" if name == "weights" else "an integer"
            problems.append(f"{name} has dtype {value.dtype}; it is {expected} array")
    if shape is not None and len(shape) == 2 and max_sequence is not None and shape[1] > max_sequence:
        problems.append(f"a sequence of {shape[1]} tokens; the model has {max_sequence} learned positions")
    _raise(problems)
    return batch["tokens"].shape


def check_values(
    batch: Mapping[str, np.ndarray], vocab_size: int, max_sequence: int | None, *, may_be_empty: bool
) -> None:
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
    if is_copy(batch):
        problems.append(
            "targets are equal to tokens, so that the model learns to repeat what it reads: targets are the tokens "
            "moved on by one, targets[:, i] = tokens[:, i + 1]; sl.data.batch(tokens) makes them"
        )
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
    last = np.inf if max_sequence is None else max_sequence - 1
    if positions is not None and (positions.min() < 0 or positions.max() > last):
        legal = "they begin at 0" if max_sequence is None else f"the model has 0 to {last}"
        problems.append(f"positions go from {positions.min()} to {positions.max()}; {legal}")
    _raise(problems)


def is_copy(batch: Mapping[str, np.ndarray]) -> bool:
    """Whether targets are the tokens themselves wherever there is weight, and not by chance the tokens moved on.

    A row such as 7 7 7 7 is both. So is a place that is judged alone, whose answer may be the token before it: at least
    two different tokens must be seen, and one place whose target is not the token after it.
    """
    tokens, targets = batch["tokens"], batch["targets"]
    weights = batch.get("weights")
    judged = np.ones(tokens.shape, bool) if weights is None else np.asarray(weights) != 0
    if not (tokens == targets)[judged].all() or np.unique(tokens[judged]).size < 2:
        return False
    inside = judged[:, :-1]
    if "segments" in batch:
        inside = inside & (batch["segments"][:, 1:] == batch["segments"][:, :-1])
    return bool((targets[:, :-1] != tokens[:, 1:])[inside].any())


def is_placed(batch: Mapping[str, Any], sharding: NamedSharding) -> bool:
    """Whether `place` made every array of it, or could have: on the devices, split as a batch is, weights included."""
    return "weights" in batch and all(
        isinstance(x, Array) and x.sharding == sharding and x.dtype == dtype_of(name) for name, x in batch.items()
    )


def to_host(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A copy of the batch as NumPy arrays of the dtypes used (int32, float32), weights filled in with ones.

    A copy, because JAX may read the host's memory after it was told to move it: a source that fills the same buffers
    again and again would otherwise change a batch whose step has yet to run.
    """
    host = {name: np.asarray(value) for name, value in batch.items()}
    for name, value in host.items():
        if name != "weights" and value.size and (value.min() < -(2**31) or value.max() >= 2**31):
            raise ValueError(f"batch: {name} holds numbers beyond int32")
    host = {name: value.astype(dtype_of(name)) for name, value in host.items()}
    return host if "weights" in host else host | {"weights": np.ones(host["tokens"].shape, np.float32)}


def place(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, Array]:
    """The batch as global arrays [batch, sequence]; each of several processes gives the rows that its devices hold."""
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


def global_rows(sharding: NamedSharding, shards: int, rows: int) -> int:
    """Rows of the global batch, `rows` of which this process has; it is split into `shards` parts."""
    if jax.process_count() == 1:
        return rows
    held = local_rows(sharding, shards)
    return rows * shards // (held.stop - held.start)


def dtype_of(name: str) -> type[np.number]:
    """The dtype in which an array travels to the devices."""
    return np.float32 if name == "weights" else np.int32


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError("batch: " + "; ".join(problems))
