"""Fine-tuning by adapters: y = x W + s (x A) B on any layout, in float64 to rounding, and nothing else is trained.

The reference has no adapters: it is the model with W + s A B in the place of W, differentiated with respect to A and B.
"""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardlm as sl
from shardlm.inspect import ledger, theory
from shardlm.inspect.program import bytes_per_device
from shardlm.models.lora import is_adapter, without_adapters
from shardlm.train.engine import flatten, unflatten

pytestmark = pytest.mark.usefixtures("x64_module")

BATCH, SEQUENCE, STEPS, SEED, SCALE = 24, 8, 2, 5, 7.0 / 3
ALL = ("query", "key", "value", "output", "gate", "up", "down")
BASE = sl.TransformerConfig(
    vocab_size=67, num_layers=3, d_model=16, num_heads=4, num_kv_heads=2, d_ff=24, vocab_multiple=8,
    attention=sl.Attention(bias=True, windows=(5, None)), dtype="float64", param_dtype="float64",
)  # fmt: skip
CONFIG = dataclasses.replace(BASE, lora=sl.Lora(rank=3, alpha=7.0, targets=ALL))
LAYOUTS = [
    "fsdp=2,tensor=4,zero=1,sequence_parallel",  # fewer key/value heads than tensor has devices
    "data=2,fsdp=2,tensor=2,accumulate=3",
    "pipe=2,fsdp=2,pipeline=interleaved:2:2:1+0+1+1",
    "pipe=2,tensor=2,pipeline=1f1b:3:ends:stored",
    "pipe=2,pipeline=zb-h1:2:stored",
]
TRACED = [
    *LAYOUTS[:4], "data=8", "data=2,tensor=4,remat=full", "fsdp=4,zero=2,accumulate=3", "fsdp=4,zero=3,remat=full",
    "data=2,fsdp=2,tensor=2,sequence_parallel,remat=dots",
    "pipe=2,fsdp=2,tensor=2,sequence_parallel,pipeline=1f1b:6:use",
]  # fmt: skip


def batch_of() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    shape = (BATCH, SEQUENCE)
    return {
        "tokens": random.integers(0, 67, shape),
        "targets": random.integers(0, 67, shape),
        "weights": (random.random(shape) * (random.random(shape) > 0.3)).astype(np.float32),
        "segments": np.sort(random.integers(1, 4, shape)),
    }


def remember() -> optax.GradientTransformation:
    """Keeps the last gradients in its state."""
    return optax.GradientTransformation(lambda params: params, lambda grads, state, params=None: (grads, grads))


def make_optimizer() -> optax.GradientTransformation:
    return optax.chain(remember(), optax.adam(1e-2))


@functools.cache
def graph_and_params(config: sl.TransformerConfig) -> tuple:
    """The plain module's graph and its initial parameters."""
    graph, state = jax.jit(lambda: nnx.split(sl.Transformer(config, rngs=nnx.Rngs(SEED))))()
    return graph, nnx.to_pure_dict(state)


@pytest.fixture(scope="module")
def start() -> dict:
    """Parameters away from their initial ones, so that zeros hide nothing; padding stays zero."""
    random = np.random.default_rng(2)
    _, params = graph_and_params(CONFIG)
    flat = {path: np.asarray(x) + 0.1 * random.normal(size=x.shape) for path, x in flatten(params).items()}
    for path in ("embedding/table", "head/table"):
        flat[path][67:] = 0
    return unflatten(flat)


def effective(params: dict) -> dict:
    """W + s A B in the place of W, by hand."""
    flat = flatten(params)
    kernels = {path: x for path, x in flat.items() if not is_adapter(path)}
    for path in [path for path in flat if path.endswith("lora_a")]:
        kernel, b = path.replace("lora_a", "kernel"), flat[path.replace("lora_a", "lora_b")]
        a = flat[path].reshape(3, -1, 3)
        kernels[kernel] = kernels[kernel] + SCALE * (a @ b.reshape(3, 3, -1)).reshape(kernels[kernel].shape)
    return unflatten(kernels)


