"""Batches as a function of (seed, step) alone, and the one call that makes them from text."""

from __future__ import annotations

import hashlib
import itertools
import math
import operator
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, SupportsIndex, cast

import grain
import numpy as np

from shardlm.data.apart import check_apart
from shardlm.data.arguments import positive, whole
from shardlm.data.packing import Packed, Rows
from shardlm.data.text import Document, read_documents, split_documents, standard_library
from shardlm.data.tokens import DEFAULT_CACHE, Tokenizer, make_tokenizer

Batch = dict[str, np.ndarray]


class Batches:
    """Shuffled batches without end, each a function of (seed, step) alone.

    Every epoch is another permutation of the rows and holds each exactly once. Where the batch size does not divide
    the rows, a batch holds the end of one epoch and the beginning of the next, so that no row is left out. There is
    no state to save: a run that stopped after step n goes on with `iterate(n + 1)`, or, in batches of another size,
    with `from_row`.

    Args:
      packed: where rows come from.
      batch_size: rows in the global batch, at most `len(packed)`.
      seed: any integer; each gives another order.
      rows: which rows of each global batch to read and return, out of 0 .. batch_size - 1; None is all of them.
        Processes that share them out read the batch together and no row twice.
      tokenizer: what made the tokens, for checkpoints of the run to keep; see `kept.files_of`.

    Raises:
      ValueError: batch_size below 1 or above the rows of one epoch, or rows outside of the batch.

    Example:
      >>> packed = Packed([range(9)], sequence=2, vocab_size=11, end=10)
      >>> batches = Batches(packed, batch_size=4, rows=slice(0, 2))
      >>> batches[7]["tokens"].shape
      (2, 2)
    """

    def __init__(
        self,
        packed: Rows,
        batch_size: int,
        seed: int = 0,
        rows: slice | range | None = None,
        *,
        tokenizer: Any = None,
    ) -> None:
        batch_size, seed = positive("batch_size", batch_size, "row"), whole("seed", seed)
        self.rows = _resolve(rows, batch_size)
        if batch_size > len(packed):
            raise ValueError(
                f"batch_size={batch_size} is more than the {len(packed)} row(s) that {packed.tokens} tokens make at "
                f"sequence={packed.sequence}; lower batch_size or sequence, or give more text"
            )
        self.packed = packed
        self.batch_size = batch_size
        self.seed = seed
        self.tokenizer = tokenizer
        # Grain shuffles epoch e with seed + e. Hashing keeps seed 1 from being seed 0 one epoch later.
        shuffle_seed = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4])
        dataset = grain.MapDataset.source(packed).shuffle(shuffle_seed).repeat()
        self._shuffled = cast("Sequence[Batch]", dataset)  # Grain's type allows for filtered rows, which are None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides these batches, for a checkpoint: two that are equal in it give the same rows in one order.

        `batch_size`, `seed`, `sequence`, `rows` of an epoch, and `digest` of their content, where the rows have one.
        """
        digest = getattr(self.packed, "digest", None)
        sizes = {"batch_size": self.batch_size, "seed": self.seed, "sequence": int(self.packed.sequence)}
        return sizes | {"rows": len(self.packed), "digest": digest}

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every row has been in a batch: rows / batch_size, rounded up."""
        return math.ceil(len(self.packed) / self.batch_size)

    def __getitem__(self, step: SupportsIndex) -> Batch:
        """Returns the batch of a step, 0 or more, as arrays [len(rows), sequence] named as in `Packed.__getitem__`."""
        return self._from(_checked_step(step) * self.batch_size)

    def __iter__(self) -> Generator[Batch, None, None]:
        return self.iterate()

    def iterate(self, start: SupportsIndex = 0, ahead: int = 2) -> Generator[Batch, None, None]:
        """Yields the batches of steps start, start + 1, .. without end, reading ahead in a background thread.

        The thread lives from the first batch until the generator is closed or collected; `ahead` is at least 1 batch.
        """
        return self.from_row(_checked_step(start) * self.batch_size, ahead)

    def from_row(self, row: SupportsIndex, ahead: int = 2) -> Generator[Batch, None, None]:
        """The same from a row on, counted over all epochs: what a run goes on with after so many rows.

        A run that has used 12 rows in batches of 4 goes on with `from_row(12)`, in batches of any size.
        """
        if (row := operator.index(row)) < 0:
            raise ValueError(f"row must be 0 or more, got {row}")
        ahead = positive("ahead", ahead, "batch")
        return _prefetched(self._from, itertools.count(row, self.batch_size), ahead)

    def _from(self, first: int) -> Batch:
        return _stack(self._shuffled[first + row] for row in self.rows)


class Epoch:
    """Batches that hold every row exactly once, in order: for evaluation.

    The last batch is filled up with rows of weight 0.

    Args:
      packed: where rows come from.
      batch_size: rows in the global batch; it may exceed `len(packed)`.
      rows: which rows of each global batch to read and return, as in `Batches`.

    Raises:
      ValueError: batch_size below 1, or rows outside of the batch.
    """

    def __init__(self, packed: Rows, batch_size: int, rows: slice | range | None = None) -> None:
        batch_size = positive("batch_size", batch_size, "row")
        self.rows = _resolve(rows, batch_size)
        self.packed = packed
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Returns the number of batches, the same for all `rows`."""
        return math.ceil(len(self.packed) / self.batch_size)

    def __getitem__(self, index: SupportsIndex) -> Batch:
        """Returns one batch, 0 <= index < len(self), as `Batches` does."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        rows = [index * self.batch_size + row for row in self.rows]
        return _stack(self.packed[row] if row < len(self.packed) else self.packed.padding() for row in rows)

    def __iter__(self) -> Generator[Batch, None, None]:
        return _prefetched(self.__getitem__, iter(range(len(self))), ahead=2)


