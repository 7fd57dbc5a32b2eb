"""What each device holds, read off the arrays' real shards, against ZeRO's formulas (arXiv:1910.02054 sections 3.1, 5).

In float32 with Adam a parameter costs 4 bytes, its gradient 4, its two moments 8; N devices share what the level says.
"""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardlm as sl
from shardlm._text import size
from shardlm.train import state as states
from shardlm.train.engine import flatten

# Every dim that ZeRO may split divides by 8, so the formulas hold to the byte.
CONFIG = sl.TransformerConfig(vocab_size=128, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48)
BATCH = {name: np.ones((8, 4), np.int32) for name in ("tokens", "targets")}
N = 8


def per_device(tree) -> set[int]:
    """Bytes on each device; a set, as every device holds the same amount."""
    held: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return set(held.values())


@pytest.mark.parametrize(("zero", "params", "grads", "moments"), [(1, 1, N, N), (2, 1, N, N), (3, N, N, N)])
def test_state_per_device_is_the_formula(zero: int, params: int, grads: int, moments: int):
    trainer = sl.Trainer(CONFIG, sl.Layout(fsdp=N, zero=zero), optax.scale_by_adam())
    p = trainer.num_parameters
    state = trainer.init()
    counters = 4  # Adam's step count
    assert per_device(state.params) == {4 * p // params}
    assert per_device(state.opt_state) == {8 * p // moments + counters}
    _, gradients = trainer.loss_and_grads(state, BATCH)
    assert per_device(gradients) == {4 * p // grads}


def test_zero_1_holds_whole_gradients_while_it_accumulates_and_zero_2_does_not():
    """Level 2 differs from level 1 inside the step: the temporaries shrink by the gradients that it has scattered."""
    temporaries = {}
    for zero in (1, 2):
        layout = sl.Layout(fsdp=N, zero=zero, accumulate=2, remat="full")
        trainer = sl.Trainer(CONFIG, layout, optax.scale_by_adam())
        batch = trainer.place({name: np.ones((16, 4), np.int32) for name in BATCH})
        temporaries[zero] = (
            trainer._step.lower(trainer.abstract_state, batch).compile().memory_analysis().temp_size_in_bytes
        )
    matrices = trainer.num_parameters - 2 * 128 * 32 - 7 * 32
    assert temporaries[1] - temporaries[2] > 0.5 * 4 * matrices * (1 - 1 / N)


def test_data_parallelism_replicates_and_tensor_parallelism_splits():
    p = sl.Trainer(CONFIG).num_parameters
    assert per_device(sl.Trainer(CONFIG, sl.Layout(data=8)).init().params) == {4 * p}
    scales = (2 * 3 + 1) * 32
    two = sl.Trainer(CONFIG, sl.Layout(tensor=2), devices=jax.devices()[:2]).init()
    assert per_device(two.params) == {4 * ((p - scales) // 2 + scales)}
    # 2 key/value heads on 4 devices: their weights are whole on each.
    kv = 2 * 3 * 32 * 2 * 8
    four = sl.Trainer(CONFIG, sl.Layout(tensor=4), devices=jax.devices()[:4]).init()
    assert per_device(four.params) == {4 * ((p - scales - kv) // 4 + scales + kv)}


def test_specs_of_a_full_layout():
    """The whole table, so that a change of any rule is a change of this test."""
    trainer = sl.Trainer(CONFIG, sl.Layout(data=2, fsdp=2, tensor=2))
    found = {path: leaf.sharding.spec for path, leaf in flatten(trainer.abstract_state.params).items()}
    assert found == {
        "embedding/table": P("tensor", "fsdp"),
        "head/table": P("tensor", "fsdp"),
        "final_norm/scale": P("fsdp"),
        "layers/attention_norm/scale": P(None, "fsdp"),
        "layers/mlp_norm/scale": P(None, "fsdp"),
        "layers/attention/query/kernel": P(None, "fsdp", "tensor"),
        "layers/attention/key/kernel": P(None, "fsdp", "tensor"),
        "layers/attention/value/kernel": P(None, "fsdp", "tensor"),
        "layers/attention/output/kernel": P(None, "tensor", None, "fsdp"),
        "layers/mlp/gate/kernel": P(None, "fsdp", "tensor"),
        "layers/mlp/up/kernel": P(None, "fsdp", "tensor"),
        "layers/mlp/down/kernel": P(None, "tensor", "fsdp"),
    }
    moments = trainer.abstract_state.opt_state
    adam = next(part for part in jax.tree.leaves(moments, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu"))
    assert {path: leaf.sharding.spec for path, leaf in flatten(adam.mu).items()} == found


def test_init_never_holds_a_full_copy():
    """A model of 57 MiB on 8 devices: while it is made, a device's output and temporaries stay far below that."""
    config = sl.TransformerConfig(vocab_size=512, num_layers=8, d_model=256, num_heads=8, d_ff=2048)
    trainer = sl.Trainer(config, sl.Layout(fsdp=N), optax.sgd(1.0))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, trainer.abstract_state)
    init = jax.jit(lambda: states.init(trainer.program, trainer.optimizer, 0), out_shardings=shardings)
    memory = init.lower().compile().memory_analysis()
    full = 4 * trainer.num_parameters
    assert full > 50 * 2**20
    assert memory.output_size_in_bytes < 1.01 * full / N
    assert memory.temp_size_in_bytes < 2 * full / N


def test_describe_says_what_is_not_split_and_what_a_device_holds():
    # One bias per head of 3 elements: neither 3 heads nor 3 elements divide by 2.
    config = sl.TransformerConfig(
        vocab_size=128, num_layers=3, d_model=32, num_heads=3, head_dim=3, d_ff=48,
        positions=sl.LearnedPositions(length=8), attention=sl.Attention(bias=True),
    )  # fmt: skip
    trainer = sl.Trainer(config, sl.Layout(fsdp=2), optax.scale_by_adam(), devices=jax.devices()[:2])
    text = trainer.describe()
    assert "not split by ZeRO, as no dim divides by fsdp=2: layers/attention/key/bias (3, 3, 3), " in text
    held = per_device(trainer.init().params).pop()
    assert f"{trainer.num_parameters:,} parameters (float32, computing in float32); on each device {size(held)}" in text
    assert "not split" not in sl.Trainer(CONFIG, sl.Layout(fsdp=N)).describe()
