"""Every family's logits are those of transformers: plain and on layouts, of whole rows and of packed ones.

What transformers computes is recorded, as record.py describes; where it is installed, test_transformers.py asks again.
"""

import dataclasses

import jax
import numpy as np
import pytest

import shardlm as sl
from shardlm.train import engine
from tests.hub.cases import CASES, DATA, load, logits, packed_rows, recorded

F32, F64 = 2e-5, 1e-9
EACH_FAMILY = ("llama3", "mistral", "qwen2_windows", "qwen3", "gemma", "gemma2", "gemma3", "gpt2")
LAYOUTS = ("data=2,fsdp=2,tensor=2", "tensor=4", "fsdp=8,zero=3")


def both(recording) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, segments and positions of the rows whole, then packed."""
    tokens, (segments, positions) = recording["tokens"], packed_rows()
    whole = np.ones_like(segments), np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    return np.tile(tokens, (2, 1)), np.concatenate([whole[0], segments]), np.concatenate([whole[1], positions])


def apart(found: np.ndarray, recording) -> tuple[float, float]:
    """How far logits of `both` are from the recording, at the worst, whole and packed."""
    real = packed_rows()[0] > 0
    return (
        float(np.abs(found[:2] - recording["logits64"]).max()),
        float(np.abs(found[2:4] - recording["packed64"])[real].max()),
    )


@pytest.mark.parametrize("name", CASES)
def test_float64_logits_are_those_of_transformers_whole_and_packed(name, x64):
    config, params, _ = load(DATA / name, dtype="float64")
    found = logits(config, params, *both(recorded(name)))
    assert max(apart(found, recorded(name))) < F64


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_float32_logits_are_those_of_transformers(name):
    config, params, _ = load(DATA / name, dtype="float32")
    tokens = recorded(name)["tokens"]
    assert np.abs(logits(config, params, tokens) - recorded(name)["logits32"]).max() < F32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", EACH_FAMILY)
def test_layouts_compute_the_same_from_the_parts_that_each_device_read(name, layout, x64):
    layout = sl.Layout.parse(layout)
    devices = jax.devices()[: layout.num_devices]
    config, params, _ = load(DATA / name, layout, "float64", devices)
    trainer = sl.Trainer(config, layout, devices=devices)
    tokens, segments, positions = (np.tile(x, (2, 1)).astype(np.int32) for x in both(recorded(name)))
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "segments": segments, "positions": positions}
    compute = jax.jit(lambda *inputs: engine.forward(trainer.plan, "manual")(*inputs)["logits"])
    found = compute(params, trainer.place(batch), jax.random.key(0), np.int32(config.num_layers))
    found = np.asarray(found)[..., : config.vocab_size]
    assert max(apart(found, recorded(name))) < F64


def without(config: sl.TransformerConfig, **changes) -> sl.TransformerConfig:
    """The configuration with fields of it, or of its attention, changed."""
    attention = {key: changes.pop(key) for key in list(changes) if hasattr(config.attention, key)}
    return dataclasses.replace(config, **changes, attention=dataclasses.replace(config.attention, **attention))


# For most cases something of its config.json that, read wrongly, must show.
CONTROLS = {
    "llama3": {"positions": sl.Rope(theta=100.0)},
    "llama_linear": {"positions": sl.Rope(theta=10_000.0)},
    "mistral": {"windows": (6,)},
    "qwen2": {"positions": sl.Rope(theta=10_000.0)},
    "qwen2_windows": {"windows": (5, None, 5)},
    "qwen3": {"norm": sl.Norm(epsilon=1e-6)},
    "gemma": {"embedding_scale": 24**0.5 * (1 + 2**-9)},  # as bfloat16 may round it
    "gemma2": {"soft_cap": None},
    "gemma3": {"local_positions": None},
    "gpt2": {"mlp": sl.MLP(gated=False, activation="gelu", bias=True)},
}


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("llama2", "llama_tied")])
def test_one_setting_read_wrongly_is_seen(name, x64):
    config, params, _ = load(DATA / name, dtype="float64")
    found = logits(without(config, **CONTROLS[name]), params, *both(recorded(name)))
    assert min(apart(found, recorded(name))) > 10 * F64
    assert max(apart(found, recorded(name))) > F32
