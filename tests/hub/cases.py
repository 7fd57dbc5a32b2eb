"""What the tests of this folder share: the recorded models, and calling ours."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import shardlm as sl
from shardlm.models.transformer import parameter_dims

DATA = Path(__file__).parent / "data"
CASES = sorted(path.parent.name for path in DATA.glob("*/config.json"))
PIECES = ((0, 7, 20), (0, 12, 17))  # as in record.py
INSTALLED = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


@functools.cache
def recorded(name: str) -> dict[str, np.ndarray]:
    """The arrays that record.py describes."""
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


def load(folder, *arguments, **keywords):
    return sl.load_hf(folder, *arguments, **keywords)


def model_of(config: sl.TransformerConfig, params) -> sl.Transformer:
    return nnx.merge(parameter_dims(config)[0], nnx.State(params))


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens, segments, positions):
    return model_of(config, params)(tokens, segments=segments, positions=positions)


def logits(config, params, tokens, segments=None, positions=None) -> np.ndarray:
    """Of the plain model; rows of one segment unless said otherwise."""
    if segments is None:
        segments, positions = np.ones_like(tokens), np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    return np.asarray(_logits(config, params, *(jnp.asarray(x, jnp.int32) for x in (tokens, segments, positions))))


def packed_rows(shape: tuple[int, int] = (2, 20)) -> tuple[np.ndarray, np.ndarray]:
    """Segments and positions of rows that hold PIECES; 0 in the padding."""
    segments, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, ends in enumerate(PIECES):
        for number, (begin, end) in enumerate(zip(ends, ends[1:], strict=False), 1):
            segments[row, begin:end], positions[row, begin:end] = number, np.arange(end - begin)
    return segments, positions
