"""What a forward holds after some layers: for whoever looks for the first difference between two runs."""

import weakref
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array

from shardlm.train import engine
from shardlm.train import state as states
from shardlm.train.state import TrainState
from shardlm.train.step import dropout_key
from shardlm.train.transformer import TransformerProgram

if TYPE_CHECKING:
    from shardlm.train.trainer import Trainer

_compiled: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def forward(
    trainer: "Trainer",
    state: TrainState,
    batch: Any,
    layers: int | None = None,
    *,
    rows: Any = None,
    columns: Any = None,
) -> dict[str, Array]:
    """What the forward of a training step of a `sl.Transformer` holds after so many layers, under its dropout masks.

    Args:
        trainer: of a `sl.Transformer`.
        state: its `params` and `step` are used.
        batch: see `Trainer.step`.
        layers: stop after so many, 0 for the embedding alone; None runs them all.
        rows, columns: int32[batch] and int32[sequence], the places from which dropout masks are drawn; default 0, 1,
            2, ...

    Returns:
        Global arrays: `hidden`[batch, sequence, embed], and, as if no layer followed, `logits`[batch, sequence, padded
        vocabulary] and `nll`[batch, sequence], the negative log-likelihood of each target.
    """
    assert isinstance(trainer.program, TransformerProgram)
    states.check_usable(state, trainer.abstract_state)
    placed: dict[str, Any] = trainer.place(batch)
    shape = placed["tokens"].shape
    places = {"rows": rows, "columns": columns}
    for (name, given), length in zip(places.items(), shape, strict=True):
        placed[name] = np.arange(length, dtype=np.int32) if given is None else np.asarray(given, np.int32)
    count = np.int32(trainer.config.num_layers if layers is None else layers)
    if trainer not in _compiled:
        _compiled[trainer] = jax.jit(engine.forward(trainer.program.plan, trainer.engine))
    return trainer._run(_compiled[trainer], state.params, placed, dropout_key(trainer.seed, state.step), count)
