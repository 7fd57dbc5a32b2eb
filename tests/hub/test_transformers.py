"""Where transformers is installed, it is asked anew: for a model's logits, and to read what we write.

Elsewhere what it answered once is read from the recordings, and the test run's last lines say so.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import shardlm as sl
from shardlm.hub import registry
from tests.hub import record
from tests.hub.cases import CASES, DATA, INSTALLED, PIECES, load, logits, packed_rows, recorded
from tests.hub.test_numbers import F32


def test_the_recordings_are_of_the_cases_that_the_script_describes():
    assert sorted(record.CASES) == CASES
    assert (record.PIECES, record.VOCABULARY) == (PIECES, 67)
    for name in CASES:
        made = recorded(name)
        assert made["tokens"].shape == (2, 20) and made["logits64"].shape == (2, 20, 67)
        assert np.abs(made["logits32"] - made["logits64"]).max() < F32
        assert made["greedy"].shape == (2, 64) and made["margin"] > 10 * 1e-5


if INSTALLED:

    @pytest.mark.parametrize("name", CASES)
    def test_a_fresh_model_of_transformers_has_our_logits(name, tmp_path):
        """Another than the recorded one: made anew, moved otherwise, and read from where transformers saved it."""
        record.make(name, tmp_path / "a", seed=99)
        theirs = record.load(tmp_path / "a", "float32")
        tokens = np.random.default_rng(5).integers(0, 67, (2, 20))
        config, params, _ = load(tmp_path / "a", dtype="float32")
        assert np.abs(logits(config, params, tokens) - record.logits(theirs, tokens)).max() < F32
        real = packed_rows()[0] > 0
        found = logits(config, params, tokens, *packed_rows())
        assert np.abs(found - record.packed(theirs, tokens))[real].max() < F32

    @pytest.mark.parametrize("name", CASES)
    def test_transformers_reads_what_we_write_as_it_reads_its_own(name, tmp_path):
        config, params, _ = load(DATA / name)
        sl.save_hf(tmp_path / "a", config, params, max_shard_size="20KB")
        tokens = recorded(name)["tokens"]
        ours, theirs = (
            record.logits(record.load(folder, "float32"), tokens) for folder in (tmp_path / "a", DATA / name)
        )
        np.testing.assert_array_equal(ours, theirs)

    @pytest.mark.parametrize("name", ["gemma2", "gemma3"])
    def test_transformers_runs_a_gemma_without_windows(name, tmp_path):
        config, params, _ = load(DATA / name, dtype="float32")
        attention = dataclasses.replace(config.attention, windows=(None,))
        full = dataclasses.replace(config, attention=attention, local_positions=None)
        sl.save_hf(tmp_path / "a", full, params)
        tokens = recorded(name)["tokens"]
        theirs = record.logits(record.load(tmp_path / "a", "float32"), tokens)
        assert np.abs(logits(full, params, tokens) - theirs).max() < F32
        assert np.abs(logits(config, params, tokens) - theirs).max() > 100 * F32  # the windows were of use

    @pytest.mark.parametrize(
        "scaling", [{"type": "linear"}, {"rope_type": "linear"}, {"rope_type": "linear", "type": "linear"}]
    )
    @pytest.mark.filterwarnings("ignore:.*transformers 5 does not read it")
    def test_transformers_scales_the_positions_of_gemma_3_as_we_do(scaling, tmp_path):
        shutil.copytree(DATA / "gemma3", tmp_path / "a")
        values = json.loads((tmp_path / "a/config.json").read_text())
        del values["rope_parameters"]
        values |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": scaling | {"factor": 8.0}}
        (tmp_path / "a/config.json").write_text(json.dumps(values))
        config, params, _ = load(tmp_path / "a", dtype="float32")
        tokens = recorded("gemma3")["tokens"]
        theirs = record.logits(record.load(tmp_path / "a", "float32"), tokens)
        assert np.abs(logits(config, params, tokens) - theirs).max() < F32

    @pytest.mark.parametrize("name", sl.presets.names())
    def test_transformers_understands_the_configuration_of_every_preset(name, tmp_path):
        """It makes as many parameters of it, without values, and writes the same of it as we do."""
        import torch
        import transformers

        preset = sl.presets.get(name)
        family = registry.family_of_config(preset)
        values = family.values(preset)
        (tmp_path / "config.json").write_text(json.dumps(values))
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        assert theirs.vocab_size == preset.vocab_size
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(theirs)
        assert sum(p.numel() for p in model.parameters()) == sl.Trainer(preset, devices=1).num_parameters
        understood = family.config(theirs.to_dict() | {"architectures": None}, "transformers")
        assert understood == family.config(values, "ours")
