"""Modules under the transformations of Flax, with layers that rewrite their own weights, and partly frozen.

The reference is the loop that Flax's documentation shows, on one device: `nnx.value_and_grad` and an update of Optax on
the module itself. Tolerances as in test_same_numbers.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import shardlm as sl
from shardlm.train.engine import flatten, unflatten
from tests.train.test_same_numbers import worst

pytestmark = pytest.mark.usefixtures("x64_module")

WIDTH, ROWS, STEPS = 8, 8, 3
WIDE = {"dtype": jnp.float64, "param_dtype": jnp.float64}


def linear(rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(WIDTH, WIDTH, rngs=rngs, **WIDE)


class Transformed(nnx.Module):
    """Called through `nnx.jit`, `nnx.remat` and a scan of `nnx.remat`; with `all_of_them`, nearly all others too."""

    def __init__(self, rngs: nnx.Rngs, all_of_them: bool = False):
        self.all_of_them = all_of_them
        self.first, self.left, self.right = linear(rngs), linear(rngs), linear(rngs)
        make = nnx.vmap(linear, in_axes=0, out_axes=0)
        self.layers, self.heads = make(rngs.split(3)), make(rngs.split(2))
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

    @nnx.remat
    def before(self, x):
        self.calls[...] += 1
        return jnp.tanh(self.first(x))

    @nnx.jit
    def between(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def layer(x, block):
            return x + jnp.tanh(block(x))

        return layer(self.before(x), self.layers)

    def __call__(self, x):
        x = self.between(x)
        if not self.all_of_them:
            return self.right(self.left(x)) + self.heads.bias[...].sum(0) * self.heads.kernel[...].sum((0, 1))
        x = nnx.vmap(lambda x, head: head(x), in_axes=(None, 0), out_axes=0)(x, self.heads).sum(0)
        x = nnx.cond(x.sum() > 0, lambda m, x: m.left(x), lambda m, x: m.right(x), self, x)
        return nnx.fori_loop(0, 2, lambda _, c: (c[0], jnp.tanh(c[0].left(c[1]))), (self, x))[1]


class Rewritten(nnx.Module):
    """Weights that are normalised in place, behind `nnx.remat`, and adapters beside a frozen one."""

    def __init__(self, rngs: nnx.Rngs, spectral: bool = True):
        self.normed = nnx.WeightNorm(linear(rngs), param_dtype=jnp.float64, rngs=rngs)
        self.spectral = linear(rngs)
        if spectral:
            self.spectral = nnx.SpectralNorm(self.spectral, param_dtype=jnp.float64, rngs=rngs)
        self.adapted = nnx.LoRALinear(WIDTH, WIDTH, lora_rank=2, rngs=rngs, **WIDE)
        for name in ("lora_a", "lora_b"):  # which Flax keeps in float32, and starts at zero
            shape = getattr(self.adapted.lora, name).shape
            setattr(self.adapted.lora, name, nnx.LoRAParam(0.3 * jax.random.normal(rngs.params(), shape, jnp.float64)))

    @nnx.remat
    def __call__(self, x):
        return self.adapted(self.spectral(jnp.tanh(self.normed(x))))


def loss_fn(module, batch):
    return jnp.square(module(batch["x"]) - batch["y"]).sum(), len(batch["x"])


def make_batch() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.normal(size=(ROWS, WIDTH)) for name in ("x", "y")}


RULES = [(r"kernel|lora_b", P(None, "tensor")), (r".*", P())]
STACKED = [(r"(layers|heads)/kernel", P(None, None, "tensor")), *RULES]
CASES = {
    "transformed": (Transformed, nnx.Param, "data=2,fsdp=2,tensor=2", STACKED),
    "all of them": (functools.partial(Transformed, all_of_them=True), nnx.Param, "data=2,fsdp=2,tensor=2", STACKED),
    "rewritten": (Rewritten, nnx.Param, "fsdp=2,tensor=2,zero=1", RULES),
    # The power iteration of a spectral norm goes on from microbatch to microbatch: it is left out here.
    "adapted": (functools.partial(Rewritten, spectral=False), nnx.LoRAParam, "fsdp=2,tensor=2,accumulate=2", RULES),
}


@functools.cache
def make_trainer(name: str, layout: str = "") -> sl.Trainer:
    make, wrt, usual, rules = CASES[name]
    parsed = sl.Layout.parse(layout or usual)
    devices = jax.devices()[: parsed.num_devices]
    return sl.Trainer.from_module(
        make, loss_fn, parsed, optax.adam(1e-2), rules=rules, wrt=wrt, seed=3, devices=devices
    )


def arrays(state: nnx.State) -> dict[str, np.ndarray]:
    return {"/".join(map(str, keys)): np.asarray(x.get_value()) for keys, x in nnx.to_flat_state(state)}


def plain_flax(name: str) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses of `STEPS` updates, and the parameters after them."""
    make, wrt, *_ = CASES[name]
    module = make(nnx.Rngs(3))
    module.train()
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=wrt)

    @nnx.jit
    def step(module, optimizer, batch):
        def mean(module):
            total, weight = loss_fn(module, batch)
            return total / weight

        loss, grads = nnx.value_and_grad(mean, argnums=nnx.DiffState(0, wrt))(module)
        optimizer.update(module, grads)
        return loss

    losses = [float(step(module, optimizer, make_batch())) for _ in range(STEPS)]
    return losses, arrays(nnx.state(module, nnx.Param))


