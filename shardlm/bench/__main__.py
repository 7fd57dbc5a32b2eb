"""The command line of the benchmarks: `python -m shardlm.bench step`, `pipeline`, `generate` and others."""

import sys
from collections.abc import Sequence

from shardlm._command_line import Parser
from shardlm.bench import checkpoint, cold, compile, faults, generate, pipeline, step


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark; returns the exit status: 0, or 2 for a mistake in the arguments."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> Parser:
    """What the command line takes."""
    top = Parser(
        prog="python -m shardlm.bench",
        description="Measure shardlm on this machine. Each command's --help says what its numbers mean.",
    )
    commands = top.add_subparsers(required=True, metavar="command")
    for command in (step, compile, cold, pipeline, generate, checkpoint, faults):
        command.add(commands)
    return top


if __name__ == "__main__":
    sys.exit(main())
