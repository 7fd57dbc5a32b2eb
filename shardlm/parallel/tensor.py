"""Tensor parallelism, and sequence parallelism between blocks.

Sources: arXiv:1909.08053 section 3, arXiv:2205.05198 section 4.2.

The residual stream x[batch, sequence, embed] is the same on every device of the tensor axis, or, under sequence
parallelism, split along its sequence. A branch (attention, MLP) works on its own heads or columns:

    h = enter(norm(x))        no communication, or all-gather of the sequence      column-parallel products follow
    x = x + leave(y, like=x)  all-reduce,       or reduce-scatter of the sequence  after the row-parallel product

`enter` is called once per branch, so q, k and v (gate and up) share one reduction of its gradient. Whether the stream
is split is read off the stream itself: it varies over the tensor axis exactly when it is. In plain and auto mode all
is identity.

The vocabulary is split too, over the stages of a pipeline as well (arXiv:2411.05288) unless the layout says otherwise:
rows of the embedding table, and so columns of the logits. Which axes those are is read off the rows that are held
(`vocabulary`). Shapes here are per device.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from shardlm import collectives
from shardlm.layout import Axis

SEQUENCE = 1  # the dim of the sequence in [batch, sequence, embed]
VOCABULARY = (Axis.PIPE, Axis.TENSOR)  # the axes that may split the vocabulary, the first one major


def vocabulary(rows: int, held: int) -> tuple[Axis, ...]:
    """The axes that split a vocabulary of so many `rows`, padding included, of which a device holds `held`."""
    return (Axis.TENSOR,) if held * collectives.size(Axis.TENSOR) == rows else VOCABULARY


def parts() -> int:
    """Into how many parts the tensor axis splits here."""
    return collectives.size(Axis.TENSOR)


def is_split(x: Array) -> bool:
    """Whether the residual stream `x` is split along its sequence over the tensor axis."""
    return bool(collectives.active(Axis.TENSOR)) and str(Axis.TENSOR) in collectives.varying(x)


def enter(x: Array) -> Array:
    """The residual stream, whole on every device of the tensor axis: x[b, s_T, e] or x[b, s, e] -> x[b, s, e]."""
    return collectives.all_gather(x, Axis.TENSOR, SEQUENCE) if is_split(x) else collectives.vary(x, Axis.TENSOR)


def leave(y: Array, like: Array) -> Array:
    """Sum a branch's partial results y[b, s, e]{U_T}, laid out as the residual stream `like` is."""
    return leave_split(y) if is_split(like) else all_reduce(y)


def leave_split(y: Array) -> Array:
    """Sum partial results into a residual stream split along its sequence: y[b, s, e]{U_T} -> [b, s_T, e]."""
    count = collectives.size(Axis.TENSOR)
    assert y.shape[SEQUENCE] % count == 0, (y.shape, count)
    return collectives.reduce_scatter(y, Axis.TENSOR, SEQUENCE)


def all_reduce(y: Array) -> Array:
    """Sum partial results into a residual stream that every device holds whole: y[b, s, e]{U_T} -> [b, s, e]."""
    return collectives.all_reduce(y, Axis.TENSOR)


def sum_embedding(x: Array, split: bool, axes: tuple[Axis, ...]) -> Array:
    """Sum partial embeddings x[b, s, e]{U_axes} into a residual stream, whole or `split` along its sequence."""
    if not split:
        return collectives.all_reduce(x, axes)
    return collectives.all_reduce(leave_split(x), tuple(axis for axis in axes if axis != Axis.TENSOR))


def enter_head(x: Array, axes: tuple[Axis, ...]) -> Array:
    """`enter`, for a product with columns that are split over `axes`."""
    # The other axes first: where the stream is split, their gradient is summed after it is scattered over tensor.
    return collectives.vary(enter(collectives.vary(x, tuple(a for a in axes if a != Axis.TENSOR))), axes)


