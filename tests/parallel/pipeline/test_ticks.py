"""Packed tables: how many ticks and slots they have, and that executing one computes the gradients."""

import dataclasses
import doctest
import importlib

import numpy as np
import pytest

from shardlm.parallel.pipeline import Kind, Operation, make_table, synchronous

CASES = [
    *((name, p, m, 1) for name in ("gpipe", "1f1b", "zb-h1") for p in (1, 2, 4, 8) for m in (1, p, 2 * p, 4 * p + 1)),
    *(("interleaved", p, m, v) for p in (1, 2, 4, 8) for m in (p, 2 * p, 4 * p) for v in (1, 2, 3)),
]


def last_first(stages, microbatches, chunks):
    """All forwards, then the backwards in the opposite order, in two chunks: not one of the named schedules."""
    forwards = [Operation(Kind.FORWARD, i, c) for c in range(chunks) for i in range(microbatches)]
    return [[*forwards, *(op._replace(kind=Kind.BACKWARD) for op in reversed(forwards))]] * stages


@pytest.mark.parametrize(("name", "p", "m", "v"), CASES)
def test_ticks_with_forwards_and_with_backwards(name, p, m, v):
    table = make_table(name, p, m, v)
    assert table.has_forward.sum() == table.has_backward.sum() == v * m + p - 1
    assert table.has_weight.sum() == (m if name == "zb-h1" else 0)
    # One run of each kind: forwards only at the start, backwards only at the end, both in between.
    runs = [(segment.has_forward, segment.has_backward) for segment in table.segments]
    middle = [] if name == "gpipe" or m == 1 else [(True, True)]
    assert list(dict.fromkeys(runs)) == [(True, False), *middle, (False, True)]
    assert table.segments[0].start == 0 and table.segments[-1].stop == table.ticks


def test_the_whole_table_of_a_small_schedule():
    table = make_table("1f1b", 2, 3)
    rows = {name: array.astype(int).T.tolist() for name, array in table.rows().items()}
    assert rows["forward_microbatch"] == [[0, 1, 2, -1, -1, -1], [-1, 0, 1, 2, -1, -1]]
    assert rows["forward_chunk"] == [[0, 0, 0, -1, -1, -1], [-1, 0, 0, 0, -1, -1]]
    assert rows["forward_read"] == [[-1] * 6, [-1, 0, 0, 0, -1, -1]]
    assert rows["forward_stash"] == [[0, 1, 2, -1, -1, -1], [-1, 0, 0, 0, -1, -1]]
    assert rows["activation_arrival"] == [[-1] * 6, [0, 0, 0, -1, -1, -1]]
    assert rows["backward_microbatch"] == [[-1, -1, -1, 0, 1, 2], [-1, -1, 0, 1, 2, -1]]
    assert rows["backward_stash"] == [[-1, -1, -1, 0, 1, 2], [-1, -1, 0, 0, 0, -1]]
    assert rows["backward_read"] == [[-1, -1, -1, 0, 0, 0], [-1, -1, 0, 0, 0, -1]]
    assert rows["gradient_arrival"] == [[-1, -1, 0, 0, 0, -1], [-1] * 6]
    assert rows["embed_microbatch"] == [0, 1, 2, -1, -1, -1]
    assert rows["head_microbatch"] == [-1, 0, 1, 2, -1, -1]
    assert rows["head_write"] == [-1, 0, 0, 0, -1, -1]
    assert rows["embed_gradient_microbatch"] == [-1, -1, -1, 0, 1, 2]
    assert rows["sends_activation"] == [1, 1, 1, 0, 0, 0]
    assert rows["sends_gradient"] == [0, 0, 1, 1, 1, 0]
    assert [tuple(segment) for segment in table.segments] == [
        (0, 2, True, False, False),
        (2, 4, True, True, False),
        (4, 6, False, True, False),
    ]


def test_interleaving_wraps_around():
    table = make_table("interleaved", 2, 2, 2)
    assert table.forward_chunk.T.tolist() == [[0, 0, 1, 1, -1, -1, -1, -1, -1], [-1, 0, 0, 1, 1, -1, -1, -1, -1]]
    assert table.backward_chunk.T.tolist() == [[-1, -1, -1, -1, -1, 1, 1, 0, 0], [-1, -1, -1, -1, 1, 1, 0, 0, -1]]
    # Chunk 0 of stage 1 sends to chunk 1 of stage 0, whose gradient comes back; the last chunk of stage 1 sends no
    # activation, and chunk 0 of stage 0 no gradient.
    assert (table.activation_arrival >= 0).T.astype(int).tolist() == [[0, 1, 1] + [0] * 6, [1, 1, 1, 1] + [0] * 5]
    assert (table.gradient_arrival >= 0).T.astype(int).tolist() == [[0] * 4 + [1] * 4 + [0], [0] * 5 + [1, 1, 0, 0]]


