"""Any layout, by either engine, gives the single device's numbers: in float64, to rounding.

The reference is the Flax module on one device with a loss, a gradient and an Optax update written here. Tolerances:
sums of a few thousand float64 terms in another order differ by some 1e-14 of the largest; parameters after AdamW,
which divides by the square root of a second moment that may be tiny, by more.
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
from shardlm.inspect.hlo import collectives
from shardlm.models import attention
from shardlm.models.dropout import Dropout
from shardlm.train.engine import flatten, unflatten

pytestmark = pytest.mark.usefixtures("x64_module")

BATCH, SEQUENCE, STEPS, SEED = 24, 12, 3, 5
WIDE = {"dtype": "float64", "param_dtype": "float64"}
LLAMA = sl.TransformerConfig(
    vocab_size=67, num_layers=3, d_model=16, num_heads=4, num_kv_heads=2, d_ff=24, vocab_multiple=8,
    attention=sl.Attention(qk_norm=True, bias=True, windows=(5, None)), **WIDE,
)  # fmt: skip
GPT = sl.TransformerConfig(
    vocab_size=67, num_layers=3, d_model=24, num_heads=6, head_dim=6, d_ff=36, vocab_multiple=8, tied=True, dropout=0.2,
    attention=sl.Attention(bias=True, output_bias=True, soft_cap=5.0), mlp=sl.MLP(gated=False, activation="gelu_tanh",
    bias=True), norm=sl.Norm(kind="layer", after=True), positions=sl.LearnedPositions(length=SEQUENCE),
    logit_soft_cap=8.0, embedding_scale=3.0, **WIDE,
)  # fmt: skip
CHUNKED = dataclasses.replace(LLAMA, attention=dataclasses.replace(LLAMA.attention, implementation="chunked"))
CONFIGS = {"llama": LLAMA, "gpt": GPT, "chunked": CHUNKED}
CONFIGS |= {f"{name}4": dataclasses.replace(CONFIGS[name], num_layers=4) for name in ("llama", "gpt")}
CONFIGS |= {"gpt8": dataclasses.replace(GPT, num_layers=8)}
PIPELINES = [
    ("llama4", "pipe=2,pipeline=1f1b:3"),
    ("llama4", "pipe=4,data=2,pipeline=1f1b:6"),
    ("llama4", "pipe=2,fsdp=2,tensor=2,pipeline=1f1b:4,remat=full"),
    ("gpt4", "pipe=2,data=2,tensor=2,sequence_parallel,pipeline=1f1b:3"),
    ("gpt4", "pipe=4,tensor=2,pipeline=1f1b:2"),
    ("llama4", "pipe=2,fsdp=2,tensor=2,pipeline=interleaved:4:2"),
    ("gpt8", "pipe=4,data=2,pipeline=interleaved:4:2"),
    ("gpt", "pipe=2,data=2,tensor=2,sequence_parallel,pipeline=interleaved:2:3:0+1+0+1+1+0"),
    ("llama", "pipe=2,fsdp=2,pipeline=1f1b:3"),
    ("llama", "pipe=8,pipeline=1f1b:3"),
    ("llama4", "pipe=2,fsdp=2,zero=2,pipeline=1f1b:3:ends"),
    ("gpt4", "pipe=2,data=2,tensor=2,sequence_parallel,pipeline=interleaved:2:2:ends"),
    ("llama4", "pipe=2,fsdp=2,tensor=2,zero=1,pipeline=gpipe:3:1:3+1,remat=dots"),
    ("gpt4", "pipe=2,data=2,tensor=2,sequence_parallel,pipeline=1f1b:3:stored"),
    ("llama4", "pipe=2,fsdp=2,pipeline=1f1b:3:use"),
    ("llama4", "pipe=2,fsdp=2,tensor=2,zero=2,remat=full,pipeline=interleaved:4:2:stored:use"),
    ("llama4", "pipe=4,fsdp=2,zero=1,pipeline=zb-h1:6:ends:stored"),
    ("llama4", "pipe=2,fsdp=2,tensor=2,zero=3,pipeline=zb-h1:3:1:1+3:stored"),
]
LAYOUTS = [
    ("llama", "accumulate=3,remat=full"),
    ("llama", "data=2"),
    ("llama", "data=2,accumulate=3,remat=dots"),
    ("llama", "fsdp=4,zero=1"),
    ("llama", "fsdp=4,zero=2"),
    ("llama", "fsdp=8,zero=3"),
    ("llama", "fsdp=2,zero=2,accumulate=3,remat=full"),
    ("llama", "data=2,fsdp=4,zero=3,remat=dots"),
    ("llama", "data=2,fsdp=2,zero=1,accumulate=3"),
    ("llama", "data=2,fsdp=2,reduce_gradients=step"),
    ("llama", "tensor=4"),
    ("llama", "tensor=4,sequence_parallel"),
    ("llama", "data=2,tensor=4,sequence_parallel,remat=full"),
    ("llama", "data=2,fsdp=2,tensor=2"),
    ("llama", "fsdp=2,tensor=4,zero=2,accumulate=3,reduce_gradients=layer"),
    ("chunked", "data=2,fsdp=2,tensor=2,sequence_parallel,remat=dots"),
    ("gpt", "data=3"),
    ("gpt", "tensor=3"),
    ("gpt", "tensor=6,sequence_parallel"),
    ("gpt", "fsdp=3,tensor=2"),
    ("gpt", "data=2,fsdp=2,tensor=2,zero=1,sequence_parallel,accumulate=3"),
    ("gpt", "data=2,fsdp=2,tensor=2,zero=3,sequence_parallel,remat=full"),
]
# The compiler knows of specs alone: each kind of them once, and with what a step does besides.
COMPILERS = [
    ("llama", "accumulate=3,remat=full"),
    ("llama", "data=2,fsdp=2,reduce_gradients=step"),
    ("llama", "fsdp=4,zero=1"),
    ("llama", "fsdp=2,zero=2,accumulate=3,remat=full"),
    ("llama", "data=2,fsdp=4,zero=3,remat=dots"),
    ("llama", "tensor=4,sequence_parallel"),
    ("gpt", "fsdp=3,tensor=2"),
    ("gpt", "data=2,fsdp=2,tensor=2,zero=1,sequence_parallel,accumulate=3"),
]


def batch_of(config: sl.TransformerConfig) -> dict[str, np.ndarray]:
    """Packed rows with uneven weights, a third of them zero; targets without weight are not even token ids."""
    random = np.random.default_rng(1)
    shape = (BATCH, SEQUENCE)
    weights = random.random(shape).astype(np.float32) * (random.random(shape) > 0.3)
    segments = np.sort(random.integers(1, 4, shape))
    starts = np.array([[np.argmax(row == s) for s in row] for row in segments])
    return {
        "tokens": random.integers(0, config.vocab_size, shape),
        "targets": np.where(weights == 0, -1, random.integers(0, config.vocab_size, shape)),
        "weights": weights,
        "segments": segments,
        "positions": np.arange(SEQUENCE) - starts,
    }


def remember_gradients() -> optax.GradientTransformation:
    """Changes nothing and keeps the last gradients in its state: one compiled step then shows them, too."""
    return optax.GradientTransformation(lambda params: params, lambda grads, state, params=None: (grads, grads))


def make_optimizer() -> optax.GradientTransformation:
    return optax.chain(
        remember_gradients(), optax.clip_by_global_norm(0.5), sl.adamw(1e-2, steps=8, warmup=1, clip=None)
    )


def perturbed(params: dict) -> dict:
    """Every parameter moved away from its initial value, so that ones and zeros hide nothing; padding stays zero."""
    random = np.random.default_rng(2)
    flat = {path: np.asarray(x) + 0.1 * random.normal(size=x.shape) for path, x in flatten(params).items()}
    for path in flat:
        if path in ("embedding/table", "head/table"):
            flat[path][67:] = 0
    return unflatten(flat)


@functools.cache
def reference(name: str) -> dict:
    """Losses and first gradients, parameters and optimizer state after three updates, on one device."""
    if name == "chunked":
        return reference("llama")
    config = CONFIGS[name]
    batch = {key: jnp.asarray(value) for key, value in batch_of(config).items()}
    graph, state = nnx.split(sl.Transformer(config, rngs=nnx.Rngs(SEED)))
    params, optimizer = perturbed(nnx.to_pure_dict(state)), make_optimizer()

    def mean_loss(params: dict, key: jax.Array) -> jax.Array:
        dropout = Dropout(config.dropout, key, jnp.arange(BATCH), jnp.arange(SEQUENCE)) if config.dropout else None
        logits = nnx.merge(graph, nnx.State(params))(
            batch["tokens"], segments=batch["segments"], positions=batch["positions"], dropout=dropout
        )
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(batch["targets"], 0)[..., None], -1)[..., 0]
        return -(batch["weights"] * log_p).sum() / batch["weights"].astype(jnp.float64).sum()

    @jax.jit
    def step(params: dict, opt_state, index):
        key = jax.random.fold_in(jax.random.key(SEED), index)
        loss, grads = jax.value_and_grad(mean_loss)(params, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, grads

    start, opt_state = params, optimizer.init(params)
    losses, first = [], None
    for index in range(STEPS):
        params, opt_state, loss, grads = step(params, opt_state, index)
        losses.append(float(loss))
        first = grads if first is None else first
    return to_host({"start": start, "losses": losses, "grads": first, "params": params, "opt_state": opt_state})


def to_host(tree):
    return jax.tree.map(np.asarray, tree)


@functools.cache
def compiled(name: str, layout: str, engine: str) -> tuple[sl.Trainer, jax.stages.Compiled]:
    """A Trainer whose step is compiled once, for what it computes and for what it sends."""
    parsed = sl.Layout.parse(layout)
    devices = jax.devices()[: parsed.num_devices]
    trainer = sl.Trainer(CONFIGS[name], parsed, make_optimizer(), seed=SEED, devices=devices, engine=engine)
    executable = trainer._step.lower(trainer.abstract_state, trainer.place(batch_of(CONFIGS[name]))).compile()
    trainer.__dict__["_step"] = executable
    return trainer, executable


def run(name: str, layout: str, engine: str) -> dict:
    """The same from a Trainer that starts at the reference's parameters."""
    config, (trainer, _) = CONFIGS[name], compiled(name, layout, engine)
    start, arrange = reference(name)["start"], trainer.program.arrange
    state = sl.TrainState(np.zeros((), np.int32), arrange(start), arrange(trainer.optimizer.init(start)))
    state = dataclasses.replace(state, layer_rows=trainer.abstract_state.layer_rows)
    state = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), state, trainer.abstract_state)
    losses, first = [], None
    for _ in range(STEPS):
        state, metrics = trainer.step(state, batch_of(config))
        losses.append(float(metrics["loss"]))
        first = to_host(trainer.in_order(state.opt_state[0])) if first is None else first
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, trainer.abstract_state)
    state = trainer.in_order(state)
    return to_host(
        {"start": start, "losses": losses, "grads": first, "params": state.params, "opt_state": state.opt_state}
    )


