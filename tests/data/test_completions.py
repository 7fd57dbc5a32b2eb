"""Examples packed whole, each once, the loss on completions and their end alone; none is cut in silence."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from shardlm.data import Batches, ByteTokenizer, Completions, Encoder, Example, Piece, load_examples

END = 256
BYTES = Encoder.of(ByteTokenizer())


def example(prompt: str, completion: str, where: str = "x:1") -> Example:
    return Example(where, (Piece(prompt, False), Piece(completion, True)))


def random_examples(count: int, longest: int = 9) -> list[Example]:
    random = np.random.default_rng(3)
    text = lambda low: "".join(chr(c) for c in random.integers(97, 123, random.integers(low, longest)))  # noqa: E731
    return [example(text(0), text(1), f"x:{i}") for i in range(count)]


def segments_of(packed: Completions) -> list[tuple[list[int], list[int], list[float]]]:
    """What each segment of all rows holds: inputs, targets and weights."""
    found = []
    for i in range(len(packed)):
        row = packed[i]
        for segment in range(1, row["segments"].max() + 1):
            held = row["segments"] == segment
            assert row["positions"][held].tolist() == list(range(held.sum()))
            found.append(tuple(row[name][held].tolist() for name in ("tokens", "targets", "weights")))
        padding = row["segments"] == 0
        assert not row["weights"][padding].any() and (row["tokens"][padding] == END).all()
        assert (np.diff(np.flatnonzero(~padding)) == 1).all()
    return found


def test_the_loss_is_on_the_completion_and_its_end_alone():
    row = Completions([example("ab", "cd")], 7, BYTES)[0]
    assert {name: array.dtype for name, array in row.items()} == {
        "tokens": np.int32, "targets": np.int32, "weights": np.float32, "segments": np.int32, "positions": np.int32,
    }  # fmt: skip
    assert row["tokens"].tolist() == [END, *b"abcd", END, END]
    assert row["targets"].tolist() == [*b"abcd", END, END, END]
    assert row["weights"].tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert row["segments"].tolist() == [1, 1, 1, 1, 1, 0, 0]


def test_every_example_is_in_one_row_whole_and_once():
    examples = random_examples(101)
    packed = Completions(examples, 23, BYTES)
    expected = []
    for e in examples:
        prompt, completion = (piece.text.encode() for piece in e.pieces)
        ids = [END, *prompt, *completion, END]
        expected.append((ids[:-1], ids[1:], [0.0] * len(prompt) + [1.0] * (len(completion) + 1)))
    assert sorted(segments_of(packed)) == sorted(expected)
    assert packed.counts == {
        "examples": 101,
        "tokens": sum(len(inputs) for inputs, _, _ in expected),
        "learned": sum(int(sum(weights)) for _, _, weights in expected),
        "rows": len(packed),
    }
    assert len(packed) <= -(-packed.tokens // 23) + 1  # best fit of so many short ones leaves next to nothing free


def test_several_turns_each_end():
    turns = (Piece("q", False), Piece("a", True), Piece("r", False), Piece("b", True))
    row = Completions([Example("x:1", turns)], 6, BYTES)[0]
    assert row["targets"].tolist() == [*b"qa", END, *b"rb", END][:6]
    assert row["weights"].tolist() == [0, 1, 1, 0, 1, 1]


def test_a_tokenizer_without_a_beginning_starts_with_the_prompt():
    row = Completions([example("ab", "c")], 4, Encoder(BYTES.encode, 257, END, None))[0]
    assert (row["tokens"].tolist(), row["targets"].tolist()) == ([*b"abc", END], [*b"bc", END, END])
    assert row["weights"].tolist() == [0, 1, 1, 0]
    with pytest.raises(ValueError, match=r"1 examples have no prompt.*the first is x:1: give begin="):
        Completions([example("", "c")], 4, Encoder(BYTES.encode, 257, END, None))


LONG = [example("abcdef", "xy", "x:1"), example("a", "b", "x:2"), example("ab", "uvwxyz", "x:3")]


def test_an_example_longer_than_a_row_is_an_error_unless_it_is_said_what_to_do():
    message = (
        r"2 of 3 examples are longer than sequence=5 tokens; the longest, x:1, has 9: use sequence=9, or say too_long"
    )
    with pytest.raises(ValueError, match=message):
        Completions(LONG, 5, BYTES)
    assert len(Completions(LONG, 9, BYTES)) == 3
    with pytest.warns(
        UserWarning, match=r"2 of 3 examples .* were left out, 18 tokens in all; the longest, x:1, has 9"
    ):
        dropped = Completions(LONG, 5, BYTES, "drop")
    assert [bytes(t[:-1]) for _, t, _ in segments_of(dropped)] == [b"ab"]
    assert dropped.counts == {"examples": 1, "tokens": 3, "learned": 2, "rows": 1, "dropped": 2, "tokens lost": 18}


@pytest.mark.parametrize("begin", [END, None])
def test_truncation_takes_from_the_prompts_beginning_and_then_from_the_end(begin):
    with pytest.warns(UserWarning, match="2 of 3 examples .* and were cut, by"):
        cut = Completions(LONG, 5, Encoder(BYTES.encode, 257, END, begin), "truncate")
    found = {bytes(i % 256 for i in [*t[:1], *targets]): weights for t, targets, weights in segments_of(cut)}
    if begin == END:
        assert found == {
            b"\0efxy\0": [0, 0, 1, 1, 1],
            b"\0ab\0": [0, 1, 1],
            b"\0uvwxy": [1, 1, 1, 1, 1],
        }
        assert cut.counts["tokens lost"] == 8
    else:
        assert found == {b"defxy\0"[1 - 1 :]: [0, 0, 1, 1, 1], b"ab\0": [1, 1], b"buvwxy": [1, 1, 1, 1, 1]}
        assert cut.counts["tokens lost"] == 6
    assert cut.counts["truncated"] == 2


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="sequence must be at least 1"):
        Completions(LONG, 0, BYTES)
    with pytest.raises(ValueError, match="too_long='cut'; it is one of None, 'truncate', 'drop'"):
        Completions(LONG, 5, BYTES, "cut")
    with pytest.raises(ValueError, match="no examples"):
        Completions([], 5, BYTES)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="all 3 were left out"):
        Completions(LONG, 1, BYTES, "drop")
    silent = Encoder(lambda text: np.zeros(0, np.int32), 257, END, END)
    with pytest.raises(ValueError, match="3 examples have no token to learn, the first is x:1"):
        Completions(LONG, 5, silent)
    with pytest.raises(ValueError, match="x:1: the tokenizer gave ids from 97 to 102, and has 0 to 99"):
        Completions(LONG, 5, Encoder(BYTES.encode, 100, 99, None))


class Foreign:
    """A tokenizer as `transformers` has them: a special token in front, unless told otherwise."""

    eos_token_id, bos_token_id, vocab_size = 1, 2, 300

    def __len__(self):
        return 400  # with added ids

    def encode(self, text, add_special_tokens=True):
        ids = [ord(c) + 3 for c in text]
        return [2, *ids] if add_special_tokens else ids


def test_tokenizers_of_others_are_taken_as_they_are():
    foreign = Encoder.of(Foreign())
    assert (foreign.vocab_size, foreign.end, foreign.begin) == (400, 1, 2)
    assert foreign.encode("ab").tolist() == [100, 101]
    row = Completions([example("a", "b")], 3, foreign)[0]
    assert (row["tokens"].tolist(), row["targets"].tolist()) == ([2, 100, 101], [100, 101, 1])
    # As `tokenizers` has them: an object with .ids, and no name for the end.
    fast = SimpleNamespace(encode=lambda text: SimpleNamespace(ids=[5] * len(text)), get_vocab_size=lambda: 9)
    assert Encoder.of(fast, end=8).encode("xyz").tolist() == [5, 5, 5]
    assert Encoder.of(fast, end=8).begin is None
    with pytest.raises(ValueError, match="end=None is no token id of SimpleNamespace, which has 0 to 8: give end="):
        Encoder.of(fast)
    with pytest.raises(ValueError, match="begin=9 is no token id"):
        Encoder.of(fast, end=8, begin=9)
    with pytest.raises(TypeError, match=r"object is no tokenizer: it has no method encode\(text\)"):
        Encoder.of(object())
    with pytest.raises(ValueError, match="does not say how many ids it has"):
        Encoder.of(SimpleNamespace(encode=list, eos_token_id=1))
    with pytest.raises(TypeError, match=r"encode\('ab'\) gave <U1\[2\]; expected are integers \[tokens\]"):
        Encoder.of(SimpleNamespace(encode=list, eos_token_id=1, vocab_size=3)).encode("ab")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "examples.jsonl"
    pairs = [{"prompt": e.pieces[0].text, "completion": e.pieces[1].text} for e in random_examples(60)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def test_loaded_examples_are_batches_indexed_by_step(file):
    data = load_examples(file, sequence=24, batch_size=4, held_out=0.2)
    assert isinstance(data.train, Batches) and data.held_out is not None
    counts = data.counts
    assert counts["train"]["examples"] + counts["held_out"]["examples"] == 60
    assert 3 <= counts["held_out"]["examples"] <= 24
    assert f"train {counts['train']['examples']} examples, " in repr(data) and " learned, " in repr(data)
    again, other = (load_examples(file, sequence=24, batch_size=4, held_out=0.2, seed=s).train for s in (0, 1))
    for step in (0, 1, 37):
        for name, array in data.train[step].items():
            assert array.shape == (4, 24)
            np.testing.assert_array_equal(array, again[step][name])
    assert any((data.train[step]["tokens"] != other[step]["tokens"]).any() for step in range(3))
    part = load_examples(file, sequence=24, batch_size=4, held_out=0.2, rows=slice(1, 3)).train
    np.testing.assert_array_equal(part[5]["tokens"], data.train[5]["tokens"][1:3])
    # In one epoch every learned token is once.
    rows = len(data.train.packed)
    learned = sum(data.train._shuffled[i]["weights"].sum() for i in range(rows))
    assert learned == counts["train"]["learned"]


def test_equal_examples_are_on_one_side_and_a_file_may_be_held_out(file, tmp_path):
    twice = tmp_path / "twice.jsonl"
    twice.write_text(file.read_text() * 2)
    data = load_examples(twice, sequence=24, batch_size=4, held_out=0.3)
    counts = data.counts
    assert counts["train"]["examples"] % 2 == counts["held_out"]["examples"] % 2 == 0
    sides = [{tuple(targets) for _, targets, _ in segments_of(part.packed)} for part in (data.train, data.held_out)]
    assert not sides[0] & sides[1]
    pairs = [{"prompt": "", "completion": f"<{i // 2}>"} for i in range(120)]  # none of those to train on
    twice.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    data = load_examples(file, sequence=24, batch_size=4, held_out=twice)
    assert [data.counts[side]["examples"] for side in ("train", "held_out")] == [60, 120]
    assert load_examples(file, sequence=24, batch_size=4, held_out=0).held_out is None


def test_too_few_examples_for_a_batch_are_refused(file):
    with pytest.raises(ValueError, match=r"batch_size=500 is more than the \d+ row\(s\)"):
        load_examples(file, sequence=24, batch_size=500)
