"""Names that come from files lead to plain files inside their folder alone, and texts do nothing to a terminal."""

import os

import pytest

from shardlm.runtime.strangers import inside, printable, read_small


@pytest.fixture
def folder(tmp_path):
    """A folder with files, and what is no plain file of its own."""
    (tmp_path / "secret").write_text("x")
    made = tmp_path / "model"
    (made / "sub").mkdir(parents=True)
    (made / "a.bin").write_bytes(b"12345")
    (made / "sub/b.bin").write_bytes(b"123")
    os.mkfifo(made / "pipe")
    (made / "out").symlink_to(tmp_path / "secret")
    (made / "up").symlink_to(tmp_path)
    (made / "zero").symlink_to("/dev/zero")
    (made / "dangling").symlink_to(tmp_path / "nothing")
    return made


def test_a_plain_file_inside_is_found(folder):
    assert inside(folder, "a.bin").stat().st_size == 5
    assert inside(str(folder), "sub/b.bin") == folder / "sub/b.bin"
    assert read_small(folder, "sub/b.bin") == b"123"


def test_the_folder_itself_may_be_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert read_small(tmp_path / "link", "a.bin") == b"12345"


@pytest.mark.parametrize("links", [False, True])
@pytest.mark.parametrize(
    "name",
    ["../secret", "sub/../../secret", "/etc/passwd", "/dev/zero", "", ".", "./a.bin", "sub//b.bin", "sub/", "a\0b",
     "..\\secret", "a\x1b[31m", 3, None, ["a.bin"], "pipe", "sub", "zero", "x" * 300],
)  # fmt: skip
def test_every_other_name_is_refused(folder, name, links):
    with pytest.raises(ValueError) as error:
        read_small(folder, name, links=links)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["out", "up/secret"])
def test_links_are_followed_only_where_the_folder_has_its_own(folder, name):
    assert read_small(folder, name, links=True) == b"x"
    with pytest.raises(ValueError, match="symbolic link"):
        inside(folder, name)


@pytest.mark.parametrize("name", ["nothing", "a.bin/b"])
def test_a_missing_file_is_said_to_be_missing(folder, name):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        inside(folder, name)


def test_a_link_to_nothing_is_said_to_be_one(folder):
    with pytest.raises(FileNotFoundError, match=r"dangling is a symbolic link to .*nothing, which is missing"):
        inside(folder, "dangling", links=True)


def test_a_file_too_large_to_be_what_it_says_is_not_read(folder):
    with open(folder / "huge.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"huge.json has 1,099,511,627,776 bytes; at most 268,435,456"):
        read_small(folder, "huge.json")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Llama – 模型", "Llama – 模型"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\nb\r", r"a\nb\r"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\x9b2J", r"\x9b2J"),
        ("\ud800", r"\ud800"),
        (None, "None"),
        ("x" * 201, "x" * 200 + "... (201 characters)"),
    ],
)
def test_text_of_others_is_one_visible_line(text, shown):
    assert printable(text) == shown
    assert printable(text).isprintable()
