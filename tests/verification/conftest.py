"""What the tests of verification share: tiny models, references that are compiled once, and planted faults."""

import functools

import jax
import pytest

import shardlm as sl
from tests.verification.models import CONFIGS, OPTIMIZER


@functools.cache
def _reference(config: sl.TransformerConfig, seed: int) -> sl.Trainer:
    layout = sl.Layout()
    return sl.Trainer(config, layout, OPTIMIZER, seed=seed, devices=jax.devices()[:1], engine="auto")


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch):
    """`sl.verify` by name of the model and text of the layout; references are compiled once for all tests.

    No fault reaches a reference: what is planted acts only where an axis is split.
    """
    monkeypatch.setattr(sl.Trainer, "on_one_device", lambda trainer: _reference(trainer.config, trainer.seed))

    def call(name: str, layout: str, dtype: str = "float64", steps: int = 2, **options) -> sl.Verification:
        return sl.verify(
            CONFIGS[name], sl.Layout.parse(layout), steps=steps, dtype=dtype, optimizer=OPTIMIZER, **options
        )

    return call
