"""The decoder-only Transformer, written once as single-device code."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from shardlm.models import embedding
from shardlm.models.attention import SelfAttention, Visibility
from shardlm.models.cache import Cache, LayerCache
from shardlm.models.config import LearnedPositions, Rope, TransformerConfig
from shardlm.models.dropout import Dropout
from shardlm.models.kinds import require_config
from shardlm.models.mlp import FeedForward
from shardlm.models.norm import Normalize
from shardlm.models.rope import rotations
from shardlm.models.stack import PLAIN, Execution, Stack, fold_layers, stack
from shardlm.parallel import tensor


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the branches' outputs normalised too where configured."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        def norm() -> Normalize:
            return Normalize(config.norm, "embed", config.d_model, config.param_dtype)

        self.attention_norm = norm()
        self.attention = SelfAttention(config, rngs=rngs)
        self.attention_after_norm = norm() if config.norm.after else None
        self.mlp_norm = norm()
        self.mlp = FeedForward(config, rngs=rngs)
        self.mlp_after_norm = norm() if config.norm.after else None

    def __call__(
        self,
        x: Array,
        visibility: Visibility,
        rotation: tuple[Array, Array] | None,
        dropout: Dropout | None,
        layer: Array | int,
    ) -> Array:
        """x[batch, sequence, embed] -> the same shape."""
        y = self.attention(self.attention_norm(x), visibility, rotation)
        return self._after_attention(x, y, dropout, layer)

    def extend(self, x: Array, cache: LayerCache, rotation: tuple[Array, Array] | None) -> tuple[Array, LayerCache]:
        """A call for new tokens x[batch, sequence, embed] of rows whose earlier tokens are in the cache."""
        y, cache = self.attention.extend(self.attention_norm(x), cache, rotation)
        return self._after_attention(x, y, None, 0), cache

    def _after_attention(self, x: Array, y: Array, dropout: Dropout | None, layer: Array | int) -> Array:
        x = x + self._branch(y, self.attention_after_norm, dropout, layer, site=0)
        y = self.mlp(self.mlp_norm(x))
        return x + self._branch(y, self.mlp_after_norm, dropout, layer, site=1)

    def _branch(
        self, y: Array, norm: Normalize | None, dropout: Dropout | None, layer: Array | int, site: int
    ) -> Array:
        y = y if norm is None else norm(y)
        return y if dropout is None else dropout(y, layer, site)


class Transformer(nnx.Module):
    """Token ids to logits: embed, `num_layers` stacked blocks under one scan, a norm, and the head.

    Args:
        config: what it is.
        rngs: keys for the initial values.
        rows: which layer each row of the stacked parameters is, int[rows] or int[chunks, rows], each with the initial
            values of its layer, or of any where it is -1. None: all layers, in order; others are for `run` alone.

    Attributes:
        config: what it is.
        embedding, positions, layers, final_norm, head: its parts; `layers` holds every block's parameters stacked on a
            leading `layer` dim, `positions` is None with RoPE, `head` is None when tied.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import shardlm as sl
        >>> model = sl.Transformer(sl.presets.tiny(), rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 16), jnp.int32)).shape
        (1, 16, 257)
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, rows: np.ndarray | None = None):
        self.config = require_config(config)
        self.embedding = embedding.Table(config, rngs=rngs)
        positions = config.positions
        learned = isinstance(positions, LearnedPositions)
        self.positions = embedding.PositionTable(positions, config, rngs=rngs) if learned else None

        rows = np.arange(config.num_layers) if rows is None else rows
        graph, keys = nnx.split(rngs.split(config.num_layers))
        keys = jax.tree.map(lambda key: key[np.maximum(rows, 0)], keys)
        stacked = lambda rngs: Block(config, rngs=rngs)  # noqa: E731
        for dim in ("layer", "chunk")[: rows.ndim]:
            stacked = nnx.vmap(stacked, in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: dim})
        self.layers = stacked(nnx.merge(graph, keys))
        self.final_norm = Normalize(config.norm, "embed", config.d_model, config.param_dtype)
        self.head = None if config.tied else embedding.Table(config, rngs=rngs)

    def __call__(
        self,
        tokens: Array,
        *,
        segments: Array | None = None,
        positions: Array | None = None,
        dropout: Dropout | None = None,
    ) -> Array:
        """Logits of the next token.

        Args:
            tokens: int32[batch, sequence].
            segments: int32[batch, sequence]; attention never crosses from one value to another. None: a row is one
                segment.
            positions: int32[batch, sequence], for RoPE or the position table. None: 0, 1, 2, ...
            dropout: None, or the masks of a training step.

        Returns:
            float32[batch, sequence, vocab] (float64 when computing in float64).
        """
        x = self.hidden(tokens, segments=segments, positions=positions, dropout=dropout)
        return self.logits(x)[..., : self.config.vocab_size]

    def hidden(
        self,
        tokens: Array,
        *,
        segments: Array | None = None,
        positions: Array | None = None,
        dropout: Dropout | None = None,
        execution: Execution = PLAIN,
        runs: Array | None = None,
    ) -> Array:
        """The last block's output: [batch, sequence, embed], as the residual stream is; arguments as of a call.

        Args:
            tokens, segments, positions, dropout: see there.
            execution: how.
            runs: bool[layers], past which layers x goes unchanged, where False. None: past none.
        """
        x, dropout = self.embed(tokens, positions, dropout, execution)
        return self.run(x, segments=segments, positions=positions, dropout=dropout, execution=execution, runs=runs)

    def embed(
        self, tokens: Array, positions: Array | None, dropout: Dropout | None, execution: Execution = PLAIN
    ) -> tuple[Array, Dropout | None]:
        """The residual stream before the first layer, and the dropout of `run`; arguments as of a call."""
        c, dtype, split = self.config, jnp.dtype(self.config.dtype), execution.sequence_parallel
        sequence = tokens.shape[1]
        if c.max_sequence is not None and sequence > c.max_sequence:
            raise ValueError(f"a sequence of {sequence} tokens is longer than the {c.max_sequence} learned positions")
        x = embedding.look_up(self.embedding.table[...], tokens, c, split)
        if c.embedding_scale is not None:
            x = x * jnp.asarray(c.embedding_scale, dtype)
        if self.positions is not None:
            positions = jnp.arange(sequence)[None] if positions is None else positions
            places = tensor.split_sequence(positions) if split else positions
            rows = self.positions.table[...][places].astype(dtype)
            known = (places >= 0) & (places < self.positions.table.shape[0])
            x = x + jnp.where(known[..., None], rows, jnp.nan)  # as for token ids: never a wrong vector
        dropout = self.dropout_of(dropout, execution)
        return (x if dropout is None else dropout(x, c.num_layers, site=2)), dropout

    @staticmethod
    def dropout_of(dropout: Dropout | None, execution: Execution) -> Dropout | None:
        """The dropout of the residual stream as `execution` splits it."""
        if dropout is None or not execution.sequence_parallel:
            return dropout
        columns = tensor.split_sequence(dropout.columns[None])[0]
        return Dropout(dropout.rate, dropout.key, dropout.rows, columns)

    def run(
        self,
        x: Array,
        *,
        segments: Array | None,
        positions: Array | None,
        dropout: Dropout | None,
        execution: Execution = PLAIN,
        layers: Array | None = None,
        runs: Array | None = None,
    ) -> Array:
        """The layers held here, one after another: x[batch, sequence, embed], as the residual stream is, to the same.

        Args:
            x: of `embed`, or of the layers before.
            segments, positions, dropout, execution, layers, runs: as of `stack`.
        """
        given = {"segments": segments, "positions": positions, "dropout": dropout}
        return self.stack(x, **given, execution=execution, layers=layers, runs=runs).run(x)

    def stack(
        self,
        x: Array,
        *,
        segments: Array | None,
        positions: Array | None,
        dropout: Dropout | None,
        execution: Execution = PLAIN,
        layers: Array | None = None,
        runs: Array | None = None,
    ) -> Stack:
        """The layers held here, taken apart.

        Args:
            x: like what they are to run on.
            segments, positions: as of a call.
            dropout: of `dropout_of`.
            execution: see there.
            layers: int32[layers held], which of the model's they are; None: all, in order.
            runs: bool[layers held], past which x goes unchanged, where False. None: past none.
        """
        c = self.config
        # Whole along the sequence, also where the residual stream is split: attention sees all of it.
        sequence = x.shape[1] * (tensor.parts() if execution.sequence_parallel else 1)
        places = jnp.arange(sequence)
        positions = places[None] if positions is None else positions
        windowed = any(w is not None for w in c.windows)
        rotary = self._rotations(positions, x.dtype)
        uniform = len(set(c.windows)) == 1  # the same in every layer: a constant, which fused attention kernels need

        def apply(block: Block, x: Array, inputs: dict[str, Array]) -> Array:
            window = (c.windows[0] if uniform else inputs["window"]) if windowed else None
            rotation = None
            if rotary:
                rotation = (
                    rotary[0] if len(rotary) == 1 else jax.tree.map(lambda *t: jnp.where(inputs["local"], *t), *rotary)
                )
            return block(x, Visibility(places, segments, window), rotation, dropout, inputs["layer"])

        far = jnp.iinfo(jnp.int32).max
        per_layer = {
            "layer": jnp.arange(c.num_layers),
            "window": jnp.array([far if w is None else w for w in c.windows], jnp.int32),
            "local": jnp.array([w is not None for w in c.windows]),
        }
        if layers is not None:
            per_layer = {name: table[layers] for name, table in per_layer.items()}
        return stack(self.layers, apply, per_layer, execution, runs)

    def extend(self, tokens: Array, counts: Array, cache: Cache, execution: Execution = PLAIN) -> tuple[Array, Cache]:
        """`hidden` of new tokens, of rows whose earlier tokens are in the cache; equal to that of the whole rows.

        Args:
            tokens: int32[batch, sequence].
            counts: int32[batch], how many of a row's tokens are real. They come first; what follows leaves no trace,
                and its results mean nothing.
            cache: of the earlier tokens; see `Cache.empty`.
            execution: see there; without sequence parallelism.

        Returns:
            [batch, sequence, embed], and the cache with the new tokens.
        """
        c = self.config
        new = jnp.arange(tokens.shape[1])
        # Padding has position 0, which learned positions have too.
        places = jnp.where(new < counts[:, None], cache.length[:, None] + new, 0)
        x, _ = self.embed(tokens, places, None, execution)
        rotary = self._rotations(places, x.dtype)

        def apply(block: Block, x: Array, state: tuple[Array, Array], kind: int, index: Array):
            rotation = rotary[-1 if cache.windows[kind] is None else 0] if rotary else None
            x, changed = block.extend(x, cache.layer(kind, index, *state, places, counts), rotation)
            return x, (changed.keys, changed.values)

        states = tuple(zip(cache.keys, cache.values, strict=True))
        kinds = [cache.windows.index(window) for window in c.windows]
        x, states = fold_layers(self.layers, x, states, apply, kinds, execution)
        keys, values = zip(*states, strict=True)
        return x, Cache(keys, values, cache.length + counts, cache.windows)

    def logits(self, x: Array) -> Array:
        """`hidden`'s result to logits over the padded vocabulary, or over the part of it that this device holds."""
        table = self.embedding if self.head is None else self.head
        return embedding.logits(table.table[...], self.final_norm(x), self.config)

    def _rotations(self, positions: Array, dtype: Any) -> list[tuple[Array, Array]]:
        """The rotation of every layer, or of the layers (with a window, without one) where these differ."""
        c = self.config
        if not isinstance(c.positions, Rope):
            return []
        wide = jnp.promote_types(dtype, jnp.float32)
        kinds = [c.positions] if c.local_positions is None else [c.local_positions, c.positions]
        return [rotations(rope, c.head_dim, positions, wide) for rope in kinds]


def parameter_dims(config: TransformerConfig, rows: np.ndarray | None = None) -> tuple[Any, dict, dict]:
    """The model's structure, and of each parameter its shape and the names of its dims; nothing is allocated.

    Args:
        config: the model.
        rows: as of `Transformer`.

    Returns:
        The NNX graph definition, and two nested dicts alike: `jax.ShapeDtypeStruct`s, and (shape, dims) pairs.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), rows=rows)))
    shapes = nnx.to_pure_dict(state)
    flat = {path: variable for path, variable in nnx.to_flat_state(state)}
    dims: dict[str, Any] = {}
    for path, variable in flat.items():
        node = dims
        for key in path[:-1]:
            node = node.setdefault(str(key), {})
        value = variable.get_value()
        node[str(path[-1])] = (tuple(value.shape), tuple(variable.get_metadata()["out_sharding"]))
    return graph, shapes, dims


def count_parameters(config: TransformerConfig) -> int:
    """Number of parameters, adapters included, padding of the vocabulary not counted."""
    _, shapes, _ = parameter_dims(config)
    padding = (config.padded_vocab_size - config.vocab_size) * config.d_model * (1 if config.tied else 2)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) - padding
