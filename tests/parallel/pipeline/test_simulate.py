"""Simulated times against the formulas of the papers. Times are whole numbers, so that equal means equal."""

import doctest
import itertools

import numpy as np
import pytest

from shardlm.parallel.pipeline import SCHEDULES, Times, asynchronous, make_table, orders, simulate, synchronous

STAGES = (2, 4, 8)
TIMES = ((1, 2), (1, 1), (3, 2), (2, 5))  # of forward and backward


@pytest.mark.parametrize("p", STAGES)
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_bubble_of_gpipe_and_1f1b(name, p):
    for m, (f, b) in itertools.product((p, 2 * p, 4 * p + 1), TIMES):
        times = Times(forward=f, backward=b)
        for simulation in (asynchronous(orders(name, p, m), times), synchronous(make_table(name, p, m), times)):
            assert simulation.makespan == (m + p - 1) * (f + b)
            assert simulation.ideal == m * (f + b)
            assert simulation.bubble_fraction == (p - 1) / m


@pytest.mark.parametrize("p", STAGES)
@pytest.mark.parametrize("v", [1, 2, 3])
def test_bubble_of_interleaved(p, v):
    for m, (f, b) in itertools.product((p, 2 * p, 4 * p), TIMES):
        times = Times(forward=f, backward=b)  # of a chunk, so F / v and B / v of a stage
        for simulation in (
            asynchronous(orders("interleaved", p, m, v), times),
            synchronous(make_table("interleaved", p, m, v), times),
        ):
            assert simulation.makespan == (v * m + p - 1) * (f + b)
            assert simulation.ideal == v * m * (f + b)
            assert simulation.bubble_fraction == (p - 1) / (v * m)


@pytest.mark.parametrize("p", STAGES)
def test_bubble_of_zb_h1(p):
    for m in (p, 2 * p, 4 * p + 1):
        order, table = orders("zb-h1", p, m), make_table("zb-h1", p, m)
        for f, i, w in itertools.product((1, 2, 3), repeat=3):
            times = Times(forward=f, input_gradient=i, weight_gradient=w)
            simulation = asynchronous(order, times)
            assert simulation.ideal == m * (f + i + w)
            if w <= min(f, i):
                assert simulation.bubble == (p - 1) * (f + i - w)
            assert simulation.bubble == (p - 1) * max(f + i - w, f, i)
            if m == p:  # ticks are counted alike for any m
                assert synchronous(table, times).makespan == (m + p - 1) * (f + i) + m * w
        assert synchronous(table, Times(forward=3, input_gradient=2)).makespan == (m + p - 1) * 5 + m


@pytest.mark.parametrize("p", STAGES)
def test_peak_activations(p):
    for m in (p, 2 * p, 4 * p + 1):
        assert asynchronous(orders("gpipe", p, m)).peak_activations == (m,) * p
        assert asynchronous(orders("1f1b", p, m)).peak_activations == tuple(min(p - i, m) for i in range(p))
        assert asynchronous(orders("zb-h1", p, m)).peak_activations == (min(p, m),) * p
    for m, v in itertools.product((p, 2 * p, 4 * p), (2, 3)):
        peak = asynchronous(orders("interleaved", p, m, v)).peak_activations
        assert peak == tuple(min(2 * (p - i - 1) + (v - 1) * p + 1, v * m) for i in range(p))


@pytest.mark.parametrize(("name", "v"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 3), ("zb-h1", 1)])
def test_messages(name, v):
    p, m = 4, 8
    for simulation in (asynchronous(orders(name, p, m, v)), synchronous(make_table(name, p, m, v))):
        # One activation and one gradient for each boundary of virtual stages and microbatch.
        assert simulation.activations == simulation.gradients == m * (v * p - 1)
    assert sum(tick.activations for tick in simulation.ticks) == m * (v * p - 1)
    assert sum(tick.gradients for tick in simulation.ticks) == m * (v * p - 1)
    assert max(tick.activations for tick in simulation.ticks) == (p if v > 1 else p - 1)


