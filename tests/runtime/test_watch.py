"""A phase that takes far longer than those before it is reported, once per doubling; others are not."""

import threading
import time

import pytest

from shardlm.runtime.watch import Watch, limits


def test_what_is_usual_is_not_reported(tmp_path):
    with (tmp_path / "report").open("w+") as stream:
        with Watch("process 0 of 2", factor=5, least=0.1, stream=stream) as watch:
            for step in range(3):
                with watch.phase("step", step):
                    time.sleep(0.05)
        stream.seek(0)
        assert stream.read() == ""


def test_a_hang_is_reported_with_stacks_and_hints_and_ended_if_asked(tmp_path):
    ended = threading.Event()
    with (tmp_path / "report").open("w+") as stream:
        watch = Watch("process 1 of 2", factor=2, least=0.2, stream=stream, abort=True, end=ended.set)
        with watch:
            for step in range(1, 4):
                with watch.phase("step", step):
                    time.sleep(0.01)
            with watch.phase("step", 4, hints=lambda: "it waits in an all-reduce"):
                assert ended.wait(10.0)
                ended.clear()
                assert ended.wait(10.0)  # when it has taken twice as long
        stream.seek(0)
        lines = stream.read().splitlines()
    heads = [line for line in lines if "has been in" in line]
    assert len(heads) == 2
    assert heads[0].startswith("process 1 of 2 has been in its step of step 4 for ")
    assert "; the median of the last 3 is 0.01" in heads[0] and heads[0].endswith("It is ended now. Its threads:")
    assert lines.count("it waits in an all-reduce") == 2
    assert any("test_watch.py" in line and "test_a_hang_is_reported" in line for line in lines)  # the stack


def test_what_has_no_history_is_given_longer(tmp_path):
    with (tmp_path / "report").open("w+") as stream:
        with Watch("process 0 of 1", factor=1, least=0.05, stream=stream) as watch, watch.phase("step", 1):
            time.sleep(0.4)  # 8 times `least`, of 30
        stream.seek(0)
        assert stream.read() == ""


def test_the_limits():
    assert limits({}) == (10.0, 60.0)
    assert limits({"SHARDLM_HANG": "5:0.5"}) == (5.0, 0.5)
    for wrong in ("5", "0:1", "a:b", "5:-1", "5:inf"):
        with pytest.raises(ValueError, match="is not FACTOR:SECONDS, as in 10:60"):
            limits({"SHARDLM_HANG": wrong})
