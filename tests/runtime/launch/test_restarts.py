"""When to start again, on how many processes, and when to give up."""

import dataclasses

from shardlm.runtime.launch.restarts import AT_ONCE, Failure, Restarts
from shardlm.runtime.processes import TRANSIENT

KILLED, LOST = Failure({1: -9}, ["step 3"], 30.0), Failure({0: TRANSIENT}, ["Gloo AllReduce failed"], 30.0)


def error(text: str = "ValueError: boom 17", seconds: float = 3.0) -> Failure:
    return Failure({0: 1}, ["Traceback", text, ""], seconds)


def test_what_was_killed_is_started_again_as_often_as_allowed():
    restarts = Restarts(3, minimum=2, count=2, backoff=0.5)
    waits = []
    for failure in (KILLED, LOST, KILLED):
        assert restarts.after(failure) == ""
        waits.append(restarts.wait)
    assert waits == [0.5, 1.0, 2.0]
    assert restarts.count == 2
    assert restarts.after(KILLED) == "3 restarts without a new checkpoint were allowed"
    assert Restarts(0, 1, 1).after(KILLED) == "no restarts are allowed (--restarts 0)"
    assert Restarts(99, 1, 1, made=50).wait == 60.0


def test_the_same_error_twice_at_once_ends_it():
    restarts = Restarts(9, minimum=2, count=2)
    assert restarts.after(error()) == ""
    assert restarts.after(error("ValueError: boom 18")) != ""  # numbers aside
    restarts = Restarts(9, minimum=2, count=2)
    for failure in (error(), error("OSError: no route"), KILLED, error(), error(seconds=AT_ONCE + 1), error()):
        assert restarts.after(failure) == ""


def test_lost_processes_are_done_without():
    restarts = Restarts(9, minimum=1, count=4)
    assert restarts.after(Failure({1: -9, 3: -9}, [], 50.0)) == "" and restarts.count == 2
    assert restarts.after(KILLED) == "" and restarts.count == 1
    assert restarts.after(KILLED) == "" and restarts.count == 1


def test_an_error_of_the_script_loses_no_process():
    restarts = Restarts(9, minimum=1, count=4)
    assert restarts.after(error(seconds=500.0)) == "" and restarts.count == 4


def test_a_number_that_the_layout_cannot_use_is_passed_over():
    restarts = Restarts(1, minimum=1, count=4)
    assert restarts.after(KILLED) == "" and restarts.count == 3
    assert restarts.after(error("LayoutError: 3")) == "" and restarts.count == 2  # no restart that counts
    assert restarts.made == 1
    assert restarts.after(KILLED) == "1 restarts without a new checkpoint were allowed"


def test_a_new_checkpoint_gives_the_restarts_back():
    restarts = Restarts(2, minimum=2, count=2, backoff=0.5)
    progressed = dataclasses.replace(LOST, progressed=True)
    for failure in (KILLED, KILLED, progressed, LOST, progressed, KILLED):
        assert restarts.after(failure) == ""
    assert (restarts.made, restarts.wait) == (2, 1.0)
    assert restarts.after(KILLED) == "2 restarts without a new checkpoint were allowed"
    # The same error after a new checkpoint each time is no run that cannot begin; without one it still is.
    restarts = Restarts(9, minimum=2, count=2)
    again = dataclasses.replace(error(), progressed=True)
    assert [restarts.after(failure) for failure in (error(), again, again)] == [""] * 3
    assert "in the same way twice" in restarts.after(error())
    assert Restarts(0, 1, 1).after(progressed) == "no restarts are allowed (--restarts 0)"
