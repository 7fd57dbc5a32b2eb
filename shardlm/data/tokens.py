"""Tokenizers: text to integer ids and back, without loss."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from shardlm._extras import install
from shardlm.runtime.folders import write_file
from shardlm.runtime.paths import local_path
from shardlm.runtime.strangers import read_small

DEFAULT_CACHE = "~/.cache/shardlm"
_NUM_BYTES = 256
_LEGAL = "'bytes', 'bpe:SIZE' with a vocabulary size such as 'bpe:8192', or an object with the methods of Tokenizer"


@runtime_checkable
class Tokenizer(Protocol):
    """What the data pipeline asks of a tokenizer.

    Attributes:
      vocab_size: number of ids, `end` included; every id is in 0 <= id < vocab_size.
      end: the id of the boundary between documents, at once begin and end; `encode` returns it for no text.
    """

    vocab_size: int
    end: int

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text, int32 [tokens]."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids [tokens], leaving out `end`."""
        ...


class ByteTokenizer:
    """The bytes of UTF-8 as ids 0 to 255, and 256 as the boundary between documents.

    Example:
      >>> ByteTokenizer().encode("né").tolist()
      [110, 195, 169]
    """

    vocab_size = _NUM_BYTES + 1
    end = _NUM_BYTES

    def encode(self, text: str) -> np.ndarray:
        """Returns the UTF-8 bytes of a text, int32 [bytes]."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids [tokens]; bytes that are not UTF-8 become U+FFFD and `end` is left out.

        Raises:
          ValueError: an id is not in 0 <= id < 257.
        """
        return _without_end(ids, self).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def to_files(self) -> dict[str, str]:
        """Returns the files that make it again, by name; see `shardlm.data.kept`."""
        return {"shardlm.json": '{"kind": "bytes"}'}

    def __repr__(self) -> str:
        return "ByteTokenizer()"


class BPETokenizer:
    """Byte-level byte-pair encoding, over the `tokenizers` package of Hugging Face.

    Any text can be encoded, and decodes to itself. The boundary between documents is the last id and no entry of the
    underlying vocabulary, so no text can contain it.

    Args:
      definition: the JSON text of a `tokenizers.Tokenizer`, as `definition` of another BPETokenizer returns it.

    Raises:
      ImportError: the `tokenizers` package is not installed.
      ValueError: the definition is not one of a tokenizer.

    Source: Sennrich, Haddow and Birch, Neural Machine Translation of Rare Words with Subword Units, arXiv:1508.07909,
    section 3.2; over bytes as in GPT-2.
    """

    def __init__(self, definition: str):
        tokenizers = _import_tokenizers()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"not the JSON definition of a tokenizer: {error}") from error
        self.end = self._tokenizer.get_vocab_size()
        self.vocab_size = self.end + 1

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, cache: str | os.PathLike | None = DEFAULT_CACHE
    ) -> BPETokenizer:
        """Trains on texts, or reads what an earlier call trained on the same texts.

        Args:
          texts: the documents' texts.
          vocab_size: number of ids wanted, at least 257 (the bytes and the boundary). A text too short for so many
            merges gives fewer, with a warning.
          cache: folder for the result, keyed by a digest of texts and vocab_size; None trains anew and keeps nothing.
            A damaged file is replaced, and a folder that cannot be written to is done without, each with a warning.

        Raises:
          ImportError: the `tokenizers` package is not installed.
          ValueError: vocab_size is below 257.

        Example:
          >>> tokenizer = BPETokenizer.train(["to be or not to be"], 260, cache=None)
          >>> tokenizer.decode(tokenizer.encode("not to"))
          'not to'
        """
        if vocab_size < _NUM_BYTES + 1:
            raise ValueError(
                f"vocab_size={vocab_size} is too small: 256 bytes and the document boundary need at least 257 ids"
            )
        texts = list(texts)
        path = None if cache is None else local_path(cache, "cache") / f"bpe-{_digest(texts, vocab_size)}.json"
        definition = _read(path) if path is not None and path.exists() else None
        if definition is None:
            definition = _train(texts, vocab_size)
            if path is not None:
                _write(path, definition)
        tokenizer = cls(definition)
        if tokenizer.vocab_size < vocab_size:
            warnings.warn(
                f"the text is too short for vocab_size={vocab_size}: its merges give {tokenizer.vocab_size} ids",
                stacklevel=2,
            )
        return tokenizer

    @property
    def definition(self) -> str:
        """The JSON text that makes the same tokenizer again; keep it with a model's checkpoints."""
        return self._tokenizer.to_str()

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text, int32 [tokens]."""
        # the fast variant keeps no offsets into the text and takes two thirds of the time
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.asarray(encoding.ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids [tokens], as `ByteTokenizer.decode` does."""
        return self._tokenizer.decode(_without_end(ids, self).tolist(), skip_special_tokens=False)

    def to_files(self) -> dict[str, str]:
        """Returns the files that make it again, by name; see `shardlm.data.kept`."""
        return {"shardlm.json": '{"kind": "bpe"}', "bpe.json": self.definition}

    def __repr__(self) -> str:
        return f"BPETokenizer(vocab_size={self.vocab_size})"