def worst(expected, found) -> tuple[float, str]:
    """The largest difference relative to its leaf's largest element, and that leaf's path."""
    expected_leaves, tree = jax.tree_util.tree_flatten_with_path(expected)
    found_leaves, found_tree = jax.tree.flatten(found)
    assert tree == found_tree
    differences = [(0.0, "")]
    for (path, a), b in zip(expected_leaves, found_leaves, strict=True):
        assert np.shape(a) == np.shape(b), path
        scale = np.abs(a).max()
        differences.append((float(np.abs(a - b).max() / (scale if scale else 1.0)), jax.tree_util.keystr(path)))
    return max(differences)


def check(expected: dict, found: dict) -> None:
    for what, tolerance in {"losses": 1e-12, "grads": 1e-12, "params": 1e-10, "opt_state": 1e-10}.items():
        difference, path = worst(expected[what], found[what])
        assert difference < tolerance, f"{what}: {path} differs by {difference:.2g}"


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_layout_gives_the_numbers_of_one_device(name: str, layout: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "CHUNK", 5)
    check(reference(name), run(name, layout, "manual"))


@pytest.mark.parametrize(("name", "layout"), COMPILERS)
def test_the_compiler_partitions_to_the_numbers_of_one_device(name: str, layout: str):
    check(reference(name), run(name, layout, "auto"))


