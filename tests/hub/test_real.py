"""Files of models that people use are read as they are, and go out saying what they said."""

import dataclasses
import json

import pytest

from shardlm.hub import registry
from shardlm.hub.family import canonical
from shardlm.hub.fields import Fields
from shardlm.hub.harmless import HARMLESS, NOTHING_AT
from shardlm.hub.origin import Origin
from shardlm.models.config import LearnedPositions
from tests.hub.cases import INSTALLED
from tests.hub.real import CONFIGS


def read(values: dict, ignore=()):
    return registry.family_of_file(values, "config.json").config(values, "config.json", ignore)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_file_is_read_and_what_it_said_is_written(name):
    values = json.loads(json.dumps(CONFIGS[name]))
    config, family = read(values), registry.family_of_file(values, "")
    assert config.num_layers == values.get("num_hidden_layers", values.get("n_layer"))
    assert not family.differences(config)
    written = Origin(values=values).config_values(config, family, "bfloat16")
    changed = {"architectures", "dtype", "torch_dtype"}
    assert {key: written[key] for key in values if key not in changed} == {
        key: value for key, value in values.items() if key not in changed
    }
    assert written["architectures"] == [family.architectures[0]] and written["dtype"] == "bfloat16"
    assert canonical(read(written)) == canonical(config)


@pytest.mark.parametrize("name", ["Mistral-7B-v0.3", "Qwen2-0.5B", "llama-7b-hf"])
def test_a_model_stays_of_its_family_though_an_earlier_one_could_say_it(name):
    values = CONFIGS[name]
    assert registry.family_of_config(read(values), None, values["model_type"]).model_type == values["model_type"]


def test_of_another_configuration_what_no_model_computes_still_goes_out():
    values = CONFIGS["Meta-Llama-3.1-8B-Instruct"]
    family = registry.NAMES["llama"]
    config = read(values | {"tie_word_embeddings": True})
    written = Origin(values=values).config_values(config, family, "float32")
    assert written["tie_word_embeddings"] is True and canonical(read(written)) == canonical(config)
    for name in ("max_position_embeddings", "eos_token_id", "bos_token_id", "transformers_version"):
        assert written[name] == values[name], name
    wider = read(values | {"rope_scaling": values["rope_scaling"] | {"factor": 32.0}})
    assert Origin(values=values).config_values(wider, family, "float32")["max_position_embeddings"] == 32 * 8192

    values = CONFIGS["gpt2 with transformers' general names"]
    shorter = dataclasses.replace(read(values), positions=LearnedPositions(length=512))
    written = Origin(values=values).config_values(shorter, registry.NAMES["gpt2"], "float32")
    assert canonical(read(written)) == canonical(shorter) and written["eos_token_id"] == 50256


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("SmolLM2-135M", {"rope_interleaved": True}, "rope_interleaved=True: rotary positions on neighbouring pairs"),
        ("gemma-2-9b", {"sliding_window_size": 8192}, "sliding_window_size=8192: sliding_window=4096 says something"),
        ("gpt2-medium", {"n_special": 3}, "n_special=3: token ids beyond the vocabulary"),
        ("gpt2", {"hidden_size": 512}, "hidden_size=512: n_embd=768 says something else"),
        ("gpt2", {"max_position_embeddings": 2048}, "max_position_embeddings=2048: n_positions=1024 says something"),
        ("Mistral-7B-v0.1", {"layer_types": ["full_attention"] * 32}, "a mistral here has layers of one kind"),
        ("Meta-Llama-3-8B", {"sliding_window": 4096}, "sliding_window=4096: a sliding window, which shardlm's"),
        ("Meta-Llama-3-8B", {"layer_types": ["sliding_attention"] * 32}, "layers of several kinds"),
        ("Meta-Llama-3-8B", {"embedding_multiplier": 12.0}, "embedding_multiplier=12.0: embeddings that are multi"),
        ("gemma-3-270m", {"_sliding_window_pattern": 3, "layer_types": None}, None),
        ("gemma-3-1b-it", {"_sliding_window_pattern": 3}, "transformers reads sliding_window_pattern, which is 6"),
    ],
)
def test_at_another_value_the_same_field_is_refused(name, changes, message):
    if message is None:
        changes = {key: value for key, value in changes.items() if value is not None}
        assert read(CONFIGS[name] | changes).windows[5] is None  # layer_types is there, and decides
        return
    with pytest.raises(ValueError, match=message):
        read(CONFIGS[name] | changes)


def test_a_field_that_nobody_knows_is_left_out_by_name():
    values = CONFIGS["Meta-Llama-3-8B"] | {"mup_width": 3, "\x1b[2Jspiral": [1]}
    with pytest.raises(ValueError) as error:
        read(values)
    assert r"ignore_fields=['\x1b[2Jspiral', 'mup_width']" in str(error.value)
    assert str(error.value).replace("\n", "").isprintable()
    assert read(values, ["mup_width", "\x1b[2Jspiral"]) == read(CONFIGS["Meta-Llama-3-8B"])
    with pytest.raises(ValueError, match="ignore_fields names mup_widht, which the file does not have"):
        read(values, ["mup_widht", "\x1b[2Jspiral"])
    assert read(CONFIGS["Meta-Llama-3-8B"] | {"never_heard_of": None})  # null says nothing


def test_a_field_is_harmless_in_one_table_alone():
    assert not set(HARMLESS) & set(NOTHING_AT)
    fields = Fields(dict.fromkeys(HARMLESS, {"any": ["thing"]}), "config.json")
    fields.finish()


if INSTALLED:

    @pytest.mark.parametrize(
        "name", [name for name in CONFIGS if CONFIGS[name]["architectures"] != ["LLaMAForCausalLM"]]
    )
    def test_transformers_reads_the_same_of_what_we_write(name, tmp_path):
        import transformers

        values = CONFIGS[name]
        family = registry.NAMES[values["model_type"]]
        written = Origin(values=values).config_values(read(values), family, "bfloat16")
        found = []
        for stage, made in (("a", values | {"dtype": "bfloat16"}), ("b", written)):
            (tmp_path / stage).mkdir()
            (tmp_path / stage / "config.json").write_text(json.dumps(made))
            found.append(transformers.AutoConfig.from_pretrained(tmp_path / stage).to_dict())
        different = {key for key in found[0] | found[1] if found[0].get(key) != found[1].get(key)}
        assert different <= {"_name_or_path", "torch_dtype"}, {key: [x.get(key) for x in found] for key in different}
