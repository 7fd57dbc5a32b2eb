"""Every notebook runs from top to bottom, in a new kernel of this interpreter, and draws something."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests import xla

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS_PER_CELL = 240


class ThisInterpreter(KernelSpecManager):
    """Answers every kernel's name with the Python that runs the tests, whatever kernels the machine has installed."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name=kernel_name, language="python")


def run(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Executes the notebook in place, with `folder` for its working directory and for IPython's own files."""
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisInterpreter())
    client = NotebookClient(
        notebook, km=kernel, timeout=SECONDS_PER_CELL, resources={"metadata": {"path": str(folder)}}
    )
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # As for the tests themselves: programs this small gain nothing from optimised machine code.
    env = os.environ | {"PYTHONPATH": path, "IPYTHONDIR": str(folder / ".ipython"), "XLA_FLAGS": xla.flags()}
    client.execute(env=env, cleanup_kc=True)


def images(notebook: nbformat.NotebookNode) -> list[str]:
    """The media type of every image that the notebook's cells put out."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [kind for output in outputs for kind in output.get("data", {}) if kind.startswith("image/")]


def notebook_of(*sources: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


def test_there_are_notebooks():
    assert NOTEBOOKS, "notebooks/ holds no .ipynb file"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    run(notebook, tmp_path)
    assert images(notebook), f"{path.name} ran, but none of its cells shows an image"


def test_a_cell_that_fails_is_reported(tmp_path):
    with pytest.raises(CellExecutionError, match="the third layer is missing"):
        run(notebook_of("raise ValueError('the third layer is missing')"), tmp_path)


def test_the_kernel_is_this_interpreter_and_images_are_found(tmp_path):
    draw = "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])"
    notebook = notebook_of("import sys\nprint(sys.executable, end='')", draw)
    assert images(notebook) == []
    run(notebook, tmp_path)
    assert notebook.cells[0].outputs[0].text == sys.executable
    assert images(notebook) == ["image/png"]
