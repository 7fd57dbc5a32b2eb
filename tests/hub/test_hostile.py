"""Whatever a folder of somebody else holds, it is read rightly, or one error names the file and the field."""

import json
import math
import os
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import shardlm as sl
from shardlm.__main__ import main
from shardlm.hub import registry
from shardlm.hub.files import Tensors, read_config
from shardlm.hub.finite import all_finite
from shardlm.hub.match import check_sizes
from shardlm.hub.origin import Origin
from shardlm.hub.rope import SPELLINGS
from shardlm.hub.tokenizer import read_tokenizer, text_files
from tests.hub.cases import CASES, DATA, load
from tests.hub.real import CONFIGS
from tests.hub.test_tokenizer import make

# One of each kind of JSON value, and numbers that are none.
VALUES = (
    None, True, False, [], [1], [None], ["x"], [[]], [{}], {}, {"x": 1}, {"rope_type": []}, {"full_attention": 3}, "",
    "x", "\x1b[2J\u202e", -1, 0, 1, 3, 10**9, 10**400, -(10**400), 0.5, -0.5, 1e308, math.nan, math.inf, -math.inf,
)  # fmt: skip
NESTED = ("rope_type", "type", "rope_theta", "factor", "low_freq_factor", "original_max_position_embeddings")


def read(values):
    return registry.family_of_file(values, "config.json").config(values, "config.json")


def problem(values, name: str) -> str:
    """What the error says, which is a ValueError of visible characters; empty where the file is read."""
    before = time.perf_counter()
    try:
        config = read(values)
        # What is read can be computed with, and is written and read again, or told why not.
        family = registry.family_of_file(values, "")
        written = Origin(values=values).config_values(config, family, "float32")
        assert read(written) == config, (name, values[name])
        told = ""
    except ValueError as error:
        told = str(error)
        assert told.replace("\n", "").isprintable() and len(told) < 3000, told
    assert time.perf_counter() - before < 20, (name, values[name])  # not by how large the number is
    return told


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*transformers 5 does not read it")
def test_every_field_with_every_kind_of_value_is_read_or_named(case):
    """In pure Python: no tensor is looked at, and no number is taken at its word."""
    values = json.loads((DATA / case / "config.json").read_text())
    # In words of ours where sizes contradict each other.
    ours = {"num_hidden_layers": "layers", "n_layer": "layers", "architectures": "architectures"}
    ours |= dict.fromkeys(("hidden_size", "n_embd", "num_attention_heads", "n_head"), "d_model|num_heads|head_dim")
    ours |= {"num_key_value_heads": "num_kv_heads", "head_dim": "head_dim"}
    for name in {*values, *SPELLINGS, "sliding_window", "layer_types", "sliding_window_pattern", "max_window_layers"}:
        for value in VALUES:
            told = problem(values | {name: value}, name)
            names = (name, *SPELLINGS, *ours.get(name, name).split("|"))
            assert not told or any(known in told for known in names), (name, value, told)
    for spelling in ("rope_parameters", "rope_scaling"):
        kinds = ("full_attention", "sliding_attention") if case == "gemma3" and spelling == "rope_parameters" else ("",)
        for kind in kinds:
            before = values.get(spelling) or {"rope_type": "llama3", "factor": 2.0}
            for name in NESTED:
                for value in VALUES:
                    changed = dict(before.get(kind, before)) | {name: value}
                    changed = before | {kind: changed} if kind else changed
                    told = problem(values | {spelling: changed}, spelling)
                    assert not told or spelling in told or "rope" in told, (name, value, told)


@pytest.mark.parametrize("value", [value for value in VALUES if not isinstance(value, str) or not value.isalpha()])
def test_a_model_type_of_any_kind_is_said_to_be_unknown(value):
    for values in ({"model_type": value}, {"model_type": value, "architectures": value}):
        with pytest.raises(ValueError, match="model_type=.* is unknown") as error:
            read(values)
        assert str(error.value).isprintable()


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(DATA / "llama3", tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, name: str, **values) -> None:
    path = folder / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | values))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"\xff\xfe{}", "is not JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b"null", "holds NoneType, not an object"),
        (b"", "is not JSON"),
    ],
)
def test_a_config_that_is_no_config_is_said(folder, content, message):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"config.json .*{message}"):
        read_config(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json",
                                  "tokenizer_config.json", "generation_config.json"])  # fmt: skip
