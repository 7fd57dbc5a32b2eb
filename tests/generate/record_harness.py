"""What the lm-evaluation-harness's own class for Hugging Face models, HFLM, answers to requests for a tiny model.

Recorded once in `data/harness.json`, by

    pip install torch transformers lm_eval && python -m tests.generate.record_harness

The model is the recorded Llama of tests/hub, said to take 24 tokens, so that texts are cut and windows slide. Its
tokenizer, of 67 ids, has tokens with spaces in them: what is encoded together is not what is encoded apart.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers

MODEL = Path(__file__).parents[1] / "hub/data/llama3"
ANSWERS = Path(__file__).parent / "data/harness.json"
LONG = "the inn is then thin; she hit the hat in the tin and then the rest of it is in the net"
CHAT = [{"role": "system", "content": "hi"}, {"role": "user", "content": "the tin? "}]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}> {{ message['content'] | trim }}\n{% endfor %}"
    "{%- if add_generation_prompt %}<assistant>{% endif %}"
)

# name: (does the tokenizer begin texts with <s>, tokenizer_config.json, arguments of both models)
CASES: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    "begins": (True, {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}, {}),
    "without": (False, {"bos_token": None, "eos_token": "</s>"}, {}),
    "plain": (True, {"bos_token": "<s>", "eos_token": "</s>"}, {"add_bos_token": False, "max_length": 30}),
    "prefix": (False, {"bos_token": "<s>", "eos_token": "</s>"}, {"add_bos_token": True, "prefix_token_id": 5}),
}
PAIRS = [
    ("the inn", " is"),
    ("the inn ", "is"),
    ("the inn is", "the"),
    ("i", "nn"),
    ("", "the tin"),
    ("", "<s>the"),
    ("<s>the", " tin"),
    ("</s>the", " tin"),
    (LONG, " then"),
    (LONG + " ", "a"),
]
TEXTS = ["", "the", "<s>the tin", LONG, LONG[:24], LONG + " " + LONG]
UNTIL = [
    ("the inn", {"until": ["e"], "max_gen_toks": 10}),
    ("the inn ", {"until": "</s>", "max_gen_toks": 8}),
    (LONG, {"until": ["\n", "q", "<s>"], "max_gen_toks": 9, "do_sample": False, "temperature": 0.7}),
    ("<s>she", {"max_new_tokens": 6}),
    ("the", {"until": ["zz"], "max_tokens": 5, "temperature": 0.0}),
    ("is", {"until": [], "max_gen_toks": 7, "repetition_penalty": 1.3}),
]


def make_tokenizer(begins: bool) -> tokenizers.Tokenizer:
    """Characters, and merges of them."""
    pairs = ("t h", "th e", "  t", "i n", " t he", "h e", "e n", "i s", "  is")
    merges = [tuple(pair.rsplit(" ", 1)) for pair in pairs]
    vocabulary = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz .;<>?\n", *(a + b for a, b in merges)]
    vocabulary += [str(i) for i in range(67 - len(vocabulary))]
    ids = {token: i for i, token in enumerate(vocabulary)}
    assert len(ids) == 67
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges, unk_token="<unk>"))
    made.decoder = tokenizers.decoders.Fuse()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    single = "<s> $A" if begins else "$A"
    made.post_processor = tokenizers.processors.TemplateProcessing(single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return made


def make(name: str, folder: Path) -> dict[str, Any]:
    """Write the case's folder, and give the arguments of its models."""
    begins, settings, arguments = CASES[name]
    shutil.copytree(MODEL, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 24}))
    make_tokenizer(begins).save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**30} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 40], "repetition_penalty": 1.1}))
    return arguments


def ask(model: Any, instance: Any) -> dict[str, Any]:
    """The model's answers to all requests, in order."""

    def requests(kind: str, arguments: list[Any]) -> list[Any]:
        return [instance(request_type=kind, doc={}, arguments=x, idx=i) for i, x in enumerate(arguments)]

    return {
        "loglikelihood": [list(x) for x in model.loglikelihood(requests("loglikelihood", PAIRS))],
        "loglikelihood_rolling": model.loglikelihood_rolling(
            requests("loglikelihood_rolling", [(text,) for text in TEXTS])
        ),
        "generate_until": model.generate_until(requests("generate_until", UNTIL)),
    }


def harness(name: str, folder: Path) -> dict[str, Any]:
    """What HFLM answers, one request at a time, as others of its batch change what it makes after a stop string.

    Without its cache of logits: of two requests that are equal but for where the continuation begins, lm_eval 0.4.13
    gives the shorter continuation the log-probabilities of other positions.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    arguments = make(name, folder)
    model = HFLM(str(folder), device="cpu", dtype="float32", batch_size=1, logits_cache=False, **arguments)
    answers = ask(model, Instance)
    if "chat_template" in CASES[name][1]:
        answers["chat"] = [model.apply_chat_template(CHAT, prompt) for prompt in (True, False)]
    return answers


def main() -> None:
    """Write everything."""
    import tempfile

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in CASES:
            found[name] = harness(name, Path(folder) / name)
    ANSWERS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
