"""Tokenizers of others, as the data pipeline asks for them: ids without special tokens, and which ids begin and end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Encoder:
    """How an example's text becomes ids.

    Attributes:
      encode: from a text, its ids, int32[tokens], no special token added.
      vocab_size: number of ids.
      end: the id that ends what is learned, and fills rows.
      begin: the id in front of every example; None for none.
      tokenizer: what it is over.
    """

    encode: Callable[[str], np.ndarray]
    vocab_size: int
    end: int
    begin: int | None
    tokenizer: Any = None

    @classmethod
    def of(cls, tokenizer: Any, end: int | None = None, begin: int | None = None) -> Encoder:
        """The encoder over a tokenizer.

        Args:
          tokenizer: a `shardlm.data.Tokenizer`, whose `end` also begins; or an object whose `encode(text)` returns ids
            or something with `.ids`, such as those of `transformers` and `tokenizers`. Where that takes
            `add_special_tokens`, it is given False.
          end: an id; default the tokenizer's `end`, or `eos_token_id`.
          begin: an id; default the tokenizer's `begin` where it has that, which may be None; else its `end`, else its
            `bos_token_id`, else none.

        Raises:
          TypeError: it has no `encode`, or one that returns no ids.
          ValueError: it names no end, or no size.
        """
        if not callable(getattr(tokenizer, "encode", None)):
            raise TypeError(f"{type(tokenizer).__name__} is no tokenizer: it has no method encode(text)")
        own = getattr(tokenizer, "end", None)
        end = next((i for i in (end, own, getattr(tokenizer, "eos_token_id", None)) if i is not None), None)
        if begin is None and hasattr(tokenizer, "begin"):  # of `load_hf`, which knows
            begin = tokenizer.begin
        else:
            begin = next((i for i in (begin, own, getattr(tokenizer, "bos_token_id", None)) if i is not None), None)
        size = _size(tokenizer)
        for name, value in (("end", end), ("begin", begin)):
            if value is None and name == "begin":
                continue
            if not isinstance(value, int | np.integer) or not 0 <= value < size:
                raise ValueError(
                    f"{name}={value!r} is no token id of {type(tokenizer).__name__}, which has 0 to {size - 1}: give "
                    f"{name}=, the id of its token for that"
                )
        assert end is not None
        return cls(_plain(tokenizer), size, int(end), None if begin is None else int(begin), tokenizer)


def _size(tokenizer: Any) -> int:
    """How many ids it has, added ones too, which `vocab_size` of `transformers` does not count."""
    if hasattr(tokenizer, "end"):
        return tokenizer.vocab_size
    if hasattr(tokenizer, "get_vocab_size"):
        return tokenizer.get_vocab_size()
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else getattr(tokenizer, "vocab_size", None)
    if not isinstance(size, int):
        raise ValueError(f"{type(tokenizer).__name__} does not say how many ids it has: give it a vocab_size")
    return size


def _plain(tokenizer: Any) -> Callable[[str], np.ndarray]:
    """Its `encode`, without special tokens, as arrays."""
    arguments = {"add_special_tokens": False}
    try:
        tokenizer.encode("a", **arguments)
    except TypeError:
        arguments = {}

    def encode(text: str) -> np.ndarray:
        found = tokenizer.encode(text, **arguments)
        ids = np.asarray(getattr(found, "ids", found))
        if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
            raise TypeError(
                f"{type(tokenizer).__name__}.encode({text[:20]!r}) gave {ids.dtype}{list(ids.shape)}; expected are "
                "integers [tokens], or an object with .ids"
            )
        return ids.astype(np.int32)

    return encode
