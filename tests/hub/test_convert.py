"""`python -m shardlm convert`: folders and checkpoints become folders."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import shardlm as sl
from shardlm.__main__ import main
from tests.hub.cases import DATA, load
from tests.hub.test_save import assert_same_files, stored


@pytest.fixture
def run(capsys):
    def call(*arguments) -> tuple[int, str, str]:
        status = main(["convert", *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


def test_a_folder_is_cast_and_cut_and_keeps_what_is_said_of_it(run, tmp_path):
    shutil.copytree(DATA / "llama3", tmp_path / "a")
    for name, content in {"tokenizer.json": '{"x": 1}', "generation_config.json": "{}", "vocab.json": "?"}.items():
        (tmp_path / "a" / name).write_text(content)
    status, output, _ = run(tmp_path / "a", tmp_path / "b", "--dtype", "bf16", "--max-shard-size", "20KB")
    assert status == 0
    assert output == f"30 tensors of a llama in bfloat16 from {tmp_path / 'a'} to {tmp_path / 'b'}\n"
    before, after = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert before.keys() == after.keys()
    assert all((after[name] == x.astype(jnp.bfloat16)).all() for name, x in before.items())
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == 2
    assert (tmp_path / "b/tokenizer.json").read_text() == '{"x": 1}' and (tmp_path / "b/vocab.json").is_file()
    old, new = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert new == old | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}


def test_a_checkpoint_becomes_a_folder(run, tmp_path):
    layout = sl.Layout.parse("data=2,fsdp=2,tensor=2")
    config, params, _ = load(DATA / "gemma2", layout)
    state = {"params": params, "opt_state": {"mu": params}, "step": jnp.int32(3)}
    sl.save(tmp_path / "runs/3", state, {"config": config.to_dict()})
    status, output, _ = run(tmp_path / "runs/3", tmp_path / "a")
    assert status == 0 and "parameters in bfloat16 from" in output
    assert_same_files(tmp_path / "a", DATA / "gemma2")
    assert json.loads((tmp_path / "a/config.json").read_text())["model_type"] == "gemma2"
    assert run(tmp_path / "runs/3", tmp_path / "b", "--dtype", "f32")[0] == 0
    assert {x.dtype for x in stored(tmp_path / "b").values()} == {np.dtype("float32")}
    assert load(tmp_path / "b")[0].param_dtype == "float32"

    status, output, _ = run(tmp_path / "runs", tmp_path / "c")  # a run's folder is its newest checkpoint
    assert status == 0 and output.endswith(", without a tokenizer, as the model's is not known\n")
    assert_same_files(tmp_path / "c", DATA / "gemma2")
    (tmp_path / "none").mkdir()
    status, _, errors = run(tmp_path / "none", tmp_path / "d")
    assert status == 2 and "it has no config.json" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{data}/llama3", "{tmp}/a", "--dtype", "f8"), "--dtype f8; it is one of bf16, f16"),
        (("{data}/llama3", "{tmp}/a", "--max-shard-size", "many"), "max_shard_size='many'; it is a number"),
        (("{data}/llama3", "{data}/gpt2"), "gpt2 holds a model already: choose another path, or pass overwrite=True"),
        (("{data}/llama3", "{data}/llama3", "--overwrite"), "llama3 is what is read: give another folder"),
        (("{tmp}/nothing", "{tmp}/a"), "no checkpoint at {tmp}/nothing: it does not exist"),
        (("{tmp}", "{tmp}/a"), "it has no config.json"),
    ],
)
def test_a_mistake_is_one_error_and_status_2(run, tmp_path, arguments, message):
    places = {"data": DATA, "tmp": tmp_path}
    status, output, errors = run(*(argument.format(**places) for argument in arguments))
    assert (status, output) == (2, "")
    assert message.format(**places) in errors and errors.count("\n") == 1


def test_values_that_float16_cannot_hold_and_a_checkpoint_of_something_else_are_refused(run, tmp_path):
    shutil.copytree(DATA / "llama3", tmp_path / "a")
    tensors = load_file(tmp_path / "a/model.safetensors")
    tensors["model.norm.weight"][:] = 1e5
    save_file(tensors, tmp_path / "a/model.safetensors")
    status, _, errors = run(tmp_path / "a", tmp_path / "b", "--dtype", "f16")
    assert status == 2 and "model.norm.weight has values beyond the 65504 of float16" in errors
    assert not (tmp_path / "b").exists()
    sl.save(tmp_path / "c", {"x": jnp.ones(3)})
    status, _, errors = run(tmp_path / "c", tmp_path / "d")
    assert status == 2 and "does not say what its model is" in errors
