"""What the training step is measured against: the same model and update, written by hand in plain JAX for one device.

It imports nothing of the library and nothing of Flax: parameters are a nested dict, layers are stacked and scanned, and
one `jax.jit` with the state donated runs forward, backward and the Optax update. The model is Llama's decoder
(arXiv:2302.13971) with grouped key/value heads (arXiv:2305.13245): RMSNorm before each branch, rotary positions,
SwiGLU, a head of its own.

Products with weights are of two matrices, all tokens of the batch in one dim. With batch and sequence apart, a weight's
gradient sums over two dims, and XLA's CPU backend transposes an operand for that, element by element: a small model's
step takes half as long again.

Shape letters: Batch, Sequence, Tokens (batch times sequence), Embed, Query heads, Kv heads, Group, head Dim,
Vocabulary, Layer, Feed-forward width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the parameters' shapes do not say.

    Attributes:
        vocab_size: ids are below it; the tables may have more rows, which receive no probability.
        theta: base of the rotary frequencies.
        epsilon: added to the mean square in a norm.
        dtype: of the computation; norms, rotations, softmax and loss are in at least float32.
        cudnn: attention by the fused kernel of NVIDIA GPUs.
    """

    vocab_size: int
    theta: float = 10_000.0
    epsilon: float = 1e-6
    dtype: str = "float32"
    cudnn: bool = False


def make_step(model: Model, optimizer: optax.GradientTransformation) -> Callable[..., tuple[dict, Any, Array]]:
    """A compiled function (parameters, optimizer state, batch) -> (parameters, optimizer state, loss).

    The first two arguments are donated. Parameters are a nested dict:

        embedding/table[V, E]
        layers/attention_norm/scale[L, E], layers/attention/query/kernel[L, E, Q, D], {key,value}/kernel[L, E, K, D],
            output/kernel[L, Q, D, E]
        layers/mlp_norm/scale[L, E], layers/mlp/{gate,up}/kernel[L, E, F], down/kernel[L, F, E]
        final_norm/scale[E]
        head/table[V, E]

    A batch is "tokens", "targets" int32[B, S] and "weights" float32[B, S].
    """

    def step(params: dict, opt_state: Any, batch: Mapping[str, Array]) -> tuple[dict, Any, Array]:
        value, grads = jax.value_and_grad(loss)(params, batch, model)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value  # pyright: ignore[reportReturnType]

    return jax.jit(step, donate_argnums=(0, 1))


def loss(params: Mapping[str, Any], batch: Mapping[str, Array], model: Model) -> Array:
    """sum(weight * -log p(target)) / sum(weight)."""
    z_BSV = logits(params, batch["tokens"], model)
    at_target = jnp.take_along_axis(z_BSV, batch["targets"][..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(z_BSV, axis=-1) - at_target
    weights = batch["weights"].astype(nll.dtype)
    return (weights * nll).sum() / weights.sum()


def logits(params: Mapping[str, Any], tokens: Array, model: Model) -> Array:
    """tokens[B, S] -> logits[B, S, V], minus infinity in the rows that pad the vocabulary."""
    wide = jnp.promote_types(model.dtype, jnp.float32)
    head_dim = params["layers"]["attention"]["query"]["kernel"].shape[-1]
    frequencies = model.theta ** -(jnp.arange(0, head_dim, 2, dtype=wide) / head_dim)
    angles_SD = jnp.arange(tokens.shape[1], dtype=wide)[:, None] * frequencies
    rotation = jnp.cos(angles_SD), jnp.sin(angles_SD)

    x_BSE = params["embedding"]["table"][tokens].astype(model.dtype)
    x_BSE, _ = jax.lax.scan(lambda x, layer: (_block(x, layer, rotation, model), None), x_BSE, params["layers"])
    h_BSE = _norm(x_BSE, params["final_norm"]["scale"], model)
    table_VE = params["head"]["table"].astype(model.dtype)
    h_TE = h_BSE.reshape(-1, h_BSE.shape[-1])
    z_BSV = jnp.einsum("te,ve->tv", h_TE, table_VE, preferred_element_type=wide).reshape(*tokens.shape, -1)
    if z_BSV.shape[-1] == model.vocab_size:
        return z_BSV
    return jnp.where(jnp.arange(z_BSV.shape[-1]) < model.vocab_size, z_BSV, -jnp.inf)


def _block(x_BSE: Array, layer: Mapping[str, Any], rotation: tuple[Array, Array], model: Model) -> Array:
    weights = jax.tree.map(lambda w: w.astype(model.dtype), {name: layer[name] for name in ("attention", "mlp")})
    h_BSE = _norm(x_BSE, layer["attention_norm"]["scale"], model)
    x_BSE = x_BSE + _attention(h_BSE, {name: w["kernel"] for name, w in weights["attention"].items()}, rotation, model)
    h_BSE = _norm(x_BSE, layer["mlp_norm"]["scale"], model)
    gate, up, down = (weights["mlp"][name]["kernel"] for name in ("gate", "up", "down"))
    h_TE = h_BSE.reshape(-1, h_BSE.shape[-1])
    return x_BSE + ((jax.nn.silu(h_TE @ gate) * (h_TE @ up)) @ down).reshape(x_BSE.shape)


def _attention(h_BSE: Array, w: Mapping[str, Array], rotation: tuple[Array, Array], model: Model) -> Array:
    b, s, e = h_BSE.shape
    d = w["query"].shape[-1]
    h_TE = h_BSE.reshape(-1, e)
    q, k, v = ((h_TE @ w[name].reshape(e, -1)).reshape(b, s, -1, d) for name in ("query", "key", "value"))
    if model.cudnn:
        cosine, sine = (t[:, None] for t in rotation)
        q, k = _rotate(q, cosine, sine), _rotate(k, cosine, sine)
        o = jax.nn.dot_product_attention(q, k, v, scale=d**-0.5, is_causal=True, implementation="cudnn")
    else:
        # Heads ahead of the sequence: on CPU these products take half the time of those in the kernel's order above.
        q_BQSD, k_BKSD, v_BKSD = (x.swapaxes(1, 2) for x in (q, k, v))
        q_BQSD, k_BKSD = _rotate(q_BQSD, *rotation), _rotate(k_BKSD, *rotation)
        q_BKGSD = q_BQSD.reshape(b, k_BKSD.shape[1], -1, s, d)
        wide = jnp.promote_types(model.dtype, jnp.float32)
        scores = d**-0.5 * jnp.einsum("bkgqd,bksd->bkgqs", q_BKGSD, k_BKSD, preferred_element_type=wide)
        causal = jnp.tril(jnp.ones((s, s), bool))
        p = jax.nn.softmax(jnp.where(causal, scores, jnp.finfo(wide).min), axis=-1).astype(model.dtype)
        o = jnp.einsum("bkgqs,bksd->bkgqd", p, v_BKSD).reshape(q_BQSD.shape).swapaxes(1, 2)
    return (o.reshape(b * s, -1) @ w["output"].reshape(-1, e)).reshape(b, s, e)


def _norm(x: Array, scale: Array, model: Model) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + model.epsilon)
    return (y * scale.astype(wide.dtype)).astype(x.dtype)


def _rotate(x: Array, cosine: Array, sine: Array) -> Array:
    first, second = jnp.split(x.astype(cosine.dtype), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)
