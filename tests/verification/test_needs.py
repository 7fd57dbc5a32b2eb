"""Both sides of a verification are weighed against the memory before either is begun."""

import jax
import pytest

import shardlm as sl
from shardlm.runtime import memory
from shardlm.verification import needs, run
from tests.train.test_room import suggested

LAYOUT = sl.Layout(fsdp=4)


def test_what_does_not_fit_on_the_host_is_refused_with_a_model_that_would(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: int(24e9))
    monkeypatch.setattr(run, "_Sides", lambda *_: pytest.fail("begun"))
    with pytest.raises(
        ValueError, match=r"verify does not fit in memory: it takes about \d+ GB on the host, and"
    ) as caught:
        sl.verify(sl.presets.llama3_8b(), LAYOUT, devices=jax.devices()[:4])
    message = str(caught.value)
    assert "96.4 GB of state, kept twice" in message and "24.1 GB of state on each of 4 devices" in message
    fits = sl.Trainer(sl.presets.llama3_8b(**suggested(message)), LAYOUT, devices=jax.devices()[:4])
    needs.check(fits, fits.on_one_device())


def test_the_device_that_holds_both_sides_is_weighed_too(monkeypatch):
    room = memory.Room(int(8e6), False, 4, "of a GPU that JAX may use")
    monkeypatch.setattr(memory, "available", lambda devices: room)
    trainer = sl.Trainer(sl.presets.tiny(), LAYOUT, devices=jax.devices()[:4])
    with pytest.raises(ValueError, match=r"about \d+\.?\d* MB on the device, and there are 8 MB of a GPU that JAX may"):
        needs.check(trainer, trainer.on_one_device())
