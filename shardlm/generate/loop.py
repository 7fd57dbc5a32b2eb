"""The two compiled programs of generation: a chunk of prompts, and a loop of single tokens on the device.

All rows of a batch go together, each at its own length. `prefill` adds up to `chunk` tokens of new requests to their
rows, while rows that are already generating get their next token in the same pass; `decode` gives every unfinished row
one token after another until a number of steps is done or few enough rows are left. Both take the state and give it
back in the same memory. Shapes depend on the number of rows, the longest length and the chunk alone.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from shardlm.generate import sampling
from shardlm.generate.model import ShardedModel
from shardlm.models.cache import Cache
from shardlm.runtime.begin import begin, spans_processes
from shardlm.train.engine import Parameters

STEPS = 64  # the most tokens of a row that one call of `decode` makes
NONE = -1  # in place of a token


def _data(cls: type) -> Any:
    names = tuple(field.name for field in dataclasses.fields(cls))
    return jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=())


@_data
@dataclass(frozen=True)
class State:
    """What the devices hold between calls; arrays [batch], rows split as the batch is.

    Attributes:
        cache: of all tokens but the last.
        last: int32, the token made last.
        made: int32, tokens made so far.
        limit: int32, how many to make.
        seed: uint32, of the request.
        done: bool, nothing more to make; a row without a request is done.
        seen: bool[batch, vocab], tokens of the prompt or the continuation; None without a repetition penalty.
    """

    cache: Cache
    last: Array
    made: Array
    limit: Array
    seed: Array
    done: Array
    seen: Array | None


@_data
@dataclass(frozen=True)
class Fresh:
    """What a call of `prefill` brings, arrays [batch].

    Attributes:
        tokens: int32[batch, chunk], the next part of a row's prompt.
        counts: int32, how many of them are real; 0 for rows that are not being filled.
        starts: bool, the row begins a new request.
        ends: bool, the prompt ends here: the first token of the continuation follows.
        seed, limit: of the new request, where `starts`.
    """

    tokens: Any
    counts: Any
    starts: Any
    ends: Any
    seed: Any
    limit: Any


@_data
@dataclass(frozen=True)
class Output:
    """What a call made, on the host and every device: arrays [batch, steps], `NONE` where a row made no token.

    Attributes:
        tokens: int32.
        log_probabilities: float32, of the tokens under the model itself: log softmax of its logits, before penalties,
            temperature and filters.
        top_tokens, top_log_probabilities: [batch, steps, top], the likeliest tokens under the model.
    """

    tokens: Array
    log_probabilities: Array
    top_tokens: Array
    top_log_probabilities: Array


@dataclass(frozen=True, eq=False)
class Programs:
    """What is compiled for a model and a way of choosing tokens.

    Attributes:
        model: on its layout.
        rows: of the batch.
        max_length: tokens of a row, prompt and continuation.
        chunk: prompt tokens of a row that `prefill` adds at a time.
        kind: of a `Sampling`.
        top: how many of the likeliest tokens to tell with each.
    """

    model: ShardedModel
    rows: int
    max_length: int
    chunk: int
    kind: tuple[str, ...]
    top: int

    @functools.cached_property
    def start(self) -> Any:
        """() -> the state of rows without requests."""

        def empty() -> State:
            def zeros(dtype: Any) -> Array:
                return jnp.zeros(self.rows, dtype)

            cache = self.model.empty_cache(self.rows, self.max_length, self.chunk)
            penalised = "repetition_penalty" in self.kind
            seen = jnp.zeros((self.rows, self.model.config.vocab_size), bool) if penalised else None
            done = jnp.ones(self.rows, bool)
            return State(cache, zeros(jnp.int32), zeros(jnp.int32), zeros(jnp.int32), zeros(jnp.uint32), done, seen)

        return jax.jit(empty, out_shardings=self._state_shardings)

    @functools.cached_property
    def prefill(self) -> Any:
        """(params, state, fresh, stopped, eos, values) -> (state, output of one step); arguments as of `decode`."""
        return jax.jit(self._prefill, donate_argnums=1, out_shardings=(self._state_shardings, self.model.sharding()))

    @functools.cached_property
    def decode(self) -> Any:
        """(params, state, stopped, eos, values, steps, leave) -> (state, output).

        params: of `model.place`. stopped: bool[batch], rows that are to stop here. eos: int32[n], tokens that end a
        row. values: of a `Sampling`. steps: at most so many tokens of a row, up to `STEPS`. leave: return once no more
        than so many rows are unfinished.
        """
        return jax.jit(self._decode, donate_argnums=1, out_shardings=(self._state_shardings, self.model.sharding()))

    @property
    def _state_shardings(self) -> State:
        row = self.model.sharding("batch")
        seen = row if "repetition_penalty" in self.kind else None
        return State(self.model.cache_shardings, row, row, row, row, row, seen)

    def _prefill(self, params: Parameters, state: State, fresh: Fresh, stopped: Array, eos: Array, values: Any):
        starts, filling = fresh.starts, fresh.counts > 0
        state = dataclasses.replace(
            state,
            cache=dataclasses.replace(state.cache, length=jnp.where(starts, 0, state.cache.length)),
            made=jnp.where(starts, 0, state.made),
            limit=jnp.where(starts, fresh.limit, state.limit),
            seed=jnp.where(starts, fresh.seed, state.seed),
            done=jnp.where(starts, False, state.done | stopped),
            seen=None if state.seen is None else state.seen & ~starts[:, None],
        )
        others = ~filling & ~state.done
        if state.seen is not None:
            real = jnp.arange(fresh.tokens.shape[1]) < fresh.counts[:, None]
            state = dataclasses.replace(state, seen=_mark(state.seen, fresh.tokens, real))
        first = jnp.where(filling, fresh.tokens[:, 0], state.last)
        tokens = fresh.tokens.at[:, 0].set(first)
        counts = jnp.where(others, 1, fresh.counts)
        state, made = self._advance(params, state, tokens, counts, fresh.ends | others, eos, values)
        return state, jax.tree.map(lambda x: x[:, None], made)

    def _decode(
        self, params: Parameters, state: State, stopped: Array, eos: Array, values: Any, steps: Array, leave: Array
    ):
        state = dataclasses.replace(state, done=state.done | stopped)

        def unfinished(carry: tuple[Array, State, Output]) -> Array:
            i, state, _ = carry
            return (i < steps) & ((~state.done).sum() > leave)

        def body(carry: tuple[Array, State, Output]):
            i, state, output = carry
            active = ~state.done
            counts = active.astype(jnp.int32)
            state, made = self._advance(params, state, state.last[:, None], counts, active, eos, values)
            put = jax.tree.map(lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, i, 1), output, made)
            return i + 1, state, put

        start = (jnp.zeros((), jnp.int32), state, self._nothing(STEPS))
        return jax.lax.while_loop(unfinished, body, start)[1:]

    def _advance(
        self, params: Parameters, state: State, tokens: Array, counts: Array, choosing: Array, eos: Array, values: Any
    ) -> tuple[State, Output]:
        """Add tokens to the rows, and choose the next one of those rows that are `choosing`: [batch] of everything."""
        logits, cache = self.model.extend(params, tokens, counts, state.cache)
        with jax.named_scope("choose"):
            token = sampling.choose(logits, state.seen, state.seed, state.made, self.kind, values)
            log_probabilities = jax.nn.log_softmax(logits, axis=-1)
            chosen = jnp.take_along_axis(log_probabilities, token[:, None], axis=-1)[:, 0]
            best, ids = jax.lax.top_k(log_probabilities, self.top)
        made = state.made + choosing
        ended = (token[:, None] == eos).any(axis=-1) | (made >= state.limit)
        output = Output(
            jnp.where(choosing, token, NONE),
            jnp.where(choosing, chosen, 0).astype(jnp.float32),
            jnp.where(choosing[:, None], ids, NONE).astype(jnp.int32),
            best.astype(jnp.float32),
        )
        state = dataclasses.replace(
            state,
            cache=cache,
            last=jnp.where(choosing, token, state.last),
            made=made,
            done=state.done | (choosing & ended),
            seen=None if state.seen is None else _mark(state.seen, token[:, None], choosing[:, None]),
        )
        return state, output

    def _nothing(self, steps: int) -> Output:
        ids, numbers = (self.rows, steps), (self.rows, steps, self.top)
        return Output(
            jnp.full(ids, NONE, jnp.int32), jnp.zeros(ids, jnp.float32),
            jnp.full(numbers, NONE, jnp.int32), jnp.zeros(numbers, jnp.float32),
        )  # fmt: skip

    def run(self, function: Any, *arguments: Any) -> Any:
        """Call a compiled function; on several CPU devices, return when all of its results are there.

        XLA's CPU backend may stand still when programs with collectives overlap.
        """
        mesh: Any = self.model.plan.mesh
        if spans_processes(mesh) and hasattr(function, "trace"):
            begin("generate", function, arguments, lambda: {"model": repr(self.model.config)})
        result = function(*arguments)
        if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
            jax.block_until_ready(result)
        return result


@functools.lru_cache(maxsize=64)
def programs(
    model: ShardedModel, rows: int, max_length: int, chunk: int, kind: tuple[str, ...] = (), top: int = 0
) -> Programs:
    """The programs with these settings, compiled once."""
    return Programs(model, rows, max_length, chunk, kind, top)


def fresh(rows: int, chunk: int) -> Fresh:
    """A `Fresh` that brings nothing, as NumPy arrays to be written to."""
    return Fresh(
        np.zeros((rows, chunk), np.int32), np.zeros(rows, np.int32), np.zeros(rows, bool), np.zeros(rows, bool),
        np.zeros(rows, np.uint32), np.zeros(rows, np.int32),
    )  # fmt: skip


def _mark(seen: Array, tokens: Array, real: Array) -> Array:
    """`seen`[batch, vocab] with the real ones of tokens[batch, n] marked."""
    columns = jnp.where(real, tokens, seen.shape[1])
    return seen.at[jnp.arange(seen.shape[0])[:, None], columns].set(True, mode="drop")
