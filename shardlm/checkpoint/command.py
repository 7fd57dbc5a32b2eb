"""`python -m shardlm checkpoints`: list, verify, prune and export the checkpoints of a run."""

import argparse
import datetime
from typing import Any

from shardlm._text import size, table

from .hashes import damage, digest_file, total
from .lock import Lock
from .record import (
    NAME,
    DamagedCheckpoint,
    absolute,
    damaged,
    is_checkpoint,
    known_steps,
    read_record,
    steps_in,
)
from .retention import Retention
from .write import UNFINISHED, remove

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
    directory = absolute(options.directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"no folder {directory}")
    if not steps_in(directory):
        what = "is a checkpoint, not a run's folder of them" if is_checkpoint(directory) else "has no checkpoints"
        raise ValueError(f"{directory} {what}: give the folder that was given to --checkpoint-dir")
    if options.export is not None:
        step, to = options.export
        export(directory / step, absolute(to))
        print(f"exported step {step} to {absolute(to)}")
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
        losses = {}
        for step in steps_in(directory):
            try:
                losses[step] = read_record(directory / str(step)).get("loss")
            except DamagedCheckpoint:
                continue
        surplus = retention.surplus(losses)
        for step in surplus:
            remove(directory / str(step))
        return surplus
    finally:
        lock.release()


def export(path: Any, to: Any) -> None:
    """Copies a checkpoint, which is then one by itself; a kill on the way leaves nothing that looks like one.

    Raises:
        DamagedCheckpoint: it, or the copy, is not what was written.
        ValueError: there is no such checkpoint, or something at `to`.
    """
    record = read_record(path)
    if to.exists():
        raise ValueError(f"{to} exists: choose a new path")
    if wrong := damage(path, record["files"]):
        raise damaged(path, "; ".join(wrong))
    unfinished = to.parent / f"{to.name}{UNFINISHED}"
    unfinished.rmtree(missing_ok=True)
    for name in [*record["files"], NAME]:
        (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).copy(unfinished / name)
        digest_file(unfinished / name, flush=True)
    read_record(unfinished)
    if wrong := damage(unfinished, record["files"]):
        raise damaged(unfinished, "; ".join(wrong))
    unfinished.rename(to)


def _names(directory: Any) -> list[str]:
    """Steps, and what is left of steps that were not finished or not whole, by step."""
    names = [entry.name for entry in directory.iterdir() if entry.name.partition(".")[0].isdecimal()]
    return sorted(names, key=lambda name: (int(name.partition(".")[0]), name))


def _line(path: Any, verify: bool) -> tuple[str, ...]:
    if path.name.endswith(UNFINISHED):
        return path.name, "-", "-", "-", "-", "-", "not finished: removed by the next run's first save"
    try:
        record = read_record(path)
    except (ValueError, OSError) as error:
        text = str(error).removeprefix(f"the checkpoint {path} is damaged: ")
        return (
            path.name,
            "-",
            "-",
            "-",
            "-",
            "-",
            f"damaged: {text.removesuffix(known_steps(path.parent))}".split(". ")[0],
        )
    metadata = record["metadata"]
    wrong = damage(path, record["files"]) if verify else _missing(path, record["files"])
    state = f"damaged: {'; '.join(wrong)}" if wrong else "ok" if verify else "complete"
    losses = (f"{loss:.4f}" if isinstance(loss, float) else "-" for loss in (metadata.get("loss"), record.get("loss")))
    saved = datetime.datetime.fromisoformat(record["saved"])
    age = (datetime.datetime.now(datetime.UTC) - saved).total_seconds()
    return (
        path.name, _age(age), size(total(record["files"])), *losses, str(metadata.get("layout", "-")), state,
    )  # fmt: skip


def _missing(path: Any, files: dict[str, str]) -> list[str]:
    wrong = []
    for name, text in files.items():
        size, file = int(text.split()[0]), path / name
        found = file.stat().length if file.exists() and not file.is_dir() else None
        if found != size:
            wrong.append(f"{name} is missing" if found is None else f"{name} has {found} of {size} bytes")
    return wrong


def _age(value: float) -> str:
    for unit, many in (("s", 60), ("min", 60), ("h", 24)):
        if value < many:
            return f"{value:.0f} {unit}" if value >= 10 or unit == "s" else f"{value:.1f} {unit}"
        value /= many
    return f"{value:.0f} d" if value >= 10 else f"{value:.1f} d"
