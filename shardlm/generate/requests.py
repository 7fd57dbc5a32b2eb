"""What is to be generated, checked: prompts as token ids, how many tokens, where to stop, with which seeds."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardlm._errors import is_int
from shardlm.generate.encode import encode
from shardlm.models.config import TransformerConfig

MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Request:
    """One prompt and what to make of it.

    Attributes:
        index: its place in the list that was given.
        prompt: int32[n], at least one id.
        limit: how many tokens to make at most.
        seed: of its draws.
    """

    index: int
    prompt: np.ndarray
    limit: int
    seed: int

    @property
    def length(self) -> int:
        """Tokens of prompt and continuation."""
        return len(self.prompt) + self.limit


def requests(
    config: TransformerConfig,
    prompts: Any,
    tokenizer: Any,
    max_new_tokens: int | Sequence[int],
    seeds: int | Sequence[int],
    max_length: int | None = None,
) -> list[Request]:
    """One request for each prompt.

    Args:
        config: the model.
        prompts: a list whose entries are token ids [n], or strings where there is a tokenizer.
        tokenizer: has `encode` and `decode`; or None.
        max_new_tokens: of all, or of each.
        seeds: of each; a number s gives prompt i the seed s + i.
        max_length: tokens that prompt and continuation may come to, by the caller's wish.

    Raises:
        TypeError, ValueError: one error that lists what is wrong with which prompt.
    """
    if isinstance(prompts, str | bytes | Mapping | Set) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts is a {type(prompts).__name__}; it is a list, of one prompt too: [prompt]")
    given = list(prompts)
    if not given:
        raise ValueError("prompts is empty; it is a list of at least one prompt")
    if any(isinstance(prompt, int | float | np.number) for prompt in given):
        raise TypeError("prompts holds numbers; it is a list of prompts, each a list of token ids: [prompt]")
    for i, prompt in enumerate(given):
        if not (isinstance(prompt, Sequence) or hasattr(prompt, "__array__")) or isinstance(prompt, bytes):
            raise TypeError(f"prompt {i} is a {type(prompt).__name__}; it is a string, or a list of token ids")
    if any(isinstance(prompt, str) for prompt in given) and tokenizer is None:
        raise ValueError("prompts are strings, and there is no tokenizer: give tokenizer=, or token ids")
    limits = _each("max_new_tokens", max_new_tokens, len(given), lambda i: 0)
    numbers = _each("seeds", seeds, len(given), lambda i: i)
    wrong = [f"max_new_tokens={n!r} is not a whole number from 1" for n in limits if not (is_int(n) and n >= 1)]
    wrong += [f"seed {n!r} is not from 0 to {MAX_SEED}" for n in numbers if not (is_int(n) and 0 <= n <= MAX_SEED)]
    problems = list(dict.fromkeys(wrong))
    ids: list[np.ndarray] = []
    for i, prompt in enumerate(given):
        ids.append(encode(tokenizer, prompt, special=None) if isinstance(prompt, str) else _row(prompt))
        problems += _wrong(f"prompt {i}", ids[-1], config)
    if problems:
        raise ValueError("; ".join(problems))
    found = [Request(i, x.astype(np.int32), limits[i], numbers[i]) for i, x in enumerate(ids)]
    for name, most in (("learned positions", config.max_sequence), ("max_length", max_length)):
        problems += [
            f"prompt {r.index} of {len(r.prompt)} tokens and {r.limit} new ones come to {r.length}, more than the "
            f"{most} of {name}: "
            + (f"at most {most - len(r.prompt)} can follow" if len(r.prompt) < most else "shorten the prompt")
            for r in found
            if most is not None and r.length > most
        ]
    if problems:
        raise ValueError("; ".join(problems))
    return found


def end_tokens(
    config: TransformerConfig, eos: int | Sequence[int] | None, tokenizer: Any, more: Sequence[int] = ()
) -> np.ndarray:
    """The ids that end a continuation, int32[n], filled up to a multiple of 8 with what is no token.

    Args:
        config: the model.
        eos: one id, or several, none of them for no end; None asks the tokenizer for `ends`, `eos_token_id` or `end`,
            the first that it has.
        tokenizer: or None.
        more: ids besides these.
    """
    if eos is None:
        names = ("ends", "eos_token_id", "end")
        found: Any = next((x for name in names if (x := getattr(tokenizer, name, None)) is not None), ())
    else:
        found = eos
    given = list(found) if isinstance(found, Iterable) and not isinstance(found, str | bytes) else [found]
    ids = list(dict.fromkeys([*(x.item() if isinstance(x, np.generic) else x for x in given), *more]))
    if wrong := [x for x in ids if not is_int(x) or not 0 <= x < config.vocab_size]:
        raise ValueError(f"eos: {wrong} are not ids of the model, which has 0 to {config.vocab_size - 1}")
    return np.array(ids + [-1] * (-len(ids) % 8 or 8 * (not ids)), np.int32)


def _each(name: str, value: Any, count: int, offset: Any) -> list[Any]:
    value = value.item() if isinstance(value, np.integer) else value
    if isinstance(value, str | bytes) or not isinstance(value, Iterable) or np.ndim(value) == 0:  # type: ignore
        return [value + offset(i) if is_int(value) else value for i in range(count)]
    values = [x.item() if isinstance(x, np.integer) else x for x in value]
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} prompts; give one for each, or one number")
    return values


def _row(prompt: Any) -> np.ndarray:
    try:
        return np.asarray(prompt)
    except ValueError:  # lists of several lengths in it
        return np.asarray(prompt, object)


def _wrong(name: str, ids: np.ndarray, config: TransformerConfig) -> list[str]:
    if ids.ndim != 1 or not ids.size:
        return [f"{name} has shape {list(ids.shape)}; it is one row of at least one token id"]
    if ids.dtype.kind not in "iu":
        return [f"{name} is {ids.dtype}; token ids are integers"]
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        return [f"{name} has ids from {ids.min()} to {ids.max()}; the model has 0 to {config.vocab_size - 1}"]
    return []
