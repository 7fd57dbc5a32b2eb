"""A user's own module is reported on and verified as our models are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import shardlm as sl
from shardlm.inspect import assert_no
from shardlm.train.module import ModuleProgram

IN, HIDDEN, OUT, ROWS = 12, 32, 8, 16
RULES = [(r"up/kernel", P(None, "tensor")), (r"down/kernel", P("tensor")), (r".*", P())]
BATCH = {
    "x": np.random.default_rng(0).normal(size=(ROWS, IN)).astype(np.float32),
    "y": np.random.default_rng(1).integers(0, OUT, ROWS).astype(np.int32),
    "w": np.random.default_rng(2).random(ROWS).astype(np.float32),
}


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(IN, HIDDEN, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, OUT, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(nnx.relu(self.up(x))))


def loss_fn(module, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(module(batch["x"]), batch["y"])
    return (losses * batch["w"]).sum(), batch["w"].sum()


def make_trainer(layout: str, devices=None, **options) -> sl.Trainer:
    parsed = sl.Layout.parse(layout)
    devices = jax.devices()[: parsed.num_devices] if devices is None else devices
    return sl.Trainer.from_module(MLP, loss_fn, parsed, optax.adam(1e-2, eps=1e-3), devices=devices, **options)


@pytest.fixture(scope="module")
def report() -> sl.Report:
    return make_trainer("data=2,fsdp=2,tensor=2", rules=RULES).explain(batch=BATCH, hardware="h100", compile=True)


def test_state_and_flops_are_exact(report):
    count = IN * HIDDEN + HIDDEN + HIDDEN * OUT + OUT
    assert report.num_parameters == count and report.model == "MLP"
    # Kernels are split by tensor and fsdp, biases by fsdp.
    held = (IN * HIDDEN + HIDDEN * OUT) // 4 + (HIDDEN + OUT) // 2
    assert report.memory.parameters == 4 * held
    assert report.memory.optimizer == 2 * 4 * held + 4 + 4
    assert report.memory.gradients == 4 * held
    products = 2 * ROWS * (IN * HIDDEN + HIDDEN * OUT)
    # Backward takes each product twice, but for the gradient of the input, which nobody needs.
    backward = 2 * products - 2 * ROWS * IN * HIDDEN
    assert report.flops.forward == products / 8 and report.flops.backward == backward / 8


def test_the_compilers_collectives_are_the_ledger(report):
    assert report.ledger.entries == () and report.ledger.compiled
    assert {"data", "fsdp", "tensor"} <= {axis for entry in report.ledger.added for axis in entry.axes}
    assert_no(report, "all-to-all")
    assert report.peak == report.memory.compiled and report.fits
    assert report.theory is None and report.remat == {}
    assert "MLP" in str(report) and "time on NVIDIA H100 SXM" in str(report)


def test_without_compiling_it_says_what_is_not_known():
    found = make_trainer("data=1024", devices=1024).explain(batch=_rows(1024))
    assert found.num_devices == 1024 and found.peak is None
    assert any("make the report with compile=True" in note for note in found.notes)


def _rows(count: int) -> dict:
    shapes = {"x": ((count, IN), jnp.float32), "y": ((count,), jnp.int32), "w": ((count,), jnp.float32)}
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def test_bad_questions_are_errors():
    trainer = make_trainer("data=2")
    with pytest.raises(ValueError, match="what a module reads is its own affair: give batch="):
        trainer.explain(8, 16)
    with pytest.raises(ValueError, match="the batch has its own batch_size: leave out batch_size="):
        trainer.explain(8, batch=BATCH)
    with pytest.raises(sl.LayoutError, match="15"):
        trainer.explain(batch=_rows(15))
    with pytest.raises(ValueError, match="needs batch="):
        sl.verify(trainer)


@pytest.mark.parametrize(("layout", "rules"), [("data=2,fsdp=2,tensor=2,accumulate=2", RULES), ("fsdp=4,zero=1", None)])
def test_it_is_verified_against_one_device(layout, rules):
    found = sl.verify(make_trainer(layout, rules=rules), batch=BATCH, steps=2)
    assert {d.quantity for d in found.differences} == {"loss", "gradients", "parameters", "optimizer state"}
    assert "agrees with one device" in str(found)


def test_a_wrong_program_is_refused_and_its_leaf_named(monkeypatch):
    trainer = make_trainer("data=2")
    reference = trainer.program
    gradients = ModuleProgram.gradients

    def doubled(self, *arguments):
        found = gradients(self, *arguments)
        if self is not reference:
            return found
        grads = {**found.grads, "down": {**found.grads["down"], "kernel": 2 * found.grads["down"]["kernel"]}}
        return found._replace(grads=grads)

    monkeypatch.setattr(ModuleProgram, "gradients", doubled)
    with pytest.raises(sl.VerificationError, match=r"down/kernel") as caught:
        sl.verify(trainer, batch=BATCH, steps=1)
    assert caught.value.diagnosis.kind == "scale"