def make_tokenizer(
    tokenizer: str | Tokenizer, texts: Iterable[str], cache: str | os.PathLike | None = DEFAULT_CACHE
) -> Tokenizer:
    """Returns the tokenizer that a string stands for, or the tokenizer given.

    Args:
      tokenizer: ``"bytes"``, ``"bpe:SIZE"`` (byte-level BPE with SIZE ids, trained on `texts`), or a Tokenizer.
      texts: what BPE is trained on.
      cache: folder of trained tokenizers, as in `BPETokenizer.train`.

    Raises:
      ValueError: the string is none of these.
      TypeError: the object lacks a method or attribute of Tokenizer.
    """
    if isinstance(tokenizer, str):
        kind, _, size = tokenizer.partition(":")
        if tokenizer == "bytes":
            return ByteTokenizer()
        if kind == "bpe" and size.isdecimal():
            return BPETokenizer.train(texts, int(size), cache)
        raise ValueError(f"unknown tokenizer {tokenizer!r}; legal are {_LEGAL}")
    if not isinstance(tokenizer, Tokenizer):
        lacking = [name for name in ("vocab_size", "end", "encode", "decode") if not hasattr(tokenizer, name)]
        raise TypeError(
            f"{type(tokenizer).__name__} is no tokenizer: it lacks {', '.join(lacking)}; legal are {_LEGAL}"
        )
    return tokenizer


def _without_end(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    ids = np.asarray(ids, np.int64 if len(ids) == 0 else None)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids must be integers of shape [tokens], got {ids.dtype}{list(ids.shape)}")
    if len(illegal := ids[(ids < 0) | (ids >= tokenizer.vocab_size)]):
        raise ValueError(
            f"{len(illegal)} of {len(ids)} ids are not in 0 <= id < {tokenizer.vocab_size}, the first is {illegal[0]}"
        )
    return ids[ids != tokenizer.end]


def _import_tokenizers() -> Any:
    try:
        import tokenizers  # an optional dependency, needed by BPE alone
    except ImportError as error:
        raise ImportError(f"BPE needs the package `tokenizers`: {install('hf')}, or use tokenizer='bytes'") from error
    return tokenizers


def _train(texts: Sequence[str], vocab_size: int) -> str:
    tokenizers = _import_tokenizers()
    level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = level(add_prefix_space=False)  # a space in front would not survive decoding
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=2, show_progress=False, initial_alphabet=level.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def _digest(texts: Sequence[str], vocab_size: int) -> str:
    digest = hashlib.sha256(f"byte-level BPE, {vocab_size} ids, {len(texts)} texts".encode())
    for text in texts:
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8) + data)  # the length, so that texts cut elsewhere differ
    return digest.hexdigest()[:32]


def _read(path: Path) -> str | None:
    """Returns the definition that `_write` wrote, or None, with a warning, if it is damaged."""
    try:
        content = read_small(path.parent, path.name)
    except ValueError as error:  # a link, a pipe, or too large
        warnings.warn(f"the cached tokenizer is not read: {error}", stacklevel=3)
        return None
    checksum, _, definition = content.partition(b"\n")
    if hashlib.sha256(definition).hexdigest().encode() == checksum:
        return definition.decode("utf-8")
    warnings.warn(f"the cached tokenizer {str(path)!r} is damaged; training it again", stacklevel=3)
    return None


def _write(path: Path, definition: str) -> None:
    data = definition.encode("utf-8")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In one step: processes that train at once see a whole file or none.
        write_file(path, [hashlib.sha256(data).hexdigest().encode() + b"\n", data])
    except OSError as error:
        warnings.warn(f"the trained tokenizer is not kept in {str(path.parent)!r}: {error}", stacklevel=3)
