"""What a model thinks of given text: log-likelihoods of continuations and choices, perplexity of long texts.

The request types are those of the lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness, class
`LM`): `loglikelihood`, `loglikelihood_rolling` and `generate_until`. Text goes through the same cache as generation, a
chunk of tokens at a time, so memory does not grow with the vocabulary times the length.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from shardlm._errors import is_int
from shardlm.generate.api import generate
from shardlm.generate.judge import Span, cut, judge
from shardlm.generate.requests import encode
from shardlm.layout import Layout
from shardlm.models.config import TransformerConfig
from shardlm.models.kinds import require_config
from shardlm.train.engine import Parameters

_WINDOW = 1024


class LogLikelihood(NamedTuple):
    """Of a continuation.

    Attributes:
        logprob: the sum of its tokens' log-probabilities, in nats.
        is_greedy: every token of it is the likeliest one where it stands.
        tokens: how many it has.
    """

    logprob: float
    is_greedy: bool
    tokens: int


@dataclass(frozen=True)
class Perplexity:
    """Of one text.

    Attributes:
        perplexity: exp of the mean negative log-probability of its tokens.
        logprob: the sum of their log-probabilities, in nats.
        tokens: how many were judged.
        bits_per_byte: of a text given as a string, its negative log-probability in bits over its bytes of UTF-8; else
            None.
    """

    perplexity: float
    logprob: float
    tokens: int
    bits_per_byte: float | None


def loglikelihood(
    config: TransformerConfig,
    params: Parameters,
    pairs: Sequence[tuple[Any, Any]],
    layout: Layout | str | None = None,
    *,
    tokenizer: Any = None,
    prefix: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    chunk: int = 64,
    devices: Sequence[Any] | None = None,
) -> list[LogLikelihood]:
    """log p(continuation | context), the sum over its tokens, for each pair.

    Strings are encoded as the harness does it: spaces that end the context go to the continuation, both are encoded
    together, and the continuation is what follows as many tokens as the context has alone.

    Args:
        config, params, layout, tokenizer, batch_size, devices: as of `sl.generate`.
        pairs: (context, continuation), both strings or both token ids.
        prefix: an id that stands for an empty context; default the tokenizer's `begin`, `bos_token_id`,
            `eos_token_id` or `end`.
        max_length: the most tokens of context and continuation; default the learned positions, and no limit without.
        truncate: take tokens off a context's front where there are more, and do not raise.
        chunk: tokens of a row in one pass.

    Raises:
        ValueError: a pair is too long, or empty; an argument does not fit.
    """
    prefix = _prefix(prefix, tokenizer)
    most = _least(max_length, require_config(config).max_sequence)
    rows: list[np.ndarray] = []
    spans: list[list[Span]] = []
    for i, (context, continuation) in enumerate(pairs):
        before, after = _encoded(context, continuation, tokenizer)
        if not len(after):
            raise ValueError(f"pair {i}: the continuation {continuation!r} has no tokens")
        if not len(before):
            if prefix is None:
                raise ValueError(f"pair {i}: the context is empty; give prefix=, the id that text begins with")
            before = np.array([prefix])
        ids = np.concatenate([before, after])
        if most is not None and len(ids) - 1 > most:  # the last token is judged, and does not go in
            if not truncate or len(after) > most:
                raise ValueError(
                    f"pair {i}: context and continuation have {len(before)} + {len(after)} tokens, and the model takes "
                    f"{most}" + ("" if len(after) > most else ": shorten the context, or let truncate=True do it")
                )
            ids = ids[-most - 1 :]
        rows.append(ids)
        spans.append([Span(0, len(ids) - len(after), len(ids))])
    judged = judge(config, params, rows, spans, layout, batch_size, chunk, devices)
    return [LogLikelihood(float(logprobs.sum()), bool(greedy.all()), len(logprobs)) for logprobs, greedy in judged]


def loglikelihood_rolling(
    config: TransformerConfig,
    params: Parameters,
    texts: Sequence[Any],
    layout: Layout | str | None = None,
    *,
    tokenizer: Any = None,
    prefix: int | None = None,
    window: int | None = None,
    batch_size: int | None = None,
    chunk: int = 64,
    devices: Sequence[Any] | None = None,
) -> list[float]:
    """log p(text) of whole texts, in nats: every token judged once, the first one after `prefix`.

    A text of more tokens than `window` is cut into parts of so many, each with one token of context, the last one with
    as many as fit, as the harness does it. Arguments as of `perplexity` and `loglikelihood`.
    """
    prefix = _prefix(prefix, tokenizer)
    if prefix is None:
        raise ValueError(
            "rolling log-likelihood judges the first token too: give prefix=, the id that text begins with"
        )
    window = _window(config, window)
    rows = [np.concatenate([[prefix], _ids(text, tokenizer)]) for text in texts]
    judged = judge(
        config, params, rows, [cut(len(ids), window, window) for ids in rows], layout, batch_size, chunk, devices
    )
    return [float(logprobs.sum()) for logprobs, _ in judged]


def perplexity(
    config: TransformerConfig,
    params: Parameters,
    texts: Sequence[Any],
    layout: Layout | str | None = None,
    *,
    tokenizer: Any = None,
    prefix: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    chunk: int = 64,
    devices: Sequence[Any] | None = None,
) -> list[Perplexity]:
    """exp(-mean log p(token | the tokens before it)) of each text.

    A text of more tokens than `window` is judged in windows that slide on by `stride`: every token counts once, and all
    but those of the first window have at least window - stride tokens of context. A small stride judges well and takes
    long; stride = window is fast, and hard on the first tokens of every window.

    Args:
        config, params, layout, tokenizer, batch_size, devices: as of `sl.generate`.
        texts: strings, or token ids [n].
        prefix: an id put in front, so that the first token is judged too; None judges from the second token on.
        window: tokens of a window; default the learned positions, or 1024.
        stride: default half the window.
        chunk: tokens of a row in one pass.

    Returns:
        A `Perplexity` for each text.
    """
    window = _window(config, window)
    stride = max(1, window // 2) if stride is None else stride
    if not is_int(stride) or not 1 <= stride <= window:
        raise ValueError(f"stride={stride!r} is not a whole number from 1 to window={window}")
    front = np.array([] if prefix is None else [prefix], np.int64)
    rows = [np.concatenate([front, _ids(text, tokenizer)]) for text in texts]
    if short := [i for i, ids in enumerate(rows) if len(ids) < 2]:
        raise ValueError(f"text {short[0]} has no token to judge after another one: give prefix=, or leave it out")
    judged = judge(
        config, params, rows, [cut(len(ids), window, stride) for ids in rows], layout, batch_size, chunk, devices
    )
    result = []
    for text, (logprobs, _) in zip(texts, judged, strict=True):
        total, count = float(logprobs.sum()), len(logprobs)
        size = len(text.encode()) if isinstance(text, str) else None
        bits = None if size is None else -total / math.log(2) / size
        result.append(Perplexity(math.exp(min(-total / count, 700.0)), total, count, bits))
    return result


def choose(
    config: TransformerConfig,
    params: Parameters,
    questions: Sequence[tuple[Any, Sequence[Any]]],
    layout: Layout | str | None = None,
    *,
    per_token: bool = False,
    **options: Any,
) -> list[tuple[int, list[LogLikelihood]]]:
    """Which of its choices a context makes likeliest: for each question the choice's index, and what each has.

    Args:
        config, params, layout: as of `sl.generate`.
        questions: (context, choices).
        per_token: compare log-probabilities over numbers of tokens, so that long choices are not at a disadvantage.
        options: of `loglikelihood`.
    """
    found = loglikelihood(
        config, params, [(context, choice) for context, choices in questions for choice in choices], layout, **options
    )
    result, at = [], 0
    for i, (_, choices) in enumerate(questions):
        if not choices:
            raise ValueError(f"question {i} has no choices")
        these, at = found[at : at + len(choices)], at + len(choices)
        values = [x.logprob / (x.tokens if per_token else 1) for x in these]
        result.append((int(np.argmax(values)), these))
    return result


def generate_until(
    config: TransformerConfig,
    params: Parameters,
    pairs: Sequence[tuple[Any, Mapping[str, Any]]],
    layout: Layout | str | None = None,
    *,
    tokenizer: Any,
    **options: Any,
) -> list[str]:
    """Text that continues each context until one of its stop strings, which is left out.

    Args:
        config, params, layout, tokenizer: as of `sl.generate`.
        pairs: (context, settings): `until`, a string or several; `max_gen_toks`, default 256; `temperature`, `top_k`,
            `top_p` and `min_p`, which count where `do_sample` is not False.
        options: of `sl.generate`, the same for all.

    Raises:
        ValueError: a setting that is none of these.
    """
    known = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p")
    groups: dict[Any, list[int]] = {}
    for i, (_, settings) in enumerate(pairs):
        if unknown := set(settings) - set(known):
            raise ValueError(f"pair {i}: unknown settings {sorted(unknown)}; legal are {', '.join(known)}")
        until = settings.get("until") or ()
        plain = dict(settings) | {"until": (until,) if isinstance(until, str) else tuple(until)}
        groups.setdefault(tuple(sorted(plain.items())), []).append(i)
    texts: dict[int, str] = {}
    for key, indices in groups.items():
        settings = dict(key)
        stop, most = settings.pop("until"), settings.pop("max_gen_toks", 256)
        if not settings.pop("do_sample", settings.get("temperature", 0) > 0):
            settings = {}
        result = generate(
            config, params, [pairs[i][0] for i in indices], layout, tokenizer=tokenizer, stop=stop, max_new_tokens=most,
            **settings, **options,
        )  # fmt: skip
        texts |= dict(zip(indices, result.texts, strict=True))
    return [texts[i] for i in range(len(pairs))]


def _encoded(context: Any, continuation: Any, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(context, str) or not isinstance(continuation, str):
        return _ids(context, tokenizer), _ids(continuation, tokenizer)
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    before = _ids(context, tokenizer)
    return before, _ids(context + continuation, tokenizer)[len(before) :]


def _ids(text: Any, tokenizer: Any) -> np.ndarray:
    if not isinstance(text, str):
        return np.asarray(text, np.int64 if len(text) == 0 else None)
    if tokenizer is None:
        raise ValueError("texts are strings, and there is no tokenizer: give tokenizer=, or token ids")
    return encode(tokenizer, text) if text else np.array([], np.int64)


def _prefix(prefix: int | None, tokenizer: Any) -> int | None:
    names = ("begin", "bos_token_id", "eos_token_id", "end")
    found = (x for name in names if (x := getattr(tokenizer, name, None)) is not None)
    return next(found, None) if prefix is None else prefix


def _window(config: TransformerConfig, window: int | None) -> int:
    require_config(config)
    if window is None:
        return config.max_sequence or _WINDOW
    most = config.max_sequence
    if not is_int(window) or window < 1 or (most is not None and window > most):
        raise ValueError(f"window={window!r} is not a whole number from 1" + (f" to {most}" if most else ""))
    return window


def _least(*values: int | None) -> int | None:
    return min((x for x in values if x is not None), default=None)
