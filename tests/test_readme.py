"""What the README tells people to type: it parses, names what exists, and the story of its folders holds together."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest

import shardlm as sl
from shardlm.__main__ import _parser
from shardlm.bench.__main__ import parser as bench_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]


def command_lines() -> list[list[str]]:
    """The words after the program in every `python -m shardlm` of the README's blocks, in order; of bench, with it."""
    lines = []
    for kind, text in BLOCKS:
        for line in text.replace("\\\n", " ").splitlines() if kind == "sh" else ():
            for part in filter(lambda part: " -m shardlm" in part, line.split("&&")):
                words = shlex.split(part, comments=True)
                if (
                    words[:1]
                    and words[0].endswith("python")
                    and words[1:2] == ["-m"]
                    and words[2].startswith("shardlm")
                ):
                    lines.append(words[2:])
    return lines


COMMANDS = command_lines()


def parsed(words: list[str]):
    return (bench_parser() if words[0] == "shardlm.bench" else _parser()).parse_args(words[1:])


def test_the_readme_has_blocks_of_both_kinds():
    assert len(PYTHON) > 7 and len(COMMANDS) > 12
    assert COMMANDS[0][:2] == ["shardlm", "train"]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_parses(words):
    options = parsed(words)
    if getattr(options, "layout", None):
        sl.Layout.parse(options.layout)
    if getattr(options, "module", None):  # of launch
        assert options.module[0] == "shardlm"
        parsed(options.module)


@pytest.mark.parametrize("source", PYTHON, ids=lambda source: source.splitlines()[-1][:40])
def test_every_name_of_the_library_in_the_python_blocks_exists(source):
    for node in ast.walk(ast.parse(source)):
        path = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if path.startswith("sl.") and "(" not in path:
            found = sl
            for name in path.split(".")[1:]:
                found = getattr(found, name)


def test_every_inline_name_of_the_library_exists():
    text = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"`sl\.([A-Za-z_]+)", text):
        assert hasattr(sl, name), name


def runs() -> dict[str, list[int]]:
    """The steps that each run of the README leaves in its folder, by the defaults and options of the command line."""
    made = {}
    for words in COMMANDS:
        options = parsed(words)
        options = parsed(options.module) if getattr(options, "module", None) else options
        if getattr(options, "checkpoint_dir", None):
            assert options.checkpoint_dir not in made, f"{options.checkpoint_dir} holds a run already: it would go on"
            saved = {*range(options.checkpoint_every, options.steps, options.checkpoint_every), options.steps}
            made[options.checkpoint_dir] = sorted(saved)[-options.keep :]
    return made


def test_every_checkpoint_that_is_named_was_saved_and_is_kept():
    made = runs()
    assert made == {"runs/a": [200, 300, 400], "runs/b": [40, 50, 60]}
    blocks = "\n".join(text for _, text in BLOCKS)
    named = re.findall(r"(runs/\w+)/(\d+)", blocks)
    named += re.findall(r"checkpoints (\S+) --export (\d+)", blocks)
    assert len(named) > 3
    assert [f"{run}/{step}" for run, step in named if int(step) not in made.get(run, ())] == []
    used = [word for words in COMMANDS for word in words if word.startswith("runs/")]
    assert {"/".join(word.split("/")[:2]) for word in used} == set(made)
    # What is pruned is not asked for later, but for the newest.
    rest = blocks[blocks.index("--prune") :]
    assert {step for run, step in re.findall(r"(runs/a)/(\d+)", rest)} <= {"400"}


def test_extras_are_installed_from_the_clone_and_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "'shardlm[" not in README
    named = re.findall(r"'\.\[([\w,]+)\]'", README)
    assert named and set(",".join(named).split(",")) <= set(extras)


def test_an_environment_is_activated_before_python_is_called_without_its_folder():
    lines = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith(("python -m", "pip ", "shardlm ")))
    assert "source .venv/bin/activate" in lines[:first]


def test_no_batch_of_the_readme_learns_to_repeat_what_it_reads():
    assert not re.search(r'"targets": tokens\b', README)
