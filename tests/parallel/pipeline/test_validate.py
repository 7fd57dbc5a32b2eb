"""The validator finds what is wrong with a table, and says where."""

import dataclasses

import numpy as np
import pytest

from shardlm.parallel.pipeline import SCHEDULES, make_table, validate
from shardlm.parallel.pipeline.table import PER_STAGE, PER_TICK, PREDICATES

# The table of 1F1B with 3 stages and 5 microbatches, which most of the corruptions start from:
#   tick       0  1  2  3  4  5  6  7  8  9
#   stage 0 F  0  1  2  3  4  .  .  .  .  .
#   stage 0 B  .  .  .  .  .  0  1  2  3  4
#   stage 1 F  .  0  1  2  3  4  .  .  .  .
#   stage 1 B  .  .  .  .  0  1  2  3  4  .
#   stage 2 F  .  .  0  1  2  3  4  .  .  .
#   stage 2 B  .  .  .  0  1  2  3  4  .  .


def changed(table, changes):
    """A copy of the table with `{(array, index): value}` applied; the index `...` is the whole array."""
    arrays = {}
    for (name, index), value in changes.items():
        arrays.setdefault(name, getattr(table, name).copy())[index] = value
    return dataclasses.replace(table, **arrays)


def idle(name, tick, stage, fields):
    return {(f"{name}_{field}", (tick, stage)): -1 for field in ("microbatch", "chunk", *fields)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Something does not run, and nobody else is told.
        (
            idle("forward", 1, 1, ["read", "stash"]),
            "tick 1, stage 1: F1 of stage 0 writes the output of F1 on stage 0 to activation slot 0, which still holds "
            "the output of F0 on stage 0",
        ),
        (
            idle("forward", 5, 1, ["read", "stash"]),
            "tick 5, stage 2: activation_arrival is 0, but stage 1 sends it no activation",
        ),
        (
            idle("backward", 9, 0, ["stash", "read"])
            | {("has_backward", 9): False, ("embed_gradient_microbatch", 9): -1},
            "stage 0: B4 is missing from all 10 ticks",
        ),
        # The wrong microbatch or chunk.
        (
            {("forward_microbatch", (1, 1)): 1},
            "tick 1, stage 1: F1 needs the output of F1 on stage 0 in its activation slot",
        ),
        ({("forward_microbatch", (2, 1)): 0}, "tick 2, stage 1: F0 already ran in tick 1"),
        ({("forward_chunk", (1, 1)): 1}, "tick 1, stage 1: forward_chunk is 1, which is not -1 to 0"),
        ({("forward_chunk", (1, 1)): -1}, "tick 1, stage 1: forward of microbatch 0 has no chunk"),
        (
            {("backward_microbatch", (4, 1)): 1},
            "tick 4, stage 1: B1 needs the input of F1 in its stash slot; slot 0 holds",
        ),
        # Slots.
        (
            {("forward_stash", (4, 0)): 0},
            "tick 4, stage 0: F4 writes the input of F4 to stash slot 0, which still holds ",
        ),
        ({("backward_stash", (4, 1)): 2}, "B0 needs the input of F0 in its stash slot; slot 2 holds the input of F2"),
        ({("backward_stash", (4, 1)): 4}, "B0 needs the input of F0 in its stash slot; slot 4 holds nothing"),
        ({("backward_read", (4, 1)): -1}, "B0 needs the gradient of the output of F0 on stage 1 .*; it names no slot"),
        ({("forward_read", (0, 0)): 0}, "tick 0, stage 0: F0 reads the embedding, but forward_read is 0; -1 says so"),
        ({("forward_read", (1, 1)): 1}, "tick 1, stage 1: forward_read is 1, which is not -1 to 0"),
        ({("forward_stash", (1, 1)): -1}, "tick 1, stage 1: F0 has no stash slot to write the input of F0 to"),
        ({("backward_write", (4, 1)): 0}, "backward_write is 0, which is not -1 to -1"),
        (
            {("forward_stash", (0, 1)): 0},
            "tick 0, stage 1: no forward, but forward_stash is 0; -1 says that it is idle",
        ),
        # Arrivals.
        (
            {("activation_arrival", (0, 1)): -1},
            "F0 of stage 0 has no activation slot to write the output of F0 on stage 0",
        ),
        (
            {("gradient_arrival", (3, 1)): -1},
            "tick 3, stage 1: B0 of stage 2 has no gradient slot to write the gradient",
        ),
        ({("gradient_arrival", (0, 1)): 0}, "tick 0, stage 1: gradient_arrival is 0, but stage 2 sends it no gradient"),
        ({("activation_arrival", (2, 0)): 0}, "tick 2, stage 0: activation_arrival is 0, but stage 2 sends it no"),
        # Predicates.
        ({("has_forward", 6): False}, "tick 6, stage 2: F4 does not run, as has_forward is false in this tick"),
        ({("has_backward", 0): True}, "tick 0: has_backward is true, and no stage has such an operation"),
        ({("has_weight", 5): True}, "tick 5: has_weight is true, and no stage has such an operation"),
        # Embedding and head.
        ({("embed_microbatch", 2): 1}, "tick 2, stage 0: embed_microbatch is 1, but F2 needs 2"),
        ({("head_microbatch", 4): -1}, "tick 4, stage 2: head_microbatch is -1, but F2 needs 2"),
        (
            {("head_microbatch", 1): 0},
            "tick 1, stage 2: head_microbatch is 0, but there is no such operation, so it has to be -1",
        ),
        ({("head_write", 4): -1}, "tick 4, stage 2: the head of microbatch 2 has no gradient slot to write"),
        ({("head_write", 0): 0}, "tick 0, stage 2: head_write is 0, but head_microbatch is -1"),
        ({("embed_gradient_microbatch", 5): -1}, "tick 5, stage 0: embed_gradient_microbatch is -1, but B0 needs 0"),
    ],
)
def test_a_corruption_is_named(changes, message):
    table = changed(make_table("1f1b", 3, 5), changes)
    with pytest.raises(ValueError, match=message):
        validate(table)