@pytest.fixture(scope="module", params=CASES)
def run(request) -> tuple[str, dict[str, np.ndarray], sl.TrainState, list[float]]:
    """Of one case: its name, the parameters at first, the state after `STEPS` steps, and their losses."""
    trainer = make_trainer(request.param)
    state, losses = trainer.init(), []
    start = {path: np.asarray(x) for path, x in flatten(state.params).items()}
    for _ in range(STEPS):
        state, metrics = trainer.step(state, make_batch())
        losses.append(float(metrics["loss"]))
    return request.param, start, state, losses


def test_it_trains_as_in_a_loop_of_plain_flax(run):
    name, start, state, losses = run
    expected, params = plain_flax(name)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    assert expected[-1] < expected[0]
    found = {path: np.asarray(x) for path, x in flatten(state.params).items()}
    difference, path = worst(params, found)
    assert difference < 1e-10, path
    with pytest.raises(AssertionError):  # what the layers assign counts
        assert worst(params, {p: x * (1 + 1e-6) for p, x in found.items()})[0] < 1e-10
    trainer = make_trainer(name)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, trainer.abstract_state)


def test_what_is_frozen_keeps_its_value_and_has_no_optimizer_state(run, tmp_path):
    name, start, state, _ = run
    trainer, found = make_trainer(name), flatten(state.params)
    moved = {path for path, x in found.items() if (np.asarray(x) != start[path]).any()}
    moments = set(flatten(state.opt_state[0].mu))
    if name != "adapted":
        idle = {"right/kernel", "right/bias"} if name == "all of them" else set()  # the branch that is not taken
        assert moved | idle == moments == set(found)
        return
    adapters = {"adapted/lora/lora_a", "adapted/lora/lora_b"}
    assert moments == adapters
    assert moved == adapters | {"normed/layer_instance/kernel"}  # which the layer itself normalises
    kernel = found["adapted/kernel"]
    assert kernel.sharding.spec == P("fsdp", "tensor")
    sl.save(tmp_path / "a", state)
    again = sl.restore(tmp_path / "a", make_trainer(name, "data=2,tensor=2,accumulate=2"))
    jax.tree.map(np.testing.assert_array_equal, again.params, state.params)
    assert "trained are 32 of 248 parameters, 12.90%, as wrt says: adapted/lora/lora_a, adapted/lora/lora_b" in (
        trainer.describe(parameters=True)
    )
    assert "rule 0 ('kernel|lora_b', P(None, 'tensor')), ZeRO-3 on dim 0, frozen" in trainer.describe(parameters=True)
    _, grads = jax.eval_shape(trainer.gradient_function, trainer.abstract_state, trainer.abstract_batch(make_batch()))
    assert set(flatten(grads)) == adapters


