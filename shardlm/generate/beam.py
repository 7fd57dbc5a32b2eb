"""Beam search: the likeliest continuation found by keeping several at each length.

The score of a finished continuation of n tokens is (sum of its log-probabilities) / n ** length_penalty. Which beams
run on, which are finished and when to stop are those of transformers' beam search (`GenerationMixin._beam_search` in
`generation/utils.py`, version 5): of the best `keep` continuations of all running beams, those that end are finished
if they are among the best `beams`, and the best of the others run on.

Shape letters: Prompts, Beams, Vocabulary, Candidates, New tokens. All beams of a prompt are on the same device.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from shardlm._errors import is_int
from shardlm.generate.loop import NONE
from shardlm.generate.model import ShardedModel
from shardlm.generate.requests import Request
from shardlm.models.cache import Cache
from shardlm.train.engine import Parameters

_STEEPEST = 8  # exponent of a length, in float32
_NEVER = -1e9  # the score of what may not be chosen; finite, as transformers has it


@dataclass(frozen=True, kw_only=True)
class Beam:
    """How to search.

    Attributes:
        beams: kept for each prompt, at least 2.
        length_penalty: exponent of the length by which a score is divided; above 0 favours long continuations.
        early_stopping: True stops at `beams` finished continuations; False when the best running beam, at its present
            length, cannot enter the best `beams` any more; "never" when it cannot at any length.

    Raises:
        ValueError: one of them is out of range.
    """

    beams: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self):
        problems = []
        if not is_int(self.beams) or self.beams < 2:
            problems.append(f"num_beams={self.beams!r} is not a whole number from 2 (1 is no beam search)")
        number = isinstance(self.length_penalty, int | float) and not isinstance(self.length_penalty, bool)
        if not number or not -_STEEPEST <= self.length_penalty <= _STEEPEST:
            problems.append(f"length_penalty={self.length_penalty!r} is not a number from {-_STEEPEST} to {_STEEPEST}")
        if self.early_stopping not in (True, False, "never"):
            problems.append(f"early_stopping={self.early_stopping!r} is not True, False or 'never'")
        if problems:
            raise ValueError("; ".join(problems))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("tokens", "scores", "best", "best_scores", "lengths", "finished", "promising", "open", "made"),
    meta_fields=(),
)
@dataclass(frozen=True)
class Beams:
    """The beams of all prompts.

    Attributes:
        tokens, scores: [prompts, beams, new] and [prompts, beams], of those that run, best first.
        best, best_scores, lengths, finished: of the best finished ones, best first; `finished` is False where there is
            none yet.
        promising: bool[prompts], a running beam can still enter the best.
        open: bool[prompts], the search goes on.
        made: int32 scalar, tokens that running beams have.
    """

    tokens: Array
    scores: Array
    best: Array
    best_scores: Array
    lengths: Array
    finished: Array
    promising: Array
    open: Array
    made: Array

    @classmethod
    def start(cls, prompts: int, beams: int, new: int, dtype: Any = jnp.float32) -> "Beams":
        """One running beam of each prompt, without a token."""
        scores = jnp.full((prompts, beams), _NEVER, dtype)
        tokens, yes = jnp.full((prompts, beams, new), NONE, jnp.int32), jnp.ones(prompts, bool)
        lengths, finished = jnp.zeros((prompts, beams), jnp.int32), jnp.zeros((prompts, beams), bool)
        return cls(tokens, scores.at[:, 0].set(0), tokens, scores, lengths, finished, yes, yes, jnp.int32(0))


def advance(
    beams: Beams, log_probabilities: Array, eos: Array, limits: Array, options: Beam, keep: int
) -> tuple[Beams, Array]:
    """Add a token to every beam.

    Args:
        beams: as they are.
        log_probabilities: [prompts, beams, vocabulary], of the next token of each running beam.
        eos: int32[n], tokens that end a continuation.
        limits: int32[prompts], tokens that a continuation may have.
        options: see there.
        keep: continuations to look at, at least twice the beams, so that enough are left when the best ones end.

    Returns:
        The beams, and of which beam each running one is a continuation: int32[prompts, beams]. A prompt whose search is
        over stays as it is.
    """
    prompts, count, vocabulary = log_probabilities.shape
    made = beams.made + 1
    total = (beams.scores[:, :, None] + log_probabilities).reshape(prompts, -1)
    scores_PC, index_PC = jax.lax.top_k(total, min(keep, total.shape[1]))
    parents_PC, token_PC = index_PC // vocabulary, (index_PC % vocabulary).astype(jnp.int32)
    tokens_PCN = _take(beams.tokens, parents_PC).at[:, :, beams.made].set(token_PC)
    ends_PC = (token_PC[:, :, None] == eos).any(axis=-1) | (made >= limits)[:, None]

    scores, running = jax.lax.top_k(scores_PC + ends_PC * _NEVER, count)

    done_PC = ends_PC & (jnp.arange(scores_PC.shape[1]) < count)
    full = beams.finished.all(axis=1) & (options.early_stopping is True)
    barred_PC = (full | ~beams.promising)[:, None].astype(scores.dtype) + ~done_PC
    length = made.astype(scores.dtype)
    new = scores_PC / length**options.length_penalty + barred_PC * _NEVER
    best_scores, chosen = jax.lax.top_k(jnp.concatenate([beams.best_scores, new], axis=1), count)

    def merged(old: Array, new: Array) -> Array:
        return _take(jnp.concatenate([old, new], axis=1), chosen)

    finished = merged(beams.finished, done_PC)
    lengths = merged(beams.lengths, jnp.broadcast_to(made, done_PC.shape))
    longest = options.early_stopping == "never" and options.length_penalty > 0
    reach = limits.astype(scores.dtype) if longest else length
    hope = scores[:, 0] / reach**options.length_penalty
    worst = jnp.where(finished, best_scores.min(axis=1, keepdims=True), _NEVER)
    promising = beams.promising & (hope[:, None] > worst).any(axis=1)
    is_open = promising & ~ends_PC.all(axis=1)
    if options.early_stopping is True:
        is_open = is_open & ~finished.all(axis=1)
    best = merged(beams.best, tokens_PCN)
    after = Beams(_take(tokens_PCN, running), scores, best, best_scores, lengths, finished, promising, is_open, made)

    def still(new: Array, old: Array) -> Array:
        return jnp.where(beams.open.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    kept = {f.name: still(getattr(after, f.name), getattr(beams, f.name)) for f in dataclasses.fields(beams)[:-1]}
    return Beams(**kept, made=made), still(
        _take(parents_PC, running), jnp.broadcast_to(jnp.arange(count), scores.shape)
    )


@dataclass(frozen=True, eq=False)
class Search:
    """What is compiled for a model and a way of searching.

    Attributes:
        model: on its layout.
        prompts: at a time; each has `options.beams` rows of the batch.
        max_length: tokens of a row.
        chunk: prompt tokens added at a time.
        new: room for new tokens.
        options: see there.
        keep: see `advance`.
    """

    model: ShardedModel
    prompts: int
    max_length: int
    chunk: int
    new: int
    options: Beam
    keep: int

    @property
    def rows(self) -> int:
        """Of the batch."""
        return self.prompts * self.options.beams

    @functools.cached_property
    def start(self) -> Any:
        """() -> (an empty cache, logits to be filled in)."""
        dtype = jnp.promote_types(self.model.config.dtype, jnp.float32)
        shape = (self.rows, self.model.config.vocab_size)

        def empty() -> tuple[Cache, Array]:
            return self.model.empty_cache(self.rows, self.max_length, self.chunk), jnp.zeros(shape, dtype)

        return jax.jit(empty, out_shardings=(self.model.cache_shardings, self.model.sharding("batch")))

    @functools.cached_property
    def prefill(self) -> Any:
        """(params, cache, logits, tokens, counts) -> (cache, logits), which are renewed in rows that have tokens."""

        def run(params: Parameters, cache: Cache, logits: Array, tokens: Array, counts: Array):
            new, cache = self.model.extend(params, tokens, counts, cache)
            return cache, jnp.where((counts > 0)[:, None], new, logits)

        out = (self.model.cache_shardings, self.model.sharding("batch"))
        return jax.jit(run, donate_argnums=(1, 2), out_shardings=out)

    @functools.cached_property
    def search(self) -> Any:
        """(params, cache, logits, eos, limits) -> (the beams when all searches are over, the cache's memory)."""
        out = (self.model.sharding(), self.model.cache_shardings)
        return jax.jit(self._search, donate_argnums=1, out_shardings=out)

    def _search(self, params: Parameters, cache: Cache, logits: Array, eos: Array, limits: Array):
        count = self.options.beams

        def step(beams: Beams, logits: Array) -> tuple[Beams, Array]:
            log_probabilities = jax.nn.log_softmax(logits, axis=-1).reshape(self.prompts, count, -1)
            return advance(beams, log_probabilities, eos, limits, self.options, self.keep)

        def body(carry: tuple[Beams, Cache, Array]):
            beams, cache, parents = carry
            last = jax.lax.dynamic_index_in_dim(beams.tokens, beams.made - 1, axis=2, keepdims=False)
            counts = jnp.repeat(beams.open.astype(jnp.int32), count)
            cache = self.model.pick(cache, parents)
            logits, cache = self.model.extend(params, last.reshape(-1, 1), counts, cache)
            beams, parents = step(beams, logits)
            return beams, cache, parents

        beams, parents = step(Beams.start(self.prompts, count, self.new, logits.dtype), logits)
        return jax.lax.while_loop(lambda carry: carry[0].open.any(), body, (beams, cache, parents))[:2]


@functools.lru_cache(maxsize=32)
def searches(
    model: ShardedModel, prompts: int, max_length: int, chunk: int, new: int, options: Beam, keep: int
) -> Search:
    """The search with these settings, compiled once."""
    return Search(model, prompts, max_length, chunk, new, options, keep)


@dataclass(frozen=True)
class Found:
    """What a search found for one prompt.

    Attributes:
        beams: the finished continuations, int32[n] each, best first.
        scores: theirs.
        prefill_seconds, search_seconds: spent on its batch.
    """

    beams: tuple[np.ndarray, ...]
    scores: tuple[float, ...]
    prefill_seconds: float
    search_seconds: float


def find(search: Search, params: Parameters, requests: Sequence[Request], eos: np.ndarray, run: Any) -> list[Found]:
    """Search for up to `search.prompts` requests at once; `run` calls a compiled function."""
    count, began = search.options.beams, time.perf_counter()
    prompts = [request.prompt for request in requests] + [requests[0].prompt] * (search.prompts - len(requests))
    limits = np.array([r.limit for r in requests] + [1] * (search.prompts - len(requests)), np.int32)
    cache, logits = run(search.start)
    for first in range(0, max(map(len, prompts)), search.chunk):
        parts = [prompt[first : first + search.chunk] for prompt in prompts]
        tokens = np.zeros((search.prompts, search.chunk), np.int32)
        for i, part in enumerate(parts):
            tokens[i, : len(part)] = part
        counts = np.array([len(part) for part in parts], np.int32)
        cache, logits = run(
            search.prefill, params, cache, logits, np.repeat(tokens, count, 0), np.repeat(counts, count)
        )
    jax.block_until_ready(logits)
    middle = time.perf_counter()
    beams = jax.device_get(run(search.search, params, cache, logits, eos, limits)[0])
    if not np.isfinite(beams.best_scores).all() or not beams.finished[:, 0].all():
        raise ArithmeticError("the model's logits are not numbers: its parameters hold NaN or infinity")
    times = (middle - began, time.perf_counter() - middle)
    result = []
    for i in range(len(requests)):
        number = int(beams.finished[i].sum())  # they come first
        best = tuple(beams.best[i, j, : beams.lengths[i, j]] for j in range(number))
        result.append(Found(best, tuple(beams.best_scores[i, :number].tolist()), *times))
    return result


def _take(x: Array, index: Array) -> Array:
    """x[prompts, many, ...] at index[prompts, some]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
