"""config.json says all that a configuration is, in old and new spellings, or the error names what it says besides."""

import dataclasses
import json

import pytest

import shardlm as sl
from shardlm.hub import registry
from shardlm.hub.family import canonical
from tests.hub.cases import CASES, DATA


def values_of(name: str) -> dict:
    return json.loads((DATA / name / "config.json").read_text())


def read(values: dict) -> sl.TransformerConfig:
    return registry.family_of_file(values, "config.json").config(values, "config.json")


SIZES = {"vocab_size": 67, "num_layers": 3, "d_model": 24, "num_heads": 4, "d_ff": 40}
GEMMA = {
    "mlp": sl.MLP(activation="gelu_tanh"),
    "embedding_scale": 24**0.5,
    "tied": True,
    "head_dim": 8,
    "norm": sl.Norm(epsilon=1e-6, one_plus_scale=True, after=True),
    "num_kv_heads": 2,
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "llama_tied",
            sl.TransformerConfig(
                **SIZES,
                num_kv_heads=1,
                head_dim=8,
                norm=sl.Norm(epsilon=1e-5),
                tied=True,
                positions=sl.Rope(theta=1000.0, scaling=sl.Llama3Scaling(factor=8.0, original_length=32)),
            ),
        ),
        (
            "qwen2_windows",
            sl.TransformerConfig(
                **SIZES,
                num_kv_heads=2,
                norm=sl.Norm(epsilon=1e-5),
                attention=sl.Attention(bias=True, windows=(None, 5, 5)),
            ),
        ),
        (
            "gemma2",
            sl.TransformerConfig(
                **SIZES,
                **GEMMA,
                attention=sl.Attention(scale=20**-0.5, soft_cap=1.5, windows=(5, None)),
                logit_soft_cap=2.5,
            ),
        ),
        (
            "gemma3",
            sl.TransformerConfig(
                **SIZES | {"num_layers": 7},
                **GEMMA,
                attention=sl.Attention(qk_norm=True, scale=20**-0.5, windows=(5, 5, 5, 5, 5, None)),
                positions=sl.Rope(theta=1e6, scaling=sl.LinearScaling(factor=8.0)),
                local_positions=sl.Rope(theta=1e4),
            ),
        ),
        (
            "gpt2",
            sl.TransformerConfig(
                **SIZES,
                attention=sl.Attention(bias=True, output_bias=True),
                mlp=sl.MLP(gated=False, activation="gelu_tanh", bias=True),
                norm=sl.Norm(kind="layer", epsilon=1e-5),
                positions=sl.LearnedPositions(length=128),
                tied=True,
            ),
        ),
    ],
)
def test_a_file_reads_as_this_configuration(name, expected):
    assert read(values_of(name)) == expected


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_reads_as_what_was_written(name):
    values = values_of(name)
    config = read(values)
    family = registry.family_of_config(config)
    assert family.model_type == values["model_type"]
    assert canonical(read(family.values(config))) == canonical(config)


@pytest.mark.parametrize("name", sl.presets.names())
def test_every_preset_is_said_by_its_family(name):
    prefix = {"tiny": "llama", "llama2": "llama", "llama3": "llama", "gemma3": "gemma3_text"}
    expected = next(prefix.get(start, start) for start in [name.split("_")[0]])
    config = sl.presets.get(name)
    assert registry.family_of_config(config).model_type == expected
    assert canonical(read(registry.NAMES[expected].values(config))) == canonical(config)


