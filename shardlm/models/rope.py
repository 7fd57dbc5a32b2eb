"""Rotary position embedding (arXiv:2104.09864), half-split as in the Llama family, and its scaled frequencies."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from shardlm.models.config import LinearScaling, Llama3Scaling, Rope


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angular frequencies in radians per position, theta ** (-2i / head_dim), scaled: float64[head_dim // 2]."""
    base = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        return base / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        # Turns made over the original context: few turns (long waves) are scaled, many kept, with a linear ramp
        # between.
        turns = scaling.original_length * base / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return keep * base + (1 - keep) * base / scaling.factor
    return base


def rotations(rope: Rope, head_dim: int, positions: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Cosines and sines of each position's angles.

    Args:
        positions: int32[batch or 1, sequence].
        dtype: float32 or wider; angles in a narrower type lose whole turns at long contexts.

    Returns:
        Two arrays [batch or 1, 1, sequence, head_dim // 2]; the 1 is for the heads.
    """
    angles = positions[:, None, :, None].astype(dtype) * jnp.asarray(frequencies(rope, head_dim), dtype)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cosine: Array, sine: Array) -> Array:
    """Rotate the pairs (i, i + head_dim / 2) of x[batch, heads, sequence, head_dim]; the result has x's dtype."""
    first, second = jnp.split(x.astype(cosine.dtype), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)
