"""`train --init-from` starts from a Hugging Face model, and `--save-hf` ends in one."""

import json

import jax
import numpy as np
import pytest

import shardlm as sl
from shardlm.__main__ import main
from shardlm.data import BPETokenizer
from tests.hub.cases import load

CONFIG = sl.TransformerConfig(
    vocab_size=266, num_layers=3, d_model=16, num_heads=2, num_kv_heads=2, d_ff=24, param_dtype="bfloat16"
)
ARGUMENTS = "--layout fsdp=4,tensor=2 --steps 2 --batch-size 8 --sequence 16 --sample 0 --held-out 0"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a model and its tokenizer, and a file of examples."""
    root = tmp_path_factory.mktemp("begin")
    lines = [{"prompt": f"{a} + {b} = ", "completion": str(a + b)} for a in range(8) for b in range(8)]
    (root / "sums.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    tokenizer = BPETokenizer.train([line["prompt"] + line["completion"] for line in lines] * 4, 262, None)
    params = sl.Trainer(CONFIG).init().params
    sl.save_hf(root / "model", CONFIG, params, tokenizer, verbose=False, fields={"max_position_embeddings": 77})
    (root / "model/chat_template.jinja").write_text("{{ messages }}\r\n", newline="")
    (root / "model/generation_config.json").write_text('{"temperature": 0.6}')
    sl.save_hf(root / "bare", CONFIG, params, verbose=False)
    return root


@pytest.fixture
def run(folders, capsys):
    def call(*arguments):
        capsys.readouterr()
        status = main(["train", "--data", str(folders / "sums.jsonl"), *ARGUMENTS.split(), *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


def test_a_learning_rate_of_zero_gives_back_the_model_and_its_tokenizer(run, folders, tmp_path):
    """On a pipeline of uneven stages, whose layers are stored out of order."""
    layout = ("--layout", "pipe=2,fsdp=4,pipeline=1f1b:2:1:2+1")
    target = tmp_path / "same"
    status, output, errors = run("--init-from", folders / "model", *layout, "--learning-rate", 0, "--save-hf", target)
    assert status == 0, errors
    assert f"saved {target}" in output.splitlines()
    assert f"generate --model {target} --prompt" in output.splitlines()[-2]
    _, expected, _ = load(folders / "model", dtype="float32")
    config, found, tokenizer = load(target)
    assert config.param_dtype == "float32"
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert tokenizer.decode(tokenizer.encode("3 + 4 = 7")) == "3 + 4 = 7"
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (folders / "model", target))
    assert after == before | {"dtype": "float32", "torch_dtype": "float32"}
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (target / name).read_bytes() == (folders / "model" / name).read_bytes(), name


def test_training_goes_on_from_the_model_and_from_its_own_checkpoint(run, folders, tmp_path):
    def losses():
        lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
        return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}

    arguments = ("--init-from", folders / "model", "--checkpoint-dir", tmp_path / "run", "--log-every", 1)
    assert run(*arguments, "--seed", 3)[0] == 0
    config, params, tokenizer = load(folders / "model", dtype="float32")
    data = sl.data.load_examples(folders / "sums.jsonl", tokenizer, 16, 8, seed=3, held_out=0)
    assert data.train[0]["tokens"].max() > 256  # pairs of bytes, so of the folder's tokenizer
    trainer = sl.Trainer(config)
    first, _ = trainer.loss_and_grads(trainer.init(params), data.train[0])
    assert losses()[1] == pytest.approx(float(first), rel=1e-6)

    status, output, errors = run(*arguments, "--seed", 3, "--steps", 3, "--save-hf", tmp_path / "tuned")
    assert status == 0, errors
    assert "resumed from" in output and sorted(losses()) == [1, 2, 3]
    assert load(tmp_path / "tuned")[0].num_layers == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--init-from", "{}/nothing"), "no folder at {}/nothing"),
        (("--init-from", "{}/bare"), "{}/bare has no tokenizer.json: say --tokenizer bytes, or bpe:SIZE"),
        (("--init-from", "{}/model", "--d-ff", "8", "--num-heads", "4"), "leave out --num-heads, --d-ff"),
        (("--init-from", "{}/bare", "--tokenizer", "bpe:400"), "the tokenizer has 2"),
        (("--save-hf", "{}/model"), "{}/model holds a model already"),
        (("--ignore-fields", "a,b"), "--ignore-fields is for the folder of --init-from"),
        (("--init-from", "{}/model", "--ignore-fields", "a, b"), "ignore_fields names a, b, which the file does not"),
        (("--save-hf", "{}/sums.jsonl/a/b"), "{}/sums.jsonl is no folder that can be written to"),
    ],
)
def test_mistakes_are_errors_before_anything_is_trained(run, folders, arguments, message):
    status, output, errors = run(*(argument.format(folders) for argument in arguments))
    assert status == 2 and message.format(folders) in errors and "run:" not in output


def test_a_preset_and_a_model_exclude_each_other(run, folders, capsys):
    with pytest.raises(SystemExit):
        run("--init-from", folders / "model", "--preset", "tiny")
    assert "argument --preset: not allowed with argument --init-from" in capsys.readouterr().err


def test_a_model_of_bytes_is_written_without_a_tokenizer(run, folders, tmp_path):
    status, output, errors = run("--init-from", folders / "bare", "--tokenizer", "bytes", "--save-hf", tmp_path / "a")
    assert status == 0, errors
    assert "without a tokenizer, as there is no file for ByteTokenizer\n" in output
    assert "generate" not in output.splitlines()[-1] and "--tokenizer bytes" in output.splitlines()[-1]
    assert not (tmp_path / "a/tokenizer.json").exists()


@pytest.mark.parametrize("begin", [None, 1])
def test_examples_begin_with_the_id_that_the_models_texts_begin_with(folders, begin):
    """Its end token alone, as our own tokenizers have it in front too, is not what such a model has seen."""
    tokenizer = load(folders / "model")[2]
    tokenizer.begin = begin
    data = sl.data.load_examples(folders / "sums.jsonl", tokenizer, 16, 4, held_out=0)
    batch = data.train[0]
    first = batch["tokens"][(batch["positions"] == 0) & (batch["segments"] > 0)]
    digits = {tokenizer.encode(f"{a} + {b} = ")[0] for a in range(8) for b in range(8)}
    assert set(first) == {1} if begin else set(first) <= digits
