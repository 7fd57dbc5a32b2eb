"""State to the byte; the peak within a tenth of what a compiler needs; and the rules by which arrays live and die."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import shardlm as sl
from shardlm.inspect import liveness, memory

TINY = sl.presets.tiny(num_layers=3, d_model=16, d_ff=24, num_heads=4, num_kv_heads=2, vocab_size=60)


def held(tree) -> int:
    """Bytes that the first device really holds."""
    device = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device)


@pytest.mark.parametrize(
    "layout",
    ["data=8", "fsdp=8,zero=1", "fsdp=4,zero=2", "data=2,fsdp=4", "tensor=4", "data=2,fsdp=2,tensor=2"],
)
def test_state_batch_and_gradients_are_the_arrays_own(layout: str):
    parsed = sl.Layout.parse(layout)
    trainer = sl.Trainer(TINY, parsed, devices=jax.devices()[: parsed.num_devices])
    found = trainer.explain(batch_size=8, sequence=6).memory
    state = trainer.init()
    batch = trainer.place({"tokens": np.ones((8, 6), np.int32), "targets": np.ones((8, 6), np.int32)})
    assert found.parameters == held(state.params)
    assert found.optimizer == held(state.opt_state) + held(state.step)
    assert found.state == held(state)
    assert found.batch == held(batch)
    assert found.gradients == held(trainer.loss_and_grads(state, batch)[1])


# Large enough for arrays to matter and small enough to compile fast: nothing is run.
WIDE = {"vocab_size": 2048, "num_layers": 12, "d_model": 256, "num_heads": 8, "d_ff": 768}
CASES = [
    ("data=1,remat=none", 4, 256, {}),
    ("data=2,fsdp=2,tensor=2,remat=none", 16, 256, {}),
    ("data=2,fsdp=2,tensor=2,remat=dots", 16, 256, {}),
    ("data=2,fsdp=2,tensor=2,remat=full", 16, 256, {}),
    ("tensor=8,sequence_parallel,remat=dots", 4, 512, {}),
    ("fsdp=8,accumulate=4,remat=full", 64, 256, {"num_kv_heads": 2}),
    ("fsdp=8,zero=1,remat=dots", 64, 128, {"num_kv_heads": 2}),
    ("fsdp=4,tensor=2,sequence_parallel,remat=none", 32, 256, {"vocab_size": 16384, "tied": True}),
    ("fsdp=4,tensor=2,sequence_parallel,remat=full", 32, 256, {"num_layers": 32}),
    ("pipe=2,fsdp=2,tensor=2,pipeline=1f1b:4", 16, 256, {"num_layers": 8, "vocab_size": 16384}),
    ("fsdp=8,remat=none", 8, 2048, {"num_layers": 8, "attention": sl.Attention(implementation="chunked")}),
]


@pytest.mark.parametrize(("layout", "batch_size", "sequence", "changes"), CASES)
def test_the_predicted_peak_is_within_a_tenth_of_the_compilers(layout, batch_size, sequence, changes):
    parsed = sl.Layout.parse(layout)
    trainer = sl.Trainer(sl.TransformerConfig(**(WIDE | changes)), parsed, devices=jax.devices()[: parsed.num_devices])
    found = trainer.explain(batch_size=batch_size, sequence=sequence, compile=True).memory
    assert found.peak == pytest.approx(found.compiled, rel=0.10)
    assert found.peak > 1.5 * (found.state + found.batch)  # it is the activations that are predicted


def test_remat_keeps_less_in_the_order_of_its_names():
    report = sl.Trainer(sl.TransformerConfig(**WIDE), sl.Layout(fsdp=8), devices=8).explain(16, 256)
    peaks = [peak for peak, _ in report.remat.values()]
    again = [flops for _, flops in report.remat.values()]
    assert list(report.remat) == ["none", "dots", "full"]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3
    assert again == sorted(again) and again[0] == 0
    assert report.remat["none"][0] == report.memory.peak


def test_kept_activations_are_the_layers_inputs_under_full_recomputation():
    config = sl.TransformerConfig(**WIDE)
    found = sl.Trainer(config, sl.Layout(remat="full"), devices=1).explain(4, 256).memory
    assert found.activations == config.num_layers * 4 * 256 * config.d_model * 4


KB = 256 * 4  # one array of 256 float32
X = jax.ShapeDtypeStruct((256,), jnp.float32)
M = jax.ShapeDtypeStruct((16, 16), jnp.float32)


def peak(function, *arguments) -> int:
    return sl.inspect.peak_memory(function, *arguments).bytes


def test_element_by_element_work_takes_the_memory_of_its_result_alone():
    assert peak(lambda x: jnp.tanh(x * 2) + 1, X) == KB


def test_products_write_their_results_and_read_written_operands():
    assert peak(lambda a: a @ a, M) == KB
    assert peak(lambda a: (a * 2) @ a, M) == 2 * KB
    # The first product's result dies when the second is there; a third needs no more.
    assert peak(lambda a: a @ a @ a, M) == 2 * KB
    assert peak(lambda a: a @ a @ a @ a, M) == 2 * KB


def test_results_that_are_needed_later_stay():
    def function(a):
        b = a @ a
        c = b @ b
        return c @ b

    assert peak(function, M) == 3 * KB


def test_dead_code_takes_nothing():
    def function(a):
        _ = jnp.concatenate([a] * 50) @ a
        return a @ a

    assert peak(function, M) == KB


def test_a_stack_is_there_from_its_first_iteration():
    def function(a):
        return lax.scan(lambda c, _: (c @ a, c), a, None, length=10)[1]

    assert peak(function, M) >= 10 * KB
    assert peak(function, M) <= 13 * KB


def test_a_loop_writes_its_carry_over_the_one_before_and_may_have_a_conditional_do_it():
    def add(sums, _):
        return lax.cond(sums[0, 0] > 0, lambda s: s + s @ s, lambda s: s, sums), None

    # The sums, and the product that is added: nothing holds them twice, in the loop or in the branch.
    assert peak(lambda a: lax.scan(add, a @ a, None, length=10)[0], M) == 2 * KB


def test_a_loop_of_one_iteration_is_its_body():
    def body(c, x):
        return c @ x, c

    loop = lambda a, xs: lax.scan(body, a, xs)  # noqa: E731
    one, inlined = jax.ShapeDtypeStruct((1, 16, 16), jnp.float32), lambda a, xs: body(a, xs[0])
    assert peak(loop, M, one) == peak(inlined, M, one) == KB


def test_an_update_in_place_may_read_what_it_leaves():
    def put(buffer, slot):
        old = lax.dynamic_index_in_dim(buffer, slot, keepdims=False)
        return lax.dynamic_update_index_in_dim(buffer, jnp.where(slot > 3, old + 1, old), slot, 0)

    assert peak(lambda a: put(a @ a, jnp.argmax(a[0])), M) < 1.2 * KB


def test_a_loops_carry_takes_the_place_of_what_it_started_from():
    assert peak(lambda a: lax.fori_loop(0, 10, lambda _, c: c @ a, a @ a), M) <= 3 * KB


def test_the_largest_array_is_named_with_its_line():
    found = liveness.peak(jax.make_jaxpr(lambda a: (a @ a).sum() + jnp.concatenate([a] * 9).max())(M))
    assert (found.largest, found.largest_shape) == (9 * KB, "float32[144,16]")
    assert found.largest_where.startswith("test_memory.py:")


def test_shapes_are_per_device_inside_shard_map():
    mesh = sl.Layout(data=8).abstract_mesh()
    inner = jax.shard_map(
        lambda x: lax.dot_general(x, x, (((1,), (1,)), ((), ()))), mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    [equation] = jax.make_jaxpr(inner)(jax.ShapeDtypeStruct((64, 4), jnp.float32)).jaxpr.eqns
    assert liveness.peak(equation.params["jaxpr"]).bytes == 8 * 8 * 4


def test_what_the_compiler_partitions_has_no_prediction_but_its_own():
    trainer = sl.Trainer(TINY, sl.Layout(data=2), devices=jax.devices()[:2], engine="auto")
    report = trainer.explain(4, 6)
    assert report.memory.peak is None and report.peak is None and report.fits is None
    assert any("compile=True" in note for note in report.notes)
    full = trainer.explain(4, 6, compile=True)
    assert full.peak == full.memory.compiled > full.memory.state
    assert full.ledger.added and full.ledger.compiled


def test_bytes_per_device_counts_shards_and_replicas():
    trainer = sl.Trainer(TINY, sl.Layout(data=2, fsdp=2), devices=4)
    leaf = trainer.abstract_state.params["embedding"]["table"]
    assert memory.bytes_per_device(leaf) == leaf.size * 4 // 2
