"""What came in goes out: all that a folder says of its model besides the weights, by whichever way they go."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import shardlm as sl
from shardlm.__main__ import main
from shardlm.hub.origin import Origin
from shardlm.hub.tokenizer import HubTokenizer
from tests.hub.cases import DATA, load
from tests.hub.test_tokenizer import make

# As they are in the folder: with whatever order, spaces and ends of lines somebody gave them.
TEXTS = {
    "tokenizer_config.json": '{"eos_token": "</s>",\r\n  "bos_token": "<s>", "clean_up_tokenization_spaces": false}',
    "special_tokens_map.json": '{"bos_token":"<s>" }',
    "chat_template.jinja": "{% for m in messages %}{{ m.content }}\r\n{% endfor %}\n",
    "generation_config.json": '{ "temperature": 0.6, "eos_token_id": [1, 3], "do_sample": true}\n',
    "tokenizer.model": b"\x0a\xff\x00",
    "merges.txt": "#version: 0.2\nt o\n",
}
FIELDS = {
    "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": [1, 3], "pad_token_id": 2, "use_cache": False,
    "torch_dtype": "float32", "task_specific_params": {"x": [1]}, "transformers_version": "4.40.0", "never_seen": None,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "model"
    shutil.copytree(DATA / "llama3", made)
    made.joinpath("tokenizer.json").write_bytes(make().to_str().replace("\n", "\r\n").encode() + b"\r\n")
    for name, content in TEXTS.items():
        made.joinpath(name).write_bytes(content.encode() if isinstance(content, str) else content)
    values = json.loads((made / "config.json").read_text()) | FIELDS
    (made / "config.json").write_text(json.dumps(values))
    return made


def values_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def assert_same(found: Path, expected: Path, *, texts: bool = True, **changes) -> None:
    """The fields of config.json but for `changes`, and the files of the text byte for byte."""
    before, after = values_of(expected) | changes, values_of(found)
    assert {name: after.get(name, "absent") for name in before} == before
    names = {path.name for path in expected.iterdir()} - {"config.json", "model.safetensors"}
    if not texts:
        names = {"generation_config.json"}
    assert {path.name for path in found.iterdir()} == names | {"config.json", "model.safetensors"}
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def test_a_model_that_was_loaded_and_saved_says_what_it_said(folder, tmp_path):
    config, params, tokenizer = load(folder)
    sl.save_hf(tmp_path / "a", config, params, tokenizer)
    assert_same(tmp_path / "a", folder)
    sl.save_hf(tmp_path / "b", config, params)  # the ids of config.json are the model's, with a tokenizer or without
    assert_same(tmp_path / "b", folder, texts=False)
    again, _, reread = load(tmp_path / "a")
    assert again == config and (reread.begin, reread.ends) == (tokenizer.begin, tokenizer.ends)


def test_it_travels_with_every_change_of_the_configuration(folder, tmp_path):
    config, params, tokenizer = load(folder)
    changed = dataclasses.replace(config, dtype="bfloat16", dropout=0.1, vocab_multiple=16, init_std=0.5)
    sl.save_hf(tmp_path / "a", changed, params, tokenizer)
    assert values_of(tmp_path / "a")["max_position_embeddings"] == 8192
    assert values_of(tmp_path / "a")["initializer_range"] == 0.5
    longer = dataclasses.replace(config, positions=sl.Rope(theta=7.0))
    sl.save_hf(tmp_path / "b", longer, params, tokenizer)
    values = values_of(tmp_path / "b")
    assert values["rope_theta"] == 7.0 and load(tmp_path / "b")[0] == longer
    assert {name: values[name] for name in FIELDS if name != "never_seen"} == {
        name: value for name, value in FIELDS.items() if name != "never_seen"
    }
    sl.save_hf(tmp_path / "c", config, params, fields={"max_position_embeddings": 99})
    assert values_of(tmp_path / "c")["max_position_embeddings"] == 99


def test_it_travels_through_a_checkpoint_and_convert(folder, tmp_path, capsys):
    config, params, _ = load(folder)
    sl.save(tmp_path / "runs/3", {"params": params, "step": jnp.int32(3)}, {"config": config.to_dict()})
    assert main(["convert", str(tmp_path / "runs/3"), str(tmp_path / "a")]) == 0
    assert_same(tmp_path / "a", folder, texts=False)
    # Of a checkpoint that says nothing, the folder that it came from can.
    bare = dataclasses.replace(config, origin=None).to_dict()
    assert "origin" not in bare
    sl.save(tmp_path / "runs/4", {"params": params, "step": jnp.int32(4)}, {"config": bare})
    assert main(["convert", str(tmp_path / "runs/4"), str(tmp_path / "b"), "--like", str(folder)]) == 0
    assert_same(tmp_path / "b", folder)
    assert main(["convert", str(folder), str(tmp_path / "c"), "--dtype", "bf16"]) == 0
    assert_same(tmp_path / "c", folder, dtype="bfloat16", torch_dtype="bfloat16")
    capsys.readouterr()
    assert main(["convert", str(folder), str(tmp_path / "d"), "--like", str(folder)]) == 2
    assert "--like is for a checkpoint" in capsys.readouterr().err


def test_another_folder_may_be_named(folder, tmp_path):
    config, params, _ = load(DATA / "llama3")
    sl.save_hf(tmp_path / "a", config, params, like=folder)
    assert_same(tmp_path / "a", folder)


def test_another_tokenizer_brings_its_own_ids(folder, tmp_path):
    config, params, tokenizer = load(folder)
    other = HubTokenizer(make().to_str(), begin=4, ends=(5,))
    sl.save_hf(tmp_path / "a", config, params, other)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / "a" / name).read_text())
        assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (4, 5, None)
    assert json.loads((tmp_path / "a/generation_config.json").read_text())["temperature"] == 0.6
    assert not (tmp_path / "a/chat_template.jinja").exists()
    tokenizer.settings["chat_template"] = "{{ messages }}"  # a change of ours is written
    sl.save_hf(tmp_path / "b", config, params, tokenizer)
    assert json.loads((tmp_path / "b/tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
    assert (tmp_path / "b/chat_template.jinja").is_file()


@pytest.mark.parametrize("name", ["ignored", "ignored_too"])
def test_fields_that_were_ignored_go_out_too(folder, tmp_path, name, capsys):
    (folder / "config.json").write_text(json.dumps(values_of(folder) | {name: {"a": 1}}))
    with pytest.raises(ValueError, match=rf"ignore_fields=\['{name}'\]"):
        load(folder)
    config, params, tokenizer = load(folder, ignore_fields=[name])
    sl.save_hf(tmp_path / "a", config, params, tokenizer)
    assert_same(tmp_path / "a", folder)
    assert main(["convert", str(folder), str(tmp_path / "b")]) == 2
    assert f"{name}={{'a': 1}}: shardlm does not know this field" in capsys.readouterr().err
    assert main(["convert", str(folder), str(tmp_path / "b"), "--ignore-fields", name]) == 0
    assert_same(tmp_path / "b", folder)


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"values": []}', '{"values": {}, "generation": 3}', "[" * 10**5, ""])
def test_an_origin_that_was_damaged_says_nothing(text, tmp_path):
    config, params, _ = load(DATA / "gpt2")
    assert Origin.of_config(dataclasses.replace(config, origin=text)) == Origin()
    with pytest.raises(ValueError, match="origin is int; it is a text, or None"):
        dataclasses.replace(config, origin=3)


def test_it_is_no_part_of_the_model(folder):
    config, _, _ = load(folder)
    bare = dataclasses.replace(config, origin=None)
    assert config == bare and hash(config) == hash(bare) and repr(config) == repr(bare)
    read = sl.TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert read.origin == config.origin
    trainer = sl.Trainer(bare)
    assert trainer.program.changes({"config": config.to_dict()}, "here") == {}


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_gemma_without_windows_is_written_with_a_width_that_no_layer_uses(name, tmp_path):
    """transformers makes the mask of windows for every Gemma, and needs a width for it."""
    config, params, _ = load(DATA / name)
    attention = dataclasses.replace(config.attention, windows=(None,))
    full = dataclasses.replace(config, attention=attention, local_positions=None)
    sl.save_hf(tmp_path / "a", full, params)
    values = values_of(tmp_path / "a")
    assert values["sliding_window"] == 4096 and set(values["layer_types"]) == {"full_attention"}
    assert load(tmp_path / "a")[0] == full


def test_gemma_3_reads_the_old_name_of_a_kind_of_scaling_as_transformers_does(tmp_path):
    shutil.copytree(DATA / "gemma3", tmp_path / "a")
    values = values_of(tmp_path / "a")
    del values["rope_parameters"]
    values |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"type": "linear", "factor": 8.0}}
    (tmp_path / "a/config.json").write_text(json.dumps(values))
    with pytest.warns(
        UserWarning, match="transformers 5 does not read it and scales nothing, and shardlm does the same"
    ):
        config, params, _ = load(tmp_path / "a")
    assert config.positions == sl.Rope(theta=1e6)
    sl.save_hf(tmp_path / "b", config, params)
    assert values_of(tmp_path / "b")["rope_scaling"] == {"type": "linear", "factor": 8.0}
    for scaling in ({"rope_type": "linear", "factor": 8.0}, {"rope_type": "linear", "type": "linear", "factor": 8.0}):
        (tmp_path / "a/config.json").write_text(json.dumps(values | {"rope_scaling": scaling}))
        assert load(tmp_path / "a")[0].positions.scaling == sl.LinearScaling(factor=8.0)
    np.testing.assert_array_equal(load(tmp_path / "a")[1]["final_norm"]["scale"], params["final_norm"]["scale"])
