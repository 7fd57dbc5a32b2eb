"""No file is read twice, and what is held out is not trained on."""

import json
import os
import warnings

import pytest

import shardlm as sl
from shardlm.data import load, load_examples
from shardlm.data.text import read_documents

TWICE = r"1 file\(s\) would be read twice: "
TRAINED = r"all \d+ {} of held_out=.* are trained on as well, so their loss would say nothing"


@pytest.fixture
def examples(tmp_path):
    """A file of examples, the same by a link, by a hard link and by another spelling of its path."""
    file = tmp_path / "a.jsonl"
    write(file, range(8))
    (tmp_path / "link.jsonl").symlink_to(file)
    os.link(file, tmp_path / "hard.jsonl")
    return [
        file,
        file,
        tmp_path / "link.jsonl",
        tmp_path / "hard.jsonl",
        tmp_path / "." / ".." / tmp_path.name / "a.jsonl",
    ]


def write(file, numbers):
    file.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": str(n)}) + "\n" for n in numbers))


def test_an_examples_file_given_twice_by_whatever_name_is_refused(examples):
    first, *others = examples
    for other in others:
        with pytest.raises(ValueError, match=TWICE):
            load_examples([first, other], sequence=16, batch_size=1)


def test_a_text_given_twice_by_whatever_name_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("to be")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/link.txt").symlink_to(tmp_path / "a.txt")
    for paths in (["a.txt", "a.txt"], ["a.txt", "folder"], [".", "a.txt"], ["a.txt", "folder/../a.txt"]):
        with pytest.raises(ValueError, match=TWICE):
            read_documents([tmp_path / path for path in paths])


def test_held_out_examples_that_are_trained_on(tmp_path, examples):
    options = {"sequence": 16, "batch_size": 1}
    write(tmp_path / "copy.jsonl", range(8))
    write(tmp_path / "some.jsonl", range(6, 10))
    write(tmp_path / "others.jsonl", range(8, 10))
    for held_out in (*examples, tmp_path / "copy.jsonl"):
        with pytest.raises(ValueError, match=TRAINED.format("examples")):
            load_examples(examples[0], held_out=held_out, **options)
    with pytest.warns(UserWarning, match="2 of the 4 examples held out are trained on as well"):
        load_examples(examples[0], held_out=tmp_path / "some.jsonl", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_examples(examples[0], held_out=tmp_path / "others.jsonl", **options)


def test_held_out_documents_that_are_trained_on(tmp_path):
    for name, text in (("a", "to be or not to be"), ("b", "that is the question"), ("copy", "to be or not to be")):
        (tmp_path / f"{name}.txt").write_text(text)
    options = {"sequence": 4, "batch_size": 1}
    one, two = sl.data.Document("x", "to be or not"), sl.data.Document("y", "that is")
    for train, held_out in (("a.txt", "a.txt"), ("a.txt", "copy.txt"), (".", "b.txt")):
        with pytest.raises(ValueError, match=TRAINED.format("documents")):
            load(tmp_path / train, held_out=tmp_path / held_out, **options)
    with pytest.raises(ValueError, match=TRAINED.format("documents")):
        load([one, two], held_out=[two], **options)
    with pytest.warns(UserWarning, match="1 of the 2 documents held out are trained on as well"):
        load(tmp_path / "a.txt", held_out=[tmp_path / "copy.txt", tmp_path / "b.txt"], **options)
