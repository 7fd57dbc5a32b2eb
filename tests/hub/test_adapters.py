"""Adapters go to the files of PEFT and come back; what those cannot say, or we cannot, is an error."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import shardlm as sl
from shardlm.train.paths import flatten, unflatten
from tests.hub.cases import DATA, load
from tests.kills import Killed, killed_at

LORA = sl.Lora(rank=3, alpha=7.0, targets=("query", "value", "output", "down"))


@pytest.fixture(scope="module")
def model():
    """A loaded Llama, and the same with adapters, neither of which is zero."""
    config, params, _ = load(DATA / "llama3")
    adapted, start = sl.add_lora(config, params, LORA)
    random = np.random.default_rng(0)
    flat = {
        path: np.asarray(x) + random.normal(size=x.shape).astype(x.dtype) if "/lora_" in path else x
        for path, x in flatten(start).items()
    }
    return config, params, adapted, unflatten(flat)


def test_adapters_come_back_as_they_went(model, tmp_path):
    config, params, adapted, start = model
    sl.save_lora(tmp_path / "a", adapted, start, base="somebody/llama")
    again, found = sl.load_lora(tmp_path / "a", config, params)
    assert again == adapted
    for path, leaf in flatten(start).items():
        np.testing.assert_array_equal(np.asarray(flatten(found)[path]), np.asarray(leaf), err_msg=path)
    settings = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (3, 7.0, "somebody/llama")
    assert settings["target_modules"] == ["q_proj", "v_proj", "o_proj", "down_proj"]


def test_the_files_hold_what_is_added_to_the_weights_of_the_model(model, tmp_path):
    """W + (alpha / r) B A, in the shapes of the files of the model itself, is the merged model's file."""
    config, _, adapted, start = model
    sl.save_lora(tmp_path / "a", adapted, start)
    merged, params = sl.merge_lora(adapted, start)
    sl.save_hf(tmp_path / "merged", merged, params, verbose=False)
    lora, after = load_file(tmp_path / "a/adapter_model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    before = load_file(DATA / "llama3/model.safetensors")
    for layer in range(config.num_layers):
        for module in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{module}"
            a, b = (lora[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
            expected = before[f"{name}.weight"] + 7.0 / 3 * b @ a
            np.testing.assert_allclose(after[f"{name}.weight"], expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    untouched = "model.layers.0.self_attn.k_proj.weight"
    np.testing.assert_array_equal(after[untouched], before[untouched])


def test_adapters_are_loaded_onto_a_layout(model, tmp_path):
    _, _, adapted, start = model
    sl.save_lora(tmp_path / "a", adapted, start)
    layout, devices = sl.Layout(fsdp=2, tensor=4), jax.devices()
    config, params, _ = load(DATA / "llama3", layout, devices=devices)
    config, params = sl.load_lora(tmp_path / "a", config, params)
    trainer = sl.Trainer(config, layout)
    state = trainer.init(params)
    for path, leaf in flatten(trainer.abstract_state.params).items():
        assert flatten(state.params)[path].sharding == leaf.sharding
    np.testing.assert_array_equal(
        np.asarray(state.params["layers"]["mlp"]["down"]["lora_b"]),
        np.asarray(start["layers"]["mlp"]["down"]["lora_b"]),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True, not False"),
        ({"peft_type": "IA3"}, "peft_type='IA3', not 'LORA'"),
        ({"target_modules": "all-linear"}, "target_modules='all-linear', not a list of q_proj, k_proj"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "not a list of q_proj"),
        ({"r": 4}, r"lora_A.weight is \[3, 48\], not \[4, 48\].* and \d+ more"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "down_proj.lora_A.weight is of no projection"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern=.*not {}"),
    ],
)
def test_what_our_adapters_are_not_is_named(model, tmp_path, change, message):
    config, params, adapted, start = model
    sl.save_lora(tmp_path / "a", adapted, start)
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    message = message.replace("48", str(config.d_model))
    with pytest.raises(ValueError, match=message):
        sl.load_lora(tmp_path / "a", config, params)


def test_missing_files_and_tensors_are_named(model, tmp_path):
    config, params, adapted, start = model
    with pytest.raises(FileNotFoundError, match="has no adapter_config.json"):
        sl.load_lora(tmp_path, config, params)
    sl.save_lora(tmp_path / "a", adapted, start)
    path = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.v_proj.lora_B.weight is missing"):
        sl.load_lora(tmp_path / "a", config, params)


def test_what_cannot_be_saved_is_refused(model, tmp_path):
    config, params, adapted, start = model
    with pytest.raises(ValueError, match="this model has no adapters"):
        sl.save_lora(tmp_path / "a", config, params)
    with pytest.raises(ValueError, match=r"adapter of query .* is missing"):
        sl.save_lora(tmp_path / "a", adapted, params)
    with pytest.raises(ValueError, match="this model has adapters: merge them first"):
        sl.save_hf(tmp_path / "b", adapted, start)
    gpt2, weights, _ = load(DATA / "gpt2")
    gpt2, weights = sl.add_lora(gpt2, weights, dataclasses.replace(LORA, targets=("query",)))
    with pytest.raises(ValueError, match="gpt2 keeps query in one matrix with others"):
        sl.save_lora(tmp_path / "c", gpt2, weights)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.tex").touch()
    with pytest.raises(ValueError, match="exists and is no folder of adapters"):
        sl.save_lora(tmp_path / "notes", adapted, start)


def test_a_kill_at_any_change_of_the_disk_leaves_whole_adapters(model, tmp_path, monkeypatch):
    config, params, adapted, start = model
    sl.save_lora(tmp_path / "old", adapted, start, base="old")
    (tmp_path / "old/README.md").write_text("mine")
    doubled = unflatten({path: np.asarray(x) * 2 if "/lora_" in path else x for path, x in flatten(start).items()})
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    found = []
    for number in itertools.count():
        parent = tmp_path / str(number)
        shutil.copytree(tmp_path / "old", parent / "a")
        with killed_at(monkeypatch, number) as made, contextlib.suppress(Killed):
            sl.save_lora(parent / "a", adapted, doubled, base="new")
        sl.load_lora(parent / "a", config, params)  # the next look
        base = json.loads((parent / "a/adapter_config.json").read_text())["base_model_name_or_path"]
        weight = load_file(parent / "a/adapter_model.safetensors")[name]
        np.testing.assert_array_equal(
            weight, load_file(tmp_path / "old/adapter_model.safetensors")[name] * (1 + (base == "new"))
        )
        assert (parent / "a/README.md").read_text() == "mine"
        found.append(base)
        if not made.dead:
            break
    assert len(found) > 8 and found == sorted(found, reverse=True) and {*found} == {"old", "new"}
    assert os.listdir(parent) == ["a"]
