"""What is saved is what was loaded, bit for bit, from any layout; it appears whole, or not at all."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import shardlm as sl
from shardlm.hub import files as files_
from shardlm.hub import write
from shardlm.runtime import folders
from shardlm.train.engine import flatten, unflatten
from tests.hub.cases import CASES, DATA, load
from tests.kills import Killed, killed_at

ROOT = Path(__file__).parents[2]


def stored(folder: Path) -> dict[str, np.ndarray]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def assert_same_files(found: Path, expected: Path) -> None:
    found, expected = stored(found), stored(expected)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape, name
        assert found[name].tobytes() == x.tobytes(), name


@pytest.mark.parametrize("name", CASES)
def test_every_family_comes_back_bit_for_bit(name, tmp_path):
    config, params, _ = load(DATA / name)
    sl.save_hf(tmp_path / "a", config, params)
    assert_same_files(tmp_path / "a", DATA / name)
    again, _, _ = load(tmp_path / "a")
    assert again == config


@pytest.mark.parametrize("layout", ["data=2,fsdp=2,tensor=2", "tensor=4", "fsdp=8", "fsdp=4,zero=1"])
@pytest.mark.parametrize("name", ["gpt2", "qwen2_windows"])
def test_any_layout_writes_the_same_bytes(name, layout, tmp_path):
    layout = sl.Layout.parse(layout)
    config, params, _ = load(DATA / name, layout, devices=jax.devices()[: layout.num_devices])
    sl.save_hf(tmp_path / "a", config, params)
    assert_same_files(tmp_path / "a", DATA / name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_dtype_comes_back_bit_for_bit(dtype, tmp_path, x64):
    config, params, _ = load(DATA / "llama3", dtype=dtype)
    sl.save_hf(tmp_path / "a", config, params)
    _, again, _ = load(tmp_path / "a")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), params, again)
    written = json.loads((tmp_path / "a/config.json").read_text())
    assert (written["dtype"], written["torch_dtype"]) == (dtype, dtype)


def test_arrays_of_numpy_and_a_layouts_own_padding_are_written_too(tmp_path):
    config, params, _ = load(DATA / "llama3")
    flat = {path: np.asarray(x) for path, x in flatten(params).items()}
    for path in ("embedding/table", "head/table"):
        flat[path] = np.pad(flat[path], ((0, 3), (0, 0)))
    sl.save_hf(tmp_path / "a", config, unflatten(flat))
    assert_same_files(tmp_path / "a", DATA / "llama3")


def test_files_are_as_large_as_asked_and_the_index_names_each_tensor(tmp_path):
    config, params, _ = load(DATA / "gpt2")
    sl.save_hf(tmp_path / "a", config, params, max_shard_size="10KB")
    files = sorted((tmp_path / "a").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, 5)]
    sizes = [sum(x.nbytes for x in load_file(file).values()) for file in files]
    assert max(sizes) <= 10_000 and sum(sizes) == sum(x.nbytes for x in stored(DATA / "gpt2").values())
    index = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert_same_files(tmp_path / "a", DATA / "gpt2")
    sl.save_hf(tmp_path / "b", config, params, max_shard_size=1)  # every tensor is larger: a file for each
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == len(stored(DATA / "gpt2"))
    assert_same_files(tmp_path / "b", DATA / "gpt2")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5KB", 1500), (7, 7), ("7B", 7)]
)
def test_sizes(text, size):
    assert write.parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "GB", "-1GB", 0, True, "five GB", "infGB"])
def test_what_is_no_size_is_refused(text, tmp_path):
    config, params, _ = load(DATA / "gpt2")
    with pytest.raises(ValueError, match=r"max_shard_size=.*; it is a number of bytes, or text such as '5GB'"):
        sl.save_hf(tmp_path / "a", config, params, max_shard_size=text)
    assert not list(tmp_path.iterdir())


def test_parameters_that_are_not_the_configurations_are_listed_at_once(tmp_path):
    config, params, _ = load(DATA / "llama3")
    flat = flatten(params)
    del flat["layers/mlp/up/kernel"]
    flat["layers/mlp/up/bias"] = jnp.zeros((3, 40))
    flat["final_norm/scale"] = jnp.zeros(23)
    flat["embedding/table"] = jnp.zeros((66, 24))
    flat["head/table"] = flat["head/table"].astype(jnp.bfloat16)
    with pytest.raises(ValueError) as error:
        sl.save_hf(tmp_path / "a", config, unflatten(flat))
    for message in (
        "layers/mlp/up/kernel is missing, of shape (3, 24, 40)",
        "layers/mlp/up/bias, of shape (3, 40), is no parameter of this configuration",
        "final_norm/scale has the shape (23,), and (24,) by the configuration",
        "embedding/table has the shape (66, 24), and (128, 24) by",
        "1 of bfloat16 such as head/table; they must be of one dtype",
    ):
        assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_fields_and_family_are_written_as_asked(tmp_path):
    config, params, _ = load(DATA / "llama2")
    sl.save_hf(tmp_path / "a", config, params, family="mistral", fields={"max_position_embeddings": 99})
    values = json.loads((tmp_path / "a/config.json").read_text())
    assert values["model_type"] == "mistral" and values["sliding_window"] is None
    assert values["max_position_embeddings"] == 99
    assert load(tmp_path / "a")[0] == config
    with pytest.raises(ValueError, match="fields: hidden_act may change what the model computes"):
        sl.save_hf(tmp_path / "b", config, params, fields={"hidden_act": "relu"})
    with pytest.raises(ValueError, match="(?s)no family of Hugging Face models is this configuration.*gpt2: positions"):
        sl.save_hf(tmp_path / "b", config, params, family="gpt2")


def test_old_versions_of_transformers_find_what_they_look_for(tmp_path):
    """One that knows no rope_parameters would take its own theta, and say nothing."""
    for name, expected in {
        "llama3": {"rope_theta": 100.0, "max_position_embeddings": 128},
        "gemma3": {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    }.items():
        config, params, _ = load(DATA / name)
        sl.save_hf(tmp_path / name, config, params)
        values = json.loads((tmp_path / name / "config.json").read_text())
        assert {key: values[key] for key in expected} == expected
        del values["rope_parameters"]
        (tmp_path / name / "config.json").write_text(json.dumps(values))
        assert load(tmp_path / name)[0] == config


def test_overwriting_must_be_asked_for_and_only_a_model_is(tmp_path):
    config, params, _ = load(DATA / "llama3")
    sl.save_hf(tmp_path / "a", config, params)
    with pytest.raises(ValueError, match=r"/a holds a model already: choose another path, or pass overwrite=True"):
        sl.save_hf(tmp_path / "a", config, params)
    (tmp_path / "a/extra.txt").write_text("?")
    other, others, _ = load(DATA / "gpt2")
    sl.save_hf(tmp_path / "a", other, others, overwrite=True)
    assert_same_files(tmp_path / "a", DATA / "gpt2")
    assert sorted(os.listdir(tmp_path)) == ["a"] and "extra.txt" not in os.listdir(tmp_path / "a")
    (tmp_path / "b").mkdir()
    sl.save_hf(tmp_path / "b", config, params)  # an empty folder is none
    (tmp_path / "c").mkdir()
    (tmp_path / "c/thesis.txt").write_text("?")
    with pytest.raises(ValueError, match=r"/c exists and is no folder of a Hugging Face model: choose another path"):
        sl.save_hf(tmp_path / "c", config, params, overwrite=True)
    assert (tmp_path / "c/thesis.txt").read_text() == "?"


def test_a_failure_leaves_nothing_that_passes_for_a_model(tmp_path, monkeypatch):
    config, params, _ = load(DATA / "llama3")
    sl.save_hf(tmp_path / "a", config, params)
    calls = []

    def broken(*arguments):
        calls.append(arguments)
        if len(calls) == 20:
            raise OSError("No space left on device")
        return original(*arguments)

    original = write.np.ascontiguousarray
    monkeypatch.setattr(write.np, "ascontiguousarray", broken)
    for name, overwrite in (("a", True), ("b", False)):
        calls.clear()
        with pytest.raises(OSError, match="No space left"):
            sl.save_hf(tmp_path / name, config, params, overwrite=overwrite, max_shard_size="10KB")
    monkeypatch.undo()
    assert_same_files(tmp_path / "a", DATA / "llama3")  # what was there is there
    assert os.listdir(tmp_path) == ["a"]


KILLED = """
import os, signal, sys
import shardlm as sl
from shardlm.hub import write

