"""A folder is read onto any layout, with no more on the host than a part, or the error names what is wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import shardlm as sl
from shardlm.hub.files import Tensors
from shardlm.train.engine import flatten
from tests.hub.cases import DATA, load

ROOT = Path(__file__).parents[2]
BF16 = np.dtype(jnp.bfloat16)


def copy(name: str, folder: Path) -> Path:
    shutil.copytree(DATA / name, folder)
    return folder


def rewrite(folder: Path, change) -> Path:
    """The folder with `change` made to its dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


# GPT-2 has fused tensors, Qwen 2 biases and a head of its own.
@pytest.mark.parametrize("layout", ["data=2,fsdp=2,tensor=2", "tensor=4", "fsdp=8", "fsdp=4,zero=1", "fsdp=3,tensor=2"])
@pytest.mark.parametrize("name", ["gpt2", "qwen2_windows"])
def test_each_device_holds_the_part_that_the_plan_gives_it(name, layout):
    layout = sl.Layout.parse(layout)
    devices = jax.devices()[: layout.num_devices]
    config, params, tokenizer = load(DATA / name, layout, devices=devices)
    _, whole, _ = load(DATA / name)
    trainer = sl.Trainer(config, layout, devices=devices)
    assert tokenizer is None
    expected = flatten(trainer.abstract_state.params)
    assert {path: (x.shape, x.dtype, x.sharding) for path, x in flatten(params).items()} == {
        path: (x.shape, x.dtype, x.sharding) for path, x in expected.items()
    }
    for path, leaf in flatten(whole).items():
        np.testing.assert_array_equal(np.asarray(flatten(params)[path]), np.asarray(leaf), err_msg=path)


def test_padding_of_the_vocabulary_grows_with_the_layout_and_is_zero():
    layout = sl.Layout(tensor=4)
    config, params, _ = load(DATA / "llama3", layout, devices=jax.devices()[:4])
    assert config.padded_vocab_size % 4 == 0 and config.vocab_size == 67
    table, stored = np.asarray(params["head"]["table"]), load_file(DATA / "llama3/model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(table[:67], stored)
    assert not table[67:].any()


def test_the_dtype_is_that_of_the_files_unless_another_is_asked_for():
    config, params, _ = load(DATA / "llama_tied")
    assert (config.dtype, config.param_dtype) == ("float16", "float16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float16)}
    config, wide, _ = load(DATA / "llama_tied", dtype="float32")
    assert (config.dtype, config.param_dtype) == ("float32", "float32")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b)), params, wide)
    _, narrow, _ = load(DATA / "llama3", dtype="bfloat16")
    stored = load_file(DATA / "llama3/model.safetensors")["model.norm.weight"]
    np.testing.assert_array_equal(np.asarray(narrow["final_norm"]["scale"]), stored.astype(BF16))


def test_parameters_can_be_given_away_by_a_step():
    """They are copies: what a step writes in their place is in nobody else's way."""
    before, params = (load(DATA / "llama3", sl.Layout(data=2), devices=jax.devices()[:2])[1] for _ in range(2))
    after = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    for was, now in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        for shard in now.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(was) + 1)


def test_files_with_an_index_are_read_as_one(tmp_path):
    folder = copy("llama3", tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    split = {"model-1.safetensors": names[:11], "model-2.safetensors": names[11:]}
    for file, held in split.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, held in split.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _, params, _ = load(folder)
    _, expected, _ = load(DATA / "llama3")
    jax.tree.map(np.testing.assert_array_equal, params, expected)

    moved = index["weight_map"] | {names[0]: "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(ValueError, match=rf"model-1.safetensors and .*index.json disagree on 1 tensors: {names[0]}"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index.json has no weight_map"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-2.safetensors is missing, which .* names"):
        load(folder)


def test_names_and_buffers_of_older_files_are_known(tmp_path):
    """Those of the released GPT-2, saved without the head, with a mask in each layer; and of the first Llamas."""

    def old_gpt2(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors |= {f"h.{i}.attn.bias": np.ones((1, 1, 128, 128), BF16) for i in range(3)}

    def old_llama(tensors):
        tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(3)}

    for name, change in (("gpt2", old_gpt2), ("llama2", old_llama)):
        _, params, _ = load(rewrite(copy(name, tmp_path / name), change))
        jax.tree.map(np.testing.assert_array_equal, params, load(DATA / name)[1])


def test_the_head_of_a_tied_model_may_be_there_if_it_is_the_table(tmp_path):
    folder = copy("gemma", tmp_path / "a")
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}))
    jax.tree.map(np.testing.assert_array_equal, load(folder)[1], load(DATA / "gemma")[1])

    def other(tensors):
        tensors["lm_head.weight"][3, 5] += 1

    rewrite(folder, other)
    with pytest.raises(ValueError, match=r"lm_head.weight is not model.embed_tokens.weight, though config.json says"):
        load(folder)


def test_all_tensors_that_do_not_fit_are_listed_at_once(tmp_path):
    def change(tensors):
        del tensors["model.layers.1.self_attn.q_proj.weight"]
        tensors["model.norm.weight"] = np.ones(23, np.float32)
        tensors["model.layers.0.block_sparse_moe.gate.weight"] = np.ones((2, 3), np.float32)

    with pytest.raises(ValueError) as error:
        load(rewrite(copy("llama3", tmp_path / "a"), change))
    for message in (
        "are not those of the llama that its config.json says:",
        "model.layers.1.self_attn.q_proj.weight is missing, of shape [32, 24]",
        "model.norm.weight has the shape [23]; config.json says [24]",
        "model.layers.0.block_sparse_moe.gate.weight, of shape [2, 3], belongs to no parameter of this model",
    ):
        assert message in str(error.value)