@pytest.mark.parametrize("kind", ["dangling", "pipe", "zero", "folder"])
def test_what_is_no_file_is_named_and_not_read(folder, name, kind):
    if "tokenizer" in name:
        make().save(str(folder / "tokenizer.json"))
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    makes = {
        "dangling": lambda path: path.symlink_to("../../blobs/0123"),
        "pipe": os.mkfifo,
        "zero": lambda path: path.symlink_to("/dev/zero"),
        "folder": Path.mkdir,
    }
    makes[kind](folder / name)
    said = {"dangling": r"is a symbolic link to \.\./\.\./blobs/0123, which is missing: fetch", "pipe": "is a pipe",
            "zero": "is a device, not a plain file", "folder": "is a folder, not a plain file"}  # fmt: skip
    with pytest.raises(ValueError, match=rf"{name} {said[kind]}"):
        load(folder)


def indexed(folder: Path, **names: str) -> None:
    """The folder with an index that gives tensors of other files' names."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "weights.safetensors") | names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    ["../weights.safetensors", "/etc/passwd", "/dev/zero", "sub/../weights.safetensors", "", ".", "pipe", "a\x1b[2J"],
)
def test_an_index_names_files_of_its_folder_alone(folder, name):
    shutil.copy(folder / "model.safetensors", folder.parent / "weights.safetensors")
    os.mkfifo(folder / "pipe")
    indexed(folder, extra=name)
    with pytest.raises(ValueError, match=r"index.json names a file that is not read: ") as error:
        load(folder)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("value", [None, 3, ["weights.safetensors"], {"a": 1}])
def test_an_index_gives_names(folder, value):
    indexed(folder, extra=value)
    with pytest.raises(ValueError, match="weight_map gives .* for extra, no file's name"):
        load(folder)


def test_a_folder_of_a_cache_whose_files_are_links_is_read(folder, tmp_path):
    """snapshots/REVISION/name leads to ../../blobs/digest, as huggingface_hub stores models."""
    make().save(str(folder / "tokenizer.json"))
    indexed(folder)
    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    config, params, tokenizer = load(snapshot)
    assert config == load(DATA / "llama3")[0] and tokenizer.vocab_size == 6
    sl.save_hf(tmp_path / "out", config, params, tokenizer)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1_000_000}, r"there are tensors of 3 layers; config.json says 1,000,000"),
        ({"vocab_size": 2**31 - 1}, r"model.embed_tokens.weight has the shape \[67, 24\]; config.json says \[21474836"),
        ({"hidden_size": 2**30}, r"q_proj.weight has the shape \[32, 24\]; config.json says \[32, 1073741824\]"),
        ({"intermediate_size": 2**31 - 1}, r"up_proj.weight has the shape \[40, 24\]; config.json says \[2147483647"),
        ({"num_attention_heads": 2**30, "hidden_size": 2**30, "num_key_value_heads": 2**30}, r"q_proj.weight has"),
    ],
)
def test_sizes_are_held_to_the_tensors_before_anything_is_made_of_them(folder, changes, message):
    change(folder, "config.json", **changes)
    before = time.perf_counter()
    with pytest.raises(
        ValueError, match=rf"(?s)config.json says a llama of [\d,]+ parameters or more, and .*{message}"
    ):
        load(folder)
    assert time.perf_counter() - before < 30
    with pytest.raises(ValueError, match="num_hidden_layers=1000000000: it is a positive integer up to 1,000,000"):
        read(CONFIGS["gemma-2-2b"] | {"num_hidden_layers": 10**9})


def test_the_command_lines_hold_sizes_to_the_tensors_too(folder, tmp_path, capsys):
    change(folder, "config.json", num_hidden_layers=1_000_000)
    for command in (
        ("convert", str(folder), str(tmp_path / "out")),
        ("train", "--init-from", str(folder), "--tokenizer", "bytes"),
    ):
        assert main(list(command)) == 2
        assert "there are tensors of 3 layers; config.json says 1,000,000" in capsys.readouterr().err


@pytest.mark.parametrize("case", CASES)
def test_every_real_shape_passes_the_first_look(case):
    values = read_config(DATA / case)
    with Tensors(DATA / case) as files:
        check_sizes(read(values), registry.family_of_file(values, ""), files, case)


@pytest.mark.parametrize("name", ["gemma", "gpt2"])
def test_one_table_may_be_stored_as_the_head(name, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(DATA / name, folder)
    tensors = load_file(folder / "model.safetensors")
    table = {"gemma": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}[name]
    tensors["lm_head.weight"] = tensors.pop(table)
    save_file(tensors, folder / "model.safetensors")
    found, expected = load(folder)[1], load(DATA / name)[1]
    np.testing.assert_array_equal(found["embedding"]["table"], expected["embedding"]["table"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_a_weight_that_is_not_finite_is_found(dtype):
    made = np.ones(3 * 2**17 + 5, np.dtype(sl.hub.files.DTYPES[{"b": "BF16"}.get(dtype[0], f"F{dtype[-2:]}")]))
    made[7] = np.finfo(np.float16).max
    assert all_finite(made) and all_finite(made[:0])
    for place in (0, 2**18 - 1, 2**18, made.size - 1):
        for value in (np.nan, np.inf, -np.inf):
            broken = made.copy()
            broken[place] = value
            assert not all_finite(broken), (place, value)


def test_weights_that_are_not_finite_are_said_when_read_and_when_written(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = np.inf
    save_file(tensors, folder / "model.safetensors")
    names = r"in 2 of its tensors: model.layers.1.mlp.up_proj.weight, model.norm.weight\. Such a model"
    with pytest.warns(UserWarning, match=rf"model was read as it is, with NaN or infinity in float32 {names}"):
        config, params, _ = load(folder)
    with pytest.warns(UserWarning, match=rf"a was written as it is, with NaN or infinity in float32 {names}"):
        sl.save_hf(tmp_path / "a", config, params)
    with pytest.warns(UserWarning, match=rf"b was written as it is, with NaN or infinity in bfloat16 {names}"):
        assert main(["convert", str(folder), str(tmp_path / "b"), "--dtype", "bf16"]) == 0


def test_a_tokenizer_of_another_form_is_not_passed_over_in_silence(folder):
    (folder / "tokenizer.model").write_bytes(b"\x00\xff")
    with pytest.warns(UserWarning, match=r"model has tokenizer.model and no tokenizer.json, which alone is read: its"):
        assert load(folder)[2] is None
    assert text_files(folder) == {"tokenizer.model": b"\x00\xff"}
    with warnings.catch_warnings(action="error"):
        assert load(DATA / "llama3")[2] is None  # has none of any form


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["<s>", {}, [None, "x"], [[1]], 0.5, True, 10**400, [10**400]])
def test_an_id_of_another_kind_is_named(folder, file, value):
    make().save(str(folder / "tokenizer.json"))
    for field in ("eos_token_id", "bos_token_id"):
        shutil.copy(DATA / "llama3/config.json", folder)
        (folder / "generation_config.json").write_text("{}")
        change(folder, file, **{field: value})
        with pytest.raises(ValueError, match=rf"{file}: {field}=.*it is an id, a list of ids or null"):
            read_tokenizer(folder, read_config(folder))


def test_a_token_of_another_kind_is_named(folder):
    make().save(str(folder / "tokenizer.json"))
    for value in (3, ["</s>"], {"content": []}, True):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}))
        with pytest.raises(ValueError, match=r"tokenizer_config.json: eos_token=.*it is a text"):
            read_tokenizer(folder, read_config(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert read_tokenizer(folder, {"bos_token_id": -1}).begin is None  # stands for none
