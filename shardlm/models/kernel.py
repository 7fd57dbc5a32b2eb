"""A weight that multiplies every token: a matrix, or a tensor that acts as one, and its bias."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from shardlm.models import parameter
from shardlm.models.config import Lora


class Kernel(nnx.Module):
    """kernel[*in, *out], a bias over the last `bias` dims where that is not 0, and adapters where there is a `lora`.

    With adapters lora_a[*in, rank] and lora_b[rank, *out] a product is x W + (alpha / rank) (x A) B. They split over
    devices as the dims of W do: of a row-parallel kernel x A is a partial sum, and so are both terms.

    Args:
        rngs: keys for the initial values, N(0, std^2).
        dims: the names of the kernel's dims.
        shape: its shape.
        std: standard deviation of the initial values.
        dtype: of storage.
        bias: how many of the last dims, the output's, the bias has; 0 for no bias.
        inward: how many of the dims are `in`.
        lora: its adapters; None for none.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        dims: tuple[str, ...],
        shape: tuple[int, ...],
        std: float,
        dtype: str,
        bias: int = 0,
        *,
        inward: int = 1,
        lora: Lora | None = None,
    ):
        self.kernel = parameter.normal(rngs, dims, shape, std, dtype)
        self.bias = parameter.constant(dims[-bias:], shape[-bias:], 0.0, dtype) if bias else None
        self.inward, self.lora_scale = inward, lora.scale if lora else 0.0
        if lora is None:
            self.lora_a = self.lora_b = None
            return
        wide, std = str(jnp.promote_types(dtype, jnp.float32)), (3 * math.prod(shape[:inward])) ** -0.5
        a, b = (*shape[:inward], lora.rank), (lora.rank, *shape[inward:])
        self.lora_a = parameter.normal(_beside(rngs), (*dims[:inward], "rank"), a, std, wide)
        self.lora_b = parameter.constant(("rank", *dims[inward:]), b, 0.0, wide)

    def product(self, x: Array, own: Callable[[Array], Array] | None = None) -> Array:
        """`tokenwise` of the kernel, without the bias, which after a row-parallel product is added after the sum.

        Args:
            x: [batch, sequence, *in].
            own: takes from weights[*, *out] the part of `out` that is wanted; None for all.
        """
        part = own or (lambda weights: weights)
        y = tokenwise(x, part(self.kernel[...]), self.inward)
        if self.lora_a is None or self.lora_b is None:
            return y
        low = tokenwise(x, self.lora_a[...], self.inward) * self.lora_scale
        return y + tokenwise(low, part(self.lora_b[...]))

    def __call__(self, x: Array) -> Array:
        """The product plus the bias: x[batch, sequence, in] -> [batch, sequence, *out]."""
        return self.add_bias(self.product(x))

    def add_bias(self, y: Array) -> Array:
        """`y` plus the bias, or `y` where there is none."""
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def _beside(rngs: nnx.Rngs) -> nnx.Rngs:
    """Keys that take none from `rngs`: adapters leave every other initial value as it is without them."""
    return nnx.Rngs(jax.random.fold_in(nnx.clone(rngs).params(), 0))


def tokenwise(x: Array, kernel: Array, dims: int = 1) -> Array:
    """x[batch, sequence, *in] times kernel[*in, *out], `in` being `dims` dims: [batch, sequence, *out], in x's dtype.

    One product of two matrices. With batch and sequence left apart, the kernel's gradient sums over two dims, and XLA's
    CPU backend transposes an operand for that, element by element.
    """
    lead, inward, outward = x.shape[:-dims], math.prod(kernel.shape[:dims]), kernel.shape[dims:]
    return (x.reshape(-1, inward) @ kernel.astype(x.dtype).reshape(inward, -1)).reshape(*lead, *outward)