config, params, _ = sl.load_hf(sys.argv[1])
write.Work.publish = lambda *given, **named: os.kill(os.getpid(), signal.SIGKILL)
sl.save_hf(sys.argv[2], config, params)
"""


def test_a_kill_at_the_last_moment_leaves_no_folder_of_that_name(tmp_path):
    command = [sys.executable, "-c", KILLED, str(DATA / "llama3"), str(tmp_path / "a")]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == -signal.SIGKILL
    [left] = os.listdir(tmp_path)
    assert left.startswith("a.saving-")
    sl.save_hf(tmp_path / "a", *load(DATA / "llama3")[:2])
    assert os.listdir(tmp_path) == ["a"]  # what the earlier try left is replaced


def test_parameters_of_a_pipeline_are_written_in_the_models_order(tmp_path):
    config, params, _ = load(DATA / "llama3")
    layers = tuple([0, config.num_layers])
    layout = sl.Layout(pipe=2, pipeline=sl.Pipeline(layers=layers))
    _, piped, _ = load(DATA / "llama3", layout, devices=jax.devices()[:2])
    with pytest.raises(ValueError, match=r"of a pipeline with chunks or uneven stages give trainer.in_order"):
        sl.save_hf(tmp_path / "a", config, piped, verbose=False)
    trainer = sl.Trainer(config, layout, devices=jax.devices()[:2])
    sl.save_hf(tmp_path / "a", config, trainer.in_order(piped), verbose=False)
    sl.save_hf(tmp_path / "b", config, params, verbose=False)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    for name, value in b.items():
        np.testing.assert_array_equal(a[name], value, err_msg=name)


def test_importing_shardlm_imports_no_package_of_an_extra():
    code = "import sys, shardlm; print([n for n in ('safetensors', 'tokenizers', 'torch') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"to read safetensors files: pip install -e '.\[hf\]'"):
        load(DATA / "llama3")


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_kill_at_any_change_of_the_disk_leaves_the_old_or_the_new_model(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    config, params, _ = load(DATA / "llama3")
    other, others, _ = load(DATA / "gpt2")
    sl.save_hf(tmp_path / "old", config, params, verbose=False)
    found = []
    for number in itertools.count():
        parent = tmp_path / str(number)
        shutil.copytree(tmp_path / "old", parent / "a")
        with killed_at(monkeypatch, number) as made:
            try:
                sl.save_hf(parent / "a", other, others, verbose=False, overwrite=True)
            except Killed:
                assert made.dead
        assert not exchanges or (parent / "a").exists(), made
        files_.folder_of(parent / "a")  # the next look
        found.append(json.loads((parent / "a/config.json").read_text())["model_type"])
        assert_same_files(parent / "a", DATA / {"llama": "llama3", "gpt2": "gpt2"}[found[-1]])
        write.check_target(parent / "a", overwrite=True)
        assert os.listdir(parent) == ["a"], made
        if not made.dead:
            break
    assert len(found) > 12 and found[0] == "llama" and found[-1] == "gpt2"
    assert found == sorted(found, reverse=True)


def test_saving_touches_nothing_beside_its_path(tmp_path):
    config, params, _ = load(DATA / "llama3")
    others = ("a.new", "a.old", "a.saving-0123abcd")
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for overwrite in (False, True):
        sl.save_hf(tmp_path / "a", config, params, verbose=False, overwrite=overwrite)
    for path, error in (
        (tmp_path / "link", "is a symbolic link: give the path of the folder itself"),
        ("", "folder='' is empty"),
        ("gs://bucket/a", "folder='gs://bucket/a' is an address"),
    ):
        with pytest.raises(ValueError, match=error):
            sl.save_hf(path, config, params, verbose=False, overwrite=True)
        if path != tmp_path / "link":
            with pytest.raises(ValueError, match=error):
                sl.load_hf(path)
    assert sorted(os.listdir(tmp_path)) == sorted(["a", "link", *others])
    assert [os.listdir(tmp_path / name) for name in others] == [["thesis"]] * 3


def test_what_fails_while_a_tensor_is_made_leaves_nothing(tmp_path, monkeypatch):
    config, params, _ = load(DATA / "llama3")
    monkeypatch.setattr(write, "_write_file", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sl.save_hf(tmp_path / "a", config, params, verbose=False)
    assert os.listdir(tmp_path) == []
