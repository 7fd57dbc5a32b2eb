"""The notebooks' stored outputs: made again, and held against what the code gives.

    python -m tests.notebooks            # runs all notebooks and lists the outputs that are stale or missing
    python -m tests.notebooks --write    # runs them and stores what they give; names of notebooks choose some

What a reader sees is what the code gives when words are equal and numbers are within 2 %, or differ by rounding. Left
out are what no two runs share (measured times, lines of source files, which leaf rounding hits most), and the words of
cells tagged "sampled", whose text is drawn from a model. With another Python or JAX than the outputs were made with,
other data and other numbers are right, and only the kinds of outputs are compared.
"""

import argparse
import base64
import html
import itertools
import os
import re
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import nbformat
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from tests import xla

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MADE_WITH = {"python": f"{sys.version_info[0]}.{sys.version_info[1]}", "jax": jax.__version__}
AGAIN = "make the stored outputs again with `python -m tests.notebooks --write`"
SECONDS_PER_CELL = 240
FOLDER = "/home/you"  # what outputs call the folder that a notebook ran in, and those that it made for a while

RELATIVE, ROUNDING = 0.02, 5e-4  # how far numbers may be apart
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
_MEASURED = re.compile(r"\b(in|after) [\d.]+ (s|ms|us)\b|[\d,.]+ (?=(?:tokens|rows)/s)")
_LINE = re.compile(r"(\.py):\d+")
_LEAF = re.compile(r"\b\w+(?:/\w+)+\b")  # a parameter's path, named for the rounding that it has


class ThisInterpreter(KernelSpecManager):
    """Answers every kernel's name with the Python that runs the tests, whatever kernels the machine has installed."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name=kernel_name, language="python")


def run(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Executes the notebook in place, with `folder` for its working directory and for IPython's own files."""
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisInterpreter())
    client = NotebookClient(
        notebook,
        km=kernel,
        timeout=SECONDS_PER_CELL,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # As for the tests themselves: programs this small gain nothing from optimised machine code.
    env = os.environ | {"PYTHONPATH": path, "IPYTHONDIR": str(folder / ".ipython"), "XLA_FLAGS": xla.flags()}
    env.pop("COLUMNS", None)  # outputs are as wide as ever
    client.execute(env=env, cleanup_kc=True)
    temporary = re.escape(tempfile.gettempdir()) + r"/tmp[a-z0-9_]{8}"  # of the notebook's own, a new name each time
    for output in _outputs(notebook):
        for at, name in ((output, "text"), *((output.get("data", {}), kind) for kind in output.get("data", {}))):
            if isinstance(at.get(name), str):
                at[name] = re.sub(temporary, FOLDER, at[name].replace(str(folder), FOLDER))


def _outputs(notebook: nbformat.NotebookNode) -> Iterator[nbformat.NotebookNode]:
    for cell in notebook.cells:
        yield from cell.get("outputs", [])


def unexecuted(notebook: nbformat.NotebookNode) -> list[str]:
    """Cells that were not run in order from top to bottom, or ended in an error; and outputs of unknown versions."""
    cells = [(i, cell) for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    found = [] if "made_with" in notebook.metadata else ["its metadata do not say with what its outputs were made"]
    for expected, (i, cell) in enumerate(cells, 1):
        if cell.execution_count != expected:
            found.append(f"cell {i} has execution count {cell.execution_count}, and is the {expected}. that runs")
        if any(output.output_type == "error" for output in cell.outputs):
            found.append(f"cell {i} ended in an error")
    return found


def stale(stored: nbformat.NotebookNode, fresh: nbformat.NotebookNode) -> list[str]:
    """Outputs that the code does not give, from a stored notebook and the same one run anew."""
    exact = stored.metadata.get("made_with") == MADE_WITH
    found = []
    for i, (old, new) in enumerate(zip(stored.cells, fresh.cells, strict=True)):
        if old.cell_type != "code":
            continue
        before, after = _shown(old), _shown(new)
        kinds = [kind for kind, _ in before], [kind for kind, _ in after]
        if kinds[0] != kinds[1]:
            found.append(f"cell {i} shows {kinds[0]}, and the code gives {kinds[1]}")
        elif exact:
            words = "sampled" not in old.metadata.get("tags", [])
            for (kind, text), (_, other) in zip(before, after, strict=True):
                found += [f"cell {i}, {kind}: {what}" for what in _differences(text, other, words)]
    return found


def _shown(cell: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """(kind, text) of each output; what a stream was written in, piece by piece, is one."""
    shown: list[tuple[str, str]] = []
    for output in cell.outputs:
        if output.output_type == "stream":
            if shown and shown[-1][0] == output.name:
                shown[-1] = output.name, shown[-1][1] + output.text
            else:
                shown.append((output.name, output.text))
        for kind, value in sorted(output.get("data", {}).items()):
            text = str(value)
            if kind == "text/html":
                text = html.unescape(re.sub(r"<[^>]*>", " ", text))
            if kind == "image/png":
                text = "{} x {} pixels".format(*struct.unpack(">II", base64.b64decode(text)[16:24]))
            shown.append((kind, text))
    return shown


def _differences(stored: str, fresh: str, words: bool) -> list[str]:
    """What differs between two texts beyond what no two runs share; without `words`, numbers and words are free."""
    if not words:
        return []
    lines = [list(filter(None, map(_plain, text.splitlines()))) for text in (stored, fresh)]
    for before, after in itertools.zip_longest(*lines, fillvalue=""):
        numbers = [[float(n.replace(",", "")) for n in _NUMBER.findall(line)] for line in (before, after)]
        same = _NUMBER.sub("_", before) == _NUMBER.sub("_", after)
        if not same or not all(_close(a, b) for a, b in zip(*numbers, strict=True)):
            return [f"{before!r:.160} is stored, and the code gives {after!r:.160}"]
    return []


def _plain(line: str) -> str:
    """A line without what no two runs share."""
    line = _LINE.sub(r"\1:_", _MEASURED.sub("_", line))
    if re.search(r"\de-0[4-9]", line):
        line = _LEAF.sub("_", line)
    return " ".join(line.split())


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= max(ROUNDING, RELATIVE * max(abs(a), abs(b)))


def write(path: Path) -> None:
    """Runs a notebook in a folder that is removed again, and stores what its cells give."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        run(notebook, Path(folder))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": kernel, "language_info": {"name": "python"}, "made_with": MADE_WITH}
    )
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, path)


def main(arguments: list[str] | None = None) -> int:
    """The command; exits with 1 where an output is stale and nothing is written."""
    parser = argparse.ArgumentParser(prog="python -m tests.notebooks", description="Stored outputs of the notebooks.")
    parser.add_argument("names", nargs="*", help="of notebooks, or the beginning of them (default: all)")
    parser.add_argument("--write", action="store_true", help="store what they give")
    options = parser.parse_args(arguments)
    chosen = [p for p in NOTEBOOKS if not options.names or p.stem.startswith(tuple(options.names))]
    if not chosen:
        parser.error(
            f"no notebook is called {' or '.join(options.names)}: there are {', '.join(p.stem for p in NOTEBOOKS)}"
        )
    wrong = 0
    for path in chosen:
        if options.write:
            write(path)
            print(f"{path.name} written", flush=True)
            continue
        stored, fresh = (nbformat.read(path, as_version=4) for _ in range(2))
        with tempfile.TemporaryDirectory() as folder:
            run(fresh, Path(folder))
        found = unexecuted(stored) + stale(stored, fresh)
        print("\n".join([f"{path.name}: {len(found)} stale or missing", *(f"  {what}" for what in found)]), flush=True)
        wrong += len(found)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
