"""Requests of the lm-evaluation-harness have the answers of its own class for Hugging Face models.

Where lm_eval, torch and transformers are installed they are asked anew; elsewhere what they answered once is read.
"""

import importlib.util
import json
import sys
import types

import numpy as np
import pytest

import shardlm as sl
from shardlm.generate import harness
from shardlm.generate.encode import decode, encode, special_ids
from tests.generate import record_harness

INSTALLED = all(importlib.util.find_spec(name) for name in ("lm_eval", "torch", "transformers"))
ANSWERS = json.loads(record_harness.ANSWERS.read_text())
APART = 2e-5  # of one log-probability in float32, as of logits in tests/hub


class Bare(harness._Requests):
    """Without the harness."""

    cache_hook = types.SimpleNamespace(add_partial=lambda *_: None)

    def __init__(self, folder, **options):
        self._set_up(folder, **options)


def instance(request_type, doc, arguments, idx):
    return types.SimpleNamespace(args=arguments)


def model_of(name, folder, **options):
    arguments = record_harness.make(name, folder)
    return Bare(folder, batch_size=16, **arguments, **options)


def check(found, expected):
    for (logprob, greedy), (wanted, wanted_greedy) in zip(
        found["loglikelihood"], expected["loglikelihood"], strict=True
    ):
        assert logprob == pytest.approx(wanted, abs=20 * APART)
        assert greedy == wanted_greedy
    np.testing.assert_allclose(found["loglikelihood_rolling"], expected["loglikelihood_rolling"], atol=120 * APART)
    assert found["generate_until"] == expected["generate_until"]


@pytest.mark.parametrize("name", record_harness.CASES)
def test_answers_are_those_of_the_harness(name, tmp_path):
    model = model_of(name, tmp_path / "a")
    check(record_harness.ask(model, instance), ANSWERS[name])


if importlib.util.find_spec("jinja2"):

    def test_a_chat_is_the_text_of_the_harness(tmp_path):
        model = model_of("begins", tmp_path / "a")
        chats = [model.apply_chat_template(record_harness.CHAT, prompt) for prompt in (True, False)]
        assert chats == ANSWERS["begins"]["chat"]
        assert model.chat_template(True) == record_harness.TEMPLATE and model.chat_template(False) is None


def test_it_matters_how_text_is_encoded(tmp_path):
    """The recorded answers tell the cases apart, so a wrong prefix, a token too many or another cut is seen."""
    sums = [[x[0] for x in ANSWERS[name]["loglikelihood"]] for name in ("begins", "without", "plain")]
    for i, j in ((0, 1), (1, 2)):
        assert any(abs(a - b) > 0.1 for a, b in zip(sums[i], sums[j], strict=True))


class Foreign:
    """As the tokenizers of transformers: special tokens go in and come out unless told otherwise."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self):
        self.made = record_harness.make_tokenizer(begins=True)

    def encode(self, text, text_pair=None, add_special_tokens=True, **options):
        return self.made.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids, skip_special_tokens=False):
        return self.made.decode(ids, skip_special_tokens=skip_special_tokens)


def test_tokenizers_of_every_make_give_the_same_ids(tmp_path):
    record_harness.make("begins", tmp_path / "a")
    *_, ours = sl.load_hf(tmp_path / "a")
    bare = record_harness.make_tokenizer(begins=True)
    for tokenizer in (ours, Foreign(), bare):
        plain = encode(tokenizer, "the inn").tolist()
        assert encode(tokenizer, "the inn", special=True).tolist() == [1, *plain]
        assert decode(tokenizer, [1, *plain, 2]) == "the inn"
        assert decode(tokenizer, [1, *plain], special=True) == "<s>the inn"
        assert special_ids(tokenizer, ["</s>", "the", "<s>x"]) == [2]
    for tokenizer in (ours, Foreign()):
        assert encode(tokenizer, "the inn", special=None).tolist() == [1, *plain]
        assert encode(tokenizer, "<s>the inn", special=None).tolist() == [1, *plain]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"no_repeat_ngram_size": 3}, "generation_config.json says no_repeat_ngram_size=3, which shardlm's generation"),
        ({"num_beams": 4, "min_length": 2}, "says min_length=2, num_beams=4"),
    ],
)
def test_what_the_folder_asks_of_generation_and_we_lack_is_named(told, message, tmp_path):
    model = model_of("begins", tmp_path / "a")
    model._defaults |= told
    with pytest.raises(ValueError, match=message):
        record_harness.ask(model, instance)


def test_what_makes_no_model_is_an_error(tmp_path):
    record_harness.make("begins", tmp_path / "a")
    with pytest.raises(ValueError, match="give a Hugging Face folder, or config=, params= and tokenizer="):
        Bare(None, params={})
    with pytest.raises(ValueError, match=r"device='cuda:0'.*shardlm places models by layout= and devices="):
        Bare(tmp_path / "a", device="cuda:0")
    (tmp_path / "a/tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer: give tokenizer="):
        Bare(tmp_path / "a")


def test_without_the_harness_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    harness._harness_model.cache_clear()
    with pytest.raises(ImportError, match=r"pip install -e '\.\[eval\]'"):
        harness.HarnessModel  # noqa: B018  made when it is asked for


if INSTALLED:

    @pytest.mark.parametrize("name", record_harness.CASES)
    def test_the_harness_answers_so_today(name, tmp_path):
        from lm_eval.api.instance import Instance
        from lm_eval.api.model import LM

        expected = record_harness.harness(name, tmp_path / "a")
        model = harness.HarnessModel(str(tmp_path / "a"), **record_harness.CASES[name][2])
        assert isinstance(model, LM)
        check(record_harness.ask(model, Instance), expected)

    def test_a_tokenizer_of_transformers_gives_the_same_numbers(tmp_path):
        import transformers

        record_harness.make("begins", tmp_path / "a")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
        check(record_harness.ask(Bare(tmp_path / "a", tokenizer=tokenizer), instance), ANSWERS["begins"])

    def test_the_harness_evaluates_a_task_with_it(tmp_path):
        import lm_eval

        record_harness.make("begins", tmp_path / "a")
        (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in record_harness.TEXTS[1:]))
        task = {
            "task": "lines", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "lines.jsonl")},
            "test_split": "train", "output_type": "loglikelihood_rolling", "doc_to_text": "",
            "doc_to_target": "{{text}}", "metric_list": [{"metric": "byte_perplexity"}],
        }  # fmt: skip
        model = harness.HarnessModel(str(tmp_path / "a"))
        results = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)["results"]
        size = sum(len(text.encode()) for text in record_harness.TEXTS[1:])
        expected = np.exp(-sum(ANSWERS["begins"]["loglikelihood_rolling"][1:]) / size)
        assert results["lines"]["byte_perplexity,none"] == pytest.approx(expected, rel=1e-4)
