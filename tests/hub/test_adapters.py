"""Adapters go to the files of PEFT and come back; what those cannot say, or we cannot, is an error."""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import shardlm as sl
from shardlm.hub import adapter_config
from shardlm.models.lora import is_adapter
from shardlm.train.paths import flatten, unflatten
from tests.hub import record_adapters
from tests.hub.cases import DATA, INSTALLED, load, logits, model_of, recorded
from tests.hub.test_numbers import F32
from tests.kills import Killed, killed_at

WEIGHTS = "adapter_model.safetensors"
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


def adapted_by(name):
    """The name of a recorded case's base model, and the model with the adapters."""
    base = record_adapters.CASES[name][0]
    config, params, _ = load(DATA / base, dtype="float32")
    return base, *sl.load_lora(record_adapters.ADAPTERS / name, config, params)


def products(folder):
    """What a folder adds to each weight, by PEFT's rules alone, of names with no special characters but dots."""
    settings, stored = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / WEIGHTS)
    found = {}
    for name in (x.removesuffix(".lora_A.weight") for x in stored if x.endswith("lora_A.weight")):
        matching = [x for x in settings["alpha_pattern"] if re.search(rf"(^|\.)({x})$", name.split("model.", 2)[2])]
        alpha = settings["alpha_pattern"][matching[0]] if matching else settings["lora_alpha"]
        a, b = stored[f"{name}.lora_A.weight"], stored[f"{name}.lora_B.weight"]
        found[name] = alpha / (len(a) ** 0.5 if settings.get("use_rslora") else len(a)) * b @ a
    return found


def test_adapters_come_back_as_they_went(model, tmp_path):
    config, params, adapted, start = model
    sl.save_lora(tmp_path / "a", adapted, start, base="somebody/llama")
    again, found = sl.load_lora(tmp_path / "a", config, params)
    assert again == dataclasses.replace(adapted, lora=dataclasses.replace(LORA, base="somebody/llama"))
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


@pytest.mark.parametrize("name", record_adapters.CASES)
def test_logits_are_those_of_peft(name):
    base, config, params = adapted_by(name)
    found, tokens = logits(config, params, recorded(base)["tokens"]), recorded(base)["tokens"]
    expected = np.load(record_adapters.ADAPTERS / f"{name}.npy")
    assert np.abs(found - expected).max() < F32
    plain, weights, _ = load(DATA / base, dtype="float32")
    assert np.abs(found - logits(plain, weights, tokens)).max() > 1


@pytest.mark.parametrize("name", record_adapters.CASES)
def test_what_came_in_goes_out(name, tmp_path):
    """The same tensors by name, and the same products; the base model's name; and the same model when read again."""
    base, config, params = adapted_by(name)
    sl.save_lora(tmp_path / "a", config, params)
    before, after = (products(folder) for folder in (record_adapters.ADAPTERS / name, tmp_path / "a"))
    assert before.keys() == after.keys()
    for module, product in before.items():
        np.testing.assert_allclose(after[module], product, rtol=0, atol=1e-6 * np.abs(product).max())
    settings = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == config.lora.base == f"somebody/{base}"
    plain, weights, _ = load(DATA / base, dtype="float32")
    again, same = sl.load_lora(tmp_path / "a", plain, weights)
    assert again == config
    for path, leaf in flatten(params).items():
        np.testing.assert_allclose(np.asarray(flatten(same)[path]), np.asarray(leaf), rtol=1e-6, err_msg=path)


def test_what_is_not_adapted_has_no_gradient():
    """Zeros in A and in B: training leaves them so, and the model stays one of these ranks and layers."""
    _, config, params = adapted_by("expression")
    tokens = np.arange(40).reshape(2, 20)

    def loss(values):
        return (model_of(config, values)(tokens) ** 2).mean()

    for path, gradient in flatten(jax.jit(jax.grad(loss))(params)).items():
        if is_adapter(path):
            zero = np.asarray(flatten(params)[path]) == 0
            assert (np.asarray(gradient)[zero] == 0).all() and np.asarray(gradient)[~zero].any(), path


