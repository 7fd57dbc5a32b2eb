"""One gate decides what may name a place on the disk."""

import re
from pathlib import Path

import pytest

from shardlm.runtime.paths import local_path


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("", "x='' is empty: name a path, or '.' for the current folder"),
        ("  ", "x='  ' is empty"),
        ("gs://bucket/run", "x='gs://bucket/run' is an address: give a local folder"),
        (Path("gs://bucket/run"), "x='gs:/bucket/run' is an address"),
        ("s3://a", "is an address"),
        ("hf://a/b", "is an address"),
        ("memory://a", "is an address"),
        ("file:///a", "is an address"),
        ("HTTPS://a", "is an address"),
        ("a\0b", "has a zero byte"),
        ("~no-such-user/a", "x='~no-such-user/a': "),
    ],
    ids=str,
)
def test_what_is_no_local_path_is_refused(path, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        local_path(path, "x")


@pytest.mark.parametrize("path", [None, 3, b"a", True, ["a"]], ids=repr)
def test_what_is_no_path_is_a_type_error(path):
    with pytest.raises(TypeError, match="it is a path on the local disk, as text or a pathlib.Path"):
        local_path(path, "x")


def test_text_and_paths_are_taken_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for given, expected in {
        "a": "a", "~/a": "a", "./a//b": "a/b", "a/../b": "b", ".": "", "a:b": "a:b", "c/gs://x": "c/gs:/x",
        "~": "", "..": "..",
    }.items():  # fmt: skip
        for path in (given, Path(given)):
            assert local_path(path) == (tmp_path / expected).resolve(), given
