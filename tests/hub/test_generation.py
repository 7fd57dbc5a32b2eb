"""Generated text, processed logits and beams are those that transformers computed: see record.py."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import shardlm as sl
from shardlm.generate import sampling
from tests.hub.cases import CASES, DATA, load, recorded
from tests.hub.record import BEAMS, VOCABULARY, WARPERS, settings_of

pytestmark = pytest.mark.usefixtures("x64_module")


@functools.cache
def results() -> dict[str, np.ndarray]:
    with np.load(DATA / "generation.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", CASES)
def test_64_greedy_tokens_are_those_of_transformers_one_by_one(name):
    """Of prompts of unequal lengths in one batch; transformers had each by itself."""
    made = recorded(name)
    config, params, _ = load(DATA / name, dtype="float64")
    prompts = [made["prompt0"].tolist(), made["prompt1"].tolist()]
    found = sl.generate(config, params, prompts, max_new_tokens=64, eos=())
    np.testing.assert_array_equal(found.tokens, made["greedy"])


@pytest.mark.parametrize("text", WARPERS)
def test_processed_logits_are_those_of_transformers(text):
    made = results()
    chosen = sampling.Sampling(**({"temperature": 1.0} | settings_of(text)))
    seen = np.zeros((len(made["ids"]), VOCABULARY), bool)
    np.put_along_axis(seen, made["ids"], True, axis=1)
    found = sampling.process(jnp.asarray(made["scores"]), jnp.asarray(seen), chosen.kind, chosen.values())
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(made[text]))
    assert (~np.isfinite(made[text])).any() == any(name in text for name in ("top_k", "top_p", "min_p"))
    np.testing.assert_allclose(found, made[text], rtol=1e-6)


@pytest.mark.parametrize("text", BEAMS)
def test_all_beams_are_those_of_transformers(text):
    made, asked = results(), settings_of(text)
    config, params, _ = load(DATA / "llama3", dtype="float64")
    [found] = sl.generate(config, params, [made["prompt"].tolist()], eos=int(made["end"]), **asked).completions
    sequences, scores = made[f"beam/{text}/sequences"], made[f"beam/{text}/scores"]
    assert [beam.tolist() for beam in found.beams] == [row[row != made["pad"]].tolist() for row in sequences]
    np.testing.assert_allclose(found.scores, scores, rtol=2e-6)
