"""How far a run has come: its processes tell their launcher, which then knows that a restart was worth it."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import jax

SAVED = "SHARDLM_SAVED"  # the file in which the launcher reads it


def tell_saved(step: int, environment: Mapping[str, str] | None = None) -> None:
    """Tell the launcher, where there is one, that a checkpoint of `step` is on disk; process 0 does."""
    path = (os.environ if environment is None else environment).get(SAVED)
    if path and jax.process_index() == 0:
        with contextlib.suppress(OSError):  # the launcher has ended: nobody asks any more
            new = Path(f"{path}.new")
            new.write_text(str(int(step)))
            new.replace(path)


def read_saved(path: Path) -> int:
    """The step last told of; -1 where there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return -1
