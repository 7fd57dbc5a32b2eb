"""Which batches a run has used: where it goes on, and what its checkpoints say of it."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax

from shardlm.train import resume
from shardlm.train.run_record import digest_of

if TYPE_CHECKING:
    from shardlm.train.trainer import Trainer

_MOST = 100  # different numbers of rows that are remembered


class Used:
    """Counts the rows of a run's batches, and holds its first batch to those of the run before.

    Args:
        run: `run_record.describe_run` of it; empty where nothing is saved.
        resumption: how it goes on from a checkpoint.
        batches: of `fit`.
        start: updates made so far.
        say: shows a line in the run's log.
        accepted: whether the user accepts batches that are others.
    """

    def __init__(
        self,
        run: Mapping[str, Any],
        resumption: resume.Resumption,
        batches: Any,
        start: int,
        say: Callable[[str], None],
        accepted: bool,
    ):
        self._run, self._resumption, self._start = run, resumption, start
        self._say, self._accepted = say, accepted
        self._size = getattr(batches, "batch_size", 0) if hasattr(batches, "from_row") else 0
        self._first = start * self._size if resumption.first_row is None else resumption.first_row
        self._rows = resumption.saved.get("rows")  # of all updates; None: not known
        if start == 0:
            self._rows = 0
        self._counts: set[int] = set()  # numbers of rows that batches have had
        self._shape: tuple[Any, dict[str, list[int]]] | None = None
        self._last: Any = None

    def stream(self, batches: Any) -> Iterator[Any]:
        """The batches from the very next one on."""
        self._resumption.lines = []  # said
        stream = resume.iterate(batches, self._start, self._resumption if self._resumption.saved else None)
        self._tell()
        return stream

    def take(self, trainer: "Trainer", step: int, batch: Any) -> None:
        """Look at a batch, which `step` is about to use; `made` counts it.

        Raises:
            ValueError: it is the first after a resumption, and of another number of rows.
        """
        if not self._run:
            return
        local = [getattr(leaf, "shape", None) for leaf in jax.tree.leaves(batch)]
        if self._shape is None or self._shape[0] != local:
            try:
                leaves = jax.tree_util.tree_leaves_with_path(trainer.abstract_batch(batch))
            except (TypeError, ValueError):
                return  # the step itself says what is wrong with it
            shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): list(x.shape) for path, x in leaves}
            self._shape = local, shapes
        if step == self._start + 1 and not self._size:
            resume.compare_shapes(self._shape[1], step, self._resumption)
            self._resumption.check(self._accepted)
            self._tell()

    def made(self, batch: Any) -> None:
        """Count a batch, which a step has used."""
        if self._shape is not None:
            rows = next(iter(self._shape[1].values()))[0]
            self._counts.add(rows)
            self._rows = None if self._rows is None else self._rows + rows
        self._last = batch

    def record(self, step: int) -> dict[str, Any]:
        """What a checkpoint of `step` is to say."""
        batches = dict(self._run["batches"])
        if self._size:
            batches["position"] = self._first + (step - self._start) * self._size
        last = digest_of(self._last) if jax.process_count() == 1 else None
        shapes = None if self._shape is None else self._shape[1]
        counts = sorted(self._counts)[:_MOST]
        found = {"batches": batches, "batch": shapes, "row_counts": counts, "rows": self._rows, "last_batch": last}
        return dict(self._run) | found

    def _tell(self) -> None:
        for line in self._resumption.lines:
            self._say(line)
        self._resumption.lines = []


def check_source(batches: Any) -> None:
    """Raise TypeError for what is no source of batches, before anything is begun."""
    if hasattr(batches, "train") and hasattr(batches, "tokenizer"):
        raise TypeError(
            "fit: batches is data of sl.data.load, with a part to train on and one held out: give data.train"
        )
    legal = any(hasattr(batches, name) for name in ("iterate", "__getitem__", "__iter__"))
    if isinstance(batches, str | bytes) or not legal:
        raise TypeError(
            f"fit: batches is a {type(batches).__name__}; it is a list of batches, something indexed by step as "
            "shardlm.data.Batches, or an iterable of batches"
        )
