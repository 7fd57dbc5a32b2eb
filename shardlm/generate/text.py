"""A continuation as text: where a stop string ends it, and what of it can be shown already."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from shardlm.generate.encode import decode

_UNFINISHED = "\ufffd"  # how the bytes of a character decode that has not all of them yet


class Detokenizer:
    """Decodes the tokens of continuations.

    Args:
        tokenizer: has `decode`.
        eos: ids that end a continuation, which are no text.
        stop: strings that end one; text goes up to the first of them.
    """

    def __init__(self, tokenizer: Any, eos: np.ndarray, stop: Sequence[str] = ()):
        self.tokenizer, self.eos, self.stop = tokenizer, set(eos.tolist()), tuple(stop)

    def text(self, tokens: Sequence[int]) -> str:
        """The whole text."""
        text = self._decode(tokens)
        return text[: min((at for s in self.stop if (at := text.find(s)) >= 0), default=len(text))]

    def stops(self, tokens: list[int]) -> int | None:
        """How many of the tokens it takes to complete a stop string; None where there is none."""
        if not self._has_stop(tokens):
            return None
        # Text only grows with tokens, but for characters that are unfinished: walk back from the end.
        kept = len(tokens)
        while kept > 1 and self._has_stop(tokens[: kept - 1]):
            kept -= 1
        return kept

    def visible(self, tokens: Sequence[int]) -> str:
        """The text that further tokens will not change: no unfinished character, no beginning of a stop string."""
        text = self.text(tokens).rstrip(_UNFINISHED)
        beginnings = (s[:n] for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n]))
        return text[: len(text) - max(map(len, beginnings), default=0)]

    def _has_stop(self, tokens: Sequence[int]) -> bool:
        text = self._decode(tokens)
        return any(s in text for s in self.stop)

    def _decode(self, tokens: Sequence[int]) -> str:
        return decode(self.tokenizer, [t for t in tokens if int(t) not in self.eos])


def stop_strings(stop: str | Sequence[str] | None, tokenizer: Any) -> tuple[str, ...]:
    """The stop strings as a tuple.

    Raises:
        TypeError, ValueError: they are none, or there is no tokenizer to decode with.
    """
    listed = stop is None or (isinstance(stop, Iterable) and not isinstance(stop, bytes | Mapping))
    strings = (stop,) if isinstance(stop, str) or not listed else tuple(stop or ())
    if any(not isinstance(s, str) for s in strings):
        raise TypeError(f"stop={stop!r}; it is a string or several (token ids that end a continuation go into eos=)")
    if "" in strings:
        raise ValueError("stop holds an empty string, which is everywhere")
    if strings and tokenizer is None:
        raise ValueError(f"stop={stop!r} is looked for in text, and there is no tokenizer: give tokenizer=")
    return strings


def stopper(detokenizer: Detokenizer | None) -> Callable[[list[int]], int | None] | None:
    """What `batching.serve` asks after every burst; None where no text can stop a request."""
    return detokenizer.stops if detokenizer is not None and detokenizer.stop else None
