"""Text to token ids and back, with tokenizers of every make: with or without the ids that belong around a text.

Whether these go in has another name and another default in each library, so that is said here, and always.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Arguments by which a tokenizer's method takes or gives special tokens, and whether True there means with them.
_ENCODE = {"special": True, "add_special_tokens": True}
_DECODE = {"special": True, "skip_special_tokens": False}


def encode(tokenizer: Any, text: str, special: bool | None = False, begin: int | None = None) -> np.ndarray:
    """The ids of a text: int64[n].

    Args:
        tokenizer: its `encode` returns ids, or an object with `ids` as in `tokenizers`.
        text: what to encode.
        special: with what the tokenizer puts around a text, such as the id that begins one; None: with it, unless the
            text begins with the text of `begin`, as one made by a chat template does.
        begin: an id; default the one that the tokenizer begins a text with.

    Raises:
        TypeError: the tokenizer has no `encode`, or one that returns no ids.
    """
    check_tokenizer(tokenizer, "encode")
    if special is None:
        begin = begin_token(tokenizer) if begin is None else begin
        special = begin is None or not text.startswith(decode(tokenizer, [begin], special=True) or "\0")
    found = tokenizer.encode(text, **_options(tokenizer.encode, _ENCODE, special))
    ids = np.asarray(getattr(found, "ids", found))
    if ids.ndim != 1 or not (ids.dtype.kind in "iu" or not ids.size):
        raise TypeError(
            f"{type(tokenizer).__name__}.encode({text[:20]!r}) gave {ids.dtype}{list(ids.shape)}; it is to give "
            "integers [tokens], or an object with .ids"
        )
    return ids.astype(np.int64)


def check_tokenizer(tokenizer: Any, *methods: str) -> None:
    """Refuse what has not these methods, default encode and decode; None is no tokenizer and may be.

    Raises:
        TypeError: it lacks one.
    """
    for name in methods or ("encode", "decode"):
        if tokenizer is not None and not callable(getattr(tokenizer, name, None)):
            raise TypeError(f"{type(tokenizer).__name__} is no tokenizer: it has no method {name}")


def decode(tokenizer: Any, ids: Sequence[int], special: bool = False) -> str:
    """The text of ids, without that of special tokens, or with it."""
    return tokenizer.decode([int(i) for i in ids], **_options(tokenizer.decode, _DECODE, special))


def begin_token(tokenizer: Any) -> int | None:
    """The id that begins a text; None where the tokenizer says none."""
    settings = getattr(tokenizer, "settings", None) or {}  # of a Hugging Face folder: its null is meant
    if "bos_token" in settings and settings["bos_token"] is None:
        return None
    return _first(tokenizer, "begin", "bos_token_id")


def prefix_token(tokenizer: Any) -> int | None:
    """The id that stands for an empty context: the one that begins a text, or else the one that ends it."""
    begin = begin_token(tokenizer)
    return _first(tokenizer, "eos_token_id", "end") if begin is None else begin


def special_ids(tokenizer: Any, strings: Sequence[str]) -> list[int]:
    """Of strings that are special tokens, their ids: decoded text lacks them, so they are not found there."""
    found = []
    for text in strings:
        ids = encode(tokenizer, text).tolist()
        if len(ids) == 1 and not decode(tokenizer, ids) and decode(tokenizer, ids, special=True) == text:
            found += ids
    return found


def _first(tokenizer: Any, *names: str) -> int | None:
    return next((x for name in names if (x := getattr(tokenizer, name, None)) is not None), None)


def _options(method: Callable[..., Any], names: dict[str, bool], special: bool) -> dict[str, bool]:
    try:
        known = inspect.signature(method).parameters
    except ValueError:  # of a builtin without a signature
        return {}
    return next(({name: special is meaning} for name, meaning in names.items() if name in known), {})
