"""What a training run shows and records: a live line, a line for each log, metrics.jsonl, TensorBoard events."""

import json
import math
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import rich.progress
from rich.console import Console
from rich.table import Column
from rich.text import Text

from shardlm._extras import install

_MIN_BAR = 6  # columns that the live line keeps for the bar
_NON_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}  # as JavaScript and Python's json spell them


class Progress:
    """Shows and records one training run. Use it in a `with` statement: that begins and ends the live line.

    On a terminal a live line (bar, step, last metrics, elapsed<remaining time) stays below a plain line for each `log`.
    Elsewhere (pipe, file, CI, notebook) there are only the plain lines, each with the time that remains. Metrics known
    by name have units: `loss`, `held_out_loss`, `grad_norm`, `learning_rate`, `tokens`, `tokens_per_second`,
    `rows_per_second`, `step_time` (in seconds, shown in ms), `utilisation` (a fraction, shown in percent). Others show
    as `name value`.

    Each `log` appends a line `{"step": 120, "time": 1767225600.0, "loss": 2.431}` to `directory/metrics.jsonl`, with
    the time in seconds since 1970. JSON has no NaN and no infinity: they are the strings "NaN", "Infinity" and
    "-Infinity", which `float` reads. Lines of steps after `start`, which a run left that went on after its last
    checkpoint, are dropped from the file first.

    Args:
        total: number of the last step.
        start: steps made before this run; the first that it makes is `start + 1`.
        log_every: steps between two calls of `log`; see `due`.
        directory: where metrics.jsonl goes, a local folder, made if it does not exist; None records nothing. One run
            at a time records in a folder, until it is closed.
        tensorboard: write TensorBoard events to `directory` too.
        console: where to print; default the standard output.
        enabled: False, for all processes but one, shows and records nothing.

    Raises:
        ValueError: `tensorboard` without `directory`, a directory that is not local, `log_every` below 1.
        OSError: another run records in the directory; or metrics.jsonl is a link, or no plain file.
        ImportError: `tensorboard` without the package tensorboardX.

    Example:
        >>> with Progress(total=300, directory="runs/a") as progress:
        ...     for step in range(1, 301):
        ...         progress.advance(step)
        ...         if progress.due(step):
        ...             progress.log(step, {"loss": 2.431})
    """

    def __init__(
        self,
        *,
        total: int,
        start: int = 0,
        log_every: int = 10,
        directory: str | Path | None = None,
        tensorboard: bool = False,
        console: Console | None = None,
        enabled: bool = True,
    ):
        if log_every < 1:
            raise ValueError(f"log_every={log_every}; it is a number of steps, at least 1")
        if tensorboard and directory is None:
            raise ValueError("tensorboard=True, but there is no directory to write the events to: give one")
        from shardlm.runtime.paths import local_path  # a line to look at needs nothing of shardlm

        folder = None if directory is None else local_path(directory, "log_dir")
        if console is None:  # rich takes a pipe for a terminal where FORCE_COLOR is set, as some CI does
            console = Console(force_interactive=None if sys.stdout.isatty() else False)
        self._total, self._log_every, self._enabled, self._console = total, log_every, enabled, console
        self._latest: dict[str, float] = {}
        self._widths: dict[str, int] = {}
        self._began, self._pace = time.monotonic(), math.nan  # seconds, seconds a step
        self._first_log: tuple[int, float] | None = None
        self._record: Any = None
        self._writer: Any = None
        self._live: rich.progress.Progress | None = None
        if enabled and folder is not None:
            from shardlm.train.record import Record

            make_writer = _summary_writer() if tensorboard else None
            self._record = Record(folder)
            if dropped := self._record.drop(start):
                self.message(f"{self._record.path}: dropped {dropped} line(s), cut short or of steps after {start}")
            if make_writer is not None:  # TensorBoard hides what earlier runs wrote for purge_step and later
                self._writer = make_writer(str(folder), purge_step=start + 1)
        if enabled and console.is_interactive and not console.is_jupyter:
            columns = rich.progress.BarColumn(None, table_column=Column(ratio=1)), _TextColumn(self._live_text)
            self._live = rich.progress.Progress(*columns, console=console, expand=True, refresh_per_second=4)
            self._task = self._live.add_task("", total=total, completed=start)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def due(self, step: int) -> bool:
        """Whether to call `log` after `step`: every `log_every` steps and at the last one."""
        return step % self._log_every == 0 or step == self._total

    def advance(self, step: int) -> None:
        """Move the live line to `step`. It prints nothing itself, so call it after every step that is dispatched."""
        if self._live is not None:
            self._live.update(self._task, completed=step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print and record what was measured at `step`, in training or evaluation, by any name but step and time."""
        if not self._enabled:
            return
        if reserved := metrics.keys() & {"step", "time"}:
            raise ValueError(f"a metric is called {reserved.pop()!r}, as the step or the time of its line: rename it")
        values = {name: float(value) for name, value in metrics.items()}
        self._latest |= values
        self._measure_pace(step, values)
        self._print_line(step, values)
        if self._record is not None:
            record = {"step": int(step), "time": time.time()}
            record |= {name: v if math.isfinite(v) else _NON_FINITE[str(v)] for name, v in values.items()}
            if problem := self._record.append(json.dumps(record) + "\n"):
                self.message(problem)
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def message(self, text: str) -> None:
        """Print a line above the live line, cut between words where the terminal is narrower."""
        if self._live is not None:
            self._console.out("\n".join(map(self._folded, text.split("\n"))), highlight=False)
        elif self._enabled:  # without rich, which in a notebook makes a block of HTML of each line
            print(text, file=self._console.file, flush=True)

    def _folded(self, line: str) -> str:
        """A line that is cut between words where it is wider than the terminal, which would cut them."""
        if len(line) <= self._console.width:
            return line
        wide, rest = self._console.width, {"break_long_words": False, "break_on_hyphens": False}
        return textwrap.fill(line, wide, subsequent_indent="  ", replace_whitespace=False, **rest)

    def close(self) -> None:
        """End the live line and the event file. Closing twice does no harm."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._writer is not None:
            self._writer.close()
        if self._record is not None:
            self._record.close()

    def _measure_pace(self, step: int, values: Mapping[str, float]) -> None:
        """Time per step since the first log: with evaluations and checkpoints, and without compilation."""
        now = time.monotonic()
        first_step, first_time = self._first_log = self._first_log or (step, now)
        measured = step > first_step
        self._pace = (now - first_time) / (step - first_step) if measured else values.get("step_time", self._pace)

    def _remaining(self, step: float) -> str:
        return _clock(self._pace * max(0, self._total - step))

    def _print_line(self, step: int, values: Mapping[str, float]) -> None:
        parts = {name: _text(name, values[name]) for name in sorted(values, key=lambda name: _RANK.get(name, 3.5))}
        if self._live is None:
            parts["eta"] = f"eta {self._remaining(step)}"
        line = f"step {step:>{max(5, len(str(self._total)))}}/{self._total}"
        indent = room = len(line)
        for name, part in parts.items():
            width = self._widths[name] = max(self._widths.get(name, 0), len(part))  # columns only ever widen
            room += 2 + width
            if self._live is not None and room > self._console.width:  # fold between metrics
                line, room = f"{line}\n{'':{indent}}", indent + 2 + width
            line += f"  {part:>{width}}"
        self.message(line)

    def _live_text(self, step: float) -> str:
        names = ("loss", "tokens_per_second", "rows_per_second", "step_time", "utilisation")
        shown = [name for name in names if name in self._latest]
        parts = {"step": f"{step:>{len(str(self._total))}}/{self._total}"}
        parts |= {name: _text(name, self._latest[name]).replace("tokens", "tok").replace("/step", "") for name in shown}
        parts["clock"] = f"{_clock(time.monotonic() - self._began)}<{self._remaining(step)}"
        for name in [*reversed(shown), "clock"]:  # what goes first where it is narrow
            if len("  ".join(parts.values())) + 1 + _MIN_BAR <= self._console.width:
                break
            del parts[name]
        return "  ".join(parts.values())


class _TextColumn(rich.progress.ProgressColumn):
    """A column of the live line whose text is a function of the step, computed at each refresh."""

    def __init__(self, text: Callable[[float], str]):
        super().__init__(Column(no_wrap=True))
        self._text = text

    def render(self, task: rich.progress.Task) -> Text:
        return Text(self._text(task.completed))


def _summary_writer() -> Any:
    try:
        from tensorboardX import SummaryWriter  # an optional dependency, needed for events alone
    except ImportError as error:
        raise ImportError(f"tensorboard=True needs tensorboardX: {install('tensorboard')}") from error
    return SummaryWriter


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-:--:--"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _short(value: float) -> str:
    for letter in ("", "k", "M", "B"):
        if not 999.95 <= abs(value) < math.inf:  # NaN and infinity have no letter
            return f"{value:.1f}{letter}" if letter else f"{value:.0f}"
        value /= 1000
    return f"{value:.1f}T"


_FORMATS: dict[str, Callable[[float], str]] = {  # in the order of the line; unknown names come fifth
    "loss": "loss {:.4f}".format,
    "held_out_loss": "held_out_loss {:.4f}".format,
    "grad_norm": lambda value: f"grad_norm {value:#.3g}".rstrip("."),
    "learning_rate": "lr {:.2e}".format,
    "tokens": lambda value: f"{_short(value)} tokens",
    "tokens_per_second": lambda value: f"{_short(value)} tokens/s",
    "rows_per_second": lambda value: f"{_short(value)} rows/s",
    "step_time": lambda value: f"{1000 * value:.{1 if value < 0.00995 else 0}f} ms/step",
    "utilisation": lambda value: f"mfu {100 * value:.1f} %",
}
_RANK = {name: rank for rank, name in enumerate(_FORMATS)}


def _text(name: str, value: float) -> str:
    return _FORMATS[name](value) if name in _FORMATS else f"{name} {value:#.4g}".rstrip(".")
