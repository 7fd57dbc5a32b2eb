"""What the processes of a run tell one another, so that all of them go on, or all of them stop."""

import itertools
import json
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

_SLOWEST = 3_600_000  # milliseconds that a process waits for the others' writes
_barriers = itertools.count()  # the same number on all processes, which pass the same barriers
_exchanges = itertools.count()  # likewise; other threads than the main one pass barriers, and exchange nothing


class SaveError(RuntimeError):
    """A checkpoint could not be written: disk full, folder not writable, another run saving there.

    Older checkpoints are as they were. `state` is what was to be saved where `Trainer.fit` raises it at the end of a
    run, and None elsewhere.
    """

    state: Any = None


class CheckpointWarning(UserWarning):
    """A checkpoint was damaged or could not be saved, or older ones not removed, and the run goes on."""


def exchange(value: Any) -> list[Any]:
    """What each process gives, by process; all call it, from the main thread. A value is what JSON can hold."""
    if jax.process_count() == 1:
        return [value]
    # However late one is: a collective gives CPUs 30 s to come together.
    ocp.multihost.get_barrier_sync_fn()(key=f"shardlm:exchange:{next(_exchanges)}", timeout_ms=_SLOWEST)
    said = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(said.size)).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: said.size] = said
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(np.asarray(rows), sizes, strict=True)]


def errors_of_all(error: BaseException | None) -> str:
    """What went wrong on any process, in one line; empty where nothing did."""
    said = exchange(None if error is None else reason(error))
    several = len(said) > 1
    return "; ".join(f"process {i}: {text}" if several else text for i, text in enumerate(said) if text is not None)


def barrier() -> None:
    """Return when all processes are here; made for threads in the background, which may run no collective."""
    key = f"shardlm:checkpoint:{next(_barriers)}"
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=_SLOWEST)


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def reason(error: BaseException) -> str:
    """What first went wrong, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    [first_line, *_] = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first_line[:300].rstrip(' [')}"
