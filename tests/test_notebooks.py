"""Every notebook runs from top to bottom, in a new kernel of this interpreter, draws something, and gives what it has
stored.
"""

import copy
import sys

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from tests.notebooks import AGAIN, MADE_WITH, NOTEBOOKS, run, stale, unexecuted


def images(notebook: nbformat.NotebookNode) -> list[str]:
    """The media type of every image that the notebook's cells put out."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [kind for output in outputs for kind in output.get("data", {}) if kind.startswith("image/")]


def notebook_of(*sources: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


def test_there_are_notebooks():
    assert NOTEBOOKS, "notebooks/ holds no .ipynb file"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_was_run_in_order(path):
    assert unexecuted(nbformat.read(path, as_version=4)) == [], AGAIN


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path):
    stored, notebook = (nbformat.read(path, as_version=4) for _ in range(2))
    run(notebook, tmp_path)
    assert images(notebook), f"{path.name} ran, but none of its cells shows an image"
    assert stale(stored, notebook) == [], AGAIN


def test_a_cell_that_fails_is_reported(tmp_path):
    with pytest.raises(CellExecutionError, match="the third layer is missing"):
        run(notebook_of("raise ValueError('the third layer is missing')"), tmp_path)


def test_the_kernel_is_this_interpreter_and_images_are_found(tmp_path):
    draw = "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])"
    where = "import os, sys, tempfile\nprint(sys.executable, os.getcwd(), tempfile.mkdtemp(), end='')"
    notebook = notebook_of(where, draw)
    assert images(notebook) == []
    run(notebook, tmp_path)
    assert notebook.cells[0].outputs[0].text == f"{sys.executable} /home/you /home/you"
    assert images(notebook) == ["image/png"]
    assert unexecuted(notebook) == ["its metadata do not say with what its outputs were made"]
    notebook.metadata["made_with"] = MADE_WITH
    assert unexecuted(notebook) == [] and stale(notebook, copy.deepcopy(notebook)) == []


def shown(*texts: str, tags: tuple[str, ...] = (), **made_with: str) -> nbformat.NotebookNode:
    """A notebook whose one cell printed these pieces of text."""
    outputs = [nbformat.v4.new_output("stream", name="stdout", text=text) for text in texts]
    cell = nbformat.v4.new_code_cell("f()", execution_count=1, outputs=outputs, metadata={"tags": list(tags)})
    return nbformat.v4.new_notebook(cells=[cell], metadata={"made_with": MADE_WITH | made_with})


@pytest.mark.parametrize(
    ("stored", "fresh"),
    [
        ("would bring it to 26.5 GB", "would bring it to 22.3 GB"),
        ("update  1f1b   gpipe\n0  5.5  5.5", "update  1f1b   gpipe  zb-h1\n0  5.5  5.5  5.5"),
        ("axis    devices\npipe          4", "axis    devices\npipe          4\npipeline 1f1b:8"),
        ("a device holds 0.28 MB", "a device holds 282 kB"),
        ("", "held-out loss 4.591"),
        ("held-out loss 4.591", ""),
        ("3 arrays", "4 arrays"),
    ],
)
def test_a_stale_or_missing_output_is_found(stored, fresh):
    before, after = (shown(text) if text else shown() for text in (stored, fresh))
    assert len(stale(before, after)) == 1
    assert stale(before, copy.deepcopy(before)) == []


@pytest.mark.parametrize(
    ("stored", "fresh"),
    [
        ("loss 5.74826050  0.0367359", "loss 5.74826145  0.0367360"),
        ("gradients  6.5e-07  layers/attention/value/kernel", "gradients  8.0e-07    head/table"),
        ("4 x all-gather, train/engine.py:252", "4 x all-gather, train/engine.py:246"),
        ("96 tokens in 6.48 s (15 tokens/s)", "96 tokens in 1.02 s (94 tokens/s)"),
    ],
)
def test_what_no_two_runs_share_is_left_out(stored, fresh):
    assert stale(shown(stored), shown(fresh)) == []


def test_pieces_of_a_stream_are_one_and_other_kinds_are_not():
    assert stale(shown("loss ", "5.0\n"), shown("loss 5.0\n")) == []
    picture = shown("loss 5.0\n")
    picture.cells[0].outputs.append(nbformat.v4.new_output("display_data", data={"text/plain": "<Figure>"}))
    [found] = stale(shown("loss 5.0\n"), picture)
    assert "shows ['stdout'], and the code gives ['stdout', 'text/plain']" in found


def test_text_that_is_drawn_from_a_model_is_free_where_its_cell_says_so():
    assert stale(shown("def f", tags=("sampled",)), shown("def g", tags=("sampled",))) == []
    assert len(stale(shown("def f"), shown("def g"))) == 1


def test_numbers_are_those_of_the_versions_they_were_made_with():
    assert stale(shown("loss 5.1", jax="0.0.1"), shown("loss 6.1")) == []
    assert len(stale(shown("loss 5.1", jax="0.0.1"), shown())) == 1


def test_a_cell_that_was_not_run_is_found():
    notebook = shown("loss 5.0")
    assert unexecuted(notebook) == []
    notebook.cells[0].execution_count = None
    assert len(unexecuted(notebook)) == 1
    notebook.cells[0].execution_count = 2
    assert len(unexecuted(notebook)) == 1
    notebook = shown()
    notebook.cells[0].outputs = [nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[])]
    assert len(unexecuted(notebook)) == 1