def test_a_stage_runs_one_operation_at_a_time_and_none_before_its_input():
    times = Times(forward=[2, 3, 2], backward=[4, 5, 3], send=1)
    for simulation in (asynchronous(orders("1f1b", 3, 5), times), synchronous(make_table("1f1b", 3, 5), times)):
        ends = {(span.stage, str(span.operation)): span.end for span in simulation.spans}
        assert len(ends) == 2 * 3 * 5
        for stage in range(3):
            spans = sorted(span[2:] for span in simulation.spans if span.stage == stage)
            assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
        for span in simulation.spans:
            source = span.stage + (-1 if span.operation.kind == "F" else 1)
            if 0 <= source < 3:
                assert span.start >= ends[source, str(span.operation)] + 1


def test_a_tick_lasts_as_long_as_its_slowest_stage():
    times = Times(forward=[1, 4, 2], backward=[7, 2, 2])
    simulation = synchronous(make_table("1f1b", 3, 5), times)
    # Three ticks with forwards alone, four with both, three with backwards alone.
    assert [tick.end - tick.start for tick in simulation.ticks] == [4] * 3 + [8] * 4 + [7] * 3
    assert simulation.work == (5 * 8, 5 * 6, 5 * 4)
    assert simulation.bubble == 3 * 4 + 4 * 8 + 3 * 7 - 40


def test_a_send_lengthens_the_ticks_that_send():
    p, m, f, b, send = 4, 8, 2, 3, 1
    plain, slow = (synchronous(make_table("1f1b", p, m), Times(forward=f, backward=b, send=x)) for x in (0, send))
    # Activations leave stages 0 to p - 2 in ticks 0 to m + p - 3, gradients in ticks p to m + 2 p - 3.
    assert slow.makespan == plain.makespan + (m + 2 * p - 2) * send
    # Asynchronous stages hide it but for the first microbatch's way there and back and what 1F1B waits for.
    assert asynchronous(orders("gpipe", p, m), Times(forward=f, backward=b, send=send)).bubble == (p - 1) * (
        f + b + 2 * send
    )


def test_embedding_and_head():
    p, m = 4, 8
    times = Times(forward=1, backward=2, embedding=4, embedding_backward=4, head=12)
    table = make_table("1f1b", p, m)
    shared = synchronous(table, times)
    alone = synchronous(table, times, vocabulary_split=False)
    whole = m * (4 + 4 + 12)
    assert shared.makespan == (m + p - 1) * 3 + whole / p
    assert shared.work == (m * 3 + whole / p,) * p
    # Every tick waits for the first and the last stage, one after the other.
    assert alone.makespan == (m + p - 1) * 3 + whole
    assert alone.work == (m * (3 + 8), m * 3, m * 3, m * (3 + 12))
    # Without ticks it is the last stage that all wait for, from its first forward to its last backward.
    classic = asynchronous(orders("1f1b", p, m), times)
    assert classic.work == alone.work
    assert classic.makespan == (4 + 1 + 2) + m * (1 + 12 + 2) + 2 * 2 + (2 + 4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_work_does_not_depend_on_the_accounting(name):
    times = Times(forward=[1, 2, 3], backward=[3, 1, 2], input_gradient=[2, 2, 1], weight_gradient=[1, 3, 1])
    classic, packed = asynchronous(orders(name, 3, 6), times), synchronous(make_table(name, 3, 6), times)
    assert classic.work == packed.work
    assert classic.makespan <= packed.makespan


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ({"send": -1}, "send=-1; a time is not negative"),
        ({"backward": [1, -2, 1]}, r"backward=\[1, -2, 1\]; a time is not negative"),
    ],
)
def test_negative_times(times, message):
    with pytest.raises(ValueError, match=message):
        Times(**times)


def test_times_of_another_number_of_stages():
    times = Times(forward=np.array([1, 2]))
    with pytest.raises(ValueError, match="forward has 2 times; there are 3 stages"):
        asynchronous(orders("1f1b", 3, 5), times)
    with pytest.raises(ValueError, match="forward has 2 times; there are 3 stages"):
        synchronous(make_table("1f1b", 3, 5), times)
    assert asynchronous(orders("1f1b", 2, 5), times).work == (5 * (1 + 2), 5 * (2 + 2))


def test_the_examples_run():
    result = doctest.testmod(simulate)
    assert result.attempted >= 4 and not result.failed
