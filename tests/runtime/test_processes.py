"""What `initialize` takes, before any process is joined; `test_together.py` joins some."""

import jax
import pytest

import shardlm as sl
from shardlm.runtime import clusters, processes
from shardlm.runtime.identity import identity, sources


def test_alone_it_does_nothing(monkeypatch):
    for name in (clusters.COORDINATOR, clusters.PROCESSES, clusters.PROCESS, clusters.DEVICES):
        monkeypatch.delenv(name, raising=False)
    assert sl.initialize() is None
    assert sl.initialize("127.0.0.1:1", 1, 0) is None
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"coordinator": "a:1", "processes": 2},
            "initialize: process not given; coordinator, processes and process go",
        ),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "process 2 of 2 .arguments.; the number of processes"),
        ({"coordinator": "a:1", "processes": 2.0, "process": 1}, "process 1 of 2.0"),
        ({"coordinator": "a", "processes": 2, "process": 1}, "the coordinator 'a' is not host:port"),
        (
            {"coordinator": "a:1", "processes": 2, "process": 1, "timeout": 0},
            "SHARDLM_TIMEOUT=0; it is a number of sec",
        ),
    ],
)
def test_what_it_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        sl.initialize(**arguments)


def test_which_accelerators_a_process_takes():
    def taken(local_index, local_count, devices):
        return processes._local_devices(clusters.Place("a:1", 8, 5, local_index, local_count, "x"), devices)

    assert taken(0, 1, 0) is None  # alone on its machine: all
    assert taken(1, 4, 0) == [1]
    assert taken(1, 4, 2) == [2, 3]


def test_a_trainer_under_a_launcher_says_that_initialize_was_forgotten(monkeypatch):
    trainer = sl.Trainer(sl.presets.tiny(num_layers=1), sl.Layout(data=2), devices=jax.devices()[:2])
    monkeypatch.setenv(clusters.PROCESSES, "2")
    with pytest.raises(ValueError, match=r"started as one of several, and has not joined them: call sl.initialize\(\)"):
        trainer.init()


def test_code_is_known_by_its_contents(tmp_path):
    known = identity()
    assert known["jax"] == jax.__version__
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("x = 1")
    before = sources(tmp_path)
    (tmp_path / "c.txt").write_text("no code")
    assert sources(tmp_path) == before
    (tmp_path / "b.py").write_text("x = 2")
    assert sources(tmp_path) != before


def test_a_lost_peer_is_told_from_an_error_of_ones_own():
    lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:1")
    assert processes._says_a_peer_died(lost)
    assert not processes._says_a_peer_died(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    assert not processes._says_a_peer_died(ValueError("Gloo"))
