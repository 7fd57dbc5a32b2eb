"""What all command lines share: options read by their whole names alone, kinds of values, and the program's name."""

import argparse
import difflib
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Parser(argparse.ArgumentParser):
    """argparse's parser without abbreviations, which would take `--step 100` for `--steps 100` in silence.

    Its commands (`add_subparsers`) are parsers of this kind too. An unknown option is an error that names its like.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options | {"allow_abbrev": False})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, with an error that names what an unknown option may mean."""
        found, others = super().parse_known_args(args, namespace)
        unknown = [word.partition("=")[0] for word in others if word.startswith("--") and word != "--"]
        legal = [name for action in self._actions for name in action.option_strings]
        meant = [next(iter(difflib.get_close_matches(word, legal, n=1)), None) for word in unknown]
        if any(meant):
            hints = ", ".join(dict.fromkeys(filter(None, meant)))
            self.error(f"unrecognized arguments: {' '.join(others)} (did you mean {hints}?)")
        return found, others


def program(module: str = "shardlm") -> str:
    """How to start this program once more, for lines that say what to type next: `shardlm`, or `python -m shardlm`.

    Where the environment is not activated, with the path of its Python: `.venv/bin/python -m shardlm`.
    """
    if Path(sys.argv[0]).stem == module:
        return module
    found = shutil.which("python")
    if found is not None and Path(found).parent == Path(sys.executable).parent:
        return f"python -m {module}"
    near = os.path.relpath(sys.executable)
    return f"{shlex.quote(sys.executable if near.startswith('..') else near)} -m {module}"


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class HeldOut(argparse.Action):
    """A number is a fraction; all else are paths."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        numbers = [_number(value) for value in values]
        if len(values) > 1 and any(number is not None for number in numbers):
            parser.error(f"argument --held-out: {' '.join(values)}: give one fraction, or files and folders")
        setattr(namespace, self.dest, values if numbers[0] is None else numbers[0])


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def at_least(minimum: float, kind: type = int) -> Callable[[str], Any]:
    """A `type` of argparse: a number that is not below `minimum`."""

    def number(text: str) -> Any:
        value = kind(text)
        if not minimum <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {minimum} on")
        return value

    number.__name__ = kind.__name__  # argparse says "invalid int value"
    return number
