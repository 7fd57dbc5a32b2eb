"""Every preset has the released model's parameters, and what no count shows: positions, windows, caps, epsilons."""

import inspect
import json
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from shardlm.models import presets
from shardlm.models.config import Attention, LearnedPositions, Norm, Rope, TransformerConfig
from shardlm.models.transformer import Transformer, count_parameters

# Counts of the released checkpoints: `safetensors.total` on the Hub, and KerasHub's presets for GPT-2 and Gemma. Three
# are not what the Hub shows: Llama 2's files also hold RoPE frequencies, 64 numbers a layer; those of Qwen 3 0.6B hold
# the tied table twice; those of Gemma 3 4B also hold the image encoder.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "mistral_7b": 7_241_732_096,
    "qwen2_0_5b": 494_032_768,
    "qwen2_1_5b": 1_543_714_304,
    "qwen2_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "gemma_2b": 2_506_172_416,
    "gemma_7b": 8_537_680_896,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 3_880_263_168,
}

# Non-embedding parameters in the papers: arXiv:2403.08295 and arXiv:2408.00118, Table 2 of each.
PUBLISHED_WITHOUT_EMBEDDING = {
    "gemma_2b": 1_981_884_416,
    "gemma_7b": 7_751_248_896,
    "gemma2_2b": 2_024_517_888,
    "gemma2_9b": 8_324_201_984,
}

ROPE_THETA = {"llama2": 1e4, "llama3": 5e5, "mistral": 1e4, "qwen2": 1e6, "qwen3": 1e6, "gemma": 1e4, "gemma2": 1e4}
EPSILON = {"gpt2": 1e-5, "llama2": 1e-5, "llama3": 1e-5, "mistral": 1e-5}  # 1e-6 elsewhere

RELEASED = sorted(PUBLISHED)


def family(name: str) -> str:
    return name.split("_")[0]


def by_hand(c: TransformerConfig) -> int:
    """The parameters of a decoder, added up from its sizes."""
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    attention = c.d_model * (queries + 2 * keys) + queries * c.d_model
    attention += (queries + 2 * keys) * c.attention.bias + c.d_model * c.attention.output_bias
    attention += 2 * c.head_dim * c.attention.qk_norm
    mlp = (3 if c.mlp.gated else 2) * c.d_model * c.d_ff + (c.d_ff + c.d_model) * c.mlp.bias
    norm = c.d_model * (2 if c.norm.kind == "layer" else 1)
    layer = attention + mlp + norm * (4 if c.norm.after else 2)
    positions = c.positions.length if isinstance(c.positions, LearnedPositions) else 0
    tables = c.vocab_size * (1 if c.tied else 2) + positions
    return tables * c.d_model + c.num_layers * layer + norm


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_are_those_of_the_released_model(name):
    config = presets.get(name)
    assert count_parameters(config) == by_hand(config) == PUBLISHED[name]


@pytest.mark.parametrize("name", sorted(PUBLISHED_WITHOUT_EMBEDDING))
def test_parameters_outside_the_table_are_those_of_the_paper(name):
    config = presets.get(name)
    assert count_parameters(config) - config.vocab_size * config.d_model == PUBLISHED_WITHOUT_EMBEDDING[name]


def test_the_count_sees_a_missing_bias_a_missing_norm_and_an_untied_head():
    missing = PUBLISHED["qwen2_7b"] - count_parameters(presets.qwen2_7b(attention=Attention()))
    assert missing == 28 * (28 + 2 * 4) * 128
    missing = PUBLISHED["qwen3_8b"] - count_parameters(presets.qwen3_8b(attention=Attention()))
    assert missing == 36 * 2 * 128
    missing = PUBLISHED["gemma2_9b"] - count_parameters(presets.gemma2_9b(norm=Norm(one_plus_scale=True)))
    assert missing == 42 * 2 * 3584
    assert count_parameters(presets.llama3_2_1b(tied=False)) - PUBLISHED["llama3_2_1b"] == 128_256 * 2048


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_traces_at_full_size_and_survives_json(name):
    config = presets.get(name)

    def forward(tokens: jax.Array) -> jax.Array:
        return Transformer(config, rngs=nnx.Rngs(0))(tokens)

    logits = jax.eval_shape(forward, jax.ShapeDtypeStruct((2, 5), jnp.int32))  # nothing is allocated
    assert (logits.shape, logits.dtype) == ((2, 5, config.vocab_size), jnp.float32)
    assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_compute_in_bfloat16_and_store_float32(name):
    config = presets.get(name)
    assert (config.dtype, config.param_dtype, config.dropout) == ("bfloat16", "float32", 0.0)


@pytest.mark.parametrize("name", RELEASED)
def test_norms_and_positions_are_their_familys(name):
    config = presets.get(name)
    assert config.norm.kind == ("layer" if family(name) == "gpt2" else "rms")
    assert config.norm.epsilon == EPSILON.get(family(name), 1e-6)
    if family(name) == "gpt2":
        assert config.positions == LearnedPositions(length=1024)
    elif family(name) != "gemma3":
        assert config.positions.theta == ROPE_THETA[family(name)]
        assert config.local_positions is None