def test_a_backward_in_the_tick_of_the_last_forward_is_too_early():
    """The head's gradient is there one tick later."""
    table = make_table("1f1b", 1, 2)
    shift = {
        (f"backward_{field}", ...): np.roll(getattr(table, f"backward_{field}"), -1, axis=0)
        for field in ("microbatch", "chunk", "stash", "read")
    }
    early = changed(
        table,
        shift | {("has_backward", ...): [True, True, False]} | {("embed_gradient_microbatch", ...): [0, 1, -1]},
    )
    with pytest.raises(
        ValueError, match="tick 0, stage 0: B0 needs the input of F0 in its stash slot; slot 0 holds nothing"
    ):
        validate(early)


def test_a_send_takes_a_tick():
    table = make_table("1f1b", 2, 1)
    rows = {f"forward_{field}": getattr(table, f"forward_{field}").copy() for field in ("microbatch", "chunk", "read")}
    for array in rows.values():
        array[0, 1] = array[1, 1]
        array[1, 1] = -1
    early = dataclasses.replace(
        table,
        **rows,
        forward_stash=np.roll(table.forward_stash, -1, axis=0) * [0, 1] + table.forward_stash * [1, 0],
        head_microbatch=np.roll(table.head_microbatch, -1),
        head_write=np.roll(table.head_write, -1),
        has_forward=np.roll(table.has_forward, -1) & table.has_forward,
    )
    with pytest.raises(
        ValueError, match="tick 0, stage 1: F0 needs the output of F0 on stage 0 .*; slot 0 holds nothing"
    ):
        validate(early)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({("weight_read", (4, 1)): 0}, "W1 needs what I1 keeps for the weights in its weight slot; slot 0 holds"),
        (
            {("weight_stash", (4, 0)): -1},
            r"tick 4, stage 0: W1 needs the input of F1 in its stash slot; it names no slot",
        ),
        ({("backward_write", (2, 1)): -1}, "tick 2, stage 1: I0 has no weight slot to write what I0 keeps"),
        ({("weight_microbatch", (5, 0)): 1}, "tick 5, stage 0: W1 already ran in tick 4"),
        (idle("weight", 5, 0, ["stash", "read"]), "stage 0: W2 is missing from all 6 ticks"),
        (
            {("forward_stash", (2, 1)): 0},
            "F1 writes the input of F1 to stash slot 0, which still holds the input of F0",
        ),
    ],
)
def test_a_corrupt_split_backward_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        validate(changed(make_table("zb-h1", 2, 3), changes))


def test_a_table_without_split_backwards_has_no_weight_gradients():
    table = make_table("zb-h1", 2, 3)
    with pytest.raises(ValueError, match="tick 2, stage 1: B0 is not split, but has a backward_write"):
        validate(dataclasses.replace(table, split=False))
    whole = make_table("1f1b", 2, 3)
    extra = changed(whole, {("weight_microbatch", (4, 1)): 0, ("weight_chunk", (4, 1)): 0, ("has_weight", 4): True})
    with pytest.raises(ValueError, match="tick 4, stage 1: W0 in a table whose backwards are not split"):
        validate(extra)


def test_arrays_have_the_table_s_shape():
    table = make_table("1f1b", 2, 3)
    with pytest.raises(ValueError, match=r"forward_read has shape \(5, 2\); 6 ticks need \(6, 2\)"):
        validate(dataclasses.replace(table, forward_read=table.forward_read[1:]))


@pytest.mark.parametrize(("name", "sizes"), [("1f1b", (3, 4)), ("interleaved", (2, 2, 2)), ("zb-h1", (2, 3))])
def test_every_change_of_one_number_is_found(name, sizes):
    table = make_table(name, *sizes)
    limits = [table.microbatches, table.stash_slots, table.chunks]
    missed, tried = [], 0
    for array in (*PER_STAGE, *PER_TICK, *PREDICATES):
        original = getattr(table, array)
        values = [False, True] if array in PREDICATES else range(-1, max(limits))
        for index in np.ndindex(original.shape):
            for value in set(values) - {original[index]}:
                tried += 1
                try:
                    validate(changed(table, {(array, index): value}))
                except ValueError:
                    continue
                missed.append((array, index, value))
    assert tried > 500
    assert missed == []


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("field", ["activation_slots", "gradient_slots", "stash_slots"])
def test_no_slot_is_spare(name, field):
    table = make_table(name, 3, 6)
    validate(table)
    with pytest.raises(ValueError, match="which is not -1 to"):
        validate(dataclasses.replace(table, **{field: getattr(table, field) - 1}))
