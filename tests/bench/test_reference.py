"""The hand-written step that the trainer is timed against makes the trainer's very update."""

import dataclasses

import jax
import numpy as np
import pytest

import shardlm as sl
from shardlm.bench import model, reference
from shardlm.bench.step import reference_model

pytestmark = pytest.mark.usefixtures("x64_module")

BATCH, SEQUENCE = 5, 12
CONFIG = sl.TransformerConfig(
    vocab_size=67,
    num_layers=3,
    d_model=24,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    d_ff=28,
    vocab_multiple=8,
    norm=sl.Norm(epsilon=1e-3),
    positions=sl.Rope(theta=500.0),
    dtype="float64",
    param_dtype="float64",
)


@pytest.fixture(scope="module")
def before() -> dict:
    """On the host: parameters with nothing left at one, a batch with uneven weights, the trainer's step from them."""
    random = np.random.default_rng(0)
    # The whole of the first update's rate, and a norm small enough to clip.
    optimizer = sl.adamw(1e-2, steps=4, warmup=0, clip=0.1)
    trainer = sl.Trainer(CONFIG, optimizer=optimizer, devices=jax.devices()[:1])
    state = trainer.init()
    params = jax.tree.map(lambda x: np.asarray(x) + 0.2 * random.normal(size=x.shape), state.params)
    for table in (params["embedding"]["table"], params["head"]["table"]):
        table[CONFIG.vocab_size :] = 0
    state = dataclasses.replace(state, params=jax.tree.map(jax.device_put, params, trainer.plan.shardings("stored")))
    batch = model.random_batch(CONFIG, BATCH, SEQUENCE)
    batch["weights"] = random.random((BATCH, SEQUENCE)).astype(np.float32)
    state, metrics = trainer.step(state, batch)
    assert metrics["grad_norm"] > 0.1
    updated, opt_state = jax.device_get((state.params, state.opt_state))
    return {
        "optimizer": optimizer,
        "params": params,
        "batch": batch,
        "loss": float(metrics["loss"]),
        "updated": updated,
        "opt_state": opt_state,
    }


def test_loss_parameters_and_optimizer_state_are_the_trainers(before):
    optimizer, params = before["optimizer"], jax.tree.map(jax.numpy.asarray, before["params"])
    step = reference.make_step(reference_model(CONFIG), optimizer)
    params, opt_state, loss = jax.device_get(step(params, optimizer.init(params), before["batch"]))
    assert loss == pytest.approx(before["loss"], rel=1e-12)
    assert jax.tree.structure(params) == jax.tree.structure(before["updated"])
    for ours, by_hand, start in zip(*map(jax.tree.leaves, (before["updated"], params, before["params"])), strict=True):
        np.testing.assert_allclose(by_hand, ours, rtol=0, atol=1e-12)
        assert np.abs(ours - start).max() > 5e-3  # Adam's first update is the rate in size
    for ours, by_hand in zip(*map(jax.tree.leaves, (before["opt_state"], opt_state)), strict=True):
        np.testing.assert_allclose(by_hand, ours, rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", [{"theta": 501.0}, {"epsilon": 1.001e-3}, {"vocab_size": 68}])
def test_another_model_gives_another_loss(before, changes):
    changed = dataclasses.replace(reference_model(CONFIG), **changes)
    loss = jax.jit(reference.loss, static_argnums=2)(before["params"], before["batch"], changed)
    assert abs(float(loss) - before["loss"]) > 1e-8