@pytest.mark.parametrize(("name", "layout"), PIPELINES)
def test_a_pipeline_gives_the_numbers_of_one_device(name: str, layout: str):
    check(reference(name), run(name, layout, "manual"))


def test_the_compiler_partitions_a_pipelined_layout_too():
    with pytest.warns(UserWarning, match="engine='auto' runs no schedule: 1f1b:3 has no effect"):
        check(reference("llama4"), run("llama4", "pipe=2,data=2,pipeline=1f1b:3", "auto"))
    with pytest.warns(UserWarning, match="engine='auto' runs no schedule"):
        check(reference("llama4"), run("llama4", "pipe=2,pipeline=interleaved:2:2:0+2+1+1", "auto"))


@pytest.mark.parametrize(("name", "layout"), LAYOUTS + PIPELINES)
def test_the_ledger_is_what_the_compiled_step_sends(name: str, layout: str):
    """By kind, axes, dtype and size, each as often. The compiler adds only the scalars of the optimizer's norms."""
    trainer, executable = compiled(name, layout, "manual")
    traced = sl.inspect.ledger(trainer.step_function, trainer.abstract_state, trainer.place(batch_of(CONFIGS[name])))
    found = collectives(executable.as_text(), trainer.mesh)
    assert traced.counts() - found == Counter()
    assert {key.elements for key in found - traced.counts()} <= {1}
    assert sum(traced.counts().values()) > 0 or trainer.layout.num_devices == 1