@pytest.fixture(scope="module")
def reference(start) -> dict:
    """Losses, first gradients, and adapters after two updates, on one device."""
    graph, _ = graph_and_params(BASE)
    batch, optimizer = {k: jnp.asarray(x) for k, x in batch_of().items()}, make_optimizer()
    batch["weights"] = batch["weights"].astype(jnp.float64)

    def loss(adapters: dict) -> jax.Array:
        model = nnx.merge(graph, nnx.State(effective(unflatten(flatten(start) | flatten(adapters)))))
        log_p = jax.nn.log_softmax(model(batch["tokens"], segments=batch["segments"]))
        log_p = jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
        return -(batch["weights"] * log_p).sum() / batch["weights"].sum()

    @jax.jit
    def step(adapters, opt_state):
        value, grads = jax.value_and_grad(loss)(adapters)
        updates, opt_state = optimizer.update(grads, opt_state, adapters)
        return optax.apply_updates(adapters, updates), opt_state, value, grads

    adapters = sl.adapters(start)
    opt_state, losses, first = optimizer.init(adapters), [], None
    for _ in range(STEPS):
        adapters, opt_state, value, grads = step(adapters, opt_state)
        losses.append(float(value))
        first = grads if first is None else first
    return {"losses": losses, "grads": first, "adapters": adapters}


@pytest.fixture(scope="module", params=LAYOUTS)
def run(request, start) -> dict:
    """The same by a Trainer, and its states before and after."""
    layout = sl.Layout.parse(request.param)
    trainer = sl.Trainer(CONFIG, layout, make_optimizer(), seed=SEED, devices=jax.devices()[: layout.num_devices])
    state = trainer.init(start)
    before = jax.tree.map(np.asarray, trainer.in_order(state).params)
    losses, first = [], None
    for _ in range(STEPS):
        state, metrics = trainer.step(state, batch_of())
        losses.append(float(metrics["loss"]))
        first = jax.tree.map(np.asarray, trainer.in_order(state.opt_state[0])) if first is None else first
    after = jax.tree.map(np.asarray, trainer.in_order(state).params)
    return {"trainer": trainer, "state": state, "before": before, "after": after, "losses": losses, "grads": first}


def worst(expected: dict, found: dict) -> float:
    """The largest difference relative to its leaf's largest element."""
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)


def test_any_layout_gives_the_numbers_of_merged_weights_on_one_device(run, reference, start):
    assert worst(start, run["before"]) == 0
    np.testing.assert_allclose(run["losses"], reference["losses"], rtol=1e-12)
    assert worst(reference["grads"], run["grads"]) < 1e-12
    # Adam divides by the root of a second moment that may be tiny.
    assert worst(reference["adapters"], sl.adapters(run["after"])) < 1e-10


def test_the_comparison_can_fail(reference):
    for path, value in flatten(reference["grads"]).items():
        assert worst(reference["grads"], unflatten(flatten(reference["grads"]) | {path: value * (1 + 1e-11)})) > 1e-12


def test_what_is_frozen_keeps_every_bit_and_has_no_optimizer_state(run):
    before, after = without_adapters(run["before"]), without_adapters(run["after"])
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
    moved = zip(*(jax.tree.leaves(sl.adapters(run[x])) for x in ("before", "after")), strict=True)
    assert all((a != b).mean() > 0.9 for a, b in moved)
    trainer, state = run["trainer"], run["state"]
    paths = ["/".join(str(getattr(k, "key", "")) for k in keys) for keys, _ in _leaves(state.opt_state)]
    assert all(is_adapter(path) for path in paths if path.strip("/") and not path.endswith("count"))
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, trainer.abstract_state)
    # Three copies of the adapters (two moments, and what `remember` keeps) and a count, to the byte.
    held = sum(bytes_per_device(x) for path, x in sharded(trainer).items() if is_adapter(path))
    assert bytes_per_device(trainer.abstract_state.opt_state) == 3 * held + 4


