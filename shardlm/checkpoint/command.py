"""`python -m shardlm checkpoints`: list, verify, prune and export the checkpoints of a run."""

import argparse
import contextlib
import datetime
import os
import shutil
from pathlib import Path
from typing import Any

from shardlm._text import size, table
from shardlm.runtime.folders import Work, discard, is_ours, sweep
from shardlm.runtime.strangers import inside, printable

from .fields import finite
from .hashes import damage, digest_file, total, wrong_size
from .lock import Lock
from .record import (
    NAME,
    absolute,
    damaged,
    is_checkpoint,
    known_steps,
    read_record,
    steps_in,
)
from .retention import Retention
from .run import surplus

_DESCRIPTION = """
List the checkpoints of a run's folder: step, age, size, loss of the step's training batch, held-out loss where it was
measured after that step ("-" elsewhere), layout, and state:

complete   metadata.json is as it was written, and every file is there with its size
ok         every byte is as it was written (with --verify, which reads all files)
damaged    something is not; the line says what

Exits with 1 where one is damaged.
"""


def add(commands: Any) -> None:
    """Add the command to an argparse object of subcommands."""
    parser = commands.add_parser(
        "checkpoints",
        help="list, verify, prune and export the checkpoints of a run",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("directory", help="of a run, as given to --checkpoint-dir")
    parser.add_argument("--verify", action="store_true", help="read every file and compare it with its hash")
    parser.add_argument("--prune", action="store_true", help="remove all that --keep, --keep-every and --keep-best "
        "do not name; a damaged one is not counted, and stays")  # fmt: skip
    parser.add_argument("--keep", type=int, default=3, help="with --prune: how many of the newest stay (default 3)")
    parser.add_argument("--keep-every", type=int, help="with --prune: those of steps that this divides stay")
    parser.add_argument("--keep-best", type=int, help="with --prune: so many of lowest held-out loss stay")
    parser.add_argument("--export", nargs=2, metavar=("STEP", "TO"), help="copy a checkpoint to a folder of its own, "
        "verified before and after")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Do what is asked and list what is there.

    Raises:
        ValueError, OSError: there are no checkpoints; what is to be exported is damaged, or its place is taken.
    """
    directory = absolute(options.directory, "the run's folder")
    if not directory.is_dir():
        raise FileNotFoundError(f"no folder {directory}")
    if not steps_in(directory):
        what = "is a checkpoint, not a run's folder of them" if is_checkpoint(directory) else "has no checkpoints"
        raise ValueError(f"{directory} {what}: give the folder that was given to --checkpoint-dir")
    if options.export is not None:
        step, to = options.export
        if not step.isascii() or not step.isdecimal():
            raise ValueError(f"--export {printable(step)}: it is one of the steps{known_steps(directory)}")
        to = absolute(to, "--export's folder")
        export(directory / step, to)
        print(f"exported step {step} to {to}")
        return 0
    if options.prune:
        for step in prune(directory, Retention(options.keep, options.keep_every, options.keep_best)):
            print(f"removed step {step}")
    lines = [_line(directory / name, options.verify) for name in _names(directory)]
    print(table((">step", ">age", ">size", ">loss", ">held-out loss", "layout", "state"), lines, gap=2))
    return 1 if any(line[-1].startswith("damaged") for line in lines) else 0


def prune(directory: Any, retention: Retention) -> list[int]:
    """Removes the checkpoints of a run's folder that are not to stay; returns their steps.

    Raises:
        OSError: a run is saving there.
    """
    lock = Lock(directory)
    try:
        steps = surplus(directory, retention)
        for step in steps:
            discard(directory / str(step))
        return steps
    finally:
        lock.release()


def export(path: Any, to: Any) -> None:
    """Copies a checkpoint, which is then one by itself; a kill on the way leaves nothing that looks like one.

    Raises:
        DamagedCheckpoint: it, or the copy, is not what was written.
        ValueError: there is no such checkpoint, or something at `to`.
    """
    record = read_record(path)
    if os.path.lexists(to):
        raise ValueError(f"{to} exists: choose a new path")
    if wrong := damage(path, record["files"]):
        raise damaged(path, "; ".join(wrong))
    sweep(to.parent, lambda name: name == to.name)
    work = Work(to)
    try:
        for name in [*record["files"], NAME]:
            (work.new / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(inside(path, name), work.new / name)
        read_record(work.new)
        if wrong := damage(work.new, record["files"]):
            raise damaged(work.new, "; ".join(wrong))
        work.publish()
    except BaseException:
        with contextlib.suppress(OSError):
            work.remove()
        raise


def _copy(source: Path, to: Path) -> None:
    shutil.copyfile(source, to, follow_symlinks=False)
    digest_file(to, flush=True)


def _names(directory: Any) -> list[str]:
    """Steps, and what is left of steps that were not finished or not whole, by step."""
    names = [entry.name for entry in directory.iterdir()]
    stems = {name: name.partition(".")[0] for name in names}
    steps = {name: int(stem) for name, stem in stems.items() if stem.isascii() and stem.isdecimal()}
    return sorted(steps, key=lambda name: (steps[name], name))


def _line(path: Any, verify: bool) -> tuple[str, ...]:
    shown = printable(path.name, 60)
    if is_ours(path.name):
        text = "not finished: removed by the next run that saves here, unless one writes it now"
        return shown, *"-----", text
    try:
        record = read_record(path)
    except (ValueError, OSError) as error:
        text = str(error).removeprefix(f"the checkpoint {path} is damaged: ")
        text = text.removesuffix(known_steps(path.parent)).split(". Restore another one")[0]
        return shown, *"-----", f"damaged: {printable(text, 500)}"
    metadata = record["metadata"]
    wrong = damage(path, record["files"]) if verify else _missing(path, record["files"])
    state = f"damaged: {'; '.join(wrong)}" if wrong else "ok" if verify else "complete"
    losses = (f"{loss:.4f}" if finite(loss) else "-" for loss in (metadata.get("loss"), record.get("loss")))
    saved = datetime.datetime.fromisoformat(record["saved"])
    age = (datetime.datetime.now(datetime.UTC) - saved).total_seconds()
    return (
        shown, _age(age), size(total(record["files"])), *losses, printable(metadata.get("layout", "-"), 60), state,
    )  # fmt: skip


def _missing(path: Any, files: dict[str, str]) -> list[str]:
    return [text for name, expected in files.items() if (text := wrong_size(path, name, expected))]


def _age(value: float) -> str:
    for unit, many in (("s", 60), ("min", 60), ("h", 24)):
        if value < many:
            return f"{value:.0f} {unit}" if value >= 10 or unit == "s" else f"{value:.1f} {unit}"
        value /= many
    return f"{value:.0f} d" if value >= 10 else f"{value:.1f} d"
