"""The tokenizer belongs to the checkpoint: it comes back from there alone, and commands take it from there."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import shardlm as sl
from shardlm.__main__ import main
from shardlm.checkpoint import Checkpoints, read_texts
from shardlm.data import Batches, BPETokenizer, ByteTokenizer, Completions, Encoder, Example, Piece, files_of
from shardlm.hub import HubTokenizer
from shardlm.hub.stored import made_of
from shardlm.train.texts import of_run, resumed
from tests.hub.cases import load

TEXT = "to be or not to be, that is the question\n" * 30
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SIZES = "--num-layers 1 --d-model 16 --num-heads 2 --num-kv-heads 1 --d-ff 24 --batch-size 4 --sequence 16 --sample 0"


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train([TEXT], 280, cache=None)


def hub(bpe, begin=3, ends=(5, 7)) -> HubTokenizer:
    return HubTokenizer(bpe.definition, begin, ends, {"chat_template": TEMPLATE, "bos_token": "a"})


def test_a_tokenizer_is_made_again_of_its_files(bpe):
    assert isinstance(made_of(files_of(ByteTokenizer())), ByteTokenizer)
    made = made_of(files_of(bpe))
    assert (made.end, made.vocab_size, made.definition) == (bpe.end, bpe.vocab_size, bpe.definition)
    made = made_of(files_of(hub(bpe)))
    assert (made.begin, made.ends, made.end, made.settings["chat_template"]) == (3, (5, 7), 5, TEMPLATE)
    assert made.encode("to be").tolist() == bpe.encode("to be").tolist()
    # What examples were packed with is what is kept, whatever the tokenizer says.
    made = made_of(files_of(Encoder.of(hub(bpe), end=9, begin=2)))
    assert (made.begin, made.ends) == (2, (9, 5, 7))


def test_tokenizers_of_others_are_kept_too(bpe):
    import tokenizers

    plain = tokenizers.Tokenizer.from_str(bpe.definition)
    assert made_of(files_of(Encoder.of(plain, end=1))).ends == (1,)

    class Transformers:
        eos_token_id, bos_token_id = 4, None

        def save_pretrained(self, folder):
            plain.save(f"{folder}/tokenizer.json")
            Path(folder, "chat_template.jinja").write_text(TEMPLATE)

    files = files_of(Transformers())
    assert files["chat_template.jinja"].decode() == TEMPLATE
    assert (made_of(files).ends, made_of(files).begin) == ((4,), None)


def test_batches_know_their_tokenizer_and_one_without_files_is_said(bpe):
    data = sl.data.load([sl.data.Document("a", TEXT)], bpe, 8, 2, held_out=0)
    assert of_run(None, data.train) == (files_of(bpe), None)
    example = Example("here", (Piece("to be", False), Piece(" or", True)))
    rows = Completions([example] * 4, 32, Encoder.of(bpe))
    assert of_run(None, Batches(rows, 1, tokenizer=Encoder.of(bpe))) == (files_of(bpe), None)
    assert of_run(None, [{}]) == ({}, None)

    class Own:
        vocab_size, end = 3, 2

    files, said = of_run(Own(), data.train)
    assert files == {} and "a Own does not say of which files it is made" in said


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "shardlm.json is missing"),
        ({"shardlm.json": b"[]"}, "shardlm.json is missing or does not say a kind"),
        ({"shardlm.json": b'{"kind": "words"}'}, "of the kind 'words', which this version of shardlm does not know"),
        ({"shardlm.json": b'{"kind": "hub", "begin": null, "ends": []}'}, "has no tokenizer.json"),
    ],
)
def test_files_of_no_tokenizer_are_errors(files, message):
    with pytest.raises(ValueError, match=message):
        made_of(files)


def test_a_checkpoint_keeps_it_and_a_run_is_held_to_it(bpe, tmp_path):
    state = {"params": {"x": jax.numpy.ones(3)}}
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, state, texts=files_of(bpe))
        checkpoints.wait()
        assert resumed(checkpoints, 1, {}) == resumed(checkpoints, 1, files_of(bpe)) == files_of(bpe)
        other = BPETokenizer.train([TEXT[:200]], 270, cache=None)
        with pytest.raises(ValueError, match=r"run/1 is of another tokenizer: bpe \w+ there, bpe \w+ here"):
            resumed(checkpoints, 1, files_of(other))
    for folder in (tmp_path / "run", tmp_path / "run/1"):
        assert sl.load_tokenizer(folder).definition == bpe.definition
    main(["checkpoints", str(tmp_path / "run"), "--export", "1", str(tmp_path / "copy")])
    assert sl.load_tokenizer(tmp_path / "copy").end == bpe.end

    sl.save(tmp_path / "one", state, tokenizer=ByteTokenizer())
    assert isinstance(sl.load_tokenizer(tmp_path / "one"), ByteTokenizer)
    sl.save(tmp_path / "none", state)
    assert sl.load_tokenizer(tmp_path / "none") is None
    with pytest.raises(ValueError, match=r"tokenizer: '\.\./a' are no names of files"):
        sl.save(tmp_path / "bad", state, tokenizer={"../a": b""})
    with pytest.raises(TypeError, match=r"tokenizer is a object, which has no files to keep: give sl.data.files_of"):
        sl.save(tmp_path / "bad", state, tokenizer=object())


def test_a_changed_file_of_it_is_a_damaged_checkpoint(bpe, tmp_path):
    sl.save(tmp_path / "a", {"x": jax.numpy.ones(3)}, tokenizer=bpe)
    (tmp_path / "a/tokenizer/bpe.json").write_text(bpe.definition.replace("to", "ot", 1))
    with pytest.raises(sl.DamagedCheckpoint, match="tokenizer/bpe.json"):
        read_texts(tmp_path / "a")


def test_a_run_with_bpe_can_be_asked_converted_begun_from_and_gone_on_with(tmp_path, capsys, monkeypatch):
    """All of it without the text that the tokenizer was trained on, and without the cache: as on another machine."""
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text("that was a question, and to answer it is not\n" * 40)
    layout = "--layout fsdp=4,tensor=2"

    def run(*words):
        capsys.readouterr()
        status = main(
            [str(word) for words_ in words for word in (words_.split() if isinstance(words_, str) else [words_])]
        )
        return status, *capsys.readouterr()

    train = ("train --data", tmp_path / "a.txt", SIZES, layout)
    assert run(*train, "--tokenizer bpe:280 --steps 1 --checkpoint-dir", tmp_path / "run")[0] == 0
    monkeypatch.setattr(BPETokenizer, "train", lambda *_, **__: pytest.fail("a tokenizer was trained again"))
    vocabulary = sl.load_tokenizer(tmp_path / "run").vocab_size
    assert 257 < vocabulary <= 280

    status, output, _ = run("generate --max-new-tokens 3 --prompt to --model", tmp_path / "run")
    assert status == 0 and output.startswith("to")

    status, output, errors = run("convert", tmp_path / "run", tmp_path / "folder")
    assert status == 0 and "without a tokenizer" not in output, errors
    assert (
        load(tmp_path / "folder")[2].encode("to be").tolist()
        == sl.load_tokenizer(tmp_path / "run").encode("to be").tolist()
    )

    others = ("train --data", tmp_path / "b.txt", SIZES, layout)
    more = "--tokenizer bpe:280 --steps 2 --accept-changes --checkpoint-dir"
    status, output, errors = run(*others, more, tmp_path / "run")
    assert status == 0 and f"BPETokenizer(vocab_size={vocabulary})" in output, errors
    status, _, errors = run(*others, "--tokenizer bytes --steps 3 --checkpoint-dir", tmp_path / "run")
    assert status == 2 and re.search(r"--tokenizer bytes, and the checkpoints in .*/run are of BPETokenizer", errors)

    begin = ("train --init-from", tmp_path / "run", "--data", tmp_path / "b.txt", "--batch-size 4 --sequence 16")
    status, output, errors = run(
        *begin, layout, "--sample 0 --steps 1 --learning-rate 0 --checkpoint-dir", tmp_path / "on"
    )
    assert status == 0, errors
    assert sl.load_tokenizer(tmp_path / "on").vocab_size == vocabulary
    found = [
        sl.restore(tmp_path / run, sl.Trainer(made.config, "fsdp=4,tensor=2"), only="params")
        for run, made in (("run/2", _trainer(tmp_path / "run/2")), ("on/1", _trainer(tmp_path / "run/2")))
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert json.loads((tmp_path / "run/2/metadata.json").read_text())["files"]["tokenizer/bpe.json"]


def _trainer(step):
    config = sl.TransformerConfig.from_dict(sl.read_metadata(step)["config"])
    return sl.Trainer(config, "fsdp=4,tensor=2")
