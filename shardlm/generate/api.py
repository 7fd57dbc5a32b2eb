"""`sl.generate`: prompts to continuations, on any layout."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardlm._errors import LayoutError, is_int
from shardlm.generate import batching
from shardlm.generate.beam import Beam, find, searches
from shardlm.generate.encode import check_tokenizer, special_ids
from shardlm.generate.loop import STEPS, Programs, programs
from shardlm.generate.model import ShardedModel
from shardlm.generate.requests import Request, end_tokens, requests
from shardlm.generate.result import Completion, Generation, Piece
from shardlm.generate.sampling import Sampling
from shardlm.generate.text import Detokenizer, stop_strings, stopper
from shardlm.layout import Layout
from shardlm.models.config import TransformerConfig
from shardlm.models.kinds import require_config
from shardlm.train.engine import Parameters

_MOST_ROWS = 64  # of a batch whose size is not given
_STOP_BURST = 8  # tokens between two looks for a stop string


def generate(
    config: TransformerConfig,
    params: Parameters,
    prompts: Sequence[Any],
    layout: Layout | str | None = None,
    *,
    max_new_tokens: int | Sequence[int] = 128,
    tokenizer: Any = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seeds: int | Sequence[int] = 0,
    eos: int | Sequence[int] | None = None,
    stop: str | Sequence[str] | None = None,
    logprobs: bool | int = False,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    stream: bool = False,
    stream_every: int = 4,
    batch_size: int | None = None,
    max_length: int | None = None,
    prefill_chunk: int = 64,
    devices: Sequence[Any] | None = None,
) -> Any:
    """Continue prompts, with a cache of keys and values that is split as the layout says.

    Rows of a batch are split over data x fsdp, heads and vocabulary over tensor. A request's continuation depends on
    its prompt, its seed and the settings, to the rounding of logits, and neither on the layout nor on the other
    requests: the draw of its n-th token is a function of (seed, n). Prompts are taken in `prefill_chunk` tokens at a
    time; more prompts than rows wait, and take the row of whichever request is finished first, without compiling
    anything again. Attention is computed in plain XLA, whatever `config.attention.implementation` says.

    Args:
        config: the model.
        params: its parameters, such as `state.params`, from any layout or from the host.
        prompts: a list of prompts of any lengths, each a list or array of token ids, or a string.
        layout: a `Layout` or its text, without `pipe`; default one device. Settings of training alone (accumulate,
            remat, reduce_gradients) are not looked at, and `sequence_parallel` is left out with a warning.
        max_new_tokens: of all requests, or of each.
        tokenizer: has `encode` (to ids, or to an object with `ids`) and `decode`; for prompts, texts and `stop`.
            Prompts get what it puts around a text, such as the id that begins one, unless they begin with that id's
            text, as those of a chat template do.
        temperature: 0, the default, takes the likeliest token; otherwise logits are divided by it.
        top_k, top_p, min_p, repetition_penalty: see `Sampling`.
        seeds: of each request, from 0 to 2**32 - 1; a number s gives prompt i the seed s + i.
        eos: one id or several that end a continuation, () for none; default those that the tokenizer names (`ends`,
            `eos_token_id` or `end`).
        stop: strings that end a continuation where its text has one, or where it has the special token of this text;
            needs a tokenizer.
        logprobs: True for the log-probability of every token; a number k for the k likeliest tokens besides.
        num_beams: more than 1 search for the likeliest continuation with so many beams, which takes as many rows for
            each prompt; without sampling, penalty, stop strings, logprobs and streaming.
        length_penalty, early_stopping: of the search; see `beam.Beam`.
        stream: return an iterator of `Piece`s as they are made, and not a `Generation`.
        stream_every: tokens of a row in a piece, at most 64.
        batch_size: rows, a multiple of data x fsdp; default as many as there are prompts, rounded up, at most 64.
        max_length: tokens of prompt and continuation for which the cache has room; default what the requests need,
            rounded up so that requests of similar lengths share what is compiled.
        prefill_chunk: prompt tokens of a row in one pass.
        devices: default all of `jax.devices()`, or the first one without a layout.

    Returns:
        A `Generation`, or with `stream` an iterator of `Piece`s.

    Raises:
        LayoutError: the layout does not fit model, devices or batch, or has stages.
        ValueError, TypeError: something else does not fit; one error for all prompts.

    Example:
        >>> result = sl.generate(config, state.params, [[1, 2, 3], [4]], max_new_tokens=8)
        >>> result.tokens, result.tokens_per_second
    """
    require_config(config)
    chosen = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    top = _top(logprobs, config)
    for name, value, most in (("stream_every", stream_every, STEPS), ("prefill_chunk", prefill_chunk, None)):
        if not is_int(value) or value < 1 or (most is not None and value > most):
            raise ValueError(f"{name}={value!r} is not a whole number from 1" + (f" to {most}" if most else ""))
    options = None
    if num_beams != 1 or isinstance(num_beams, bool) or (length_penalty, early_stopping) != (1.0, False):
        options = Beam(beams=num_beams, length_penalty=length_penalty, early_stopping=early_stopping)
        without = {"sampling or a penalty": chosen.kind, "logprobs": logprobs, "stop": stop, "stream": stream}
        if wrong := [name for name, given in without.items() if given]:
            raise ValueError(f"num_beams={num_beams} goes without {', '.join(wrong)}: leave them out")
    job = prepare(
        config, params, prompts, layout, max_new_tokens=max_new_tokens, tokenizer=tokenizer, seeds=seeds, eos=eos,
        stop=stop, batch_size=batch_size, max_length=max_length, chunk=prefill_chunk, devices=devices,
        beams=1 if options is None else options.beams,
    )  # fmt: skip
    if options is not None:
        return _searched(job, options)
    compiled = programs(job.model, job.rows, job.max_length, job.chunk, chosen.kind, top)
    if stream:
        return _stream(job, compiled, chosen, stream_every)
    return _collect(job, compiled, chosen, bool(logprobs), top)


@dataclass(frozen=True)
class Job:
    """Checked arguments: what is to be made, and on what.

    Attributes:
        model, params: on the layout.
        requests: one for each prompt.
        eos: int32[n], ids that end a continuation.
        detokenizer: None without a tokenizer.
        rows, max_length, chunk: the static shapes.
    """

    model: ShardedModel
    params: Parameters
    requests: list[Request]
    eos: np.ndarray
    detokenizer: Detokenizer | None
    rows: int
    max_length: int
    chunk: int


def prepare(
    config: TransformerConfig,
    params: Parameters,
    prompts: Sequence[Any],
    layout: Layout | str | None,
    *,
    max_new_tokens: int | Sequence[int],
    tokenizer: Any = None,
    seeds: int | Sequence[int] = 0,
    eos: int | Sequence[int] | None = None,
    stop: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    chunk: int,
    beams: int = 1,
    devices: Sequence[Any] | None = None,
) -> Job:
    """Check everything, and put the parameters where they are needed; arguments and errors as of `generate`."""
    check_tokenizer(tokenizer)
    if max_length is not None and (not is_int(max_length) or max_length < 1):
        raise ValueError(f"max_length={max_length!r} is not a whole number from 1, or None")
    strings = stop_strings(stop, tokenizer)
    found = requests(config, prompts, tokenizer, max_new_tokens, seeds, max_length)
    ends = end_tokens(config, eos, tokenizer, special_ids(tokenizer, strings) if strings else ())
    model = ShardedModel.of(config, layout, devices)
    longest = max(request.length for request in found)
    length = room(longest, config.max_sequence) if max_length is None else max_length
    if config.max_sequence is not None:
        length = min(length, config.max_sequence)
    rows = rows_of(model.layout, len(found), batch_size)
    detokenizer = None if tokenizer is None else Detokenizer(tokenizer, ends, strings)
    cache = model.cache_bytes(rows * beams, length, min(chunk, length))
    what = f"generation of {rows * beams:,} rows of up to {length:,} tokens"
    return Job(model, model.place(params, cache, what), found, ends, detokenizer, rows, length, min(chunk, length))


def rows_of(layout: Layout, count: int, batch_size: int | None) -> int:
    """Rows of a batch for `count` requests: as given, or enough for all, a power of two on each device, at most 64.

    Raises:
        LayoutError: they do not divide over the devices that split the batch.
    """
    shards = layout.batch_shards
    if batch_size is None:
        each = 1 << (-(-count // shards) - 1).bit_length()
        return shards * min(each, max(1, _MOST_ROWS // shards))
    if not is_int(batch_size) or batch_size < 1 or batch_size % shards:
        split = " x ".join(f"{axis}={getattr(layout, axis)}" for axis in layout.batch_axes) or "1"
        near = batch_size // shards * shards if is_int(batch_size) else 0
        raise LayoutError(
            f"batch_size={batch_size!r} is not a positive multiple of {split} = {shards}, over which rows are split: "
            f"use {' or '.join(str(n) for n in (near, near + shards) if n > 0)}"
        )
    return batch_size


def room(longest: int, most: int | None) -> int:
    """Tokens to have room for: `longest` rounded up to a multiple of 128, or of an eighth of what it is near to."""
    step = max(128, 1 << max(0, (longest - 1).bit_length() - 3))
    rounded = -(-longest // step) * step
    return rounded if most is None else min(rounded, most)


def _top(logprobs: bool | int, config: TransformerConfig) -> int:
    if isinstance(logprobs, bool):
        return 0
    if not is_int(logprobs) or not 0 <= logprobs <= config.vocab_size:
        raise ValueError(f"logprobs={logprobs!r} is not True, False, or a number of tokens up to {config.vocab_size}")
    return logprobs


def _collect(job: Job, compiled: Programs, chosen: Sampling, logprobs: bool, top: int) -> Generation:
    clock, began = batching.Clock(), time.perf_counter()
    parts: list[list[batching.Made]] = [[] for _ in job.requests]
    stop = stopper(job.detokenizer)
    burst = STEPS if stop is None else _STOP_BURST
    for made in batching.serve(compiled, job.params, job.requests, chosen.values(), job.eos, stop, burst, clock):
        parts[made.request].append(made)
    seconds = time.perf_counter() - began

    def completion(request: Request) -> Completion:
        made = parts[request.index]
        join = lambda name: np.concatenate([getattr(part, name) for part in made])  # noqa: E731
        tokens = join("tokens")
        text = None if job.detokenizer is None else job.detokenizer.text(tokens.tolist())
        return Completion(
            request.prompt, tokens, text, made[-1].reason or "length",
            join("log_probabilities") if logprobs else None,
            join("top_tokens") if top else None,
            join("top_log_probabilities") if top else None,
        )  # fmt: skip

    completions = tuple(completion(request) for request in job.requests)
    times = (clock.prefill_tokens, clock.prefill_seconds, clock.decode_tokens, clock.decode_seconds)
    return Generation(completions, seconds, *times, plan=job.model.describe(job.rows, job.max_length, job.chunk))


def _searched(job: Job, options: Beam) -> Generation:
    began = time.perf_counter()
    new = -(-max(request.limit for request in job.requests) // STEPS) * STEPS
    keep = max(2, 1 + int((job.eos >= 0).sum())) * options.beams
    search = searches(job.model, job.rows, job.max_length, job.chunk, new, options, keep)
    compiled = programs(job.model, search.rows, job.max_length, job.chunk)
    found, seconds = [], [0.0, 0.0]
    for first in range(0, len(job.requests), job.rows):
        part = find(search, job.params, job.requests[first : first + job.rows], job.eos, compiled.run)
        seconds = [seconds[0] + part[0].prefill_seconds, seconds[1] + part[0].search_seconds]
        found += part

    def completion(request: Request, best: Any) -> Completion:
        tokens = best.beams[0]
        text = None if job.detokenizer is None else job.detokenizer.text(tokens.tolist())
        reason = "eos" if tokens[-1] in job.eos else "length"
        return Completion(request.prompt, tokens, text, reason, beams=best.beams, scores=best.scores)

    completions = tuple(completion(r, best) for r, best in zip(job.requests, found, strict=True))
    prompts, made = sum(len(r.prompt) for r in job.requests), sum(len(best.beams[0]) for best in found)
    plan = job.model.describe(search.rows, job.max_length, job.chunk)
    return Generation(completions, time.perf_counter() - began, prompts, seconds[0], made, seconds[1], plan)


def _stream(job: Job, compiled: Programs, chosen: Sampling, every: int) -> Iterator[Piece]:
    tokens: list[list[int]] = [[] for _ in job.requests]
    shown = [0] * len(job.requests)
    detokenizer = job.detokenizer
    for made in batching.serve(
        compiled, job.params, job.requests, chosen.values(), job.eos, stopper(detokenizer), every
    ):
        i = made.request
        tokens[i].extend(made.tokens.tolist())
        text = None
        if detokenizer is not None:
            whole = detokenizer.text(tokens[i]) if made.reason else detokenizer.visible(tokens[i])
            text, shown[i] = whole[shown[i] :], max(shown[i], len(whole))
        yield Piece(i, made.tokens, text, made.reason)