def test_old_spellings_mean_what_the_new_ones_mean():
    """As the released files of Llama 3.1, Gemma 3 1B and GPT-2 spell it."""
    values = values_of("llama3")
    new = values.pop("rope_parameters")
    old = {"rope_theta": new.pop("rope_theta"), "rope_scaling": new}
    assert read(values | old) == read(values_of("llama3"))
    assert read(values | {"rope_theta": 100.0, "rope_scaling": None}).positions == sl.Rope(theta=100.0)
    linear = {"rope_scaling": {"type": "linear", "factor": 4.0}}  # before rope_type there was type, and theta was 1e4
    assert read(values | linear).positions == sl.Rope(scaling=sl.LinearScaling(factor=4.0))
    assert read(values).positions == sl.Rope()
    absent = {key: value for key, value in old["rope_scaling"].items() if key != "original_max_position_embeddings"}
    assert read(values | old | {"rope_scaling": absent}).positions.scaling.original_length == 128

    values = values_of("gemma3")
    for name in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
        del values[name]
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
    old["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    assert read(values | old) == read(values_of("gemma3"))
    assert read(values | old | {"sliding_window_pattern": 2}).attention.windows == (5, None)

    values = values_of("gemma2")
    del values["layer_types"]
    assert read(values) == read(values_of("gemma2"))
    assert read(values_of("gpt2") | {"n_ctx": 128}) == read(values_of("gpt2"))
    for before in ({"hidden_act": "gelu", "hidden_activation": None}, {"hidden_act": "gelu_pytorch_tanh"}):
        assert read(values_of("gemma") | before).mlp.activation == "gelu_tanh"


def test_both_spellings_may_be_there_and_must_agree():
    values = values_of("llama3")
    theta, *_ = {values["rope_parameters"]["rope_theta"]}
    scaling = {key: value for key, value in values["rope_parameters"].items() if key != "rope_theta"}
    assert read(values | {"rope_theta": theta, "rope_scaling": scaling}) == read(values)
    with pytest.raises(ValueError, match=r"rope_parameters=.*but rope_theta or rope_local_base_freq is 5000"):
        read(values | {"rope_theta": 5000})
    with pytest.raises(ValueError, match=r"rope_parameters=.*: rope_scaling=.*says something else"):
        read(values | {"rope_scaling": scaling | {"factor": 2.0}})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama3", {"mup_width": 3}, r"mup_width=3: shardlm does not know this field"),
        ("llama3", {"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\}: weights stored in fewer"),
        ("llama3", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5: rotary positions on a part"),
        ("llama3", {"hidden_act": "xielu"}, r"hidden_act='xielu': not a value .*legal are silu, swish, gelu"),
        ("llama3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, r"'yarn'; shardlm knows default, lin"),
        (
            "llama3",
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "attention_factor": 2.0}},
            r"shardlm knows no meaning of attention_factor",
        ),
        ("llama3", {"rope_parameters": {"rope_type": "linear"}}, r"'linear' has factor, and .*their absence"),
        ("llama3", {"rope_parameters": {"sliding_attention": {}}}, r"layers of two kinds, which shardlm knows of Gem"),
        ("gemma3", {"rope_parameters": {"other": {}}}, r"other is no kind of layer; these are full_attention"),
        ("llama3", {"architectures": ["LlamaForSequenceClassification"]}, r"a llama here is one of LlamaForCausalLM"),
        ("llama3", {"num_attention_heads": 3}, r"num_kv_heads=2 does not divide num_heads=3"),
        ("gemma", {"hidden_activation": "relu"}, r"hidden_activation='relu': a gemma here has 'gelu_pytorch_tanh'"),
        ("gemma2", {"use_bidirectional_attention": True}, r"True: attention to tokens that come later, which shar"),
        ("gemma2", {"layer_types": ["full_attention"]}, r"layer_types=.*1 types of 3 layers"),
        ("gemma2", {"layer_types": ["chunked"] * 3}, r"knows full_attention and sliding_attention, not chunked"),
        ("gemma2", {"sliding_window": None}, r"sliding_window=None: the layers of type sliding_attention need it"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50.0: a gemma3_text here has None"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, r"attention scores divided by the number of the layer"),
        ("gpt2", {"n_ctx": 64}, r"n_ctx=64: n_positions=128 says something else"),
    ],
)
def test_what_a_configuration_cannot_say_is_named_with_its_value(name, changes, message):
    with pytest.raises(ValueError, match=message):
        read(values_of(name) | changes)


def test_every_problem_is_listed_at_once():
    values = values_of("llama3") | {"mup_width": 3, "hidden_act": "xielu", "rope_scaling": {"type": "yarn"}}
    del values["hidden_size"], values["num_hidden_layers"]
    with pytest.raises(ValueError) as error:
        read(values)
    for named in ("hidden_size is missing", "num_hidden_layers is missing", "mup_width=3", "'xielu'", "'yarn'"):
        assert named in str(error.value)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("mixtral", r"'mixtral' is known and not supported: a mixture of experts, which shardlm does not have yet"),
        ("qwen3_moe", r"'qwen3_moe' is known and not supported: a mixture of experts"),
        ("gemma3", r"'gemma3' is known and not supported: a model of images and text"),
        ("mamba", r"model_type='mamba' \(architectures=\['MambaForCausalLM'\]\) is unknown; shardlm reads llama, m"),
        (None, r"model_type=None .* is unknown"),
    ],
)
def test_an_architecture_that_is_not_supported_is_named(model_type, message):
    with pytest.raises(ValueError, match=message):
        read({"model_type": model_type, "architectures": ["MambaForCausalLM"]})


def test_a_configuration_that_no_family_can_say_is_told_why_by_each():
    config = sl.presets.tiny(logit_soft_cap=3.0, attention=sl.Attention(windows=(4, None)))
    with pytest.raises(ValueError) as error:
        registry.family_of_config(config)
    lines = str(error.value).splitlines()
    assert [line.split(":")[0].strip(" -") for line in lines[1:]] == list(registry.NAMES)
    assert "logit_soft_cap=3.0, which is None there" in lines[1]
    assert "attention.windows" in lines[1]
    assert "positions are Rope, and LearnedPositions there" in lines[-1]
    with pytest.raises(ValueError, match=r"(?s)^(?!.*mistral).*llama: "):
        registry.family_of_config(config, "llama")
    with pytest.raises(ValueError, match="family='lama'; it is one of llama, mistral"):
        registry.family_of_config(config, "lama")


def test_how_a_model_is_computed_and_trained_is_no_matter_of_families():
    config = sl.presets.llama3_8b()
    for changes in ({"dropout": 0.1}, {"dtype": "float16"}, {"param_dtype": "bfloat16"}, {"vocab_multiple": 7}):
        assert registry.family_of_config(dataclasses.replace(config, **changes)).model_type == "llama"
    chunked = dataclasses.replace(config.attention, implementation="chunked", scale=128**-0.5)
    assert registry.family_of_config(dataclasses.replace(config, attention=chunked)).model_type == "llama"


def test_a_width_that_transformers_refuses_is_refused():
    config = sl.TransformerConfig(vocab_size=67, num_layers=1, d_model=26, num_heads=4, head_dim=8)
    assert "d_model=26 does not divide by num_heads=4" in registry.NAMES["llama"].differences(config)
    assert registry.family_of_config(config).model_type == "mistral"
