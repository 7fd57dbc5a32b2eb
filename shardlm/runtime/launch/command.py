"""The command line of the launcher."""

import argparse
import importlib.util
import os
import sys
from typing import Any

from shardlm.runtime import watch
from shardlm.runtime.launch.restarts import Restarts
from shardlm.runtime.launch.supervisor import Supervisor

_HELP = """
Start a script as several processes on this machine that train together, and merge what they print, each line with the
number of its process. The script calls sl.initialize() first. When a process dies the others are ended, what it printed
last is shown, and all are started again: fit then goes on from the newest checkpoint in its checkpoint_dir.

Ctrl-C and SIGTERM let the processes save the step they are at and end; a second one ends them at once. However the
launcher itself ends, no process is left.

  python -m shardlm launch --processes 2 --devices-per-process 4 train.py --steps 100
  python -m shardlm launch --processes 2 -m shardlm train --checkpoint-dir runs/a
"""


def add(commands: Any) -> None:
    """Add the command to an argparse object of subcommands."""
    parser = commands.add_parser(
        "launch",
        help="run a script as several processes on this machine, and again when one dies",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python -m shardlm launch [options] script.py [arguments], or ... -m module [arguments]",
    )
    parser.set_defaults(run=launch)
    add = parser.add_argument
    add("--processes", type=_positive, default=None, help="how many (default 1, or the most of --elastic)")
    add("--devices-per-process", type=_positive, help="fake CPU devices, or accelerators, of each (default: on a CPU "
        "1; of several processes on accelerators each takes one)")  # fmt: skip
    add("--restarts", type=_count, default=3, help="how often to start again without a new "
        "checkpoint in between (default %(default)s)")  # fmt: skip
    add("--elastic", type=_range, metavar="MIN:MAX", help="begin with MAX processes, and start again on as many fewer "
        "as were lost, down to MIN; let one size of the layout be -1")  # fmt: skip
    add("--backoff", type=_seconds, default=1.0, help="seconds before the first restart, doubled for each (default 1)")
    add("--grace", type=_seconds, default=30.0, help="seconds to save and end after Ctrl-C or SIGTERM (default 30)")
    add("--hang", metavar="FACTOR:SECONDS", help="report a step that takes FACTOR times as long as the median of "
        "the last 20, and at least SECONDS (default 10:60)")  # fmt: skip
    add("--abort-hangs", action="store_true", help="end a process whose step hangs, so that all are started again")
    add("-m", dest="module", nargs=argparse.REMAINDER, help="run a module as `python -m` does, with its arguments")
    add("script", nargs="?", help="a Python file")
    add("arguments", nargs=argparse.REMAINDER, help="what the script is given")


def launch(options: argparse.Namespace) -> int:
    """`python -m shardlm launch`. Returns the exit status of the run."""
    least, most = options.elastic or (options.processes or 1,) * 2
    if options.elastic and options.processes not in (None, most):
        raise ValueError(f"launch: --processes {options.processes} and --elastic {least}:{most}: give one of them")
    extra = {}
    if options.hang:
        watch.limits({watch.HANG: options.hang})
        extra[watch.HANG] = options.hang
    if options.abort_hangs:
        extra[watch.ABORT] = "1"
    return Supervisor(
        _command(options),
        Restarts(options.restarts, minimum=least, count=most, backoff=options.backoff),
        devices=options.devices_per_process,
        grace=options.grace,
        extra=extra,
    ).run()


def _command(options: argparse.Namespace) -> list[str]:
    """What each process runs, once it is known to exist."""
    if options.module:
        if options.script:
            raise ValueError(f"launch: both a module and a script ({options.script}) are given: give one of them")
        name = options.module[0]
        try:
            found = importlib.util.find_spec(name)
        except ImportError:
            found = None
        if found is None:
            raise ValueError(f"launch: there is no module called {name}")
        return [sys.executable, "-m", *options.module]
    if not options.script:
        raise ValueError("launch: what to run is missing: a script, or -m and a module")
    if not os.path.isfile(options.script):
        raise ValueError(f"launch: there is no file {options.script} (from {os.getcwd()})")
    return [sys.executable, options.script, *options.arguments]


def _positive(text: str) -> int:
    return _count(text, least=1)


def _count(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is not a number from {least} on")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds from 0 on")
    return value


def _range(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise argparse.ArgumentTypeError(f"{text} is not MIN:MAX with 1 <= MIN <= MAX, as in 2:4")
    return int(least), int(most)
