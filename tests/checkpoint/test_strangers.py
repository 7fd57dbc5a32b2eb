"""A checkpoint that somebody made on purpose, its seal included, harms nothing and is one clear error."""

import argparse
import json
import os
import random
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from shardlm.__main__ import main
from shardlm.checkpoint import Checkpoints, DamagedCheckpoint, command, files, read_metadata, record, restore
from shardlm.models.config import TransformerConfig

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TARGET = {"x": jnp.zeros(3), "layers": {"w": jnp.zeros((2, 2))}}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """One step, not to be changed."""
    directory = tmp_path_factory.mktemp("strangers") / "run"
    with Checkpoints(directory) as checkpoints:
        state = {"x": jnp.ones(3), "layers": {"w": jnp.ones((2, 2))}}
        checkpoints.save(1, state, {"layout": "data=2", "loss": 2.0}, loss=1.0)
    return directory


@pytest.fixture
def step(run, tmp_path) -> Path:
    """A copy, for a test to change."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run/1"


def forge(path: Path, /, **changes: object) -> None:
    """Change fields of metadata.json, and seal it anew, as anybody can."""
    content = json.loads((path / "metadata.json").read_text()) | changes
    content.pop("digest", None)
    record.write_record(path, content)


def entry(size: int = 4) -> str:
    return f"{size} {'0' * 32}"


OUTSIDE = [
    "../victim", "/etc/hostname", "a/../../victim", "state/../../victim", "..", ".", "", "state", "state/", "\0",
    "a\x1b[31m", "link", "linked/victim", "pipe", "zero", "x" * 5000, "/".join("a" * 100), "state//_METADATA",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: repr(name[:20]))
def test_a_name_leads_to_plain_files_inside_alone(step, tmp_path, capsys, name):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run/victim").write_text("precious")
    if name == "link":
        (step / "link").symlink_to(tmp_path / "victim")
    if name == "linked/victim":
        (step / "linked").symlink_to(tmp_path)
    if name == "pipe":
        os.mkfifo(step / "pipe")
    if name == "zero":
        (step / "zero").symlink_to("/dev/zero")
    forge(step, files=json.loads((step / "metadata.json").read_text())["files"] | {name: entry()})
    with pytest.raises(DamagedCheckpoint) as error:
        restore(step, TARGET)
    assert "\x1b" not in str(error.value) and "\0" not in str(error.value)
    for arguments in ((), ("--verify",), ("--export", "1", str(tmp_path / "to/best"))):
        assert main(["checkpoints", str(step.parent), *arguments]) != 0
        assert "\x1b" not in (output := "".join(capsys.readouterr())) and "damaged" in output
    assert not (tmp_path / "to").exists() or os.listdir(tmp_path / "to") == []
    assert (tmp_path / "victim").read_text() == (tmp_path / "run/victim").read_text() == "precious"


@pytest.mark.parametrize("name", ["state/extra", "state/manifest.ocdbt", "extra"])
@pytest.mark.parametrize("kind", ["link", "folder link", "pipe"])
def test_links_and_pipes_anywhere_in_a_checkpoint_are_refused(step, tmp_path, name, kind):
    (tmp_path / "elsewhere").mkdir()
    if os.path.lexists(step / name):
        (step / name).rename(tmp_path / "elsewhere/moved")
    if kind == "pipe":
        os.mkfifo(step / name)
    else:
        (step / name).symlink_to(tmp_path / ("elsewhere/moved" if kind == "link" else "elsewhere"))
    with pytest.raises(DamagedCheckpoint, match=f"{name}.*(is a symbolic link|is a pipe|is no plain file)"):
        restore(step, TARGET)


def test_what_reads_the_arrays_does_not_leave_their_folder(step, tmp_path):
    """TensorStore looks up whatever its own files name by keys of this kind."""
    import tensorstore

    (tmp_path / "run/victim").write_text("precious")
    store = tensorstore.KvStore.open({"driver": "file", "path": f"{step}/"}).result()
    assert store.read("metadata.json").result().value
    for name in ("../victim", "state/../../victim", f"{tmp_path}/run/victim"):
        with pytest.raises(ValueError, match="Invalid key"):
            store.read(name).result()


def test_what_metadata_json_is_decides_before_it_is_read(step, monkeypatch):
    path = step / "metadata.json"
    content = path.read_bytes()
    for make, message in (
        (lambda: path.symlink_to("/dev/zero"), "is a symbolic link"),
        (lambda: os.mkfifo(path), "is a pipe"),
        (path.mkdir, "is a folder"),
        (lambda: (path.touch(), os.truncate(path, 1 << 40)), "at most"),
        (lambda: path.write_bytes(b"[" * 10**6), "truncated or changed"),
        (lambda: path.write_bytes(b'{"a":' * 10**5), "truncated or changed"),
        (lambda: path.write_bytes(b'{"format": ' + b"9" * 5000 + b"}"), "truncated or changed"),
        (lambda: path.write_bytes(b""), "truncated or changed"),
    ):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        make()
        with pytest.raises(DamagedCheckpoint, match=message):
            read_metadata(step)
    path.unlink()
    path.write_bytes(content)
    read_metadata(step)


VALUES = [
    None, True, -1, 0, 1.5, 10**30, float("nan"), float("inf"), "", "x", "\x1b[2J", "9" * 5000, [], [[]], [1, [2]],
    [[0, 1], [2]], [0, 0], [-5], {}, {"a": 1}, {"a": {"b": [None]}}, {"": ""}, {"x": "float32[3] 0"},
    {"x": "object[3] 00000000"}, {"x": "nonsense[3] 00000000"}, {"x": f"float32[{'9' * 30}] 00000000"},
    {"x": entry()}, {"x": f"{'9' * 5000} {'0' * 32}"}, "2020-01-01", "2020-01-01T00:00:00+00:00",
]  # fmt: skip


def test_no_value_of_any_field_gives_more_than_a_clear_error(step, capsys, monkeypatch):
    """Every field with every value, and values drawn at random put anywhere, by all that reads a checkpoint."""
    monkeypatch.setattr(files, "_load", lambda path, wanted: pytest.fail("nothing was found wrong"))
    original = json.loads((step / "metadata.json").read_text())
    fields = [*original, "loss", "layer_rows", "processes", "unknown"]
    cases = [{field: value} for field in fields for value in VALUES if field != "digest"]
    chance = random.Random(0)
    for _ in range(100):
        changed = json.loads(json.dumps(original))
        for _ in range(chance.randrange(1, 4)):
            where = changed
            while isinstance(where, dict) and where and chance.random() < 0.6:
                key = chance.choice([*where])
                if not isinstance(where[key], dict):
                    break
                where = where[key]
            if isinstance(where, dict):
                where[chance.choice([*where, "new"])] = chance.choice(VALUES)
        cases.append(changed)
    asked = argparse.Namespace(directory=str(step.parent), export=None, prune=False, verify=False)
    refused = 0
    for case in cases:
        forge(step, **(original | case))
        for look in (read_metadata, lambda path: files.damage(path, record.read_record(path)["files"])):
            try:
                look(step)
            except ValueError as error:  # which DamagedCheckpoint is
                refused += 1
                assert "\x1b" not in str(error), case
        assert command.run(asked) in (0, 1), case
        output = "".join(capsys.readouterr())
        assert "\x1b" not in output and len(output.splitlines()) == 2, (case, output)
    assert refused > len(cases)


def test_what_says_how_layers_are_stored_is_a_table_of_them(step):
    for rows in ([1, 0], [[0], [1]], [1, 0, -1]):
        forge(step, layer_rows=rows)
        read_metadata(step)
    for rows in ([0, 2], [0, 0], [[0, 1], [2]], [-1, -1], [[[0]]], ["0"], [True, 0], 7):
        forge(step, layer_rows=rows)
        with pytest.raises(DamagedCheckpoint, match="has layer_rows=.*, which is not which layer each row is"):
            restore(step, TARGET)


def test_names_and_values_are_printed_without_their_commands_to_the_terminal(step, capsys):
    evil = "\x1b]0;owned\x07\x1b[2J\r\u202e"
    forge(step, metadata={"layout": evil}, loss=None)
    (step.parent / f"2.{evil}").mkdir()
    forge(step, arrays={evil: "float32[3] 00000000"}, metadata={"layout": evil})
    with pytest.raises(ValueError, match="is of another model") as error:
        restore(step, TARGET)
    main(["checkpoints", str(step.parent)])
    output = "".join(capsys.readouterr())
    for text in (str(error.value), output):
        assert not {"\x1b", "\x07", "\r", "\u202e"} & set(text)
        assert "\\x1b" in text


@pytest.mark.parametrize("value", [None, 1, [], {}, "x", {"type": []}, {"type": "TransformerConfig"},
    {"type": "TransformerConfig", "num_layers": {}}, {"type": "TransformerConfig", "vocab_size": [], "num_layers": "x"},
    {"type": "Norm", "no": 1}], ids=repr)  # fmt: skip
def test_a_configuration_of_another_kind_is_a_value_error(value):
    with pytest.raises(ValueError):
        TransformerConfig.from_dict(value)


def test_no_field_of_a_configuration_gives_more_than_a_clear_error():
    good = TransformerConfig(vocab_size=9, num_layers=2, d_model=8, num_heads=2, d_ff=16).to_dict()
    for name in good:
        for value in VALUES:
            try:
                TransformerConfig.from_dict(good | {name: value})
            except ValueError as error:
                assert "\x1b" not in str(error), name
