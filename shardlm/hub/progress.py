"""How far reading or writing has come: a bar on a terminal, nothing elsewhere."""

import sys
from typing import Any, Self

import jax
import rich.progress
from rich.console import Console


class Progress:
    """A bar over bytes; use it in a `with` statement.

    Args:
        what: is done, in words.
        total: bytes.
        shown: False shows nothing; nor do other processes than the first, nor an output that is no terminal.
    """

    def __init__(self, what: str, total: float, shown: bool):
        shown = shown and jax.process_index() == 0 and sys.stderr.isatty()
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(),
            rich.progress.TransferSpeedColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        self._progress = rich.progress.Progress(*columns, console=Console(stderr=True), disable=not shown)
        self._task = self._progress.add_task(what, total=total)

    def advance(self, count: float) -> None:
        """So many bytes more are done."""
        self._progress.advance(self._task, count)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._progress.stop()
