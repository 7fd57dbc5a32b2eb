"""What a verification runs on: a batch that hides nothing, and parameters away from their initial ones and zeros."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from shardlm.checkpoint.keys import is_key
from shardlm.layout import Layout
from shardlm.models.config import TransformerConfig
from shardlm.train.engine import unflatten
from shardlm.train.state import TrainState
from shardlm.train.trainer import Trainer
from shardlm.train.update import Update
from shardlm.verification.compare import leaves

_LENGTH, _ROWS = 12, 8  # of a row, and of them, at least


def random_batch(config: TransformerConfig, layout: Layout, seed: int) -> dict[str, np.ndarray]:
    """Packed rows with uneven weights, a third of them zero, in the smallest shape that the layout takes.

    Args:
        config: gives the vocabulary and the longest sequence.
        layout: with its sizes filled in.
        seed: of everything random.
    """
    random = np.random.default_rng(seed)
    unit = math.lcm(layout.tensor, 2 * layout.context)
    length = -(-_LENGTH // unit) * unit
    if config.max_sequence is not None and length > config.max_sequence:
        length = max(config.max_sequence // unit, 1) * unit
    parts = layout.batch_shards * layout.microbatches
    shape = (max(-(-_ROWS // parts), 2) * parts, length)
    weights = random.random(shape).astype(np.float32) * (random.random(shape) > 0.3)
    weights[:, -1] += 0.5  # no row, and so no device's part, without any
    segments = np.sort(random.integers(1, 4, shape))
    starts = np.array([[np.argmax(row == segment) for segment in row] for row in segments])
    return {
        "tokens": random.integers(0, config.vocab_size, shape, np.int32),
        "targets": random.integers(0, config.vocab_size, shape, np.int32),
        "weights": weights,
        "segments": segments.astype(np.int32),
        "positions": (np.arange(length) - starts).astype(np.int32),
    }


def perturbed(trainer: Trainer, params: Any, seed: int) -> Any:
    """Every parameter moved away from its initial value, rows of padding left at zero; on the host.

    The noise has standard deviation 0.1, less for a matrix so wide that its products would grow: scores, masks and
    positions then have an effect that is far above rounding.
    """
    random = np.random.default_rng(seed + 1)
    flat, tree = jax.tree.flatten(params)
    moved = []
    for path, value in zip(leaves(params), flat, strict=True):
        value = np.asarray(value)
        if value.dtype.kind in "iub":
            moved.append(value)
            continue
        wide = max(value.shape) if value.ndim > 1 else 1
        noise = min(0.1, wide**-0.5) * random.normal(size=value.shape)
        rows = trainer.padded_rows(path, value.shape)
        if rows is not None:
            noise[rows:] = 0
        moved.append((value + noise).astype(value.dtype))
    return jax.tree.unflatten(tree, moved)


def rounded(params: Any, share: float, seed: int) -> Any:
    """Every element moved by `share` of itself, up or down at random."""
    random = np.random.default_rng(seed + 2)

    def move(x: np.ndarray) -> np.ndarray:
        return x if x.dtype.kind in "iub" else (x * (1 + share * random.choice((-1, 1), x.shape))).astype(x.dtype)

    return jax.tree.map(move, params)


def start(reference: Trainer, params: Any) -> TrainState:
    """The state before the first update with these parameters, on the host."""
    opt_state = jax.jit(Update(reference.program, reference.optimizer).init)(params)
    state = dataclasses.replace(reference.init(), params=params, opt_state=opt_state)
    return jax.tree.map(lambda x: x if is_key(x) else np.asarray(x), state)


def put(trainer: Trainer, state: TrainState) -> TrainState:
    """A state of the host on the trainer's devices, laid out as the trainer has it."""
    like = trainer.abstract_state
    state = dataclasses.replace(trainer.program.arrange(state), layer_rows=like.layer_rows)
    return jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding, may_alias=False), state, like)


def put_params(trainer: Trainer, step: Any, params: dict[str, Any]) -> TrainState:
    """A state for a forward, from parameters of the host by path: it has no optimizer state."""
    like = trainer.abstract_state
    arranged = leaves(trainer.program.arrange(unflatten(params)))
    placed = {path: jax.device_put(arranged[path], leaf.sharding) for path, leaf in leaves(like.params).items()}
    return TrainState(step, unflatten(placed), None, layer_rows=like.layer_rows)
