"""What a model thinks of given text: log-likelihoods of continuations and choices, perplexity of long texts.

The request types are those of the lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness, class
`LM`): `loglikelihood`, `loglikelihood_rolling` and `generate_until`. They encode text as its class `HFLM` does for
Hugging Face models, with a tokenizer of any make; `shardlm.generate.harness` puts them into the harness. Text goes
through the same cache as generation, a chunk of tokens at a time, so memory does not grow with the vocabulary times the
length.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from shardlm._errors import is_int
from shardlm.generate.api import generate
from shardlm.generate.encode import begin_token, encode, prefix_token
from shardlm.generate.judge import Span, cut, judge
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
    special: bool | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    chunk: int = 64,
    devices: Sequence[Any] | None = None,
) -> list[LogLikelihood]:
    """log p(continuation | context), the sum over its tokens, for each pair.

    Strings are encoded as the harness does it: spaces that end the context go to the continuation, both are encoded
    together, and the continuation is what follows as many tokens as the context has alone. An empty context is the one
    token `prefix`, and its continuation is encoded without the tokenizer's special tokens.

    Args:
        config, params, layout, tokenizer, batch_size, devices: as of `sl.generate`.
        pairs: (context, continuation), both strings or both token ids.
        prefix: an id that stands for an empty context; default the id with which the tokenizer begins a text (`begin`
            or `bos_token_id`), or else ends one (`eos_token_id` or `end`).
        special: whether texts get what the tokenizer puts around them, such as the id that begins one. None: they do,
            unless they begin with the text of `prefix` already.
        max_length: the most tokens of context and continuation; default the learned positions, and no limit without.
        truncate: take tokens off a context's front where there are more, and do not raise.
        chunk: tokens of a row in one pass.

    Raises:
        ValueError: a pair is too long, or empty; an argument does not fit.
    """
    require_config(config)
    prefix = _prefix(prefix, tokenizer, config)
    if max_length is not None and (not is_int(max_length) or max_length < 1):
        raise ValueError(f"max_length={max_length!r} is not a whole number from 1, or None")
    most = _least(max_length, config.max_sequence)
    rows: list[np.ndarray] = []
    spans: list[list[Span]] = []
    for i, pair in enumerate(_listed("pairs", pairs)):
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"pair {i} is {pair!r}; it is (context, continuation)")
        before, after = _encoded(*pair, tokenizer, prefix, special)
        if not len(after):
            raise ValueError(f"pair {i}: the continuation {pair[1]!r} has no tokens after the context")
        if not len(before):
            raise ValueError(f"pair {i}: the context is empty; give prefix=, the id that text begins with")
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
    special: bool | None = None,
    window: int | None = None,
    batch_size: int | None = None,
    chunk: int = 64,
    devices: Sequence[Any] | None = None,
) -> list[float]:
    """log p(text) of whole texts, in nats: every token judged once, the first one after `prefix`.

    A text of more tokens than `window` is cut into parts of so many, each with one token of context, the last one with
    as many as fit, as the harness does it. A text of no tokens has 0. Arguments as of `perplexity` and `loglikelihood`:
    the id with which the tokenizer begins a text is one of its tokens, and judged after `prefix`, as in the harness.
    """
    require_config(config)
    texts, prefix = _listed("texts", texts), _prefix(prefix, tokenizer, config)
    if prefix is None:
        raise ValueError(
            "rolling log-likelihood judges the first token too: give prefix=, the id that text begins with"
        )
    window = _window(config, window)
    found = [_ids(f"text {i}", text, tokenizer, special, prefix) for i, text in enumerate(texts)]
    rows = [np.concatenate([[prefix], ids]) for ids in found if len(ids)]
    spans = [cut(len(ids), window, window) for ids in rows]
    judged = iter(judge(config, params, rows, spans, layout, batch_size, chunk, devices))
    return [float(next(judged)[0].sum()) if len(ids) else 0.0 for ids in found]


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
        texts: strings, encoded without the tokenizer's special tokens, or token ids [n].
        prefix: an id put in front, so that the first token is judged too; None judges from the second token on.
        window: tokens of a window; default the learned positions, or 1024.
        stride: default half the window.
        chunk: tokens of a row in one pass.

    Returns:
        A `Perplexity` for each text.
    """
    window = _window(config, window)
    stride = max(1, window // 2) if stride is None else stride
    require_config(config)
    if not is_int(stride) or not 1 <= stride <= window:
        raise ValueError(f"stride={stride!r} is not a whole number from 1 to window={window}")
    front = np.array([] if prefix is None else [_prefix(prefix, None, config)], np.int64)
    rows = [
        np.concatenate([front, _ids(f"text {i}", text, tokenizer, False, None)])
        for i, text in enumerate(_listed("texts", texts))
    ]
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
    questions = _listed("questions", questions)
    for i, (_, choices) in enumerate(questions):
        if isinstance(choices, str):
            raise TypeError(f"question {i} has the choices {choices!r}; they are a list")
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
    special: bool | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    **options: Any,
) -> list[str]:
    """Text that continues each context until one of its stop strings, which is left out.

    Args:
        config, params, layout, tokenizer: as of `sl.generate`.
        pairs: (context, settings): `until`, a string or several; `max_gen_toks`, or one of its other names
            (`max_new_tokens`, `max_tokens`, `max_completion_tokens`), default 256; `repetition_penalty`; `temperature`,
            `top_k`, `top_p` and `min_p`, which count where `do_sample` is not False.
        special: as of `loglikelihood`.
        max_length: the most tokens of context and continuation; default as of `sl.generate`.
        truncate: take tokens off a context's front where there are more than `max_length` - `max_gen_toks`, and do not
            raise.
        options: of `sl.generate`, the same for all.

    Raises:
        ValueError: a setting that is none of these.
    """
    groups: dict[Any, list[int]] = {}
    contexts: list[Any] = []
    most = _least(max_length, require_config(config).max_sequence)
    begin = begin_token(tokenizer)
    for i, pair in enumerate(_listed("pairs", pairs)):
        if isinstance(pair, str) or len(pair) != 2 or not isinstance(pair[1], Mapping):
            raise ValueError(f"pair {i} is {pair!r}; it is (context, settings)")
        plain = _settings(i, pair[1])
        context = _ids(f"context {i}", pair[0], tokenizer, special, begin)
        if not len(context) and (prefix := prefix_token(tokenizer)) is not None:
            context = np.array([prefix])
        if truncate and most is not None:
            if not is_int(plain["max_new_tokens"]) or most <= plain["max_new_tokens"]:
                raise ValueError(
                    f"pair {i}: max_gen_toks={plain['max_new_tokens']!r} leaves nothing of the {most} tokens that the "
                    "model takes to the context: it is a whole number below that"
                )
            context = context[-(most - plain["max_new_tokens"]) :]
        contexts.append(context)
        groups.setdefault(tuple(sorted(plain.items())), []).append(i)
    texts: dict[int, str] = {}
    for key, indices in groups.items():
        chosen = [contexts[i] for i in indices]
        result = generate(
            config, params, chosen, layout, tokenizer=tokenizer, max_length=max_length, **dict(key), **options
        )
        texts |= dict(zip(indices, result.texts, strict=True))
    return [texts[i] for i in range(len(contexts))]


LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts
_DRAWING = ("temperature", "top_k", "top_p", "min_p")


def _settings(index: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `generate` that the settings of a request stand for."""
    known = ("until", *LENGTHS, "do_sample", *_DRAWING, "repetition_penalty")
    if unknown := set(given) - set(known):
        raise ValueError(f"pair {index}: unknown settings {sorted(unknown)}; legal are {', '.join(known)}")
    until = given.get("until") or ()
    length = next((x for name in LENGTHS if (x := given.get(name)) is not None), 256)
    found = {"stop": (until,) if isinstance(until, str) else tuple(until), "max_new_tokens": length}
    drawn = given.get("do_sample")
    temperature = given.get("temperature") or 0.0
    if drawn and not temperature:
        raise ValueError(f"pair {index}: do_sample={drawn!r} with temperature={temperature!r}; give one above 0")
    if drawn is not False and temperature:
        found |= {name: given[name] for name in _DRAWING if given.get(name) is not None}
    if given.get("repetition_penalty") is not None:
        found["repetition_penalty"] = given["repetition_penalty"]
    return found


def _encoded(
    context: Any, continuation: Any, tokenizer: Any, prefix: int | None, special: bool | None
) -> tuple[np.ndarray, np.ndarray]:
    front = np.array([] if prefix is None else [prefix], np.int64)
    if not isinstance(context, str) or not isinstance(continuation, str):
        before, after = (
            _ids(name, text, tokenizer, special, prefix)
            for name, text in (("context", context), ("continuation", continuation))
        )
        return (before if len(before) else front), after
    if not context:
        after = _ids("continuation", continuation, tokenizer, False, prefix)
        # What begins with the prefix has it as its context already.
        return (after[:1], after[1:]) if len(after) and after[0] == prefix else (front, after)
    if spaces := len(context) - len(context.rstrip()):
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    before, whole = (_ids("text", text, tokenizer, special, prefix) for text in (context, context + continuation))
    return (before if len(before) else front), whole[len(before) :]


def _ids(name: str, text: Any, tokenizer: Any, special: bool | None, begin: int | None) -> np.ndarray:
    if not isinstance(text, str):
        ids = np.asarray(text, np.int64 if len(text) == 0 else None)
        if ids.ndim != 1:
            raise ValueError(f"{name} has shape {list(ids.shape)}; it is a string, or one row of token ids")
        return ids
    if tokenizer is None:
        raise ValueError("texts are strings, and there is no tokenizer: give tokenizer=, or token ids")
    return encode(tokenizer, text, special, begin)


def _prefix(prefix: int | None, tokenizer: Any, config: TransformerConfig) -> int | None:
    if prefix is None:
        return prefix_token(tokenizer)
    value = prefix.item() if isinstance(prefix, np.integer) else prefix
    if not is_int(value) or not 0 <= value < config.vocab_size:
        raise ValueError(f"prefix={prefix!r} is no id of the model, which has 0 to {config.vocab_size - 1}")
    return value


def _listed(name: str, values: Any) -> list[Any]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is a {type(values).__name__}; it is a list, of one entry too")
    return list(values)


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