class Called(nnx.Module):
    """Two layers, dropout and running statistics, called as `call` says."""

    def __init__(self, rngs: nnx.Rngs, call):
        self.a, self.b, self.call = linear(rngs), linear(rngs), call
        self.dropout, self.norm = nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(WIDTH, rngs=rngs, **WIDE)
        self.layers = nnx.vmap(lambda r: nnx.Sequential(linear(r), nnx.Dropout(0.5, rngs=r)))(rngs.split(2))

    def __call__(self, x):
        return self.call(self, x)


def through_layers(module, x):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def layer(x, block):
        return nnx.remat(lambda block, x: jnp.tanh(block(x)))(block, x)

    return layer(x, module.layers)


@nnx.split_rngs(splits=2)
@nnx.vmap(in_axes=(nnx.StateAxes({nnx.RngState: 0, ...: None}), None), out_axes=0)
def twice(dropout, x):
    return dropout(x)


CALLS = {
    "plain": lambda m, x: m.norm(m.dropout(m.b(m.a(x)))),
    "remat": lambda m, x: nnx.remat(lambda m, x: m.norm(m.dropout(m.a(x))))(m, x),
    "remat with a policy": lambda m, x: nnx.remat(
        lambda m, x: m.norm(m.a(x)), policy=jax.checkpoint_policies.dots_saveable
    )(m, x),
    "jit in jit": lambda m, x: nnx.jit(lambda m, x: nnx.jit(lambda m, x: m.norm(m.a(x)))(m, x))(m, x),
    "remat of jit of remat": lambda m, x: nnx.remat(nnx.jit(nnx.remat(lambda m, x: m.norm(m.a(x)))))(m, x),
    "scan": through_layers,
    "jit of scan": nnx.jit(through_layers),
    "switch": lambda m, x: nnx.switch(jnp.int32(1), [lambda m, x: m.a(x), lambda m, x: m.b(x)], m, x),
    "cond of remat": lambda m, x: nnx.cond(x.sum() > 0, nnx.remat(lambda m, x: m.a(x)), lambda m, x: m.b(x), m, x),
    "split_rngs and vmap": lambda m, x: twice(m.dropout, m.a(x)).sum(0),
    "vmap over rows": lambda m, x: nnx.vmap(lambda m, x: m.b(m.a(x)), in_axes=(None, 0), out_axes=0)(m, x),
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_that_flax_does_to_a_module_counts_as_a_new_value(name: str):
    layout, one = sl.Layout(accumulate=2), jax.devices()[:1]
    trainer = sl.Trainer.from_module(lambda rngs: Called(rngs, CALLS[name]), loss_fn, layout, devices=one)
    program, batch = trainer.program, trainer.abstract_batch(make_batch())
    state, _ = jax.eval_shape(trainer.step_function, trainer.abstract_state, batch)
    assert jax.tree.structure(state) == jax.tree.structure(trainer.abstract_state)
    params, variables = (flatten(getattr(trainer.abstract_state, part)) for part in ("params", "variables"))
    key = jax.eval_shape(jax.random.key, 0)

    def assigned(params, variables, batch, key):
        return dict.fromkeys(program._assigns(params, variables, batch, key), 0)

    assert jax.eval_shape(assigned, params, variables, batch, key) == {}


class Kinds(nnx.Module):
    """Parameters of several kinds, one of which has no gradient."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear, self.table = linear(rngs), nnx.Param(jnp.arange(WIDTH))
        self.own = nnx.Variable(jnp.ones(WIDTH))

    def __call__(self, x):
        return self.linear(x) * self.own + self.table


@pytest.mark.parametrize(
    ("wrt", "trained"),
    [
        (nnx.PathContains("linear"), {"linear/kernel", "linear/bias"}),
        (nnx.All(nnx.Param, nnx.PathContains("bias")), {"linear/bias"}),
        (nnx.Any(nnx.PathContains("bias"), nnx.PathContains("own")), {"linear/bias", "own"}),
        (lambda path, _: path[-1] == "kernel", {"linear/kernel"}),
    ],
)
def test_any_filter_of_flax_says_what_is_trained(wrt, trained):
    trainer = sl.Trainer.from_module(Kinds, loss_fn, optimizer=optax.adam(1e-2), wrt=wrt)
    splits = trainer.plan.splits
    assert {path for path, split in splits.items() if not split.frozen} == trained
    assert set(splits) == {"linear/kernel", "linear/bias", "table"} | trained
    state, _ = jax.eval_shape(trainer.step_function, trainer.abstract_state, trainer.abstract_batch(make_batch()))
    assert set(flatten(state.opt_state[0].mu)) == trained and set(flatten(state.params)) == set(splits)


@pytest.mark.parametrize(
    ("wrt", "error", "message"),
    [
        (nnx.LoRAParam, ValueError, r"wrt=LoRAParam takes nothing of Kinds, whose parameters are 3 nnx.Param \(as "),
        (3, TypeError, "wrt=3 is a int; it is a filter of Flax for what is trained: a type as nnx.LoRAParam"),
        (nnx.Param, ValueError, "table is an nnx.Param of dtype int64, .* or leave it out by wrt="),
    ],
)
def test_a_filter_that_cannot_be_meant_is_an_error(wrt, error, message):
    with pytest.raises(error, match=message):
        sl.Trainer.from_module(Kinds, loss_fn, wrt=wrt)


CONFIG = sl.TransformerConfig(
    vocab_size=64, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, d_ff=24, vocab_multiple=8,
    dtype="float64", param_dtype="float64",
)  # fmt: skip


class Scored(nnx.Module):
    """Our Transformer within a module of one's own."""

    def __init__(self, rngs: nnx.Rngs):
        self.body, self.score = sl.Transformer(CONFIG, rngs=rngs), nnx.Param(jnp.ones(64))

    def __call__(self, tokens):
        return self.body(tokens) * self.score


def token_loss(module, batch):
    logits = module(batch["tokens"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return losses.sum(), losses.size


def test_our_own_transformer_is_split_as_its_dims_say_and_gives_the_same_numbers():
    layout = sl.Layout(fsdp=2, tensor=4)
    trainer = sl.Trainer.from_module(Scored, token_loss, layout, optax.sgd(1.0), seed=3)
    found = {path: split.stored for path, split in trainer.plan.splits.items()}
    assert found["body/embedding/table"] == P("tensor", "fsdp")
    assert found["body/layers/attention/query/kernel"] == P(None, "fsdp", "tensor")
    assert found["body/layers/attention/key/kernel"] == P(None, "fsdp")  # two heads on four devices
    assert found["body/layers/mlp/down/kernel"] == P(None, "tensor", "fsdp")
    random = np.random.default_rng(0)
    batch = {name: random.integers(0, 64, (4, 6)) for name in ("tokens", "targets")}
    loss, grads = trainer.loss_and_grads(trainer.init(), batch)
    plain = sl.Trainer(CONFIG, devices=jax.devices()[:1])
    params = flatten(trainer.init().params)
    ours = {path.removeprefix("body/"): np.asarray(x) for path, x in params.items() if path.startswith("body/")}
    expected, wanted = plain.loss_and_grads(plain.init(unflatten(ours)), batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    ours = {path.removeprefix("body/"): x for path, x in flatten(grads).items() if path.startswith("body/")}
    assert worst(*(jax.tree.map(np.asarray, tree) for tree in (flatten(wanted), ours)))[0] < 1e-12
    with pytest.raises(sl.LayoutError, match=r"use fsdp or data, or, for a sl\.Transformer, sl\.Trainer\(config"):
        sl.Trainer.from_module(Scored, token_loss, sl.Layout(pipe=2, data=4))


def test_rules_override_the_dims_of_our_own_layers():
    trainer = sl.Trainer.from_module(Scored, token_loss, sl.Layout(fsdp=8), rules=[(".*", P())])
    assert "over the annotation P('vocab'" not in trainer.describe(parameters=True)  # translated before
    assert trainer.plan.splits["body/embedding/table"].stored == P("fsdp")
