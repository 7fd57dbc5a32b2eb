"""The model on a layout, as generation runs it: new tokens in, logits and a longer cache out.

A program is manual over the whole mesh, as in training: the batch is split over data x fsdp, heads over tensor, and
with ZeRO-3 each layer's parameters are gathered where they are used, for every token again.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from shardlm._arguments import check_usable
from shardlm._errors import LayoutError
from shardlm._text import fold, size
from shardlm.layout import Layout
from shardlm.models.cache import Cache, kinds_of
from shardlm.models.config import TransformerConfig
from shardlm.models.kinds import require_config, require_params
from shardlm.parallel import tensor
from shardlm.train import engine, room
from shardlm.train.engine import Parameters, Plan, flatten, unflatten
from shardlm.train.program import require_devices, resolve
from shardlm.train.transformer import TransformerProgram

_TABLES = ("embedding/table", "head/table")
MAX_LENGTH = 2**31 - 1  # of a row: positions are int32


@dataclass(frozen=True, eq=False)
class ShardedModel:
    """A model on a layout; functions of (parameters, ...) on global arrays, to be called under `jax.jit`.

    Attributes:
        plan: how the parameters are split.
    """

    plan: Plan

    @classmethod
    def of(
        cls, config: TransformerConfig, layout: Layout | str | None = None, devices: Sequence[Any] | None = None
    ) -> "ShardedModel":
        """Plan `config` on `layout`, by default the first device; models that are equal share what is compiled.

        Raises:
            LayoutError: the layout does not fit the devices or the model, or has stages.
        """
        require_config(config)
        layout, found = resolve(layout, devices)
        if layout.pipe > 1:
            split = f"fsdp={layout.fsdp * layout.pipe}"
            others = [f"{axis}={n}" for axis, n in layout.sizes.items() if n > 1 and axis not in ("pipe", "fsdp")]
            raise LayoutError(
                f"generation runs no pipeline, and the layout {layout} has pipe={layout.pipe}: a token would wait for "
                f"all stages. Give a layout without it, such as {','.join([split, *others])}; the parameters may stay "
                "as they are, they are moved"
            )
        if layout.sequence_parallel:
            warnings.warn(
                "sequence_parallel has no effect in generation: a single token cannot be split along its sequence. The "
                "residual stream is whole on every device of the tensor axis",
                stacklevel=3,
            )
            layout = dataclasses.replace(layout, sequence_parallel=False)
        return _planned(config, layout, tuple(found) if not isinstance(found, int) else found)

    @property
    def config(self) -> TransformerConfig:
        """The model, its vocabulary padded as the layout needs."""
        return self.plan.config

    @property
    def layout(self) -> Layout:
        """The layout, its sizes filled in."""
        return self.plan.layout

    @property
    def cached_heads(self) -> int:
        """Key/value heads that the cache holds over all devices: those of the model, or one for each device."""
        return max(self.config.num_kv_heads, self.layout.tensor)

    def spec(self, *dims: str | None) -> PartitionSpec:
        """Of an array with these dims, each `batch`, `head`, `vocab` or None."""
        return PartitionSpec(*(self.plan.table.rules[dim] or None if dim else None for dim in dims))

    def sharding(self, *dims: str | None) -> NamedSharding:
        """Of an array with these dims."""
        return NamedSharding(self.plan.mesh, self.spec(*dims))

    def place(self, params: Parameters, cache: int = 0, what: str = "generation") -> Parameters:
        """Parameters on this layout, from any other or from the host; what is there already is not moved.

        Args:
            params: of `config`.
            cache: bytes of cache on each device, which must fit beside them.
            what: is to be done with them, for the error.

        Raises:
            ValueError: they are not those of `config`, or do not fit in memory.
        """
        require_devices(self.plan.mesh)
        check_usable(params)
        given, expected = _named(params), flatten(self.plan.shapes)
        problems = [f"{path} is missing" for path in expected if path not in given]
        problems += [f"{path} is not of the model" for path in given if path not in expected]
        for path in expected.keys() & given.keys():
            problems += self._problems(path, given[path], expected[path])
        if problems:
            raise ValueError(
                f"these parameters are not those of the configuration: {'; '.join(sorted(problems))}. Of a pipeline "
                "with chunks or uneven stages give trainer.in_order(state).params"
            )
        missing = sum(self._shard_bytes(path) for path in expected if not self._is_there(path, given[path]))
        needs = {"parameters not there yet": missing, "the cache": cache}
        hint = " Take fewer rows at a time (batch_size), shorter ones (max_length), more devices, or a smaller dtype"
        room.require(needs, list(self.plan.mesh.devices.flat), what, lambda _: hint)
        return unflatten({path: self._placed(path, given[path], expected[path].shape) for path in expected})

    def empty_cache(self, rows: int, max_length: int, added: int) -> Cache:
        """See `Cache.empty`; made under `jax.jit` with `cache_shardings`."""
        return Cache.empty(self.config, rows, self.cached_heads, max_length, added)

    @property
    def cache_specs(self) -> Cache:
        """The specs of a cache: rows over the batch's axes, heads over tensor."""
        windows = kinds_of(self.config.windows)
        arrays: Any = tuple(self.spec(None, "batch", "head") for _ in windows)
        length: Any = self.spec("batch")
        return Cache(arrays, arrays, length, windows)

    @property
    def cache_shardings(self) -> Cache:
        """The shardings of a cache."""
        return jax.tree.map(
            lambda s: NamedSharding(self.plan.mesh, s), self.cache_specs, is_leaf=lambda s: isinstance(s, PartitionSpec)
        )

    def extend(self, params: Parameters, tokens: Array, counts: Array, cache: Cache) -> tuple[Array, Cache]:
        """Add tokens to the rows.

        Args:
            params: as `place` gives them.
            tokens: int32[batch, sequence].
            counts: int32[batch], how many of each row's are real; they come first.
            cache: of the earlier tokens.

        Returns:
            Logits after each row's last real token, [batch_B, vocab], whole along the vocabulary on every device; they
            mean nothing for a row without one. And the cache.
        """

        def last(model: Any, hidden: Array, counts: Array) -> Array:
            at = jnp.maximum(counts - 1, 0)[:, None, None]
            return model.logits(jnp.take_along_axis(hidden, at, axis=1))[:, 0]

        logits, cache = self._run(params, tokens, counts, cache, counts, last, self.spec("batch", "vocab"))
        whole = jax.lax.with_sharding_constraint(logits, self.sharding("batch"))
        return whole[:, : self.config.vocab_size], cache

    def pick(self, cache: Cache, parents: Array) -> Cache:
        """The cache in which the rows of each group are those of its rows at `parents`[groups, rows of a group].

        A group is rows that stand together, on one device: the beams of a prompt.
        """

        def local(cache: Cache, parents: Array) -> Cache:
            groups, size = parents.shape
            rows = (jnp.arange(groups)[:, None] * size + parents).reshape(-1)
            keys, values = ([jnp.take(x, rows, axis=1) for x in part] for part in (cache.keys, cache.values))
            return Cache(tuple(keys), tuple(values), cache.length[rows], cache.windows)

        specs = (self.cache_specs, self.spec("batch"))
        return jax.shard_map(local, mesh=self.plan.mesh, in_specs=specs, out_specs=specs[0])(cache, parents)

    def score(
        self, params: Parameters, tokens: Array, targets: Array, counts: Array, cache: Cache
    ) -> tuple[Array, Array, Cache]:
        """Add tokens to the rows, and judge a target after each of them.

        Args:
            params, tokens, counts, cache: as of `extend`.
            targets: int32[batch, sequence], ids of the vocabulary.

        Returns:
            [batch_B, sequence] both: the target's log-probability, and whether it is the likeliest token; of real
            tokens, the others mean nothing. And the cache.
        """

        def judged(model: Any, hidden: Array, targets: Array) -> tuple[Array, Array]:
            logits = model.logits(hidden)
            return -tensor.cross_entropy(logits, targets), tensor.likeliest(logits) == targets

        spec = (self.spec("batch"), self.spec("batch"))
        (log_probabilities, greedy), cache = self._run(params, tokens, counts, cache, targets, judged, spec)
        return log_probabilities, greedy, cache

    def _run(self, params, tokens, counts, cache, beside: Array, finish: Any, out_spec: Any) -> tuple[Any, Cache]:
        """`finish(model, hidden, beside)` of the new tokens' hidden states, and the cache."""

        def local(params: Parameters, tokens: Array, counts: Array, beside: Array, cache: Cache):
            model, execution = engine.held(self.plan, params)
            hidden, cache = model.extend(tokens, counts, cache, execution)
            return finish(model, hidden, beside), cache

        stored = unflatten({path: split.stored for path, split in self.plan.splits.items()})
        row = self.spec("batch")
        run = jax.shard_map(
            local,
            mesh=self.plan.mesh,
            in_specs=(stored, row, row, row, self.cache_specs),
            out_specs=(out_spec, self.cache_specs),
        )
        return run(params, tokens, counts, beside, cache)

    def describe(self, rows: int, max_length: int, added: int) -> str:
        """What a device keeps while it generates `rows` rows of up to `max_length` tokens."""
        c, layout = self.config, self.layout
        cache = jax.eval_shape(lambda: self.empty_cache(rows, max_length, added))
        held, params = self.cache_bytes(rows, max_length, added), sum(map(self._shard_bytes, flatten(self.plan.shapes)))
        kinds = [
            f"{keys.shape[0]} layers {'without a window' if window is None else f'with a window of {window}'} keep "
            f"{keys.shape[3]} tokens"
            for window, keys in zip(cache.windows, cache.keys, strict=True)
        ]
        lines = [
            f"generation on {layout}: {rows} rows, {rows // layout.batch_shards} on each device, of up to {max_length} "
            "tokens",
            f"on each device {size(params)} of parameters and {size(held)} of cache ({c.dtype}); " + ", ".join(kinds),
        ]
        if layout.tensor > c.num_kv_heads:
            copies = layout.tensor // c.num_kv_heads
            lines.append(
                f"kv heads {c.num_kv_heads} < tensor {layout.tensor}: each is cached {copies} times, once for each "
                f"device whose queries use it: {size(held * layout.tensor)} of cache over the tensor axis for "
                f"{size(held * c.num_kv_heads)} of different numbers"
            )
        if layout.zero == 3 and layout.fsdp > 1:
            lines.append(
                f"zero=3: the parameters are gathered over fsdp={layout.fsdp} for every token again; with zero=2 they "
                "are kept whole"
            )
        return "\n".join(map(fold, lines))

    def cache_bytes(self, rows: int, max_length: int, added: int) -> int:
        """Bytes of the cache's keys and values on each device; ValueError where rows are too long to be counted."""
        if max_length > MAX_LENGTH:
            raise ValueError(
                f"rows of {max_length:,} tokens of prompt and continuation, whose positions are counted up to "
                f"{MAX_LENGTH:,}: ask for less with max_new_tokens or max_length"
            )
        cache = jax.eval_shape(lambda: self.empty_cache(rows, max_length, added))
        whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*cache.keys, *cache.values))
        return whole // (self.layout.batch_shards * self.layout.tensor)

    def _shard_bytes(self, path: str) -> int:
        leaf = flatten(self.plan.shapes)[path]
        sharding = NamedSharding(self.plan.mesh, self.plan.splits[path].stored)
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    def _is_there(self, path: str, x: Any) -> bool:
        sharding = NamedSharding(self.plan.mesh, self.plan.splits[path].stored)
        return isinstance(x, Array) and x.shape == flatten(self.plan.shapes)[path].shape and x.sharding == sharding

    def _problems(self, path: str, given: Any, expected: jax.ShapeDtypeStruct) -> list[str]:
        shape, dtype = np.shape(given), getattr(given, "dtype", None)
        if dtype is None:
            return [f"{path} is a {type(given).__name__}, not an array"]
        rows_free = path in _TABLES and len(shape) == 2 and shape[0] >= self.config.vocab_size
        wanted = (shape[0], expected.shape[1]) if rows_free else expected.shape
        problems = [] if shape == wanted else [f"{path} has shape {shape}, expected {expected.shape}"]
        if dtype != expected.dtype:
            problems.append(
                f"{path} is {dtype}, and param_dtype={self.config.param_dtype!r}: cast it, or change the configuration"
            )
        return problems

    def _placed(self, path: str, x: Any, shape: tuple[int, ...]) -> Array:
        sharding = NamedSharding(self.plan.mesh, self.plan.splits[path].stored)
        if x.shape != shape:  # another layout's padding of the vocabulary
            x = np.asarray(x)[: self.config.vocab_size]
            x = np.pad(x, ((0, shape[0] - x.shape[0]), (0, 0)))
        if isinstance(x, Array) and x.sharding == sharding:
            return x
        if jax.process_count() > 1 and not isinstance(x, Array):
            return jax.make_array_from_callback(shape, sharding, lambda index: x[index])
        return jax.block_until_ready(jax.device_put(x, sharding))


@functools.lru_cache(maxsize=32)
def _planned(config: TransformerConfig, layout: Layout, devices: tuple[Any, ...]) -> ShardedModel:
    program = TransformerProgram.of(config, layout, devices, "manual")
    return ShardedModel(program.plan)


def _named(params: Any) -> dict[str, Any]:
    return flatten(require_params(params))