def test_a_message_shows_a_dozen_problems_and_counts_the_rest(tmp_path):
    folder = copy("llama3", tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(ValueError, match=r"model.layers.3.input_layernorm.weight is missing(?s:.*)- and 6 more"):
        load(folder)


def test_a_damaged_file_is_named(tmp_path):
    folder = copy("llama3", tmp_path / "a")
    content = (folder / "model.safetensors").read_bytes()
    for cut in (len(content) - 1, 100, 4, 0):
        (folder / "model.safetensors").write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"model.safetensors is damaged or cut short: .*\. Fetch it again"):
            load(folder)


def test_what_is_no_folder_of_a_model_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder at .*/meta-llama/Llama-3.2-1B: shardlm downloads nothing"):
        load("meta-llama/Llama-3.2-1B")
    (tmp_path / "notes.txt").write_text("?")
    with pytest.raises(ValueError, match=r"is no folder of a Hugging Face model: it has no config.json, but notes.txt"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json holds list, not an object"):
        load(tmp_path)
    shutil.copy(DATA / "llama3/config.json", tmp_path)
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor .*, but no weights at all"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("?")
    with pytest.raises(ValueError, match=r"but pytorch_model.bin; load them with transformers once, and save"):
        load(tmp_path)


def test_dtypes_that_cannot_be_kept_are_refused(tmp_path):
    mixed = copy("llama3", tmp_path / "a")
    rewrite(mixed, lambda tensors: tensors.update({"model.norm.weight": np.ones(24, BF16)}))
    with pytest.raises(ValueError, match=r"several dtypes \((29 of float32, 1 of bfloat16|1 of .*)\): say with dtype"):
        load(mixed)
    assert load(mixed, dtype="bfloat16")[0].param_dtype == "bfloat16"

    eight = copy("llama3", tmp_path / "b")
    rewrite(eight, lambda tensors: tensors.update({"model.norm.weight": np.ones(24, np.int8)}))
    with pytest.raises(ValueError, match=r"tensors of dtype I8 \(such as model.norm.weight\); .* no quantised weights"):
        load(eight)

    large = copy("llama3", tmp_path / "c")
    rewrite(large, lambda tensors: tensors.update({"model.norm.weight": np.full(24, 1e5, np.float32)}))
    with pytest.raises(ValueError, match=r"model.norm.weight has values beyond the 65504 of float16"):
        load(large, dtype="float16")
    with pytest.raises(ValueError, match=r"param_dtype='int8'; it is one of"):
        load(DATA / "llama3", dtype="int8")
    with pytest.raises(ValueError, match=r"JAX computes in float64 only after"):
        load(DATA / "llama3", dtype="float64")


def test_stages_of_a_pipeline_are_refused_for_now():
    with pytest.raises(ValueError, match=r"pipe=3: Hugging Face folders are read and written on layouts without pipe"):
        load(DATA / "llama3", sl.Layout(pipe=3), devices=jax.devices()[:3])


def test_no_more_is_read_than_the_parts_that_devices_hold(monkeypatch):
    """Of a matrix that four devices split each reads its quarter; one that all hold is read once."""
    read = []
    original = Tensors.reader

    def counted(self, name):
        reader = original(self, name)
        return lambda slices: read.append((name, reader(slices).size)) or reader(slices)

    monkeypatch.setattr(Tensors, "reader", counted)
    load(DATA / "llama3", sl.Layout(tensor=4), devices=jax.devices()[:4])
    query, norm = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
    assert [size for name, size in read if name == query] == [32 * 24 // 4] * 4
    assert [size for name, size in read if name == norm] == [24]
    assert sum(size for name, size in read if name == "lm_head.weight") == 67 * 24  # the padding is nowhere


# A model of 105 MB in two files; peaks of the memory that is no file's, beyond what was taken before.
MEMORY = """
import json, sys, threading, time
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
import shardlm as sl
from shardlm.models.transformer import parameter_dims

folder = sys.argv[1]
config = sl.TransformerConfig(vocab_size=8000, num_layers=12, d_model=512, num_heads=8, d_ff=1024, tied=True)

def anonymous():
    return 1024 * int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0])

def peak_of(function):
    peak, done = [0], threading.Event()
    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.0005)
    watcher = threading.Thread(target=watch)
    before = anonymous()
    watcher.start()
    result = function()
    done.set()
    watcher.join()
    return result, peak[0] - before

jax.block_until_ready(jax.numpy.ones(8) + 1)
params = jax.tree.map(lambda x: np.full(x.shape, 0.5, x.dtype), parameter_dims(config)[1])
_, saving = peak_of(lambda: sl.save_hf(folder, config, params, max_shard_size="60MB", verbose=False))
del params
(config, params, _), loading = peak_of(lambda: sl.load_hf(folder, sl.Layout(fsdp=8), verbose=False))
leaves = jax.tree.leaves(params)
held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
print(json.dumps({"saving": saving, "loading": loading, "held": held, "largest": max(leaf.nbytes for leaf in leaves)}))
"""


def test_the_host_holds_a_part_at_a_time(tmp_path):
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "model")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["held"] > 4 * found["largest"]  # else a second copy of all would not be seen
    assert found["loading"] - found["held"] < 2 * found["largest"]
    assert found["saving"] < found["largest"]
