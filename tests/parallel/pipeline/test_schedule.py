"""Orders of operations: what the named schedules give, and what a user's may not."""

import doctest

import pytest

from shardlm.parallel.pipeline import SCHEDULES, Kind, Operation, orders, schedule

F, B, I, W = Kind  # noqa: E741


def text(name, *sizes):
    return [" ".join(map(str, order)) for order in orders(name, *sizes)]


def test_gpipe():
    assert text("gpipe", 2, 3) == ["F0 F1 F2 B0 B1 B2"] * 2


def test_1f1b():
    assert text("1f1b", 3, 5) == [
        "F0 F1 F2 B0 F3 B1 F4 B2 B3 B4",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 B4",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4",
    ]


def test_1f1b_with_fewer_microbatches_than_stages():
    assert text("1f1b", 4, 2) == ["F0 F1 B0 B1", "F0 F1 B0 B1", "F0 F1 B0 B1", "F0 B0 F1 B1"]


def test_interleaved():
    assert text("interleaved", 2, 4, 2) == [
        "F0 F1 F0.1 F1.1 F2 B0.1 F3 B1.1 F2.1 B0 F3.1 B1 B2.1 B3.1 B2 B3",
        "F0 F1 F0.1 B0.1 F1.1 B1.1 F2 B0 F3 B1 F2.1 B2.1 F3.1 B3.1 B2 B3",
    ]


def test_interleaved_with_one_chunk_is_1f1b():
    assert orders("interleaved", 4, 8, 1) == orders("1f1b", 4, 8)


def test_zb_h1():
    assert text("zb-h1", 3, 5) == [
        "F0 F1 F2 I0 W0 F3 I1 W1 F4 I2 W2 I3 W3 I4 W4",
        "F0 F1 I0 F2 I1 W0 F3 I2 W1 F4 I3 W2 I4 W3 W4",
        "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 F4 I4 W2 W3 W4",
    ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_stage_needs_no_other(name):
    [order] = orders(name, 1, 3)
    assert sorted(order)[:3] == [(B, 0, 0), (B, 1, 0), (B, 2, 0)] or name == "zb-h1"
    assert len(order) == (9 if name == "zb-h1" else 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f1b", 0, 4), "stages=0; it is at least 1"),
        (("1f1b", 4, 0), "microbatches=0; it is at least 1"),
        (("interleaved", 4, 4, 0), "chunks=0; it is at least 1"),
        (("1F1B", 4, 8), "schedule='1F1B'; it is one of 'gpipe', '1f1b', 'interleaved', 'zb-h1', or a function"),
        (("interleaved", 4, 9, 2), "microbatches=9 and stages=4: use microbatches=8 or 12, or schedule '1f1b'"),
        (("interleaved", 4, 3, 2), "microbatches=3 and stages=4: use microbatches=4, or schedule '1f1b'"),
        (("interleaved", 4, 3, 1), "needs microbatches to be a multiple of the stages"),
        (("gpipe", 4, 8, 2), "schedule 'gpipe' has one chunk per stage, but chunks=2; 'interleaved' has several"),
        (("1f1b", 4, 8, 2), "schedule '1f1b' has one chunk per stage"),
        (("zb-h1", 4, 8, 3), "schedule 'zb-h1' has one chunk per stage, but chunks=3"),
    ],
)
def test_illegal_sizes_and_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        orders(*arguments)


def whole(i):
    return [Operation(F, i), Operation(B, i)]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([[*whole(0), *whole(1)]], "gave orders for 1 stages; there are 2"),
        ([[*whole(0), *whole(1)], whole(0)], r"stage 1: F1 \(and 1 more\) is missing"),
        ([[*whole(0), *whole(1)], [*whole(0), *whole(1), Operation(B, 1)]], "stage 1: B1 comes twice"),
        ([[*whole(0), *whole(1), *whole(2)], [*whole(0), *whole(1)]], r"stage 0: F2 \(and 1 more\) is not among 2 m"),
        ([[*whole(0), *whole(1)], [*whole(0), Operation(F, 1), Operation(B, 1, 1)]], "stage 1: B1.1 is not among"),
        (
            [[*whole(0), *whole(1)], [*whole(0), Operation(F, 1), Operation(I, 1), Operation(W, 1)]],
            r"mixes whole backwards \(B\) with split ones \(I and W\)",
        ),
    ],
)
def test_incomplete_orders(result, message):
    with pytest.raises(ValueError, match=message):
        orders(lambda *_: result, 2, 2)


def test_a_deadlock_names_what_waits_for_what():
    crossed = [[*whole(0), *whole(1)], [*whole(1), *whole(0)]]
    with pytest.raises(
        ValueError, match="B0 on stage 0 waits for B0 on stage 1; F1 on stage 1 waits for F1 on stage 0"
    ):
        orders(lambda *_: crossed, 2, 2)
    backwards = [[Operation(B, 0), Operation(F, 0)]]
    with pytest.raises(ValueError, match="the orders deadlock: B0 on stage 0 waits for F0 on stage 0$"):
        orders(lambda *_: backwards, 1, 1)
    weights = [[Operation(F, 0), Operation(W, 0), Operation(I, 0)]]
    with pytest.raises(ValueError, match="W0 on stage 0 waits for I0 on stage 0$"):
        orders(lambda *_: weights, 1, 1)


def test_the_example_runs():
    result = doctest.testmod(schedule)
    assert result.attempted and not result.failed