def test_padding_of_the_vocabulary_gets_no_gradient():
    for name in CONFIGS:
        for path, grad in flatten(reference(name)["grads"]).items():
            if path in ("embedding/table", "head/table"):
                assert grad.shape[0] == 72
                assert not grad[67:].any()
                assert grad[:67].any()


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"losses": lambda x: [x[0] * (1 + 1e-11), *x[1:]]}, "losses"),
        ({"grads": lambda g: g | {"final_norm": {"scale": g["final_norm"]["scale"] * 2}}}, "final_norm"),
    ],
)
def test_the_comparison_can_fail(change: dict, where: str):
    found = dict(reference("llama"))
    for key, function in change.items():
        found[key] = function(found[key])
    with pytest.raises(AssertionError, match=where):
        check(reference("llama"), found)


def test_a_missing_reduction_is_seen(monkeypatch: pytest.MonkeyPatch):
    """Negative control through the whole machinery: without the sum over data the gradients are one device's own."""
    from shardlm.parallel import zero

    reduce = zero._reduce

    def without_data(gradient, plan, dim, axes):
        return reduce(gradient, plan, dim, tuple(axis for axis in axes if axis != "data"))

    monkeypatch.setattr(zero, "_reduce", without_data)
    monkeypatch.setattr(jax, "shard_map", functools.partial(jax.shard_map, check_vma=False))
    found = run(
        "llama", "data=2,reduce_gradients=step,remat=none", "manual"
    )  # a layout of no other test: none is cached
    assert worst(reference("llama")["losses"][0], found["losses"][0])[0] < 1e-12  # before the first update
    assert worst(reference("llama")["grads"], found["grads"])[0] > 0.1


def test_float32_agrees_to_its_own_rounding():
    """bfloat16 and float32 take other paths through casts and collectives than float64: one layout of each."""
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 4e-2)):
        config = dataclasses.replace(LLAMA, dtype=dtype, param_dtype="float32")
        grads = []
        for layout in (sl.Layout(), sl.Layout(data=2, fsdp=2, tensor=2, sequence_parallel=True)):
            trainer = sl.Trainer(config, layout, optax.sgd(1.0), devices=jax.devices()[: layout.num_devices])
            loss, grad = trainer.loss_and_grads(trainer.init(), batch_of(config))
            assert {leaf.dtype for leaf in jax.tree.leaves(grad)} == {jnp.dtype("float32")}
            grads.append(to_host({"loss": loss, "grad": grad}))
        difference, path = worst(*grads)
        assert difference < tolerance, (dtype, path, difference)
