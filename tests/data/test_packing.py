"""Packed rows hold every token of every document exactly once, and say where each document is."""

import itertools

import grain
import numpy as np
import pytest

from shardlm.data import Packed

END = 10
LENGTHS = (5, 0, 1, 13, 2, 7, 0)  # empty documents, and one longer than two rows


def documents_of(lengths, high=END):
    rng = np.random.default_rng(0)
    return [rng.integers(0, high, length) for length in lengths]


def pack(documents, sequence):
    return Packed(documents, sequence, vocab_size=END + 1, end=END)


def pairs_of(documents):
    """The definition: END t1 .. tn predicts t1 .. tn END."""
    return [pair for tokens in documents for pair in itertools.pairwise([END, *tokens.tolist(), END])]


def unpack(rows):
    """Rebuilds the documents from rows alone, by their boundaries."""
    targets = np.concatenate([row["targets"][row["weights"] == 1] for row in rows])
    return [part[:-1] for part in np.split(targets, np.flatnonzero(targets == END) + 1)[:-1]]


@pytest.mark.parametrize("sequence", [1, 3, 4, 5, 35, 100])
def test_every_document_is_rebuilt_from_the_rows(sequence):
    documents = documents_of(LENGTHS)
    rebuilt = unpack(list(pack(documents, sequence)))
    assert [part.tolist() for part in rebuilt] == [tokens.tolist() for tokens in documents]


@pytest.mark.parametrize("sequence", [1, 3, 4, 5, 35, 100])
def test_the_pairs_of_the_rows_in_order_are_those_of_the_definition(sequence):
    documents = documents_of(LENGTHS)
    rows = list(pack(documents, sequence))
    weights = np.concatenate([row["weights"] for row in rows])
    pairs = [pair for row in rows for pair in zip(row["tokens"].tolist(), row["targets"].tolist(), strict=True)]
    assert pairs[: int(weights.sum())] == pairs_of(documents)
    # padding stands at the very end only, and is less than a row
    assert weights.tolist() == [1.0] * len(pairs_of(documents)) + [0.0] * (-len(pairs_of(documents)) % sequence)


@pytest.mark.parametrize("sequence", [1, 3, 4, 5, 100])
def test_segments_and_positions_follow_the_documents(sequence):
    documents = documents_of(LENGTHS)
    owner = [i for i, tokens in enumerate(documents) for _ in range(len(tokens) + 1)]
    for i, row in enumerate(pack(documents, sequence)):
        segments, positions, previous = [], [], None
        for document in owner[i * sequence : (i + 1) * sequence]:
            same = document == previous
            segments.append(segments[-1] if same else (segments[-1] if segments else 0) + 1)
            positions.append(positions[-1] + 1 if same else 0)
            previous = document
        rest = [0] * (sequence - len(segments))
        assert row["segments"].tolist() == segments + rest
        assert row["positions"].tolist() == positions + rest


def test_a_row_by_hand():
    packed = pack([[7, 8, 9], [], [5]], sequence=4)
    first, second = packed
    assert first["tokens"].tolist() == [END, 7, 8, 9]
    assert first["targets"].tolist() == [7, 8, 9, END]
    assert second["tokens"].tolist() == [END, END, 5, END]
    assert second["targets"].tolist() == [END, 5, END, END]
    assert second["weights"].tolist() == [1, 1, 1, 0]
    assert second["segments"].tolist() == [1, 2, 2, 0]
    assert second["positions"].tolist() == [0, 0, 1, 0]


def test_rows_have_one_length_and_the_types_of_a_batch():
    for row in [*pack(documents_of(LENGTHS), 6), pack([[1]], 6).padding()]:
        assert {name: (array.dtype, array.shape) for name, array in row.items()} == {
            "tokens": (np.int32, (6,)),
            "targets": (np.int32, (6,)),
            "weights": (np.float32, (6,)),
            "segments": (np.int32, (6,)),
            "positions": (np.int32, (6,)),
        }


def test_a_change_of_one_token_is_seen():
    documents = documents_of(LENGTHS)
    packed = pack(documents, 4)
    packed._stream[9] = (packed._stream[9] + 1) % END
    assert [part.tolist() for part in unpack(list(packed))] != [tokens.tolist() for tokens in documents]


def test_it_counts_and_is_a_source_for_grain():
    packed = pack(documents_of(LENGTHS), 4)
    assert (packed.documents, packed.tokens, len(packed)) == (7, sum(LENGTHS) + 7, 9)
    assert repr(packed) == "Packed(7 documents, 35 tokens, 9 rows of 4)"
    assert isinstance(packed, grain.sources.RandomAccessDataSource)
    np.testing.assert_array_equal(packed[np.int64(3)]["tokens"], packed[3]["tokens"])


@pytest.mark.parametrize("index", [-1, 9])
def test_a_row_that_is_not_there_is_an_index_error(index):
    with pytest.raises(IndexError, match=f"row {index} of 9"):
        pack(documents_of(LENGTHS), 4)[index]


@pytest.mark.parametrize(("vocab_size", "bytes_per_token"), [(2**16, 2), (2**16 + 1, 4)])
def test_tokens_take_two_bytes_where_the_vocabulary_fits(vocab_size, bytes_per_token):
    tokens = np.array([0, 1, vocab_size - 2])
    packed = Packed([tokens], 4, vocab_size=vocab_size, end=vocab_size - 1)
    assert packed._stream.itemsize == bytes_per_token
    assert packed[0]["targets"].tolist() == [*tokens.tolist(), vocab_size - 1]


@pytest.mark.parametrize("sequence", [0, -3])
def test_rows_of_no_token_are_an_error(sequence):
    with pytest.raises(ValueError, match=f"sequence must be at least 1 token per row, got {sequence}"):
        pack([[1]], sequence)


@pytest.mark.parametrize("documents", [[], [[], []]])
def test_packing_nothing_is_an_error(documents):
    with pytest.raises(ValueError, match=rf"nothing to pack: the {len(documents)} document\(s\) given hold no token"):
        pack(documents, 4)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([3, 11], "document 1 has token ids from 3 to 11; vocab_size=11 allows 0 to 10"),
        ([-1, 3], "document 1 has token ids from -1 to 3; vocab_size=11 allows 0 to 10"),
        ([3, END, END], r"document 1 contains the boundary end=10 2 time\(s\)"),
        ([[3]], r"document 1 must be integers of shape \[tokens\], got int64\[1, 1\]"),
        ([0.5], r"document 1 must be integers of shape \[tokens\], got float64\[1\]"),
    ],
)
def test_tokens_that_cannot_be_packed_are_an_error_that_names_the_document(bad, message):
    with pytest.raises(ValueError, match=message):
        pack([[1], bad], 4)


def test_the_boundary_must_be_a_token():
    with pytest.raises(ValueError, match="end=11 is not a token id: .* vocab_size=11"):
        Packed([[1]], 4, vocab_size=11, end=11)
