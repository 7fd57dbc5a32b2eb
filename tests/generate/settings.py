"""Models, layouts and plain references that the tests of generation share."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

import shardlm as sl
from shardlm.models.transformer import parameter_dims

VOCAB = 67
LAYOUTS = ("data=2,fsdp=2,tensor=2", "fsdp=2,tensor=4", "fsdp=8", "fsdp=4,tensor=2,zero=2")
BASE = sl.TransformerConfig(
    vocab_size=VOCAB, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=6, d_ff=24,
    norm=sl.Norm(epsilon=0.1), vocab_multiple=4, dtype="float64", param_dtype="float64",
)  # fmt: skip
# Two kinds of layers, each with its rope, and everything that a logit passes through.
MIXED = dataclasses.replace(
    BASE, num_layers=3, tied=True, embedding_scale=4.0, logit_soft_cap=20.0,
    norm=sl.Norm(epsilon=0.1, one_plus_scale=True, after=True), positions=sl.Rope(theta=100.0),
    local_positions=sl.Rope(theta=20.0), attention=sl.Attention(qk_norm=True, soft_cap=3.0, windows=(5, None)),
)  # fmt: skip
LEARNED = dataclasses.replace(
    BASE, num_kv_heads=4, attention=sl.Attention(bias=True, output_bias=True), positions=sl.LearnedPositions(length=24),
    mlp=sl.MLP(gated=False, activation="gelu", bias=True), norm=sl.Norm(kind="layer", epsilon=0.1),
)  # fmt: skip

# Two layers of a kind each, and a head of its own: it does not say one word again and again.
TALKER = dataclasses.replace(MIXED, num_layers=2, tied=False)


@functools.cache
def parameters(config):
    """Random everywhere, and large enough that texts do not repeat one token: NumPy arrays."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: (0.5 * rng.normal(size=p.shape)).astype(p.dtype), parameter_dims(config)[1])


@functools.cache
def _plain(config):
    graph = parameter_dims(config)[0]
    return jax.jit(lambda p, tokens: nnx.merge(graph, nnx.State(p))(tokens))


def plain_logits(config, ids, room=64):
    """Logits of the plain module after each of ids[n], without a cache: [n, vocab]."""
    room = config.max_sequence or room
    padded = np.zeros((1, room), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(_plain(config)(parameters(config), padded))[0, : len(ids)]


def devices(layout):
    """As many devices as the layout has."""
    return jax.devices()[: layout.num_devices]


def log_softmax(z):
    """Along the last dim, in NumPy."""
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))
