"""What the training step is measured against: the same model and update, written by hand in plain JAX for one device.

It imports nothing of the library and nothing of Flax: parameters are a nested dict, layers are stacked and scanned, and
one `jax.jit` with the state donated runs forward, backward and the Optax update. The model is Llama's decoder
(arXiv:2302.13971) with grouped key/value heads (arXiv:2305.13245): RMSNorm before each branch, rotary positions,
SwiGLU, a head of its own.

Shape letters: Batch, Sequence, Embed, Query heads, Kv heads, Group, head Dim, Vocabulary, Layer,
Feed-forward width.
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
    z_BSV = jnp.einsum("bse,ve->bsv", h_BSE, table_VE, preferred_element_type=wide)
    if z_BSV.shape[-1] == model.vocab_size:
        return z_BSV
    return jnp.where(jnp.arange(z_BSV.shape[-1]) < model.vocab_size, z_BSV, -jnp.inf)


def _block(x_BSE: Array, layer: Mapping[str, Any], rotation: tuple[Array, Array], model: Model) -> Array:
    weights = jax.tree.map(lambda w: w.astype(model.dtype), {name: layer[name] for name in ("attention", "mlp")})
    h_BSE = _norm(x_BSE, layer["attention_norm"]["scale"], model)
    x_BSE = x_BSE + _attention(h_BSE, {name: w["kernel"] for name, w in weights["attention"].items()}, rotation, model)
    h_BSE = _norm(x_BSE, layer["mlp_norm"]["scale"], model)
    gate, up, down = (weights["mlp"][name]["kernel"] for name in ("gate", "up", "down"))
    return x_BSE + (jax.nn.silu(h_BSE @ gate) * (h_BSE @ up)) @ down


def _attention(h_BSE: Array, w: Mapping[str, Array], rotation: tuple[Array, Array], model: Model) -> Array:
    scale = w["query"].shape[-1] ** -0.5
    if model.cudnn:
        q, k, v = (jnp.einsum("bse,ehd->bshd", h_BSE, w[name]) for name in ("query", "key", "value"))
        cosine, sine = (t[:, None] for t in rotation)
        q, k = _rotate(q, cosine, sine), _rotate(k, cosine, sine)
        o = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
        return jnp.einsum("bshd,hde->bse", o, w["output"])
    # Heads ahead of the sequence: on CPU these products take half the time of those in the kernel's order above.
    q, k, v = (jnp.einsum("bse,ehd->bhsd", h_BSE, w[name]) for name in ("query", "key", "value"))
    q_BQSD, k_BKSD = _rotate(q, *rotation), _rotate(k, *rotation)
    q_BKGSD = q_BQSD.reshape(k.shape[0], k.shape[1], -1, *k.shape[2:])
    wide = jnp.promote_types(model.dtype, jnp.float32)
    scores = scale * jnp.einsum("bkgqd,bksd->bkgqs", q_BKGSD, k_BKSD, preferred_element_type=wide)
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    probabilities = jax.nn.softmax(jnp.where(causal, scores, jnp.finfo(wide).min), axis=-1).astype(model.dtype)
    o_BQSD = jnp.einsum("bkgqs,bksd->bkgqd", probabilities, v).reshape(q_BQSD.shape)
    return jnp.einsum("bhsd,hde->bse", o_BQSD, w["output"])


def _norm(x: Array, scale: Array, model: Model) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + model.epsilon)
    return (y * scale.astype(wide.dtype)).astype(x.dtype)


def _rotate(x: Array, cosine: Array, sine: Array) -> Array:
    first, second = jnp.split(x.astype(cosine.dtype), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)
