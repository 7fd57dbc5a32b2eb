"""Tokenizers lose nothing, no text can contain the document boundary, and a cached tokenizer is whole or replaced."""

import sys

import numpy as np
import pytest

from shardlm.data import BPETokenizer, ByteTokenizer, Tokenizer, make_tokenizer

TEXTS = ["to be or not to be, that is the question:\n", "whether 'tis nobler in the mind to suffer\n"] * 3
HARD = "  né 𝄞\r\n\t\x00 <|endoftext|> \ufffd  "
SIZE = 273


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(TEXTS, SIZE, cache=None)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request):
    return ByteTokenizer() if request.param == "bytes" else request.getfixturevalue("bpe")


@pytest.mark.parametrize("text", ["", " ", HARD, TEXTS[0]])
def test_text_decodes_to_itself(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text


def test_the_boundary_is_the_last_id_and_is_left_out_of_text(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.end == tokenizer.vocab_size - 1
    assert tokenizer.end not in tokenizer.encode(HARD)
    ids = [tokenizer.end, *tokenizer.encode("to be"), tokenizer.end, *tokenizer.encode("!")]
    assert tokenizer.decode(ids) == "to be!"
    assert tokenizer.decode([]) == ""


def test_bytes_that_are_not_utf8_decode_to_a_replacement(tokenizer):
    assert tokenizer.decode(tokenizer.encode("né")[:2]) == "n\ufffd"


def test_ids_out_of_range_are_an_error(tokenizer):
    size = tokenizer.vocab_size
    with pytest.raises(ValueError, match=rf"2 of 3 ids are not in 0 <= id < {size}, the first is {size}"):
        tokenizer.decode([5, size, -1])


@pytest.mark.parametrize(("ids", "shape"), [([[1, 2, 3]], r"int64\[1, 3\]"), ([0.5], r"float64\[1\]")])
def test_ids_of_another_shape_or_type_are_an_error(tokenizer, ids, shape):
    with pytest.raises(ValueError, match=rf"ids must be integers of shape \[tokens\], got {shape}"):
        tokenizer.decode(ids)


def test_bytes_are_the_bytes_of_utf8():
    assert ByteTokenizer().encode("né").tolist() == [110, 195, 169]
    assert (ByteTokenizer().vocab_size, ByteTokenizer().end) == (257, 256)


def test_bpe_has_the_size_asked_for_and_shortens_what_it_was_trained_on(bpe):
    assert bpe.vocab_size == SIZE
    ids = bpe.encode(TEXTS[0])
    assert len(ids) < len(TEXTS[0])
    assert ids.max() < SIZE


def test_a_definition_makes_the_same_tokenizer_again(bpe):
    again = BPETokenizer(bpe.definition)
    assert again.encode(HARD).tolist() == bpe.encode(HARD).tolist()
    assert again.vocab_size == SIZE
    with pytest.raises(ValueError, match="not the JSON definition of a tokenizer"):
        BPETokenizer("{}")


def test_training_is_reproducible(bpe):
    assert BPETokenizer.train(TEXTS, SIZE, cache=None).definition == bpe.definition


def test_the_cache_spares_training(bpe, tmp_path, monkeypatch):
    BPETokenizer.train(TEXTS, SIZE, cache=tmp_path / "new" / "folder")
    monkeypatch.setattr("shardlm.data.tokens._train", lambda *_: pytest.fail("trained again"))
    cached = BPETokenizer.train(iter(TEXTS), SIZE, cache=str(tmp_path / "new" / "folder"))
    assert cached.definition == bpe.definition


def test_the_cache_tells_texts_and_sizes_apart(tmp_path):
    first, *rest = TEXTS
    cut_elsewhere = [first + rest[0][:1], rest[0][1:], *rest[1:]]
    changed = [first.replace("be", "do"), *rest]
    for texts, size in [(TEXTS, SIZE), (TEXTS, SIZE - 1), (cut_elsewhere, SIZE), (changed, SIZE), (rest, SIZE)]:
        BPETokenizer.train(texts, size, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 5  # and no temporary file


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_cache_is_replaced_with_a_warning(bpe, tmp_path, damage):
    BPETokenizer.train(TEXTS, SIZE, cache=tmp_path)
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    broken = bytearray(whole)
    broken[-99] ^= 1
    file.write_bytes({"flipped": bytes(broken), "cut": whole[:-7], "empty": b""}[damage])
    with pytest.warns(UserWarning, match=r"cached tokenizer '\S+json' is damaged; training it again"):
        again = BPETokenizer.train(TEXTS, SIZE, cache=tmp_path)
    assert again.definition == bpe.definition
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("in the way of a folder")
    with pytest.warns(UserWarning, match=r"the trained tokenizer is not kept in '\S+file'"):
        assert BPETokenizer.train(TEXTS, SIZE, cache=tmp_path / "file").vocab_size == SIZE


def test_a_text_too_short_for_the_size_gives_fewer_ids_with_a_warning():
    with pytest.warns(UserWarning, match="too short for vocab_size=999: its merges give 258 ids"):
        tokenizer = BPETokenizer.train(["abab"], 999, cache=None)
    assert tokenizer.vocab_size == 258


def test_bpe_cannot_be_smaller_than_its_bytes():
    with pytest.raises(ValueError, match="vocab_size=256 is too small: 256 bytes .* need at least 257 ids"):
        BPETokenizer.train(TEXTS, 256)


def test_without_the_tokenizers_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install -e '.\[hf\]' .*, or use tokenizer='bytes'"):
        make_tokenizer("bpe:300", TEXTS, cache=None)
    assert make_tokenizer("bytes", TEXTS).decode([104, 105]) == "hi"


def test_a_string_stands_for_a_tokenizer(bpe):
    assert isinstance(make_tokenizer("bytes", []), ByteTokenizer)
    assert make_tokenizer(f"bpe:{SIZE}", TEXTS, cache=None).definition == bpe.definition
    assert make_tokenizer(bpe, []) is bpe


@pytest.mark.parametrize("name", ["byte", "bpe", "bpe:", "bpe:8k", "bpe:-300", "bytes:257", ""])
def test_an_unknown_tokenizer_lists_the_legal_ones(name):
    with pytest.raises(ValueError, match=f"unknown tokenizer '{name}'; legal are 'bytes', 'bpe:SIZE' .*'bpe:8192'"):
        make_tokenizer(name, TEXTS)


def test_an_object_that_is_no_tokenizer_is_told_what_it_lacks():
    class Half:
        vocab_size = 300

        def encode(self, text):
            return []

    with pytest.raises(TypeError, match="Half is no tokenizer: it lacks end, decode"):
        make_tokenizer(Half(), TEXTS)
