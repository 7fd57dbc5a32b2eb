"""A weight that multiplies every token: a matrix, or a tensor that acts as one, and its bias."""

import math

from flax import nnx
from jax import Array

from shardlm.models import parameter


class Kernel(nnx.Module):
    """kernel[*in, *out], and a bias over the last `bias` dims where that is not 0.

    Args:
        rngs: keys for the initial values, N(0, std^2).
        dims: the names of the kernel's dims.
        shape: its shape.
        std: standard deviation of the initial values.
        dtype: of storage.
        bias: how many of the last dims, the output's, the bias has; 0 for no bias.
    """

    def __init__(
        self, rngs: nnx.Rngs, dims: tuple[str, ...], shape: tuple[int, ...], std: float, dtype: str, bias: int = 0
    ):
        self.kernel = parameter.normal(rngs, dims, shape, std, dtype)
        self.bias = parameter.constant(dims[-bias:], shape[-bias:], 0.0, dtype) if bias else None

    def product(self, x: Array, dims: int = 1) -> Array:
        """`tokenwise` of the kernel, without the bias, which after a row-parallel product is added after the sum."""
        return tokenwise(x, self.kernel[...], dims)

    def __call__(self, x: Array) -> Array:
        """The product plus the bias: x[batch, sequence, in] -> [batch, sequence, *out]."""
        return self.add_bias(self.product(x))

    def add_bias(self, y: Array) -> Array:
        """`y` plus the bias, or `y` where there is none."""
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def tokenwise(x: Array, kernel: Array, dims: int = 1) -> Array:
    """x[batch, sequence, *in] times kernel[*in, *out], `in` being `dims` dims: [batch, sequence, *out], in x's dtype.

    One product of two matrices. With batch and sequence left apart, the kernel's gradient sums over two dims, and XLA's
    CPU backend transposes an operand for that, element by element.
    """
    lead, inward, outward = x.shape[:-dims], math.prod(kernel.shape[:dims]), kernel.shape[dims:]
    return (x.reshape(-1, inward) @ kernel.astype(x.dtype).reshape(inward, -1)).reshape(*lead, *outward)
