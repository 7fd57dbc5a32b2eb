"""Documents are found in the same order everywhere, nothing is lost in silence, and a split depends on names alone."""

import sysconfig

import pytest

from shardlm.data import Document, read_documents, split_documents, standard_library


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


def test_one_document_cannot_be_split_and_the_error_says_what_to_do():
    with pytest.raises(
        ValueError,
        match=r"held_out=0\.05 splits 1 into 1 \(6 characters\) to train on and 0 \(0 characters\) held out.*"
        r"give at least two, name a separate file or folder as held_out, or pass held_out=0",
    ):
        split_documents(numbered(1))


def test_a_side_whose_documents_are_empty_is_an_error():
    documents = [Document("0.txt", "text"), Document("1.txt", "")]
    with pytest.raises(ValueError, match="both sides need text"):
        split_documents(documents)


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_an_error(fraction):
    with pytest.raises(ValueError, match=f"0 <= held_out < 1, got {fraction}"):
        split_documents(numbered(5), fraction)