def test_the_stash_is_as_small_as_the_ticks_allow():
    for p in (2, 4, 8):
        for m in (p, 2 * p, 4 * p + 1):
            peaks = {name: synchronous(make_table(name, p, m)).peak_activations for name in ("gpipe", "1f1b", "zb-h1")}
            assert peaks["gpipe"] == (m,) * p
            # p - s - 1 more than the asynchronous p - s: both directions are as long as the way to the last stage.
            assert peaks["1f1b"] == tuple(min(2 * (p - s) - 1, m) for s in range(p))
            # All stages free their inputs in the same ticks, which is p - 1 more than the asynchronous p on the first.
            assert peaks["zb-h1"] == tuple(min(2 * p - 1 - s, m) for s in range(p))
        for v in (2, 3):
            for m in (p, 2 * p, 4 * p):
                peak = synchronous(make_table("interleaved", p, m, v)).peak_activations
                assert peak == tuple(min(2 * (p - s - 1) + (v - 1) * p + 1, v * m) for s in range(p))


@pytest.mark.parametrize(("name", "p", "m", "v"), CASES)
def test_there_are_no_more_slots_than_values(name, p, m, v):
    table = make_table(name, p, m, v)
    assert table.stash_slots == max(synchronous(table).peak_activations)
    assert table.activation_slots == (1 if p * v > 1 else 0)
    assert table.gradient_slots == (m if name == "gpipe" else 1)  # GPipe's last stage keeps the heads' gradients
    assert table.weight_slots == (min(p, m) if name == "zb-h1" else 0)


@pytest.mark.parametrize(("name", "v"), [("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zb-h1", 1)])
@pytest.mark.parametrize("p", [2, 4])
def test_slots_do_not_grow_with_microbatches(name, p, v):
    tables = [make_table(name, p, m, v) for m in (8, 16, 32, 64)]
    slots = {(t.activation_slots, t.gradient_slots, t.stash_slots, t.weight_slots) for t in tables}
    assert len(slots) == 1
    # The same schedule with all forwards first is not bounded: the claim is the schedule's and not the compiler's.
    assert [make_table(last_first, p, m, v).stash_slots for m in (8, 16, 32, 64)] == [8 * v, 16 * v, 32 * v, 64 * v]


def test_gpipe_grows_with_microbatches():
    assert [make_table("gpipe", 4, m).stash_slots for m in (8, 16, 32, 64)] == [8, 16, 32, 64]


def execute(table, weights, inputs):
    """Runs a table on numbers: chunk c of stage s is x -> tanh(w x), the loss of a microbatch y^2 / 2.

    What is read is replaced by NaN, and all that a tick reads is read before it writes, as the table allows.
    """
    p, v = table.stages, table.chunks
    empty = lambda slots: np.full((p, slots + 1), np.nan)  # noqa: E731  the last row takes what goes nowhere
    activation, gradient = empty(table.activation_slots), empty(table.gradient_slots)
    stash, rest = empty(table.stash_slots), empty(table.weight_slots)
    grads, input_grads, loss = np.zeros((v, p)), np.zeros(len(inputs)), 0.0

    def take(buffer, s, slot, free=True):
        value = buffer[s, slot]
        if free:
            buffer[s, slot] = np.nan
        return value

    for t in range(table.ticks):
        row = {name: array[t] for name, array in table.rows().items()}
        outputs, input_gradients = np.full(p, np.nan), np.full(p, np.nan)
        for s in range(p):
            if row["backward_microbatch"][s] >= 0:
                chunk = row["backward_chunk"][s]
                x = take(stash, s, row["backward_stash"][s], free=not table.split)
                inner = (1 - np.tanh(weights[chunk, s] * x) ** 2) * take(gradient, s, row["backward_read"][s])
                input_gradients[s] = inner * weights[chunk, s]
                if table.split:
                    rest[s, row["backward_write"][s]] = inner
                else:
                    grads[chunk, s] += inner * x
        for s in range(p):
            if row["weight_microbatch"][s] >= 0:
                x = take(stash, s, row["weight_stash"][s])
                grads[row["weight_chunk"][s], s] += take(rest, s, row["weight_read"][s]) * x
        if row["embed_gradient_microbatch"] >= 0:
            input_grads[row["embed_gradient_microbatch"]] += input_gradients[0]
        for s in range(p):
            if row["forward_microbatch"][s] >= 0:
                embedded = row["forward_read"][s] < 0
                x = inputs[row["embed_microbatch"]] if embedded else take(activation, s, row["forward_read"][s])
                stash[s, row["forward_stash"][s]] = x
                outputs[s] = np.tanh(weights[row["forward_chunk"][s], s] * x)
        if row["head_microbatch"] >= 0:
            loss += outputs[-1] ** 2 / 2
            gradient[-1, row["head_write"]] = outputs[-1]
        for s in range(p):
            activation[s, row["activation_arrival"][s]] = outputs[s - 1]
        for s in range(p):
            slot = row["gradient_arrival"][s]
            if slot >= 0:
                gradient[s, slot] = input_gradients[(s + 1) % p]
    return loss, grads, input_grads


