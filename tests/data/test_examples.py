"""JSON lines to examples: what is read and what is learned, and every line that cannot be used in one error."""

import json

import pytest

from shardlm.data import Piece, are_examples, read_examples


def write(folder, *lines, name="a.jsonl"):
    file = folder / name
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return file


def test_a_prompt_is_read_and_a_completion_is_learned(tmp_path):
    file = write(
        tmp_path, {"prompt": "2 + 2? ", "completion": "4"}, "", {"completion": "né\u2028", "prompt": "", "id": 7}
    )
    first, second = read_examples(file)
    assert first.pieces == (Piece("2 + 2? ", False), Piece("4", True))
    assert second.pieces == (Piece("", False), Piece("né\u2028", True))
    assert (first.where, second.where) == (f"{file}:1", f"{file}:3")
    assert first.text == "2 + 2? 4"


def test_every_turn_of_the_assistant_is_learned(tmp_path):
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Ciao")]
    file = write(tmp_path, {"messages": [{"role": role, "content": text} for role, text in turns]})
    [example] = read_examples(file)
    assert "".join(f"[{piece.text}]" if piece.learned else piece.text for piece in example.pieces) == (
        "system: Be brief.\nuser: Hi\nassistant: [Hello]user: Bye\nassistant: [Ciao]"
    )


def test_several_files_are_read_in_order(tmp_path):
    files = [write(tmp_path, {"prompt": n, "completion": "x"}, name=f"{n}.jsonl") for n in ("b", "a")]
    assert [example.pieces[0].text for example in read_examples(files)] == ["b", "a"]
    files[0].write_bytes(b"\xef\xbb\xbf" + files[0].read_bytes())  # some editors write this mark
    assert read_examples(files[0])[0].pieces[0].text == "b"


GOOD = {"prompt": "a", "completion": "b"}
USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "completion"}', "not JSON: Expecting ':' delimiter at column 29"),
        ("[1, 2]", "a list, not an object"),
        ({"prompt": "a", "answer": "b"}, "no 'completion'; its keys are 'prompt', 'answer'"),
        ({}, "no 'prompt' and no 'completion'; its keys are none"),
        ({"prompt": 3, "completion": "b"}, "'prompt' is a number, not a string"),
        ({"prompt": "a", "completion": ["b"]}, "'completion' is a list, not a string"),
        ({"prompt": "a", "completion": None}, "'completion' is null, not a string"),
        ({"prompt": "a", "completion": ""}, "the completion is empty: nothing to learn"),
        ('{"prompt": "\\ud800", "completion": "b"}', "'prompt' is no Unicode text: half of a surrogate pair"),
        ({"messages": [USER], "prompt": "a"}, "has messages and prompt: which of them"),
        ({"messages": []}, "'messages' is an empty list, not a list of at least one message"),
        ({"messages": [USER]}, "no message of the assistant: nothing to learn"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 is no object with 'role' and 'content'"),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            "message 1 has the role 'bot'; roles are system, user, assis",
        ),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "message 2, of the assistant, is empty"),
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path, line, message):
    file = write(tmp_path, GOOD, line)
    with pytest.raises(ValueError) as error:
        read_examples(file)
    assert str(error.value).startswith(f"1 of 2 lines are no examples:\n  {file}:2: {message}")
    assert str(error.value).endswith('"content": "..."}, ...]}')


def test_one_error_counts_all_lines_and_names_the_first(tmp_path):
    file = write(tmp_path, *["{"] * 8, GOOD)
    with pytest.raises(ValueError, match=r"8 of 9 lines are no examples:\n") as error:
        read_examples(file)
    assert f"{file}:5: not JSON" in str(error.value)
    assert f"{file}:6" not in str(error.value)
    assert "\n  and 3 more\n" in str(error.value)


def test_files_without_examples_are_refused(tmp_path):
    empty, binary = tmp_path / "empty.jsonl", tmp_path / "binary.jsonl"
    empty.write_text("\n \n")
    binary.write_bytes(b"\xff\xfe{")
    for given, message in (
        (empty, r"no examples: '.*empty\.jsonl' is empty; a line is \{"),
        (binary, r"'.*binary\.jsonl' is not UTF-8 text: invalid start byte at byte 0"),
        (tmp_path / "absent.jsonl", r"no such file: .*absent\.jsonl"),
        ([], "the list of files is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            read_examples(given)


def test_examples_are_known_by_the_end_of_their_name():
    assert are_examples("a.jsonl") and are_examples(["a.jsonl", "b.jsonl"])
    assert not are_examples(None) and not are_examples("a.json") and not are_examples(["notes", "b.txt"])
    with pytest.raises(ValueError, match=r"examples \(\.jsonl\) and text are not mixed: leave out 'b\.txt'"):
        are_examples(["a.jsonl", "b.txt"])
