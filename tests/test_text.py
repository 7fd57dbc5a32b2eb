"""What people read fits their terminal without a broken word, and bytes are written by one function."""

import ast
import io
import itertools
import os
import re
from pathlib import Path

import pytest

import shardlm as sl
from shardlm import _text as text
from shardlm.inspect import render

PACKAGE = Path(sl.__file__).parent


def words(lines: str) -> list[str]:
    return re.sub("[─▏█]+", "", lines).split()


@pytest.mark.parametrize(
    ("count", "written"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (853_376, "853 kB"), (999_600, "1 MB")],
)
def test_small_things_have_small_units(count, written):
    assert text.size(count) == written


def byte_formats(source: str) -> list[str]:
    """Strings that put a unit of bytes behind a number that is computed, in f-strings."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            for before, after in itertools.pairwise(node.values):
                behind = str(after.value) if isinstance(after, ast.Constant) else ""
                if isinstance(before, ast.FormattedValue) and (match := re.match(r"\s?(B|[kMGTPE]i?B)\b", behind)):
                    found.append(f"{node.lineno}: {match[1]}")
    return found


def test_one_function_writes_bytes():
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "_text.py"]
    assert {path.name: found for path in files if (found := byte_formats(path.read_text(encoding="utf-8")))} == {}
    assert byte_formats('f"{n / 1e6:.2f} MB of parameters"') == ["1: MB"]


@pytest.mark.parametrize("room", [20, 33, 80])
def test_lines_are_cut_between_words_and_hang(room):
    long = "  - batch_size=7 is not a multiple of data=2 x fsdp=2: --layout data=2,fsdp=2,tensor=2,remat=full too"
    folded = text.fold(f"a title\n{long}", room)
    assert words(folded) == words(f"a title {long}")
    first, *rest = folded.splitlines()[1:]
    assert first.startswith("  - batch_size=7") and rest and all(line.startswith(" " * 4) for line in rest)
    assert all(len(line) <= room or len(line.split()) == 1 for line in folded.splitlines())
    assert text.fold(long, 200) == long


def test_a_number_stays_with_its_unit():
    line = "it takes 96.4 GB on the host, 1.08 PFLOP and 21.3 us, for 4 students"
    for room in range(8, len(line)):
        folded = text.fold(line, room)
        assert "96.4 GB" in folded and "1.08 PFLOP" in folded and "21.3 us" in folded
        assert words(folded) == words(line) and "\u00a0" not in folded


@pytest.mark.parametrize(("columns", "found"), [("80", 80), ("7", 20), ("0", None), ("wide", None), ("", None)])
def test_the_variable_columns_comes_first_and_a_pipe_has_no_width(monkeypatch, columns, found):
    monkeypatch.setenv("COLUMNS", columns)
    assert text.width(io.StringIO()) == found
    read, write = os.pipe()
    with os.fdopen(read), os.fdopen(write, "w") as pipe:
        assert text.width(pipe) == found


def test_the_terminal_says_its_width(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((72, 24)))
    with open(os.devnull, "w") as stream:
        assert text.width(stream) == 72
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((0, 0)))
    with open(os.devnull, "w") as stream:
        assert text.width(stream) is None


HEADS = ("phase", ">times", ">bytes", "asked for at")
ROWS = [("backward again", "28", "1.05 MB", "models/attention.py:235"), ("forward", "4", "524 kB", "models/mlp.py:41")]


@pytest.mark.parametrize("room", [None, 80, 49, 40, 31, 24, 12])
def test_a_table_never_cuts_a_word_or_a_number_from_its_unit(room):
    shown = text.table(HEADS, ROWS, room, rule=True)
    assert sorted(words(shown)) == sorted(
        " ".join(h.removeprefix(">") for h in HEADS).split() + " ".join(map(" ".join, ROWS)).split()
    )
    assert "1.05 MB" in shown and "models/attention.py:235" in shown
    longest = max(len("models/attention.py:235") + 4, 31)
    assert all(len(line) <= max(room or 200, longest) for line in shown.splitlines())


def test_a_table_of_numbers_goes_on_below():
    shown = text.table(("", ">data=2,fsdp=4", ">data=4,fsdp=2", ">data=8"), [("peak", "1 kB", "2 kB", "3 kB")], 33)
    assert [line.split() for line in shown.splitlines()] == [
        ["data=2,fsdp=4"], ["peak", "1", "kB"], [], ["data=4,fsdp=2", "data=8"], ["peak", "2", "kB", "3", "kB"],
    ]  # fmt: skip


@pytest.fixture(scope="module")
def report() -> sl.inspect.Report:
    layout = sl.Layout.parse("pipe=2,data=2,tensor=2,pipeline=1f1b:4")
    return sl.Trainer(sl.presets.tiny(), layout, devices=8).explain(16, 128, hardware="h100")


@pytest.mark.parametrize("columns", [40, 60, 80, 100])
def test_a_report_fits_and_loses_no_word(report, columns):
    whole, shown = (render.as_text(render.sections(report), width) for width in (1000, columns))
    assert set(words(shown)) == set(words(whole))  # names of rows are there again where a table goes on below
    if columns >= 80:
        assert sorted(words(shown)) == sorted(words(whole))
        assert max(map(len, shown.splitlines())) <= columns


def test_what_is_printed_takes_the_terminal_s_width(report, monkeypatch):
    trainer = sl.Trainer(sl.presets.tiny(), sl.Layout.parse("data=2,fsdp=2,tensor=2"), devices=8)
    monkeypatch.delenv("COLUMNS", raising=False)
    wide = str(report), trainer.describe(parameters=True), trainer.layout.describe()
    assert max(len(line) for line in wide[0].splitlines()) <= 118  # as ever in a pipe
    monkeypatch.setenv("COLUMNS", "80")
    for before, after in zip(
        wide, (str(report), trainer.describe(parameters=True), trainer.layout.describe()), strict=True
    ):
        assert max(len(line) for line in after.splitlines()) <= 80
        assert sorted(words(after)) == sorted(words(before))


def test_rich_prints_the_same_in_its_own_width(report):
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=72, color_system=None).print(report)
    assert out.getvalue().rstrip() == render.as_text(render.sections(report), 72)
