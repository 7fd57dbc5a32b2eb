"""Documents are found in the same order everywhere, nothing is lost in silence, and a split depends on names alone."""

import json
import sysconfig

import pytest

from shardlm.data import (
    Document,
    are_examples,
    read_documents,
    read_examples,
    split_documents,
    standard_library,
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub" / "deeper").mkdir(parents=True)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "b.txt").write_bytes(b"second\r\n")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "sub" / "deeper" / "c.txt").write_text("thïrd")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "__pycache__" / "x.txt").write_text("compiled")
    return tmp_path


def numbered(count):
    return [Document(f"{i}.txt", f"text {i}") for i in range(count)]


def test_a_folder_is_read_recursively_sorted_by_name_with_text_as_it_is(folder):
    assert read_documents(folder) == [
        Document("a.md", "first"),
        Document("b.txt", "second\r\n"),
        Document("empty.txt", ""),
        Document("sub/deeper/c.txt", "thïrd"),
    ]


def test_a_pattern_chooses_files_by_name(folder):
    assert [document.name for document in read_documents(folder, "*.txt")] == ["b.txt", "empty.txt", "sub/deeper/c.txt"]


def test_a_file_is_one_document_named_after_itself(folder):
    assert read_documents(str(folder / "b.txt")) == [Document("b.txt", "second\r\n")]


def test_names_of_several_paths_are_relative_to_their_common_folder(folder):
    for paths in ([folder / "b.txt", folder / "sub"], [folder / "sub", folder / "b.txt"]):
        assert [document.name for document in read_documents(paths)] == ["b.txt", "sub/deeper/c.txt"]


def test_a_named_file_is_read_whatever_the_pattern(folder):
    assert [document.name for document in read_documents([folder / "a.md"], "*.txt")] == ["a.md"]


def test_files_in_a_folder_that_are_not_utf8_are_counted_and_named(folder):
    (folder / "sub" / "image.png").write_bytes(b"\x89PNG\xff")
    with pytest.warns(UserWarning, match=r"skipped 1 of 5 files that are not UTF-8 text: sub/image\.png"):
        documents = read_documents(folder)
    assert len(documents) == 4


def test_a_named_file_that_is_not_utf8_is_an_error(folder):
    (folder / "latin").write_bytes(b"caf\xe9s")
    with pytest.raises(ValueError, match=r"latin' is not UTF-8 text: .* at byte 3; convert it or leave it out"):
        read_documents(folder / "latin")


def test_missing_paths_are_all_named(folder):
    with pytest.raises(ValueError, match=r"no such file or folder: \S+/nowhere, \S+/nothing"):
        read_documents([folder / "nowhere", folder / "a.md", folder / "nothing"])


def test_a_file_that_comes_up_twice_is_an_error(folder):
    with pytest.raises(ValueError, match=r"1 file\(s\) would be read twice: \S+/b\.txt"):
        read_documents([folder, folder / "b.txt"])


def test_finding_nothing_says_what_there_is_instead(folder):
    with pytest.raises(ValueError, match=r"no documents: .* matches pattern='\*\.rst'.* 3 \.txt, 1 \.md"):
        read_documents(folder, "*.rst")
    with pytest.raises(ValueError, match="no documents: the list of paths is empty"):
        read_documents([])


def test_files_without_a_character_are_no_text(folder):
    with pytest.raises(ValueError, match=r"no text: all 1 file\(s\) read are empty: \S+/empty\.txt"):
        read_documents(folder / "empty.txt")


def test_the_default_text_is_the_standard_library_without_its_tests():
    documents = standard_library()
    names = [document.name for document in documents]
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names) and all(name.endswith(".py") for name in names)
    assert not {"test", "tests", "idle_test", "site-packages", "__pycache__"} & {p for n in names for p in n.split("/")}
    assert documents == standard_library()


def test_a_python_without_sources_asks_for_a_path(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="no standard library sources in .*; pass a file or folder of your own"):
        standard_library()


def test_a_split_holds_every_document_once_and_about_the_fraction_asked_for():
    documents = numbered(1001)
    train, held = split_documents(documents, 0.05)
    assert sorted(train + held) == sorted(documents)
    assert 50 - 4 * 7 < len(held) < 50 + 4 * 7  # binomial: standard deviation sqrt(1001 * 0.05 * 0.95) = 7
    assert train == [document for document in documents if document in set(train)]


