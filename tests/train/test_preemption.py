"""SIGTERM to a run of one process; of several, tests/runtime/test_together.py."""

import os
import signal

import jax
import numpy as np
import pytest

import shardlm as sl
from shardlm.runtime.preemption import Preemption

CONFIG = sl.TransformerConfig(vocab_size=67, num_layers=1, d_model=12, num_heads=2, d_ff=24)


def batches(at: int, steps: int = 6):
    """As many batches, with a SIGTERM to this process before one of them."""
    for step in range(1, steps + 1):
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        random = np.random.default_rng(step)
        yield {name: random.integers(0, 67, (4, 8)) for name in ("tokens", "targets")}


@pytest.fixture(scope="module")
def trainer() -> sl.Trainer:
    return sl.Trainer(CONFIG, sl.Layout(data=2), devices=jax.devices()[:2])


@pytest.fixture(autouse=True)
def the_handler_is_as_before():
    yield
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_step_is_saved_and_the_process_ends_with_status_0(trainer, tmp_path, capsys):
    with pytest.raises(sl.Preempted, match="ended by SIGTERM: step 3 is saved in") as raised:
        trainer.fit(batches(at=3), 6, checkpoint_dir=tmp_path, checkpoint_every=2)
    assert isinstance(raised.value, SystemExit) and raised.value.code == 0
    assert f"ended by SIGTERM: step 3 is saved in {tmp_path}\n" in capsys.readouterr().out
    assert int(sl.restore(tmp_path / "3", trainer).step) == 3
    assert int(trainer.fit(batches(at=0), 6, checkpoint_dir=tmp_path).step) == 6


def test_what_is_saved_nowhere_does_not_end_well(trainer):
    with pytest.raises(sl.Preempted, match="step 3 is not saved") as raised:
        trainer.fit(batches(at=3), 6)
    assert raised.value.code == 128 + signal.SIGTERM


def test_a_signal_after_the_last_step_is_not_lost(monkeypatch):
    sent = []
    monkeypatch.setattr(signal, "raise_signal", sent.append)
    with Preemption():
        os.kill(os.getpid(), signal.SIGTERM)
    assert sent == [signal.SIGTERM]


def test_a_handler_of_the_users_stays():
    def mine(*_):
        pass

    signal.signal(signal.SIGTERM, mine)
    try:
        with Preemption() as preemption:
            assert signal.getsignal(signal.SIGTERM) is mine
            assert not preemption.reached(1)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