@pytest.mark.parametrize(
    ("schedule", "p", "m", "v"),
    [("gpipe", 3, 5, 1), ("1f1b", 3, 5, 1), ("1f1b", 4, 3, 1), ("interleaved", 3, 6, 3), ("zb-h1", 3, 5, 1)]
    + [(last_first, 3, 5, 2), ("interleaved", 1, 4, 3)],
)
def test_executing_a_table_computes_the_gradients(schedule, p, m, v):
    rng = np.random.default_rng(0)
    weights, inputs = rng.normal(size=(v, p)), rng.normal(size=m)
    loss, grads, input_grads = execute(make_table(schedule, p, m, v), weights, inputs)

    expected, expected_inputs, total = np.zeros((v, p)), np.zeros(m), 0.0
    for i, x in enumerate(inputs):
        values = [x]
        for w in weights.ravel():
            values.append(np.tanh(w * values[-1]))
        total, g = total + values[-1] ** 2 / 2, values[-1]
        for n in reversed(range(v * p)):
            inner = (1 - values[n + 1] ** 2) * g
            expected.ravel()[n] += inner * values[n]
            g = inner * weights.ravel()[n]
        expected_inputs[i] = g
    np.testing.assert_allclose(loss, total, rtol=1e-12)
    np.testing.assert_allclose(grads, expected, rtol=1e-12)
    np.testing.assert_allclose(input_grads, expected_inputs, rtol=1e-12)


def test_executing_a_table_with_two_slots_exchanged_does_not():
    table = make_table("1f1b", 3, 5)
    stash = table.backward_stash.copy()
    assert table.backward_microbatch[5:7, 0].tolist() == [0, 1]
    stash[[5, 6], 0] = stash[[6, 5], 0]
    weights, inputs = np.linspace(0.5, 1.5, 3)[None], np.linspace(-1, 1, 5)
    _, right, _ = execute(table, weights, inputs)
    _, wrong, _ = execute(dataclasses.replace(table, backward_stash=stash), weights, inputs)
    assert abs(wrong - right).max() > 1e-3


def test_a_schedule_of_a_user_goes_through():
    table = make_table(last_first, 3, 5, 2)
    assert (table.ticks, table.stash_slots, table.chunks) == (2 * (2 * 5 + 2), 10, 2)
    assert [i for i in table.backward_microbatch[:, 0] if i >= 0] == [4, 3, 2, 1, 0] * 2


def test_tables_are_read_only():
    table = make_table("1f1b", 2, 3)
    with pytest.raises(ValueError, match="read-only"):
        table.forward_microbatch[0, 0] = 1
    with pytest.raises(AttributeError, match="cannot assign"):
        table.stages = 3


def test_a_printed_table_with_chunks_and_split_backwards():
    lines = str(make_table("interleaved", 2, 2, 2)).splitlines()
    assert lines[1:4] == [
        "tick             0   1   2   3   4   5   6   7   8",
        "kind             F   F   F   F  FB   B   B   B   B",
        "embed            0   1   .   .   .   .   .   .   .",
    ]
    assert lines[6:8] == [
        "stage 0 F        0   1 0.1 1.1   .   .   .   .   .",
        "stage 0 B        .   .   .   .   . 0.1 1.1   0   1",
    ]
    lines = str(make_table("zb-h1", 2, 3)).splitlines()
    assert lines[0].endswith("slots per stage: 1 activation, 1 gradient, 3 stash, 2 weight")
    assert lines[2] == "kind             F   F  FI FIW  IW  IW"
    assert [line.split()[2] for line in lines if line.startswith("stage")] == ["F", "I", "W"] * 2


def test_the_example_runs():
    # The module by its name: the package does not re-export it.
    result = doctest.testmod(importlib.import_module("shardlm.parallel.pipeline.ticks"))
    assert result.attempted and not result.failed