_leaves = jax.tree_util.tree_leaves_with_path


def sharded(trainer: sl.Trainer) -> dict:
    shardings = flatten(trainer.plan.shardings("sharded"))
    return {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[path])
        for path, x in flatten(trainer.plan.shapes).items()
    }


def traced(config: sl.TransformerConfig, layout: str) -> tuple[sl.Trainer, Counter]:
    """By kind, axes and dtype, the elements that a step sends."""
    parsed, found = sl.Layout.parse(layout), Counter()
    trainer = sl.Trainer(config, parsed, devices=parsed.num_devices)
    kinds = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    batch = {k: jax.ShapeDtypeStruct((BATCH, SEQUENCE), d, sharding=trainer.batch_sharding) for k, d in kinds.items()}
    for entry in ledger(trainer.step_function, trainer.abstract_state, batch):
        found[entry.kind, entry.axes, entry.dtype] += entry.elements * entry.count
    return trainer, found


@pytest.mark.parametrize("layout", TRACED)
def test_only_gradients_of_adapters_are_sent(layout: str):
    """The ledger is the textbook, in which nothing frozen is summed, and gathered at level 3 alone."""
    trainer, found = traced(CONFIG, layout)
    expected: Counter = Counter()
    for line in theory.expected(trainer.config, trainer.layout, BATCH, SEQUENCE):
        expected[line.kind, line.axes, line.dtype] += line.elements
    assert found == expected


def test_data_parallelism_sums_as_many_elements_as_adapters_have():
    _, found = traced(CONFIG, "data=8")
    count = sum(x.size for x in jax.tree.leaves(sl.adapters(sl.Trainer(CONFIG).abstract_state.params)))
    assert count == 3 * 3 * ((16 + 16) + 2 * (16 + 8) + (16 + 16) + 2 * (16 + 24) + (24 + 16))
    assert found == {("all-reduce", ("data",), "float64"): count + 2}  # and the sums of losses and weights
    _, everything = traced(BASE, "data=8")
    assert everything["all-reduce", ("data",), "float64"] > 3 * count


