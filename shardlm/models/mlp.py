"""The feed-forward branch: gated (arXiv:2002.05202) or plain."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from shardlm.models import parameter
from shardlm.models.config import TransformerConfig
from shardlm.parallel import tensor

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class Kernel(nnx.Module):
    """A matrix, or a tensor that acts as one, and its bias where it has one."""

    def __init__(
        self, rngs: nnx.Rngs, dims: tuple[str, ...], shape: tuple[int, ...], std: float, dtype: str, bias: int = 0
    ):
        self.kernel = parameter.normal(rngs, dims, shape, std, dtype)
        # The last `bias` dims are the output's.
        self.bias = parameter.constant(dims[-bias:], shape[-bias:], 0.0, dtype) if bias else None

    def product(self, equation: str, x: Array) -> Array:
        """The einsum of `x` and the kernel, without the bias, in x's dtype."""
        return jnp.einsum(equation, x, self.kernel[...].astype(x.dtype))


class FeedForward(nnx.Module):
    """y = (activation(x W_gate) * (x W_up)) W_down, or activation(x W_up) W_down, with biases where configured."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        c, self.activation = config, config.mlp.activation
        inward = (("embed", "mlp"), (c.d_model, c.d_ff), c.init_std, c.param_dtype, int(c.mlp.bias))
        outward_std = c.init_std * (2 * c.num_layers) ** -0.5
        self.gate = Kernel(rngs, *inward) if c.mlp.gated else None
        self.up = Kernel(rngs, *inward)
        self.down = Kernel(rngs, ("mlp", "embed"), (c.d_ff, c.d_model), outward_std, c.param_dtype, int(c.mlp.bias))

    def __call__(self, x: Array) -> Array:
        """x[batch, sequence, embed] -> the same shape."""
        h = tensor.enter(x)
        activation = ACTIVATIONS[self.activation]
        up = _columns(self.up, h)
        hidden = activation(up) if self.gate is None else activation(_columns(self.gate, h)) * up
        y = tensor.leave(self.down.product("bsm,me->bse", hidden), like=x)
        return y if self.down.bias is None else y + self.down.bias[...].astype(y.dtype)


def _columns(projection: Kernel, x: Array) -> Array:
    y = projection.product("bse,em->bsm", x)
    return y if projection.bias is None else y + projection.bias[...].astype(y.dtype)
