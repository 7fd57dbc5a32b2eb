"""Documents of any length, packed without loss into rows of one length.

A document with tokens t1 .. tn contributes n + 1 pairs (input, target) to one flat stream:

    inputs   END t1 ..   tn
    targets  t1  t2 .. END

so every token, and every document's end, is predicted exactly once. Row i of length S holds the pairs
[i*S, (i+1)*S) of the stream; only the last row has padding. The rows are computed when asked for, from the
flat stream.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Protocol, SupportsIndex

import numpy as np

from shardlm.data.arguments import positive


class Rows(Protocol):
    """Rows of one length by random access, as `Packed` has them: what batches are made of.

    Attributes:
      sequence: tokens per row.
      tokens: tokens in all rows, without padding.
      counts: sizes by what they count, for a line about the data; the last are the rows.
    """

    sequence: int
    tokens: int

    @property
    def counts(self) -> dict[str, int]:
        """Sizes by what they count."""
        ...

    def __len__(self) -> int:
        """Returns the number of rows."""
        ...

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        """Returns one row."""
        ...

    def padding(self) -> dict[str, np.ndarray]:
        """Returns a row that is all padding."""
        ...


class Packed:
    """Rows of packed documents, by random access: a Grain `RandomAccessDataSource`.

    It keeps one flat array of tokens (uint16 where the vocabulary fits, else int32) and one offset per document.

    Args:
      documents: the tokens of each document, integers [tokens] in 0 <= token < vocab_size and never `end`; a
        document may be empty.
      sequence: tokens per row, at least 1.
      vocab_size: number of token ids, `end` included.
      end: the id of the boundary between documents.

    Attributes:
      sequence: tokens per row.
      documents: number of documents.
      tokens: number of pairs, which is that of all tokens plus one END per document.

    Raises:
      ValueError: sequence below 1, no documents or only empty ones, or tokens that are out of range.

    Example:
      >>> packed = Packed([[7, 8, 9], [5]], sequence=4, vocab_size=11, end=10)
      >>> {name: array.tolist() for name, array in packed[0].items() if name in ("tokens", "targets")}
      {'tokens': [10, 7, 8, 9], 'targets': [7, 8, 9, 10]}
      >>> packed[1]["weights"].tolist()
      [1.0, 1.0, 0.0, 0.0]
    """

    def __init__(
        self, documents: Iterable[Sequence[int] | np.ndarray], sequence: int, *, vocab_size: int, end: int
    ) -> None:
        sequence = positive("sequence", sequence, "token per row")
        if not 0 <= end < vocab_size:
            raise ValueError(f"end={end} is not a token id: it must be in 0 <= end < vocab_size={vocab_size}")
        dtype = np.uint16 if vocab_size <= 2**16 else np.int32
        parts = [_checked(tokens, i, vocab_size, end).astype(dtype) for i, tokens in enumerate(documents)]
        lengths = np.array([len(part) + 1 for part in parts], np.int64)
        if lengths.sum() == len(parts):
            raise ValueError(f"nothing to pack: the {len(parts)} document(s) given hold no token")

        # Each document is preceded by END and the last one followed by it, so that the targets are the inputs one
        # further on and need no array of their own.
        boundary = np.array([end], dtype)
        self._stream = np.concatenate([array for part in parts for array in (boundary, part)] + [boundary])
        self._starts = np.cumsum(lengths) - lengths
        self._end = end
        self.sequence = sequence
        self.documents = len(parts)
        self.tokens = len(self._stream) - 1

    @cached_property
    def digest(self) -> str:
        """A digest of the documents' tokens, whatever the rows' length."""
        digest = hashlib.sha256(f"{self._stream.dtype} {self._end}\n".encode())
        digest.update(self._stream.tobytes())
        digest.update(self._starts.tobytes())
        return digest.hexdigest()[:32]

    def __len__(self) -> int:
        """Returns the number of rows."""
        return math.ceil(self.tokens / self.sequence)

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        """Returns one row.

        Args:
          index: 0 <= index < len(self).

        Returns:
          A dict of arrays [sequence]:
            tokens: int32, the inputs; END in padding.
            targets: int32, the token that follows each; END in padding.
            weights: float32, 1, and 0 in padding.
            segments: int32, 1, 2, .. for the documents in this row, 0 in padding.
            positions: int32, from 0 within each segment; a document that began in an earlier row starts again at 0.

        Raises:
          IndexError: there is no such row.
        """
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        low = index * self.sequence
        high = min(low + self.sequence, self.tokens)
        length = high - low

        # the documents that begin inside the row, after its first pair
        first, last = np.searchsorted(self._starts, [low, high - 1], side="right")
        begins = np.concatenate([[0], self._starts[first:last] - low])
        lengths = np.diff(begins, append=length)

        row = self.padding()
        row["tokens"][:length] = self._stream[low:high]
        row["targets"][:length] = self._stream[low + 1 : high + 1]
        row["weights"][:length] = 1
        row["segments"][:length] = np.repeat(np.arange(1, len(begins) + 1), lengths)
        row["positions"][:length] = np.arange(length) - np.repeat(begins, lengths)
        return row

    def padding(self) -> dict[str, np.ndarray]:
        """Returns a row that is all padding, as `self[index]` has it: weights 0, segments 0, positions 0."""
        return row_of_padding(self.sequence, self._end)

    @property
    def counts(self) -> dict[str, int]:
        """Documents, tokens (one END per document included) and rows."""
        return {"documents": self.documents, "tokens": self.tokens, "rows": len(self)}

    def __repr__(self) -> str:
        return f"Packed({self.documents} documents, {self.tokens} tokens, {len(self)} rows of {self.sequence})"


def row_of_padding(sequence: int, end: int) -> dict[str, np.ndarray]:
    """A row of `sequence` places that hold nothing: `end`, of weight 0, in segment 0."""
    return {
        "tokens": np.full(sequence, end, np.int32),
        "targets": np.full(sequence, end, np.int32),
        "weights": np.zeros(sequence, np.float32),
        "segments": np.zeros(sequence, np.int32),
        "positions": np.zeros(sequence, np.int32),
    }


def _checked(tokens: Sequence[int] | np.ndarray, document: int, vocab_size: int, end: int) -> np.ndarray:
    if isinstance(tokens, np.ma.MaskedArray):
        raise ValueError(f"document {document} is a masked array, whose mask is not read: give the tokens that stay")
    tokens = np.asarray(tokens, np.int32 if len(tokens) == 0 else None)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"document {document} must be integers of shape [tokens], got {tokens.dtype}{list(tokens.shape)}"
        )
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        raise ValueError(
            f"document {document} has token ids from {tokens.min()} to {tokens.max()}; "
            f"vocab_size={vocab_size} allows 0 to {vocab_size - 1}"
        )
    if found := np.count_nonzero(tokens == end):
        raise ValueError(
            f"document {document} contains the boundary end={end} {found} time(s); packing puts it between documents, "
            "so the tokenizer must not"
        )
    return tokens
