"""Batches depend on seed and step alone, a process reads its own rows only, and an epoch holds every row once."""

import gc
import itertools
import threading

import numpy as np
import pytest

from shardlm.data import Batches, ByteTokenizer, Document, Epoch, Packed, load

ROWS, SEQUENCE, BATCH = 13, 3, 5  # the batch does not divide the rows
DOCUMENTS = [Document(f"{i}.txt", f"document number {i}") for i in range(17)]


class Recording(Packed):
    """Remembers which rows were read."""

    def __init__(self):
        # every token differs, so that a row is known by its first
        super().__init__([np.arange(ROWS * SEQUENCE - 1)], SEQUENCE, vocab_size=100, end=99)
        self.read = []

    def __getitem__(self, index):
        self.read.append(int(index))
        return super().__getitem__(index)


class Broken(Recording):
    """Cannot be read."""

    def __getitem__(self, index):
        raise OSError("the disk is gone")


def row_of(targets):
    """The index of the row that begins with this target."""
    return int(targets[0]) // SEQUENCE


def order(batches, count):
    rows = [row_of(row) for step in range(-(-count // BATCH)) for row in batches[step]["targets"]]
    return rows[:count]


def assert_same(batch, other):
    assert list(batch) == list(other)
    for name in batch:
        np.testing.assert_array_equal(batch[name], other[name])


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("shardlm-data")]


def test_each_epoch_holds_every_row_once_in_an_order_of_its_own():
    rows = order(Batches(Recording(), BATCH), 4 * ROWS)
    epochs = [tuple(rows[i : i + ROWS]) for i in range(0, 4 * ROWS, ROWS)]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert len(set(epochs)) == 4 and tuple(range(ROWS)) not in epochs


def test_a_batch_depends_on_seed_and_step_alone():
    batches, again = Batches(Recording(), BATCH, seed=3), Batches(Recording(), BATCH, seed=3)
    later = batches[1000]
    for step in (7, 0, 2):
        assert_same(batches[step], again[step])
    assert_same(later, again[1000])


def test_another_seed_is_another_order_and_not_the_next_epoch_of_its_neighbour():
    orders = [tuple(order(Batches(Recording(), BATCH, seed), 2 * ROWS)) for seed in (-1, 0, 1, 2**40)]
    epochs = [epoch for both in orders for epoch in (both[:ROWS], both[ROWS:])]
    assert len(set(epochs)) == 8


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_the_rows_of_two_processes_are_the_whole_batch_and_no_other_row_is_read(cut):
    whole, low, high = Recording(), Recording(), Recording()
    batches = Batches(whole, BATCH)
    lows, highs = Batches(low, BATCH, rows=slice(0, cut)), Batches(high, BATCH, rows=range(cut, BATCH))
    assert (low.read, high.read) == ([], [])
    for step in (0, 2, 9):
        whole.read, low.read, high.read = [], [], []
        batch, first, second = batches[step], lows[step], highs[step]
        assert_same({name: np.concatenate([first[name], second[name]]) for name in first}, batch)
        assert low.read == whole.read[:cut]
        assert high.read == whole.read[cut:]
        assert len(whole.read) == BATCH


def test_rows_may_be_strided():
    batches = Batches(Recording(), BATCH)
    assert_same(
        Batches(batches.packed, BATCH, rows=slice(1, None, 2))[4],
        {name: array[1::2] for name, array in batches[4].items()},
    )


def test_an_epoch_is_counted_in_whole_steps():
    assert Batches(Recording(), BATCH).steps_per_epoch == 3
    assert set(order(Batches(Recording(), BATCH), 3 * BATCH)) == set(range(ROWS))
    assert Batches(Recording(), ROWS).steps_per_epoch == 1


def test_iteration_yields_the_steps_in_order_from_any_start():
    batches = Batches(Recording(), BATCH)
    for step, batch in enumerate(itertools.islice(batches, 4)):
        assert_same(batch, batches[step])
    for step, batch in enumerate(itertools.islice(batches.iterate(6, ahead=3), 4)):
        assert_same(batch, batches[6 + step])


def test_no_more_is_read_ahead_than_asked_for():
    packed = Recording()
    iterator = Batches(packed, BATCH).iterate(ahead=2)
    assert packed.read == []
    next(iterator)
    iterator.close()  # ends the thread, so that the count stands still
    assert BATCH <= len(packed.read) <= 3 * BATCH


@pytest.mark.parametrize("end", ["close", "drop", "exhaust"])
def test_no_thread_is_left_behind(end):
    assert threads() == []
    iterator = iter(Epoch(Recording(), BATCH)) if end == "exhaust" else iter(Batches(Recording(), BATCH))
    next(iterator)
    assert len(threads()) == 1
    if end == "close":
        iterator.close()
    elif end == "drop":
        del iterator
        gc.collect()
    else:
        assert len(list(iterator)) == 2
    assert threads() == []


def test_an_error_of_the_reading_thread_reaches_the_caller():
    with pytest.raises(OSError, match="the disk is gone"):
        next(iter(Batches(Broken(), BATCH)))
    gc.collect()
    assert threads() == []


@pytest.mark.parametrize("batch_size", [1, 5, 13, 20])
def test_evaluation_sees_every_row_once_and_fills_up_with_weight_zero(batch_size):
    epoch = Epoch(Recording(), batch_size)
    batches = list(epoch)
    assert len(batches) == len(epoch) == -(-ROWS // batch_size)
    assert all(batch["tokens"].shape == (batch_size, SEQUENCE) for batch in batches)
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    assert [row_of(row) for row in joined["targets"][:ROWS]] == list(range(ROWS))
    assert (joined["weights"][:ROWS] == 1).all()
    assert not joined["weights"][ROWS:].any() and not joined["segments"][ROWS:].any()
    for batch, again in zip(batches, epoch, strict=True):
        assert_same(batch, again)


def test_evaluation_reads_the_rows_of_its_process_only():
    whole, low, high = Recording(), Recording(), Recording()
    parts = zip(Epoch(low, BATCH, rows=slice(0, 4)), Epoch(high, BATCH, rows=slice(4, 5)), strict=True)
    for batch, (first, second) in zip(Epoch(whole, BATCH), parts, strict=True):
        assert_same({name: np.concatenate([first[name], second[name]]) for name in first}, batch)
    assert low.read == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12]
    assert high.read == [4, 9]
    with pytest.raises(IndexError, match="batch 3 of 3"):
        Epoch(whole, BATCH)[3]


def test_a_batch_larger_than_an_epoch_is_an_error_with_the_numbers():
    message = r"batch_size=14 is more than the 13 row\(s\) that 39 tokens make at sequence=3; lower batch_size"
    with pytest.raises(ValueError, match=message):
        Batches(Recording(), 14)


@pytest.mark.parametrize("kind", [Batches, Epoch])
def test_impossible_batches_and_rows_are_errors(kind):
    with pytest.raises(ValueError, match="batch_size must be at least 1 row, got 0"):
        kind(Recording(), 0)
    for rows in (slice(3, 6), range(2, 9), slice(2, 2), slice(-2, None), range(-1, 2)):
        with pytest.raises(ValueError, match=r"must be one or more of the rows of the global batch, 0 to 4"):
            kind(Recording(), BATCH, rows=rows)
    with pytest.raises(TypeError, match="rows must be a slice, a range or None, got list"):
        kind(Recording(), BATCH, rows=[0, 1])


def test_impossible_steps_are_errors():
    batches = Batches(Recording(), BATCH)
    with pytest.raises(ValueError, match="step must be 0 or more, got -1"):
        batches[-1]
    with pytest.raises(ValueError, match="step must be 0 or more, got -2"):
        batches.iterate(-2)
    with pytest.raises(ValueError, match="ahead must be at least 1 batch, got 0"):
        batches.iterate(ahead=0)


def test_load_holds_out_documents_and_counts_both_sides():
    data = load(DOCUMENTS, sequence=7, batch_size=3, held_out=0.2)
    counts = data.counts
    assert counts["train"]["documents"] + counts["held_out"]["documents"] == 17
    assert counts["train"]["tokens"] + counts["held_out"]["tokens"] == sum(len(text) + 1 for _, text in DOCUMENTS)
    assert data.train[0]["tokens"].shape == data.held_out[0]["tokens"].shape == (3, 7)
    assert str(data) == (
        "train 15 documents, 277 tokens, 40 rows; held out 2 documents, 36 tokens, 6 rows (rows of 7); ByteTokenizer()"
    )


def test_load_reads_files_and_a_separate_held_out_file(tmp_path):
    (tmp_path / "train.txt").write_text("to be or not to be")
    (tmp_path / "valid.txt").write_text("that is the question")
    data = load(tmp_path / "train.txt", sequence=4, batch_size=2, held_out=tmp_path / "valid.txt")
    texts = [part.packed._stream for part in (data.train, data.held_out)]
    assert [data.tokenizer.decode(text) for text in texts] == ["to be or not to be", "that is the question"]


def test_load_takes_documents_and_paths_together(tmp_path):
    (tmp_path / "more.txt").write_text("to be or not to be")
    data = load([*DOCUMENTS, tmp_path / "more.txt"], sequence=4, batch_size=2, held_out=0)
    assert data.counts["train"]["documents"] == 18


def test_load_without_held_out_documents():
    data = load(DOCUMENTS[:1], sequence=4, batch_size=2, held_out=0)
    assert data.held_out is None
    assert data.counts["held_out"] == {"documents": 0, "tokens": 0, "rows": 0}


def test_load_trains_a_tokenizer_on_the_training_documents_alone(tmp_path):
    first = load(DOCUMENTS[5:], "bpe:260", held_out=DOCUMENTS[:3], sequence=4, batch_size=2, cache=tmp_path)
    load(DOCUMENTS[5:], "bpe:260", held_out=DOCUMENTS[3:5], sequence=4, batch_size=2, cache=tmp_path)
    assert first.tokenizer.vocab_size == 260
    assert len(list(tmp_path.iterdir())) == 1


def test_load_takes_a_tokenizer_seed_and_rows():
    tokenizer = ByteTokenizer()
    data = load(DOCUMENTS, tokenizer, sequence=7, batch_size=3, seed=5, rows=slice(1, 3))
    assert data.tokenizer is tokenizer
    assert data.train[2]["tokens"].shape == data.held_out[0]["tokens"].shape == (2, 7)
    whole = load(DOCUMENTS, tokenizer, sequence=7, batch_size=3, seed=5)
    np.testing.assert_array_equal(data.train[2]["tokens"], whole.train[2]["tokens"][1:])


def test_load_of_one_file_holds_out_its_end(tmp_path):
    (tmp_path / "only.txt").write_text("to be or not to be\n" * 20)
    data = load(tmp_path / "only.txt", sequence=8, batch_size=2, held_out=0.2)
    # Each part ends in a token of its own.
    assert [sizes["tokens"] for sizes in data.counts.values()] == [19 * 16 + 1, 19 * 4 + 1]


def test_the_default_text_needs_no_path():
    data = load()
    assert data.counts["train"]["documents"] > 300
    assert data.train.steps_per_epoch > 1000
    assert data.train[0]["tokens"].shape == (8, 128)
