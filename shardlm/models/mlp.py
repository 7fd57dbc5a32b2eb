"""The feed-forward branch: gated (arXiv:2002.05202) or plain."""

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx
from jax import Array

from shardlm.models.config import TransformerConfig
from shardlm.models.kernel import Kernel
from shardlm.parallel import tensor

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class FeedForward(nnx.Module):
    """y = (activation(x W_gate) * (x W_up)) W_down, or activation(x W_up) W_down, with biases where configured."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        c, self.activation = config, config.mlp.activation
        bias = int(c.mlp.bias)
        inward = (("embed", "mlp"), (c.d_model, c.d_ff), c.init_std, c.param_dtype, bias)
        outward_std = c.init_std * (2 * c.num_layers) ** -0.5
        self.gate = Kernel(rngs, *inward, lora=c.lora_of("gate")) if c.mlp.gated else None
        self.up = Kernel(rngs, *inward, lora=c.lora_of("up"))
        dims, shape, lora = ("mlp", "embed"), (c.d_ff, c.d_model), c.lora_of("down")
        self.down = Kernel(rngs, dims, shape, outward_std, c.param_dtype, bias, lora=lora)

    def __call__(self, x: Array) -> Array:
        """x[batch, sequence, embed] -> the same shape."""
        h = tensor.enter(x)
        activation = ACTIVATIONS[self.activation]
        up = self.up(h)
        hidden = activation(up) if self.gate is None else activation(self.gate(h)) * up
        return self.down.add_bias(tensor.leave(self.down.product(hidden), like=x))
