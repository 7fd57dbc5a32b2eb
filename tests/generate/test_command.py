"""`python -m shardlm generate` continues text with the model of a checkpoint folder."""

import jax
import numpy as np
import pytest

import shardlm as sl
from shardlm.__main__ import main
from shardlm.data import ByteTokenizer

CONFIG = sl.presets.tiny(num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24, init_std=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's checkpoints, as `fit` leaves them."""
    path = tmp_path_factory.mktemp("run")
    trainer = sl.Trainer(CONFIG, None, sl.adamw(1e-3, steps=10), devices=jax.devices()[:1])
    sl.save(path / "7", trainer.init(), {"config": CONFIG.to_dict()})
    return path


def text_of(folder, prompt, **options):
    trainer = sl.Trainer(CONFIG, None, sl.adamw(1e-3, steps=10), devices=jax.devices()[:1])
    ids = np.concatenate([[256], ByteTokenizer().encode(prompt)])
    params = sl.restore(folder / "7", trainer).params
    return sl.generate(CONFIG, params, [ids], tokenizer=ByteTokenizer(), max_new_tokens=9, **options).texts[0]


def test_one_prompt_is_shown_as_it_is_made(folder, capsys):
    words = ["--max-new-tokens", "9", "--temperature", "1.0", "--top-k", "50", "--seed", "3"]
    assert main(["generate", "--model", str(folder), "--prompt", "ab", *words]) == 0
    out, error = capsys.readouterr()
    assert out == "ab" + text_of(folder, "ab", temperature=1.0, top_k=50, seeds=3)
    assert "tokens; the first after" in error


def test_several_prompts_on_a_layout(folder, capsys):
    words = ["--layout", "fsdp=2,tensor=-1", "--max-new-tokens", "9", "--temperature", "0"]
    assert main(["generate", "--model", str(folder / "7"), "--prompt", "ab", "--prompt", "c", *words]) == 2
    assert "num_heads=2 is not a positive multiple of tensor=4" in capsys.readouterr().err
    words[1] = "fsdp=4,tensor=2"
    assert main(["generate", "--model", str(folder / "7"), "--prompt", "ab", "--prompt", "c", *words]) == 0
    out, error = capsys.readouterr()
    assert out == "".join(f"{p}{text_of(folder, p)}\n{'-' * 80}\n" for p in ("ab", "c"))
    assert "2 completions" in error


def test_a_folder_without_a_model_is_an_error(folder, tmp_path, capsys):
    assert main(["generate", "--model", str(tmp_path), "--prompt", "a"]) == 2
    assert "holds no model: no config.json of Hugging Face, and no checkpoint" in capsys.readouterr().err
    state = sl.Trainer(CONFIG, devices=jax.devices()[:1]).init()
    sl.save(tmp_path / "1", state)
    assert main(["generate", "--model", str(tmp_path), "--prompt", "a"]) == 2
    assert "does not say what its model is" in capsys.readouterr().err