def split_sequence(x: Array) -> Array:
    """This device's part of x[b, s, ...], which every device of the tensor axis holds whole."""
    return collectives.split(x, Axis.TENSOR, SEQUENCE)


def own_kv_heads(x: Array, dim: int, query_heads: int, queries_per_kv: int) -> Array:
    """Of key/value weights that hold more heads than this device's queries attend to, the heads that they do.

    With fewer key/value heads than devices, every device holds all of them, and `query_heads` consecutive query heads,
    which share one key/value head.

    Args:
        x: weights whose dim `dim` is the key/value heads held here.
        query_heads: query heads held here.
        queries_per_kv: query heads that share one key/value head, in the whole model.
    """
    needed = max(1, query_heads // queries_per_kv)
    if x.shape[dim] == needed:
        return x
    first = collectives.index(Axis.TENSOR) * query_heads // queries_per_kv
    return lax.dynamic_slice_in_dim(collectives.vary(x, Axis.TENSOR), first, needed, dim)


def embed(table: Array, ids: Array, axes: tuple[Axis, ...] = VOCABULARY) -> Array:
    """Rows of a table split over `axes`: table[v_T, e], ids[b, s] -> partial rows [b, s, e]{U_T}.

    Each device looks up the ids it holds and gives zeros for the others, so the sum over the axes is exact.
    """
    local = ids - collectives.index(axes) * table.shape[0]
    held = (local >= 0) & (local < table.shape[0])
    rows = jnp.take(table, jnp.where(held, local, 0), axis=0)
    return jnp.where(held[..., None], rows, 0)


def vocabulary_ids(held: int, axes: tuple[Axis, ...] = VOCABULARY) -> Array:
    """The token ids of the `held` logits that this device computes: int32[held]."""
    return collectives.index(axes) * held + jnp.arange(held)


def cross_entropy(logits: Array, targets: Array, axes: tuple[Axis, ...] = VOCABULARY) -> Array:
    """Negative log-likelihood of `targets` under logits whose vocabulary is split, without gathering them.

    nll = log(sum_v exp(z_v - m)) - (z_target - m) with m = max_v z_v: three all-reduces of [b, s], of which the
    maximum's carries no gradient (arXiv:1909.08053 section 3).

    Args:
        logits: float32[b, s, v_T]; minus infinity where the vocabulary is padding.
        targets: int32[b, s], ids of the whole vocabulary.
        axes: those that split the vocabulary.

    Returns:
        float32[b, s], the same on every device of these axes.
    """
    peak = collectives.all_reduce_max(lax.stop_gradient(logits.max(axis=-1)), axes)
    shifted = logits - peak[..., None]
    total = collectives.all_reduce(jnp.exp(shifted).sum(axis=-1), axes)
    local = targets - collectives.index(axes) * logits.shape[-1]
    held = (local >= 0) & (local < logits.shape[-1])
    at_target = jnp.take_along_axis(shifted, jnp.where(held, local, 0)[..., None], axis=-1)[..., 0]
    # Padding is minus infinity, and 0 * inf is not 0: select, do not multiply.
    return jnp.log(total) - collectives.all_reduce(jnp.where(held, at_target, 0), axes)


def likeliest(logits: Array) -> Array:
    """The id of the largest of logits[b, s, v_T] whose vocabulary is split, the lowest of several: int32[b, s]."""
    peak = logits.max(axis=-1)
    ids = vocabulary_ids(logits.shape[-1])[logits.argmax(axis=-1)]
    top = collectives.all_reduce_max(peak, VOCABULARY)
    # The lowest id is the largest of the negative ones.
    return -collectives.all_reduce_max(jnp.where(peak == top, -ids, jnp.iinfo(ids.dtype).min), VOCABULARY)


def in_branch(dims: Sequence[str | None]) -> bool:
    """Whether a parameter with these dims is used between `enter` and `leave`, where devices differ."""
    return any(dim in ("vocab", "head", "kv_head", "head_dim", "mlp", "rank") for dim in dims)
