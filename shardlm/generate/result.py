"""What generation returns."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Completion:
    """What was made of one prompt.

    Attributes:
        prompt: int32[n], its ids.
        tokens: int32[m], the ids that follow it, with the one that ended it, or that completed a stop string.
        text: them decoded, without the end token, up to a stop string; None without a tokenizer.
        reason: why it ends: "eos", "stop" or "length".
        logprobs: float32[m], of each token under the model itself, before penalties, temperature and filters; None
            unless asked for.
        top_tokens, top_logprobs: int32[m, k] and float32[m, k], the k likeliest tokens at each place under the model;
            None unless asked for.
        beams, scores: of a beam search, all the continuations it finished, int32[n] each, and their scores, best first;
            `tokens` is the first. Else None.
    """

    prompt: np.ndarray
    tokens: np.ndarray
    text: str | None
    reason: str
    logprobs: np.ndarray | None = None
    top_tokens: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    beams: tuple[np.ndarray, ...] | None = None
    scores: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Piece:
    """The next part of a continuation, as a stream gives it.

    Attributes:
        request: which prompt it continues.
        tokens: int32[n].
        text: what they add, held back while it may turn into something else: an unfinished character, the beginning
            of a stop string. None without a tokenizer.
        reason: why the continuation ends with this piece, else None.
    """

    request: int
    tokens: np.ndarray
    text: str | None
    reason: str | None


@dataclass(frozen=True, eq=False)
class Generation:
    """Completions in the order of their prompts, and how long they took.

    Attributes:
        completions: one for each prompt.
        seconds: from the first call of a compiled program to the last, compilation included where it was needed.
        prefill_tokens, prefill_seconds: tokens of prompts, and the time of the calls that took them in, in which rows
            that were already generating made a token too.
        decode_tokens, decode_seconds: of the calls that only generated.
        plan: what a device keeps, in words.
    """

    completions: tuple[Completion, ...]
    seconds: float
    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float
    plan: str

    def __len__(self) -> int:
        return len(self.completions)

    def __getitem__(self, index: int) -> Completion:
        return self.completions[index]

    def __iter__(self) -> Iterator[Completion]:
        return iter(self.completions)

    @property
    def tokens(self) -> list[np.ndarray]:
        """The tokens of each completion."""
        return [completion.tokens for completion in self.completions]

    @property
    def texts(self) -> list[str | None]:
        """The text of each completion."""
        return [completion.text for completion in self.completions]

    @property
    def tokens_per_second(self) -> float:
        """Tokens made, over all of the time."""
        return sum(map(len, self.tokens)) / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        total = sum(map(len, self.tokens))
        return (
            f"{len(self)} completions, {total} tokens in {self.seconds:.2f} s "
            f"({self.tokens_per_second:,.0f} tokens/s); prompts: {self.prefill_tokens} tokens in "
            f"{self.prefill_seconds:.2f} s, then {self.decode_tokens} tokens in {self.decode_seconds:.2f} s"
        )