def test_a_document_stays_on_its_side_when_others_come_or_change():
    documents = numbered(301)
    held = {document.name for document in split_documents(documents, 0.1)[1]}
    fewer = [Document(name, text + " changed") for name, text in documents[::-3]]
    assert {document.name for document in split_documents(fewer, 0.1)[1]} == held & {name for name, _ in fewer}


def test_the_side_of_a_name_is_the_same_for_ever():
    # of the ten, sha256(b"1.txt") = 0a23af.. / 2**256 = 0.0396 and sha256(b"2.txt") = 1c46e2.. = 0.1105 are the lowest
    for fraction, names in [(0.01, ["1.txt"]), (0.0396, ["1.txt"]), (0.1104, ["1.txt"]), (0.1105, ["1.txt", "2.txt"])]:
        assert [document.name for document in split_documents(numbered(10), fraction)[1]] == names


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_two_documents_give_one_to_each_side_whatever_the_fraction(fraction):
    train, held = split_documents(numbered(2), fraction)
    assert (len(train), len(held)) == (1, 1)
    assert (train, held) == split_documents(numbered(2), 0.5)


def test_holding_out_nothing_keeps_every_document():
    assert split_documents(numbered(1), 0) == (numbered(1), [])


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.99])
@pytest.mark.parametrize(
    "text", ["ab", "to be\nor not\n" * 40, "one line " * 99, "\n" * 5, "é\r\n" * 9, "a\n" + "b" * 50]
)
def test_of_the_only_document_the_end_is_held_out(fraction, text):
    others = [Document("empty.txt", "")]
    train, held = split_documents([Document("a.txt", text), *others], fraction)
    assert "".join(document.text for document in train + held) == text
    assert all("".join(document.text for document in side) for side in (train, held))
    wanted = fraction * len(text)
    assert 1 <= len(held[0].text) <= max(2 * wanted + 2, 2)


def test_the_end_of_a_document_begins_at_a_line():
    train, held = split_documents([Document("a.txt", "to be\nor not\n" * 40)], 0.1)
    assert train[0].text.endswith("\n") and held[0].text.startswith(("to be", "or not"))


def test_a_document_of_one_character_cannot_be_split_and_the_error_says_what_to_do():
    with pytest.raises(ValueError, match=r"a.txt: it has 1 character.*pass held_out=0 \(--held-out 0\)"):
        split_documents([Document("a.txt", "a")])


def test_sides_that_are_both_without_text_are_an_error():
    documents = [Document("0.txt", ""), Document("1.txt", "")]
    with pytest.raises(ValueError, match="both sides need text; name a file or folder of its own"):
        split_documents(documents)


def test_lines_of_json_are_documents(tmp_path):
    lines = [{"text": f"document {i}\u2028", "url": "x"} for i in range(12)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf\n" + "\r\n".join(map(json.dumps, lines)).encode())
    (tmp_path / "b.txt").write_text("text")
    found = read_documents(tmp_path)
    assert {document.text for document in found} == {line["text"] for line in lines} | {"text"}
    assert {document.name for document in found if document.text.startswith("document 0")} == {"a.jsonl:2"}
    assert read_documents(tmp_path / "a.jsonl")[0].name.startswith("a.jsonl:")
    assert not are_examples(tmp_path / "a.jsonl") and not are_examples([tmp_path / "a.jsonl", tmp_path / "b.txt"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 3}', r'1 of 2 lines hold no text:\n  .*a.jsonl:2: no string under "text"'),
        ("nonsense", r"a.jsonl:2: not JSON: Expecting value at column 1"),
        ('{"text": "\\ud800"}', 'no string under "text"'),
        ('{"prompt": "a", "completion": "b"}', 'no string under "text"'),
        ("[]", 'no string under "text"'),
    ],
)
def test_lines_that_hold_no_text_are_counted_in_one_error(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / "a.jsonl")


def test_examples_are_no_text_and_documents_no_examples(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    with pytest.raises(ValueError, match="holds examples, prompts and completions, and no text: .*load_examples"):
        read_documents(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}')
    with pytest.raises(ValueError, match="is a document, and no example: files of them go to sl.data.load"):
        read_examples(tmp_path / "b.jsonl")


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_an_error(fraction):
    with pytest.raises(ValueError, match=f"0 <= held_out < 1, got {fraction}"):
        split_documents(numbered(5), fraction)
