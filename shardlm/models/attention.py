"""Causal self-attention with grouped key/value heads.

Shape letters: Batch, Query heads, Kv heads, Group, Sequence, head Dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from shardlm.models.cache import CacheVisibility, LayerCache
from shardlm.models.config import Norm, TransformerConfig
from shardlm.models.kernel import Kernel
from shardlm.models.norm import Normalize
from shardlm.models.rope import rotate
from shardlm.parallel import tensor


@dataclass(frozen=True)
class Visibility:
    """Which keys a query sees: those before it, in its segment, in its window.

    Attributes:
        index: int32[sequence], the place of each token in its row.
        segments: int32[batch, sequence], or None where a row is one segment.
        window: the layer's sliding window in tokens: a Python int or an int32 scalar, None where no layer has one.
    """

    index: Array
    segments: Array | None
    window: Array | int | None

    def mask(self, rows: Array | None = None) -> Array:
        """Boolean [batch or 1, 1, queries, sequence]: query on the third dim, key on the last.

        Args:
            rows: int32[queries], which places of the sequence the queries have; None: all, in order.
        """
        query, key = (self.index if rows is None else self.index[rows])[:, None], self.index[None, :]
        visible = key <= query
        if self.window is not None:
            visible = visible & (query - key < self.window)
        visible = visible[None, None]
        if self.segments is not None:
            asking = self.segments if rows is None else self.segments[:, rows]
            visible = visible & (asking[:, None, :, None] == self.segments[:, None, None, :])
        return visible


CHUNK = 512  # queries at a time in `attend_chunked`
ON_CHIP = "on_chip"
"""What `attend_chunked` names the operations whose scores need not go through memory; `inspect` reads it."""


def attend(
    q_BQSD: Array,
    k_BKSD: Array,
    v_BKSD: Array,
    visibility: Visibility | CacheVisibility,
    scale: float,
    soft_cap: float | None,
    rows: Array | None = None,
) -> Array:
    """softmax(scale q k^T, masked) v in plain XLA, heads ahead of the sequence; scores and softmax in at least float32.

    Returns:
        [batch, query heads, queries, head dim] in q's dtype; the queries are the sequence's, or those at `rows` of it.
    """
    b, heads, s, d = q_BQSD.shape
    groups = heads // k_BKSD.shape[1]
    q_BKGSD = q_BQSD.reshape(b, -1, groups, s, d)
    scores = jnp.einsum(
        "bkgqd,bksd->bkgqs", q_BKGSD, k_BKSD, preferred_element_type=jnp.promote_types(q_BQSD.dtype, jnp.float32)
    )
    scores = scores * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    # A finite floor: with minus infinity a row that sees nothing would be NaN. Causality shows every query itself.
    scores = jnp.where(visibility.mask(rows)[:, :, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BKSD.dtype)
    return jnp.einsum("bkgqs,bksd->bkgqd", weights, v_BKSD).reshape(b, heads, s, d)


def attend_chunked(
    q_BQSD: Array, k_BKSD: Array, v_BKSD: Array, visibility: Visibility, scale: float, soft_cap: float | None
) -> Array:
    """The same, `CHUNK` queries at a time; backward makes each chunk's scores again."""
    v = visibility
    return _chunked(scale, soft_cap, q_BQSD, k_BKSD, v_BKSD, (v.index, v.segments, v.window))


# One function to whoever differentiates it, so that no choice of what a layer keeps reaches the scores.
@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(scale: float, soft_cap: float | None, q: Array, k: Array, v: Array, visible: Any) -> Array:
    pieces, rows, join = _chunks(q)

    def one(piece: tuple[Array, Array]) -> Array:
        with jax.named_scope(ON_CHIP):
            return attend(piece[0], k, v, Visibility(*visible), scale, soft_cap, piece[1])

    return join(jax.lax.map(one, (pieces, rows)))


def _chunked_forward(scale: float, soft_cap: float | None, q: Array, k: Array, v: Array, visible: Any):
    return _chunked(scale, soft_cap, q, k, v, visible), (q, k, v, visible)