def test_one_matrix_of_several_projections_after_training(tmp_path):
    """GPT-2's c_attn: A of query, key and value are apart, and the file's A holds all three of them."""
    _, config, params = adapted_by("gpt2")
    random = np.random.default_rng(3)
    flat = flatten(params) | {
        f"layers/attention/{name}/lora_a": np.asarray(flatten(params)[f"layers/attention/{name}/lora_a"])
        + random.normal(size=(3, 24, 3)).astype(np.float32) * np.array([1, 0, 1], np.float32)[:, None, None]
        for name in ("query", "value")
    }
    sl.save_lora(tmp_path / "a", config, unflatten(flat))
    stored = load_file(tmp_path / "a/adapter_model.safetensors")
    assert stored["base_model.model.transformer.h.2.attn.c_attn.lora_A.weight"].shape == (9, 24)
    plain, weights, _ = load(DATA / "gpt2", dtype="float32")
    again, same = sl.load_lora(tmp_path / "a", plain, weights)
    assert again == config
    for path, leaf in flat.items():
        np.testing.assert_allclose(np.asarray(flatten(same)[path]), np.asarray(leaf), rtol=1e-6, err_msg=path)


def test_every_field_that_peft_writes_is_known():
    known = {*adapter_config.HARMLESS, *adapter_config.NOTHING_AT, *adapter_config.READ}
    for name in record_adapters.CASES:
        told = json.loads((record_adapters.ADAPTERS / name / "adapter_config.json").read_text())
        assert set(told) <= known and len(told) == 41


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({"init_lora_weights": kind}, f"init_lora_weights='{kind}': {kind[:5]}.* do not fit the model as it is")
            for kind in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "PiSSA".lower())
        ),
        ({"init_lora_weights": "something"}, "init_lora_weights='something': legal are True, False, None, 'gaussian'"),
        ({"use_dora": True}, "use_dora=True: weights split into direction and magnitude, .* may be False"),
        (
            {"alora_invocation_tokens": [5, 6]},
            r"alora_invocation_tokens=\[5, 6\]: adapters that act from certain tokens",
        ),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=.*rows of the embedding that were trained"),
        ({"modules_to_save": ["lm_head"], "bias": "all"}, "(?s)bias='all'.*modules_to_save=.*were trained whole"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication=.*a model some of whose layers are repeated"),
        (
            {"lora_bias": True, "task_type": "SEQ_CLS"},
            "(?s)lora_bias=True.*task_type='SEQ_CLS': a head for another task",
        ),
        ({"use_hira": False}, "use_hira=False: shardlm does not know this field"),
        ({"peft_type": "IA3"}, "peft_type='IA3'; shardlm reads 'LORA'"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "it names model.embed_tokens; adapters here are on"),
        ({"target_modules": r".*"}, "it names model.embed_tokens, .* and more; adapters here are on"),
        ({"target_modules": ["c_attn"]}, "names none of the model's projections, which are q_proj, k_proj"),
        ({"target_modules": r"(q_proj"}, r"target_modules='\(q_proj': not a regular expression"),
        ({"target_modules": None}, "target_modules=None: it is a list of names, or one regular expression"),
        ({"target_modules": [3]}, r"target_modules=\[3\]: it is a list of names"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "layers_to_transform=.*goes with a list"),
        ({"layers_to_transform": "all"}, "layers_to_transform='all': it is the number of a layer"),
        ({"r": 0, "lora_alpha": float("nan")}, "(?s)r=0: it is a whole number from 1.*lora_alpha=nan: it is a number"),
        ({"lora_alpha": 10**400}, "lora_alpha=1.*: it is a number"),
        ({"lora_alpha": 5e-324}, "lora_alpha=5e-324: it is a number"),
        ({"target_modules": "([a-z._0-9]+)+X"}, "target_modules=.*: a repeated group"),
        ({"rank_pattern": {"([a-z._0-9]+)+X": 2}}, r"rank_pattern\[.*\]: a repeated group"),
        ({"r": "3", "lora_alpha": True}, "(?s)r='3': it is a whole number.*lora_alpha=True: it is a number"),
        (
            {"rank_pattern": {"q_proj": 2.5, "(": 1}},
            r"(?s)rank_pattern\['q_proj'\]=2.5: it is.*not a regular expression",
        ),
        ({"alpha_pattern": [1]}, r"alpha_pattern=\[1\]: it is an object"),
        ({"use_rslora": "yes"}, "use_rslora='yes': it is true or false"),
        ({"r": 4}, r"lora_A.weight is \[3, 48\], not \[4, 48\].* and \d+ more"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "down_proj.lora_A.weight is of no projection"),
        ({"target_modules": "all-linear"}, "k_proj.lora_A.weight is missing, of shape"),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj.lora_A.weight is \[3, 48\], not \[2, 48\]"),
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


def test_an_unknown_field_is_ignored_where_the_user_says_so(model, tmp_path):
    config, params, adapted, start = model
    sl.save_lora(tmp_path / "a", adapted, start)
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "red", "use_dora": True}))
    with pytest.raises(ValueError, match=r"use_dora=True") as caught:
        sl.load_lora(tmp_path / "a", config, params, ignore_fields=("colour",))
    assert "colour" not in str(caught.value)
    with pytest.raises(ValueError, match="ignore_fields has use_dora, which .* only unknown fields can be ignored"):
        sl.load_lora(tmp_path / "a", config, params, ignore_fields=("colour", "use_dora"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.astype(np.int32), "is int32, and weights are float32, float16 or bfloat16"),
        (lambda x: x[:-1], r"is \[\d+, 3\], not \[\d+, 3\]"),
        (lambda x: np.where(x == x.max(), np.nan, x), "has 1 values that are not finite"),
    ],
)
def test_tensors_that_are_no_weights_are_named(model, tmp_path, change, message):
    config, params, adapted, start = model
    sl.save_lora(tmp_path / "a", adapted, start)
    path, name = tmp_path / "a/adapter_model.safetensors", "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    tensors = load_file(path)
    save_file(tensors | {name: np.ascontiguousarray(change(tensors[name]))}, path)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        sl.load_lora(tmp_path / "a", config, params)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="is damaged or cut short"):
        sl.load_lora(tmp_path / "a", config, params)
    path.rename(tmp_path / "a/adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors, but adapter_model.bin, a pickle"):
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
    with pytest.raises(ValueError, match=r"attention/query/lora_a is missing"):
        sl.save_lora(tmp_path / "a", adapted, params)
    with pytest.raises(ValueError, match="this model has adapters: merge them first"):
        sl.save_hf(tmp_path / "b", adapted, start)
    bad = flatten(start) | {"layers/mlp/down/lora_b": np.full((3, 3, 24), np.inf, np.float32)}
    with pytest.raises(ValueError, match="mlp/down/lora_b has 216 values that are not finite"):
        sl.save_lora(tmp_path / "c", adapted, unflatten(bad))
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


if INSTALLED and importlib.util.find_spec("peft"):

    @pytest.mark.parametrize("name", record_adapters.CASES)
    def test_fresh_adapters_of_peft_have_our_logits_and_peft_reads_what_we_write(name, tmp_path):
        record_adapters.make(name, tmp_path / "a", seed=5)
        base = record_adapters.CASES[name][0]
        config, params, _ = load(DATA / base, dtype="float32")
        config, params = sl.load_lora(tmp_path / "a", config, params)
        tokens = recorded(base)["tokens"]
        ours = logits(config, params, tokens)
        sl.save_lora(tmp_path / "b", config, params)
        for folder in (tmp_path / "a", tmp_path / "b"):
            assert np.abs(ours - record_adapters.logits(base, folder, tokens)).max() < F32
