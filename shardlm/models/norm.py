"""RMSNorm and LayerNorm, over the last dim."""

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from shardlm.models import parameter
from shardlm.models.config import Norm


class Normalize(nnx.Module):
    """y = x / sqrt(mean(x^2) + epsilon) * w, or with the mean removed and a bias; in at least float32.

    RMSNorm: arXiv:1910.07467; LayerNorm: arXiv:1607.06450. With `one_plus_scale` the factor is (1 + w), w starting at
    zero.
    """

    def __init__(self, norm: Norm, dim: str, length: int, dtype: str):
        self.norm = norm
        self.scale = parameter.constant((dim,), (length,), 0.0 if norm.one_plus_scale else 1.0, dtype)
        self.bias = parameter.constant((dim,), (length,), 0.0, dtype) if norm.kind == "layer" else None

    def __call__(self, x: Array) -> Array:
        """x[..., length] -> the same shape and dtype."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.norm.kind == "layer":
            wide = wide - wide.mean(axis=-1, keepdims=True)
        y = wide * lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.norm.epsilon)
        y = y * (self.scale[...].astype(y.dtype) + (1.0 if self.norm.one_plus_scale else 0.0))
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        return y.astype(x.dtype)