@dataclass(frozen=True, kw_only=True, repr=False)
class TextData:
    """Text ready to train on; printing it gives its sizes in one line.

    Attributes:
      train: the batches to train on.
      held_out: the batches to evaluate on, or None if nothing is held out.
      tokenizer: what made the tokens. A model needs its `vocab_size`.
    """

    train: Batches
    held_out: Epoch | None
    tokenizer: Tokenizer

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Documents, tokens (one END per document included) and rows of "train" and "held_out"; or examples, ..."""
        train = self.train.packed.counts
        return {"train": train, "held_out": self.held_out.packed.counts if self.held_out else dict.fromkeys(train, 0)}

    def __repr__(self) -> str:
        sizes = "; ".join(
            f"{name.replace('_', ' ')} " + ", ".join(f"{count:,} {unit}" for unit, count in counts.items())
            for name, counts in self.counts.items()
        )
        return f"{sizes} (rows of {self.train.packed.sequence}); {self.tokenizer!r}"


Source = str | os.PathLike | Sequence[str | os.PathLike | Document]


def load(
    path: Source | None = None,
    tokenizer: str | Tokenizer = "bytes",
    sequence: int = 128,
    batch_size: int = 8,
    seed: int = 0,
    held_out: float | Source = 0.05,
    rows: slice | range | None = None,
    *,
    cache: str | os.PathLike | None = DEFAULT_CACHE,
) -> TextData:
    """Makes batches to train and evaluate on from text.

    Args:
      path: a file, a folder, several (see `read_documents`), or documents already read; None is the Python standard
        library's own sources.
      tokenizer: ``"bytes"``, ``"bpe:SIZE"`` such as ``"bpe:8192"``, trained on the training documents, or a Tokenizer.
      sequence, batch_size: tokens per row, and rows per global batch.
      seed: decides the order of the training rows, and nothing else.
      held_out: fraction of the documents to evaluate on (see `split_documents`), 0 for none; or where to read
        them from, as `path`, which then is trained on whole. Of a single document its end is held out.
      rows: which rows of each global batch this process reads.
      cache: folder of trained tokenizers; None keeps none.

    Raises:
      ValueError: a path is missing or holds no text, the documents cannot be split, the tokenizer is unknown, or
        the text is too short for one batch; a file, or a document's text, is given twice.

    Example:
      >>> data = load([Document("a", "to be or not to be"), Document("b", "that is")], sequence=4, batch_size=2)
      >>> sorted(data.train[0])
      ['positions', 'segments', 'targets', 'tokens', 'weights']
    """
    documents = standard_library() if path is None else _documents(path)
    if isinstance(held_out, int | float | np.number):
        train, held = split_documents(documents, float(held_out))
    else:
        train, held = documents, _documents(held_out)
        check_apart([d.text for d in train], [d.text for d in held], "documents", (path, held_out))
    tokenizer = make_tokenizer(tokenizer, (document.text for document in train), cache)

    def pack(part: Sequence[Document]) -> Packed:
        tokens = (tokenizer.encode(document.text) for document in part)
        return Packed(tokens, sequence, vocab_size=tokenizer.vocab_size, end=tokenizer.end)

    return TextData(
        train=Batches(pack(train), batch_size, seed, rows, tokenizer=tokenizer),
        held_out=Epoch(pack(held), batch_size, rows) if held else None,
        tokenizer=tokenizer,
    )


def _documents(source: Source) -> list[Document]:
    items = [source] if isinstance(source, str | os.PathLike) else source
    documents = [item for item in items if isinstance(item, Document)]
    paths = [item for item in items if not isinstance(item, Document)]
    return documents + read_documents(paths) if paths or not documents else documents


def _resolve(rows: slice | range | None, batch_size: int) -> range:
    every = range(batch_size)
    chosen = every if rows is None else rows
    if isinstance(chosen, slice):  # not every[rows], which would clip in silence
        chosen = range(chosen.start or 0, batch_size if chosen.stop is None else chosen.stop, chosen.step or 1)
    if not isinstance(chosen, range):
        raise TypeError(f"rows must be a slice, a range or None, got {type(rows).__name__}")
    if len(chosen) == 0 or chosen[0] not in every or chosen[-1] not in every:
        raise ValueError(f"rows={rows} must be one or more of the rows of the global batch, 0 to {batch_size - 1}")
    return chosen


def _checked_step(step: SupportsIndex) -> int:
    if (step := operator.index(step)) < 0:
        raise ValueError(f"step must be 0 or more, got {step}")
    return step


def _stack(rows: Iterable[Batch]) -> Batch:
    rows = list(rows)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _prefetched(read: Callable[[int], Batch], steps: Iterator[int], ahead: int) -> Generator[Batch, None, None]:
    # The thread holds `read`, never this generator, so dropping the generator runs `finally` and ends the thread.
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shardlm-data")
    try:
        waiting = deque(pool.submit(read, step) for step in itertools.islice(steps, ahead))
        while waiting:
            batch = waiting.popleft().result()
            waiting.extend(pool.submit(read, step) for step in itertools.islice(steps, 1))
            yield batch
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