def test_a_pipeline_with_a_frozen_embedding_sends_it_no_gradients():
    """All stages embed together, so an embedding that is trained takes the first stage's gradient to all of them."""
    configs = (dataclasses.replace(config, num_layers=4) for config in (CONFIG, BASE))
    (_, frozen), (_, full) = (traced(config, "pipe=4,pipeline=1f1b:6") for config in configs)
    sent = ("all-reduce", ("pipe",), "float64")
    assert full[sent] - frozen[sent] >= 6 * (BATCH // 6) * SEQUENCE * 16
    assert full["collective-permute", ("pipe",), "float64"] == frozen["collective-permute", ("pipe",), "float64"]


def test_merged_weights_are_the_same_bits_on_any_layout(run, start):
    alone, expected = sl.merge_lora(CONFIG, start)
    assert alone == BASE
    config, merged = sl.merge_lora(run["trainer"].config, sl.Trainer.init(run["trainer"], start).params)
    stored = run["trainer"].abstract_state.params
    for path, x in flatten(merged).items():
        assert x.sharding == flatten(stored)[path].sharding, path
    assert config.lora is None
    found = jax.tree.map(np.asarray, run["trainer"].in_order(merged))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(flatten(expected).items(), jax.tree.leaves(found), strict=True):
        assert np.array_equal(a, b), path


def test_the_merged_model_gives_the_logits_of_the_adapted_one(start):
    tokens = jnp.asarray(batch_of()["tokens"][:2])

    def logits(config: sl.TransformerConfig):
        graph, _ = graph_and_params(config)
        return jax.jit(lambda params: nnx.merge(graph, nnx.State(params))(tokens))

    adapted, plain = logits(CONFIG)(start), logits(BASE)
    merged, without = plain(sl.merge_lora(CONFIG, start)[1]), plain(without_adapters(start))
    assert np.abs(adapted - merged).max() < 1e-12 * np.abs(adapted).max()
    assert np.abs(adapted - without).max() > 0.1 * np.abs(adapted).max()


def test_half_precision_is_rounded_once_and_adapters_stay_wide():
    config = dataclasses.replace(CONFIG, param_dtype="bfloat16", num_layers=1)
    shapes = flatten(sl.Trainer(config).abstract_state.params)
    assert {str(x.dtype) for path, x in shapes.items() if is_adapter(path)} == {"float32"}
    assert {str(x.dtype) for path, x in shapes.items() if not is_adapter(path)} == {"bfloat16"}
    random = np.random.default_rng(0)
    params = {p: jnp.asarray(random.normal(size=x.shape), x.dtype) for p, x in shapes.items()}
    merged = flatten(sl.merge_lora(config, unflatten(params))[1])
    name = "layers/attention/output/"
    kernel, a, b = (np.asarray(params[name + x], np.float64) for x in ("kernel", "lora_a", "lora_b"))
    exact = kernel + SCALE * np.einsum("lhdr,lre->lhde", a, b)
    close = np.abs(np.asarray(merged[name + "kernel"], np.float64) - exact) <= 2.0**-8 * np.abs(exact)
    assert merged[name + "kernel"].dtype == jnp.bfloat16
    assert close.mean() > 0.99  # beyond half a unit only where float32's own error tips the rounding
    assert not np.array_equal(merged[name + "kernel"], params[name + "kernel"])


def test_adapters_change_no_initial_value_and_start_at_nothing():
    (_, base), (_, adapted) = graph_and_params(BASE), graph_and_params(CONFIG)
    config, added = sl.add_lora(BASE, base, CONFIG.lora, seed=SEED)
    assert config == CONFIG
    for found in (adapted, added):
        assert jax.tree.structure(without_adapters(found)) == jax.tree.structure(base)
        assert all(map(np.array_equal, *map(jax.tree.leaves, (base, without_adapters(found)))))
    assert all(map(np.array_equal, *map(jax.tree.leaves, (adapted, added))))
    _, again = sl.add_lora(BASE, base, CONFIG.lora, seed=SEED + 1, saved=sl.adapters(added))
    assert all(map(np.array_equal, *map(jax.tree.leaves, (again, added))))
    for path, x in flatten(sl.adapters(added)).items():
        inward = {"output": 16, "down": 24}.get(path.split("/")[-2], 16)
        if path.endswith("lora_b"):
            assert not x.any()
        else:
            assert 0.6 < x.std() * (3 * inward) ** 0.5 < 1.4, path
    firsts = {
        float(x.ravel()[0] * (x.size // 9) ** 0.5) for p, x in flatten(sl.adapters(added)).items() if p[-1] == "a"
    }
    assert len(firsts) == len(ALL)  # no two projections, which may have the same shape, get the same draw


def test_init_fills_in_adapters_and_keeps_what_it_was_given():
    trainer = sl.Trainer(CONFIG, sl.Layout.parse(LAYOUTS[2]), optax.sgd(0.1), seed=SEED, devices=jax.devices()[:4])
    _, base = graph_and_params(BASE)
    state = trainer.init(base)
    _, expected = graph_and_params(CONFIG)
    found = trainer.in_order(state).params
    assert all(map(np.array_equal, *map(jax.tree.leaves, (expected, found))))
    assert not any(x.is_deleted() for x in jax.tree.leaves(base))


def test_describe_says_how_many_are_trained():
    text = sl.Trainer(CONFIG, sl.Layout(data=2), devices=2).describe()
    assert "trained are 2,088 of 10,200 parameters, 20.47%: adapters of rank 3, alpha 7, on query, key" in text
    assert "trained are" not in sl.Trainer(BASE, sl.Layout(data=2), devices=2).describe()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank=0; it is a positive integer"),
        ({"rank": 2.0}, r"rank=2\.0; it is a positive integer"),
        ({"alpha": 0}, "alpha=0; it is positive"),
        ({"alpha": -1.0}, r"alpha=-1\.0; it is positive"),
        ({"targets": ("query", "q_proj")}, "has 'q_proj'; they are of query, key, value, output, gate, up, down"),
        ({"targets": ("up", "query", "up")}, "targets has 'up' more than once"),
        ({"targets": ()}, r"targets=\(\); it is a non-empty tuple"),
        ({"targets": "query"}, "targets='query'; it is a non-empty tuple"),
        ({"rank": 0, "alpha": 0, "targets": ("head",)}, "rank=0.*alpha=0.*targets has 'head'"),
    ],
)  # fmt: skip
def test_adapters_that_cannot_be_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        sl.Lora(**changes)


def test_a_model_refuses_adapters_on_what_it_lacks_and_twice():
    with pytest.raises(ValueError, match=r"lora\.targets has 'gate', and mlp\.gated=False has none: leave it out"):
        dataclasses.replace(CONFIG, mlp=sl.MLP(gated=False))
    with pytest.raises(ValueError, match="add_lora: this model has adapters: .*Merge them first"):
        sl.add_lora(CONFIG, {}, sl.Lora())
    with pytest.raises(
        ValueError, match=r"4 parameters are not those of the model with layers in order: embedding is missing"
    ):
        sl.add_lora(BASE, {}, sl.Lora())
    _, params = graph_and_params(BASE)
    with pytest.raises(
        ValueError, match=r"layers/attention/query/lora_a is float64\[3, 16, 3\], expected float64\[3, 16, 4\]"
    ):
        sl.add_lora(BASE, params, sl.Lora(rank=4, targets=ALL), saved=sl.adapters(graph_and_params(CONFIG)[1]))
    with pytest.raises(ValueError, match="this model has no adapters"):
        sl.merge_lora(BASE, {})


def test_parameters_of_another_model_are_refused(start):
    wrong = flatten(start)
    wrong["final_norm/scale"] = wrong["final_norm/scale"].astype(np.float32)
    del wrong["embedding/table"]
    wrong["extra"] = wrong["head/table"]
    with pytest.raises(ValueError, match=r"init: 3 parameters are not those of this model: embedding/table: missing; "
                       r"extra: not expected; final_norm/scale: float32\[16\], expected float64\[16\]"):  # fmt: skip
        sl.Trainer(CONFIG).init(unflatten(wrong))


def test_a_configuration_with_adapters_survives_being_written_down():
    assert sl.TransformerConfig.from_dict(CONFIG.to_dict()) == CONFIG
    old = BASE.to_dict()
    del old["lora"]  # as it was written before there were any
    assert sl.TransformerConfig.from_dict(old) == BASE


def test_a_report_counts_gradients_of_adapters_alone():
    trainer = sl.Trainer(CONFIG, sl.Layout(data=2, fsdp=2, tensor=2), devices=8)
    report = trainer.explain(BATCH, SEQUENCE)
    held = sum(bytes_per_device(x) for path, x in sharded(trainer).items() if is_adapter(path))
    assert report.memory.gradients == held
    assert (
        report.memory.optimizer == 2 * held + 4 + 4 + 4
    )  # two moments; counts of adamw and its schedule, and the step
    for sent, says in report.against_theory().values():
        assert sent == pytest.approx(says, rel=1e-12)


def test_verify_compares_what_is_trained():
    config = dataclasses.replace(CONFIG, num_layers=1, lora=sl.Lora(rank=2, targets=("key", "down")))
    result = sl.verify(config, sl.Layout(tensor=2), steps=1, dtype="float64")
    assert {d.leaf for d in result.differences if d.quantity == "gradients"} == {
        f"layers/{name}/lora_{x}" for name in ("attention/key", "mlp/down") for x in "ab"
    }
