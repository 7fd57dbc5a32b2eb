"""Modules whose matrices two axes split: XLA alone was seen to give some of them wrong gradients.

Two matrices of 8 x 8, both split over fsdp and tensor, on data=2,fsdp=2,tensor=2: where the compiler gathers them by
itself, it permutes the rows of the first one's gradient over data and fsdp, and does not put them back.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import shardlm as sl

pytestmark = pytest.mark.usefixtures("x64_module")

RULES = {
    "by ZeRO": [("kernel", P(None, "tensor"))],
    "by rule": [("kernel", P("fsdp", "tensor"))],
}


def make(rngs: nnx.Rngs) -> nnx.Module:
    wide = {"dtype": jnp.float64, "param_dtype": jnp.float64, "use_bias": False}
    return nnx.Dict({name: nnx.Linear(8, 8, rngs=rngs, **wide) for name in ("0", "1")})


def loss_fn(module, batch):
    x = batch["x"]
    for name in ("0", "1"):
        x = jnp.tanh(module[name](x))
    return jnp.square(x - batch["y"]).sum(), len(x)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_matrices_that_two_axes_split_have_the_gradients_of_one_device(rules):
    random = np.random.default_rng(0)
    batch = {name: random.normal(size=(8, 8)) for name in ("x", "y")}
    found, describes = [], []
    for layout, used in (("data=2,fsdp=2,tensor=2", rules), ("data=1", [(".*", P())])):
        parsed = sl.Layout.parse(layout)
        devices = jax.devices()[: parsed.num_devices]
        trainer = sl.Trainer.from_module(make, loss_fn, parsed, optax.sgd(0.1), rules=used, devices=devices)
        state = trainer.init()
        describes.append(trainer.describe())
        found.append((trainer.loss_and_grads(state, batch), trainer.evaluate(state, [batch])["loss"]))
    ((loss, grads), evaluated), ((loss_1, grads_1), evaluated_1) = found
    assert abs(float(loss) - float(loss_1)) < 1e-12 and abs(evaluated - evaluated_1) < 1e-12
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_1), strict=True):
        assert np.abs(np.asarray(x) - np.asarray(y)).max() < 1e-12
    told = ["gathered over fsdp for the whole step, 512 B on each device: 2 parameters" in x for x in describes]
    assert told == [True, False]
