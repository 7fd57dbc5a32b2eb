"""A folder's tokenizer comes with the model and goes with it, with the ids that begin and end a text."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers

import shardlm as sl
from shardlm.data.tokens import Tokenizer
from shardlm.hub.tokenizer import HubTokenizer, read_tokenizer
from tests.hub.cases import DATA, load


def make() -> tokenizers.Tokenizer:
    """Words as ids from 2 on; 0 begins a text and 1 ends it."""
    words = {word: i for i, word in enumerate(["<s>", "</s>", "to", "be", "or", "not"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="</s>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return made


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(DATA / "llama3", tmp_path / "model")
    make().save(str(tmp_path / "model/tokenizer.json"))
    return tmp_path / "model"


def write(folder: Path, name: str, **values) -> None:
    path = folder / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | values))


def test_texts_become_ids_and_ids_texts(folder):
    _, _, tokenizer = load(folder)
    assert isinstance(tokenizer, Tokenizer)  # of sl.data
    ids = tokenizer.encode("to be or not to be")
    assert ids.dtype == np.int32 and ids.tolist() == [2, 3, 4, 5, 2, 3]
    assert tokenizer.encode("to be", special=True).tolist() == [0, 2, 3]
    assert tokenizer.decode([0, 2, 3, 1]) == "to be"
    assert tokenizer.decode(np.array([0, 2, 3]), special=True) == "<s> to be"
    assert tokenizer.vocab_size == 6


def test_texts_are_neither_cut_nor_filled_up(folder):
    made = make()
    made.enable_truncation(2)
    made.enable_padding(length=5)
    made.save(str(folder / "tokenizer.json"))
    *_, tokenizer = load(folder)
    assert tokenizer.encode("to be or not").tolist() == [2, 3, 4, 5]
    assert tokenizer.encode("to").tolist() == [2]


def test_which_ids_begin_and_end_a_text(folder):
    read = lambda: read_tokenizer(folder, json.loads((folder / "config.json").read_text()))  # noqa: E731
    assert (read().begin, read().end, read().ends) == (1, 2, (2,))  # config.json
    write(folder, "generation_config", bos_token_id=4, eos_token_id=[3, 5])
    assert (read().begin, read().ends) == (4, (3, 5, 2))
    write(folder, "tokenizer_config", bos_token="<s>", eos_token={"content": "</s>", "lstrip": False})
    assert (read().begin, read().end, read().ends) == (0, 1, (1, 3, 5, 2))
    write(folder, "config", bos_token_id=None, eos_token_id=None)
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert (read().begin, read().end, read().ends) == (None, None, ())


def test_it_goes_with_the_model(folder, tmp_path):
    write(folder, "tokenizer_config", bos_token="<s>", eos_token="</s>", model_max_length=77)
    config, params, tokenizer = load(folder)
    sl.save_hf(tmp_path / "a", config, params, tokenizer)
    _, _, again = load(tmp_path / "a")
    assert (again.definition, again.begin, again.ends) == (tokenizer.definition, 0, (1, 2))
    assert json.loads((tmp_path / "a/tokenizer_config.json").read_text())["model_max_length"] == 77
    assert json.loads((tmp_path / "a/config.json").read_text())["eos_token_id"] == 2  # as it came in
    sl.save_hf(tmp_path / "b", config, params, make())
    assert load(tmp_path / "b")[2].encode("not").tolist() == [5]
    values = json.loads((tmp_path / "b/config.json").read_text())
    assert [values[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [None] * 3  # of that one, which has none
    # Without one, no ids of the family's own vocabulary are left to be taken.
    sl.save_hf(tmp_path / "c", dataclasses.replace(config, origin=None), params)
    values = json.loads((tmp_path / "c/config.json").read_text())
    assert [values[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [None] * 3


def test_one_trained_here_keeps_its_boundary_between_documents(tmp_path):
    trained = sl.data.BPETokenizer.train(["to be or not to be"], 260, cache=None)
    config, params, _ = load(DATA / "llama3")
    sl.save_hf(tmp_path / "a", config, params, trained)
    _, _, tokenizer = load(tmp_path / "a")
    assert tokenizer.end == trained.end and tokenizer.vocab_size == trained.vocab_size
    ids = trained.encode("not to be")
    np.testing.assert_array_equal(tokenizer.encode("not to be"), ids)
    assert tokenizer.decode([*ids, trained.end]) == "not to be"


def test_what_is_no_tokenizer_is_refused(folder, tmp_path):
    config, params, _ = load(DATA / "llama3")
    with pytest.raises(TypeError, match="ByteTokenizer cannot be written as tokenizer.json: .*of bytes there is none"):
        sl.save_hf(tmp_path / "a", config, params, sl.data.ByteTokenizer())
    with pytest.raises(ValueError, match="not the JSON definition of a tokenizer"):
        HubTokenizer("{}")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model/tokenizer.json: not the JSON definition of a tokenizer"):
        load(folder)