def test_llama_3_scales_rope_from_3_1_on():
    assert presets.llama3_8b().positions.scaling is None
    assert presets.llama3_70b().positions.scaling is None
    for config, factor in [(presets.llama3_1_8b(), 8), (presets.llama3_2_1b(), 32), (presets.llama3_2_3b(), 32)]:
        s = config.positions.scaling
        values = (s.factor, s.low_frequency_factor, s.high_frequency_factor, s.original_length)
        assert values == (factor, 1, 4, 8192)


def test_mistral_has_its_window_in_every_layer():
    assert presets.mistral_7b().windows == (4096,) * 32


@pytest.mark.parametrize("name", [name for name in RELEASED if family(name).startswith("gemma")])
def test_gemmas_scale_embeddings_shift_norms_and_tie_the_head(name):
    config = presets.get(name)
    assert config.embedding_scale == pytest.approx(config.d_model**0.5)
    assert config.norm.one_plus_scale and config.tied
    assert config.norm.after == (family(name) != "gemma")
    assert (config.mlp.gated, config.mlp.activation, config.head_dim) == (True, "gelu_tanh", 256)


@pytest.mark.parametrize("name", ["gemma2_2b", "gemma2_9b"])
def test_gemma_2_alternates_windows_from_a_local_layer_and_caps_scores_and_logits(name):
    config = presets.get(name)
    assert config.windows == (4096, None) * (config.num_layers // 2)
    assert (config.attention.soft_cap, config.logit_soft_cap, config.attention.scale) == (50.0, 30.0, 1 / 16)


@pytest.mark.parametrize(("name", "window", "factor"), [("gemma3_1b", 512, None), ("gemma3_4b", 1024, 8.0)])
def test_gemma_3_has_five_local_layers_to_a_global_one_each_with_its_rope(name, window, factor):
    config = presets.get(name)
    everything = [layer for layer, w in enumerate(config.windows) if w is None]
    assert everything == list(range(5, config.num_layers, 6))
    assert set(config.windows) == {window, None}
    assert (config.attention.qk_norm, config.attention.soft_cap, config.attention.scale) == (True, None, 1 / 16)
    assert config.logit_soft_cap is None
    assert config.local_positions == Rope(theta=1e4)
    assert config.positions.theta == 1e6
    assert getattr(config.positions.scaling, "factor", None) == factor


def test_tiny_runs_and_starts_near_the_uniform_distribution():
    config = presets.tiny()
    assert (config.vocab_size, config.dtype, config.param_dtype) == (257, "float32", "float32")
    assert count_parameters(config) == by_hand(config) == 853_376
    tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, 257)
    logits = Transformer(config, rngs=nnx.Rngs(0))(tokens)
    assert (logits.shape, logits.dtype) == ((2, 16, 257), jnp.float32)
    # The last norm gives vectors of mean square 1, the head's weights have std 0.06: logits have 0.06 sqrt(128) = 0.68.
    assert 0.5 < float(logits.std()) < 0.9


def test_changes_replace_fields_before_defaults_are_filled():
    assert presets.llama3_8b(num_layers=3) != presets.llama3_8b()
    assert presets.llama3_8b(num_layers=3).num_layers == 3
    assert presets.llama3_8b(d_model=1024).head_dim == 32
    assert presets.gpt2(d_model=48).d_ff == 192
    assert presets.gemma_2b(d_model=64).embedding_scale == 8.0
    assert presets.gemma_2b(d_model=64, embedding_scale=None).embedding_scale is None
    assert presets.mistral_7b(attention=Attention()).windows == (None,) * 32
    assert presets.tiny(dtype="bfloat16").dtype == "bfloat16"
    assert presets.get("gemma3_1b", num_layers=7) == presets.gemma3_1b(num_layers=7)


def test_a_change_that_does_not_fit_is_the_configurations_error():
    with pytest.raises(ValueError, match=r"num_kv_heads=8 does not divide num_heads=12: use \[1, 2, 3, 4, 6, 12\]"):
        presets.llama3_8b(num_heads=12, head_dim=64)
    with pytest.raises(TypeError, match="layers"):
        presets.tiny(layers=2)


def test_names_are_the_public_functions():
    functions = inspect.getmembers(presets, inspect.isfunction)
    public = {name for name, f in functions if f.__module__ == presets.__name__ and not name.startswith("_")}
    assert set(presets.names()) == public - {"names", "get"} == set(PUBLISHED) | {"tiny"}
    assert len(presets.names()) == len(set(presets.names()))
    for name in presets.names():
        assert presets.get(name) == getattr(presets, name)()


@pytest.mark.parametrize(
    ("name", "meant"), [("llama-3-8b", "llama3_8b"), ("Llama3.2-1B", "llama3_2_1b"), ("mistral7b", "mistral_7b")]
)
def test_an_unknown_name_is_answered_with_the_nearest_and_all(name, meant):
    every = ", ".join(presets.names())
    expected = f"no preset is called {name!r}: did you mean {meant!r}? The presets are {every}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        presets.get(name)


def test_a_name_like_no_other_gets_no_guess():
    with pytest.raises(ValueError, match=r"no preset is called 'zzz'\. The presets are tiny, gpt2, "):
        presets.get("zzz")