def _chunked_backward(scale: float, soft_cap: float | None, kept: Any, gradient: Array):
    q, k, v, visible = kept
    (pieces, rows, join), (gradients, _, _) = _chunks(q), _chunks(gradient)
    wide = jnp.promote_types(k.dtype, jnp.float32)

    def one(sums: tuple[Array, Array], piece: tuple[Array, Array, Array]):
        q, rows, gradient = piece
        with jax.named_scope(ON_CHIP):
            with jax.named_scope("rematted_computation"):  # as JAX names what is made again in backward
                _, transpose = jax.vjp(
                    lambda q, k, v: attend(q, k, v, Visibility(*visible), scale, soft_cap, rows), q, k, v
                )
            dq, dk, dv = transpose(gradient)
        return (sums[0] + dk.astype(wide), sums[1] + dv.astype(wide)), dq

    start = (jnp.zeros_like(k, wide), jnp.zeros_like(v, wide))
    (dk, dv), dq = jax.lax.scan(one, start, (pieces, rows, gradients))
    return join(dq), dk.astype(k.dtype), dv.astype(v.dtype), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _chunks(x_BHSD: Array) -> tuple[Array, Array, Callable[[Array], Array]]:
    """Parts along the sequence, [chunks, batch, heads, CHUNK, dim], the rows in each, and what joins such parts."""
    b, heads, s, d = x_BHSD.shape
    count = min(CHUNK, s)
    chunks = -(-s // count)
    padded = jnp.pad(x_BHSD, ((0, 0), (0, 0), (0, chunks * count - s), (0, 0)))
    # The padding asks as the last query does, for nobody.
    rows = jnp.minimum(jnp.arange(chunks * count), s - 1).reshape(chunks, count)

    def join(parts: Array) -> Array:
        return jnp.moveaxis(parts, 0, 2).reshape(b, heads, chunks * count, d)[:, :, :s]

    return jnp.moveaxis(padded.reshape(b, heads, chunks, count, d), 2, 0), rows, join


def attend_cudnn(q_BQSD: Array, k_BKSD: Array, v_BKSD: Array, visibility: Visibility, scale: float) -> Array:
    """The same by the fused cuDNN kernel: NVIDIA GPUs, bfloat16 or float16."""
    # The kernel knows causality and a fixed window; what else is hidden must come as a mask in memory.
    fixed = visibility.segments is None and (visibility.window is None or isinstance(visibility.window, int))
    window = (visibility.window - 1, 0) if fixed and isinstance(visibility.window, int) else None
    swap = lambda x: x.swapaxes(1, 2)  # noqa: E731
    out = jax.nn.dot_product_attention(
        swap(q_BQSD),
        swap(k_BKSD),
        swap(v_BKSD),
        mask=None if fixed else visibility.mask(),
        scale=scale,
        is_causal=fixed,
        local_window_size=window,
        implementation="cudnn",
    )
    return swap(out)


class SelfAttention(nnx.Module):
    """y = concat_h(attend(q_h, k_h, v_h)) W_o, with rotary positions, biases, q/k norms and windows as configured."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        c, self.config = config, config
        bias = 2 * int(c.attention.bias)

        def inward(name: str, dim: str, heads: int) -> Kernel:
            dims, shape = ("embed", dim, "head_dim"), (c.d_model, heads, c.head_dim)
            return Kernel(rngs, dims, shape, c.init_std, c.param_dtype, bias, lora=c.lora_of(name))

        self.query = inward("query", "head", c.num_heads)
        self.key = inward("key", "kv_head", c.num_kv_heads)
        self.value = inward("value", "kv_head", c.num_kv_heads)
        outward_std = c.init_std * (2 * c.num_layers) ** -0.5
        dims, shape = ("head", "head_dim", "embed"), (c.num_heads, c.head_dim, c.d_model)
        output_bias, lora = int(c.attention.output_bias), c.lora_of("output")
        self.output = Kernel(rngs, dims, shape, outward_std, c.param_dtype, output_bias, inward=2, lora=lora)
        per_head = Norm(kind="rms", epsilon=c.norm.epsilon, one_plus_scale=c.norm.one_plus_scale)
        normed = c.attention.qk_norm
        self.query_norm = Normalize(per_head, "head_dim", c.head_dim, c.param_dtype) if normed else None
        self.key_norm = Normalize(per_head, "head_dim", c.head_dim, c.param_dtype) if normed else None

    def __call__(self, x: Array, visibility: Visibility, rotation: tuple[Array, Array] | None) -> Array:
        """Attend within each row of x[batch, sequence, embed].

        Args:
            x: the normalised residual stream.
            visibility: which keys each query sees.
            rotation: cosines and sines of `rope.rotations`; None without rotary positions.
        """
        c = self.config
        q, k, v = self._project(tensor.enter(x), rotation)
        if c.attention.implementation == "cudnn":
            o = attend_cudnn(q, k, v, visibility, self._scale)
        else:
            plain = attend_chunked if c.attention.implementation == "chunked" else attend
            o = plain(q, k, v, visibility, self._scale, c.attention.soft_cap)
        return self._combine(o, like=x)

    def extend(self, x: Array, cache: LayerCache, rotation: tuple[Array, Array] | None) -> tuple[Array, LayerCache]:
        """Attend from new tokens x[batch, sequence, embed] to what the cache holds and to themselves.

        In plain XLA whatever `implementation` says: the queries are few.

        Returns:
            What a call returns, and the cache with the new tokens.
        """
        q, k, v = self._project(tensor.enter(x), rotation)
        cache = cache.add(k, v)
        o = attend(q, *cache.read(), cache.visibility, self._scale, self.config.attention.soft_cap)
        return self._combine(o, like=x), cache

    @property
    def _scale(self) -> float:
        c = self.config
        return c.head_dim**-0.5 if c.attention.scale is None else c.attention.scale

    def _project(self, h: Array, rotation: tuple[Array, Array] | None) -> tuple[Array, Array, Array]:
        q = self.query(h).swapaxes(1, 2)
        held = q.shape[1]
        k = self._kv_heads(self.key, h, held)
        v = self._kv_heads(self.value, h, held)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return q, k, v

    def _combine(self, o: Array, like: Array) -> Array:
        return self.output.add_bias(tensor.leave(self.output.product(o.swapaxes(1, 2)), like=like))

    def _kv_heads(self, projection: Kernel, h: Array, query_heads: int) -> Array:
        group = self.config.num_heads // self.config.num_kv_heads
        y = projection.product(h, lambda weights: tensor.own_kv_heads(weights, 1, query_heads, group))
        if projection.bias is not None:
            y = y + tensor.own_kv_heads(projection.bias[...], 0, query_heads, group).astype(y.dtype)
        return y.swapaxes(1, 2)
