"""Examples packed whole into rows of one length, with the loss on what is to be learned alone.

Of an example with the ids p1 .. pn of its prompt and c1 .. cm of its completion a row holds the pairs

    inputs   BEGIN p1 .. pn c1 .. cm
    targets  p1    .. pn c1 .. cm END
    weights  0     .. 0  1  .. 1  1

n + m + 1 of them, or one fewer with a tokenizer that has no BEGIN. A row holds as many whole examples as fit, each a
segment of its own, and padding. They are put in longest first, each into the fullest row that has room (best fit).
"""

from __future__ import annotations

import bisect
import hashlib
import os
import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any, SupportsIndex

import numpy as np

from shardlm.data.apart import check_apart
from shardlm.data.arguments import positive
from shardlm.data.encoder import Encoder
from shardlm.data.examples import Example, read_examples
from shardlm.data.loader import Batches, Epoch, TextData
from shardlm.data.packing import row_of_padding
from shardlm.data.text import Document, split_documents
from shardlm.data.tokens import DEFAULT_CACHE, make_tokenizer

TOO_LONG = (None, "truncate", "drop")


class Completions:
    """Rows of packed examples, by random access, as `Packed` gives rows of documents.

    Args:
      examples: at least one.
      sequence: pairs in a row.
      encoder: makes the ids.
      too_long: what happens to an example of more pairs than a row has: None is an error that counts them; "drop"
        leaves it out; "truncate" takes ids from the beginning of its prompt, all if need be, then from its end. Both
        warn with numbers, and `counts` has them.

    Raises:
      ValueError: sequence below 1, no example, one without ids to learn, or some that are too long.

    Example:
      >>> example = Example("here", (Piece("ab", False), Piece("c", True)))
      >>> row = Completions([example], sequence=5, encoder=Encoder.of(ByteTokenizer()))[0]
      >>> row["tokens"].tolist(), row["targets"].tolist(), row["weights"].tolist()
      ([256, 97, 98, 99, 256], [97, 98, 99, 256, 256], [0.0, 0.0, 1.0, 1.0, 0.0])
    """

    def __init__(
        self, examples: Sequence[Example], sequence: int, encoder: Encoder, too_long: str | None = None
    ) -> None:
        sequence = positive("sequence", sequence, "token per row")
        if too_long not in TOO_LONG:
            raise ValueError(f"too_long={too_long!r}; it is one of {', '.join(map(repr, TOO_LONG))}")
        self.sequence, self._end, self._begins = sequence, encoder.end, encoder.begin is not None
        encoded = [_encoded(example, encoder) for example in examples]
        if nothing := [e.where for e, (_, learned) in zip(examples, encoded, strict=True) if not learned[1:].any()]:
            raise ValueError(f"{len(nothing)} examples have no token to learn, the first is {nothing[0]}")
        if first := [e.where for e, (_, learned) in zip(examples, encoded, strict=True) if learned[0]]:
            raise ValueError(
                f"{len(first)} examples have no prompt, and the tokenizer has no token to begin with, from which their "
                f"first could be learned; the first is {first[0]}: give begin=, the id of such a token"
            )
        kept = self._fitted(examples, encoded, too_long)
        if not kept:
            raise ValueError(f"no examples: all {len(examples)} were left out" if examples else "no examples")
        # One id more than pairs: the targets are the inputs one further on.
        self._ids = np.concatenate([ids for ids, _ in kept])
        self._learned = np.concatenate([learned for _, learned in kept])
        lengths = np.array([len(ids) for ids, _ in kept])
        self._starts, self._ends = np.cumsum(lengths) - lengths, np.cumsum(lengths)
        self._rows = _best_fit(lengths - 1, sequence)
        self.tokens = int((lengths - 1).sum())
        self.learned = int(sum(learned[1:].sum() for _, learned in kept))

    @property
    def counts(self) -> dict[str, int]:
        """Examples, their pairs, those of them that are learned, rows, and what was done to examples too long."""
        sizes = {"examples": len(self._starts), "tokens": self.tokens, "learned": self.learned, "rows": len(self)}
        return sizes | {name: n for name, n in self._lost.items() if n}

    @cached_property
    def digest(self) -> str:
        """A digest of the examples, what of them is learned, and how rows are made of them."""
        digest = hashlib.sha256(f"{self._end} {self._begins} {self._rows}\n".encode())
        for array in (self._ids, self._learned, self._starts):
            digest.update(array.tobytes())
        return digest.hexdigest()[:32]

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        """Returns one row, 0 <= index < len(self): arrays as of `Packed`, weights 0 on prompts and in padding."""
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row, at = self.padding(), 0
        for segment, example in enumerate(self._rows[index], 1):
            first, last = self._starts[example], self._ends[example] - 1
            held = slice(at, at + last - first)
            row["tokens"][held] = self._ids[first:last]
            row["targets"][held] = self._ids[first + 1 : last + 1]
            row["weights"][held] = self._learned[first + 1 : last + 1]
            row["segments"][held] = segment
            row["positions"][held] = np.arange(last - first)
            at = held.stop
        return row

    def padding(self) -> dict[str, np.ndarray]:
        """Returns a row that is all padding."""
        return row_of_padding(self.sequence, self._end)

    def __repr__(self) -> str:
        return f"Completions({', '.join(f'{n} {name}' for name, n in self.counts.items())} of {self.sequence})"

    def _fitted(
        self, examples: Sequence[Example], encoded: list[tuple[np.ndarray, np.ndarray]], too_long: str | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The examples, those that are too long dealt with."""
        surplus = [len(ids) - 1 - self.sequence for ids, _ in encoded]
        long = [i for i, more in enumerate(surplus) if more > 0]
        self._lost = {"dropped": 0, "truncated": 0, "tokens lost": 0}
        if not long:
            return encoded
        worst = max(long, key=lambda i: surplus[i])
        longest = self.sequence + surplus[worst]
        what = f"{len(long)} of {len(examples)} examples are longer than sequence={self.sequence} tokens"
        where = f"the longest, {examples[worst].where}, has {longest}"
        if too_long is None:
            raise ValueError(
                f"{what}; {where}: use sequence={longest}, or say too_long='truncate' or 'drop' (--too-long)"
            )
        if too_long == "drop":
            lost = sum(len(encoded[i][0]) - 1 for i in long)
            self._lost |= {"dropped": len(long), "tokens lost": lost}
            warnings.warn(f"{what} and were left out, {lost} tokens in all; {where}", stacklevel=4)
            return [pair for pair, more in zip(encoded, surplus, strict=True) if more <= 0]
        lost = sum(surplus[i] for i in long)
        self._lost |= {"truncated": len(long), "tokens lost": lost}
        warnings.warn(f"{what} and were cut, by {lost} tokens in all; {where}", stacklevel=4)
        return [_cut(*pair, max(more, 0), self._begins) for pair, more in zip(encoded, surplus, strict=True)]


def load_examples(
    path: str | os.PathLike | Sequence[str | os.PathLike],
    tokenizer: Any = "bytes",
    sequence: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    held_out: float | str | os.PathLike | Sequence[str | os.PathLike] = 0.05,
    rows: slice | range | None = None,
    *,
    too_long: str | None = None,
    end: int | None = None,
    begin: int | None = None,
    cache: str | os.PathLike | None = DEFAULT_CACHE,
) -> TextData:
    """Makes batches to fine-tune on from JSON lines of prompts and completions, or of chats (see `examples`).

    Args:
      path: a file, or several.
      tokenizer: ``"bytes"``, ``"bpe:SIZE"`` trained on the training examples, or what `Encoder.of` takes.
      sequence, batch_size: tokens per row, and rows per global batch.
      seed: decides the order of the training rows, and nothing else.
      held_out: fraction of the examples to evaluate on, 0 for none, by a hash of their text, so that equal examples
        are on one side; or files of them.
      rows: which rows of each global batch this process reads.
      too_long: None, "truncate" or "drop", see `Completions`.
      end, begin: token ids, where the tokenizer's own are not wanted; see `Encoder.of`.
      cache: folder of trained tokenizers; None keeps none.

    Returns:
      As of `load`: batches indexed by step, each a function of (seed, step) alone.

    Raises:
      ValueError: a file, a line or an example cannot be used, or there are too few examples for one batch.

    Example:
      >>> data = sl.data.load_examples("questions.jsonl", sequence=256, batch_size=16)  # doctest: +SKIP
      >>> state = trainer.fit(data.train, steps=200)  # doctest: +SKIP
    """
    examples = read_examples(path)
    if isinstance(held_out, int | float | np.number):
        if held_out and len(examples) < 2:
            raise ValueError(
                "cannot hold out examples: there is one, and both sides need some; name a file of its own as held_out "
                "(--held-out), or pass held_out=0 to train without evaluation"
            )
        # By the hash of its text; the index leads back to the example.
        sides = split_documents([Document(e.text, str(i)) for i, e in enumerate(examples)], float(held_out))
        train, held = ([examples[int(document.text)] for document in side] for side in sides)
    else:
        train, held = examples, read_examples(held_out)
        check_apart([e.text for e in train], [e.text for e in held], "examples", (path, held_out))
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, (example.text for example in train), cache)
    encoder = Encoder.of(tokenizer, end, begin)
    packed = Completions(train, sequence, encoder, too_long)
    return TextData(
        train=Batches(packed, batch_size, seed, rows, tokenizer=encoder),
        held_out=Epoch(Completions(held, sequence, encoder, too_long), batch_size, rows) if held else None,
        tokenizer=tokenizer,
    )


def _encoded(example: Example, encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    """All ids of an example, and which of them are learned."""
    parts = [] if encoder.begin is None else [(np.array([encoder.begin], np.int32), False)]
    for piece in example.pieces:
        ids = encoder.encode(piece.text)
        if ids.size and not 0 <= ids.min() <= ids.max() < encoder.vocab_size:
            raise ValueError(
                f"{example.where}: the tokenizer gave ids from {ids.min()} to {ids.max()}, and has 0 to "
                f"{encoder.vocab_size - 1}"
            )
        parts.append((ids, piece.learned))
        if piece.learned:
            parts.append((np.array([encoder.end], np.int32), ids.size > 0))
    learned = np.concatenate([np.full(len(ids), flag) for ids, flag in parts])
    return np.concatenate([ids for ids, _ in parts]), learned


def _cut(ids: np.ndarray, learned: np.ndarray, surplus: int, begins: bool) -> tuple[np.ndarray, np.ndarray]:
    """`surplus` ids fewer: from the prompt's beginning, then from the end; one id stays in front of what is learned."""
    head = min(surplus, max(int(learned.argmax()) - 1, 0))
    kept = np.r_[: int(begins), int(begins) + head : len(ids) - (surplus - head)]
    return ids[kept], learned[kept]


def _best_fit(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Examples by row: longest first, each into the fullest row that has room for it."""
    rows: list[list[int]] = []
    free: dict[int, list[int]] = {}  # rows by the room left in them
    sizes: list[int] = []  # its keys, ascending
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        at = bisect.bisect_left(sizes, length)
        if at == len(sizes):
            left, row = room - length, len(rows)
            rows.append([example])
        else:
            left, row = sizes[at] - length, free[sizes[at]].pop()
            rows[row].append(example)
            if not free[sizes[at]]:
                del free[sizes[at]], sizes[at]
        if left:
            if left not in free:
                bisect.insort(sizes, left)
                free[left] = []
            free[left].append(row)
    return rows
