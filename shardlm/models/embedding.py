"""Token embedding, learned positions, and the head: tables whose rows are the vocabulary."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from shardlm.models import parameter
from shardlm.models.config import LearnedPositions, TransformerConfig
from shardlm.parallel import tensor


class Table(nnx.Module):
    """A vector per token id: table[padded vocabulary, embed]; rows of padding are zero and stay zero."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        shape = (config.padded_vocab_size, config.d_model)
        self.table = parameter.normal(rngs, ("vocab", "embed"), shape, config.init_std, config.param_dtype)
        if config.padded_vocab_size != config.vocab_size:
            real = jnp.arange(config.padded_vocab_size)[:, None] < config.vocab_size
            self.table[...] = jnp.where(real, self.table[...], 0)


class PositionTable(nnx.Module):
    """A learned vector per position: table[length, embed]."""

    def __init__(self, positions: LearnedPositions, config: TransformerConfig, *, rngs: nnx.Rngs):
        shape = (positions.length, config.d_model)
        self.table = parameter.normal(rngs, (None, "embed"), shape, config.init_std, config.param_dtype)


def look_up(table: Array, ids: Array, config: TransformerConfig, split: bool) -> Array:
    """The vectors of `ids` in the computation's dtype; an id outside the vocabulary gives NaN, no wrong vector.

    Args:
        table: [the vocabulary held here, embed].
        ids: int32[batch, sequence].
        config: the model's.
        split: whether the result is split along its sequence over the tensor axis.
    """
    axes = tensor.vocabulary(config.padded_vocab_size, table.shape[0])
    rows = tensor.embed(table, ids, axes)
    known = (ids >= 0) & (ids < config.vocab_size)
    return tensor.sum_embedding(jnp.where(known[..., None], rows, jnp.nan).astype(config.dtype), split, axes)


def cross_entropy(logits: Array, targets: Array, config: TransformerConfig) -> Array:
    """`tensor.cross_entropy` of `logits`' result."""
    return tensor.cross_entropy(logits, targets, tensor.vocabulary(config.padded_vocab_size, logits.shape[-1]))


def logits(table: Array, x: Array, config: TransformerConfig) -> Array:
    """x[batch, sequence, embed] -> logits[batch, sequence, the vocabulary held here], padding at minus infinity.

    At least float32, soft-capped where configured.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    axes = tensor.vocabulary(config.padded_vocab_size, table.shape[0])
    x = tensor.enter_head(x, axes)
    flat = x.reshape(-1, x.shape[-1])  # one product of matrices, as in `kernel.tokenwise`
    z = jnp.einsum("te,ve->tv", flat, table.astype(x.dtype), preferred_element_type=wide)
    z = z.reshape(*x.shape[:-1], table.shape[0])
    if config.logit_soft_cap is not None:
        z = config.logit_soft_cap * jnp.tanh(z / config.logit_soft_cap)
    if config.padded_vocab_size != config.vocab_size:
        z = jnp.where(tensor.vocabulary_ids(z.shape[-1], axes) < config.vocab_size, z, -jnp.inf)
    return z
