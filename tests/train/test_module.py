"""Any Flax module trains on any layout with the single device's numbers, and what it cannot do is an error.

The modules are made of Flax's own layers, as its documentation shows them. The reference is a loop on one device with
its own gradients, accumulation, random streams and updates, written here; tolerances as in test_same_numbers.py.
"""

import contextlib
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardlm as sl
from shardlm.train.engine import flatten, unflatten
from tests.train.test_same_numbers import worst

pytestmark = pytest.mark.usefixtures("x64_module")

ROWS, STEPS, SEED, VOCABULARY = 24, 3, 5, 20
WIDE = {"dtype": jnp.float64, "param_dtype": jnp.float64}


def attention(query, key, value, **_):
    """In float64 throughout: the fused function that a MultiHeadAttention prefers has a softmax in float32."""
    scores = jnp.einsum("...qhd,...khd->...hqk", query / np.sqrt(query.shape[-1]), key)
    return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores), value)


class Attend(nnx.Module):
    """A stack of Flax's own layers over tokens."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, 12, rngs=rngs, **WIDE)
        self.norm = nnx.LayerNorm(12, rngs=rngs, **WIDE)
        self.attend = nnx.MultiHeadAttention(
            4, 12, use_bias=False, attention_fn=attention, decode=False, rngs=rngs, **WIDE
        )
        self.blocks = nnx.List([nnx.Linear(12, 12, rngs=rngs, **WIDE) for _ in range(2)])

    def __call__(self, x):
        x = self.embed(x)
        x = x + self.attend(self.norm(x))
        for block in self.blocks:
            x = x + nnx.relu(block(x))
        return self.embed.attend(x.mean(1))


class CNN(nnx.Module):
    """Convolution, batch normalisation, dropout, pooling: running statistics and a random stream."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 8, kernel_size=(3, 3), use_bias=False, rngs=rngs, **WIDE)
        self.batch_norm = nnx.BatchNorm(8, momentum=0.7, rngs=rngs, **WIDE)
        for name, value in (("mean", 0.0), ("var", 1.0)):  # which Flax keeps in float32
            setattr(self.batch_norm, name, nnx.BatchStat(jnp.full(8, value, jnp.float64)))
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.linear = nnx.Linear(32, VOCABULARY, rngs=rngs, **WIDE)

    def __call__(self, x):
        x = nnx.relu(self.batch_norm(self.conv(x)))
        x = nnx.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        return self.linear(self.dropout(x.reshape(x.shape[0], -1)))


class Annotated(nnx.Module):
    """An MLP whose initialisers say what is split, and a table held as a bare array."""

    def __init__(self, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        columns, rows = (nnx.with_partitioning(init, spec) for spec in ((None, "tensor"), ("tensor", None)))
        self.up = nnx.Linear(16, 24, kernel_init=columns, rngs=rngs, **WIDE)
        self.down = nnx.Linear(24, VOCABULARY, kernel_init=rows, use_bias=False, rngs=rngs, **WIDE)
        self.shift = jnp.linspace(0.0, 1.0, 16)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x.reshape(x.shape[0], -1) + self.shift)))


MODULES = {"attend": Attend, "cnn": CNN, "annotated": Annotated}
RULES = {
    "attend": [
        (r"embed", P("tensor")),
        (r"attend/(query|key|value)/kernel", P(None, "tensor")),
        (r"attend/out/kernel", P("tensor")),
        (r"blocks/\d/kernel", P(None, "tensor")),
        (r".*", P()),
    ],
    "cnn": [(r"conv/kernel", P(None, None, None, "tensor")), (r"linear/kernel", P("tensor")), (r".*", P())],
    "annotated": None,
}
LAYOUTS = [
    ("attend", "accumulate=3"),
    ("attend", "fsdp=4,zero=1,accumulate=3"),
    ("attend", "fsdp=4,zero=3"),
    ("attend", "data=2,tensor=4"),
    ("attend", "data=2,fsdp=2,tensor=2,zero=2,accumulate=2"),
    ("cnn", "data=8"),
    ("cnn", "fsdp=4,zero=2,accumulate=3"),
    ("cnn", "data=2,fsdp=2,tensor=2"),
    ("annotated", "tensor=2,accumulate=2"),
    ("annotated", "fsdp=8"),
    ("annotated", "data=2,fsdp=2,tensor=2,zero=3"),
    ("annotated", "fsdp=2,tensor=4,zero=2,accumulate=3"),
]


def loss_fn(module, batch):
    """Cross-entropy under uneven weights."""
    losses = optax.softmax_cross_entropy_with_integer_labels(module(batch["x"]), batch["y"])
    return (batch["weights"] * losses).sum(), batch["weights"].sum()


def make_batch(name: str, seed: int = 0, rows: int = ROWS) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCABULARY, (rows, 5))
    return {
        "x": tokens if name == "attend" else random.normal(size=(rows, 4, 4, 1)),
        "y": random.integers(0, VOCABULARY, rows),
        "weights": random.random(rows) * 3.0 ** (np.arange(rows) % 4),
    }


def remember_gradients() -> optax.GradientTransformation:
    """Changes nothing and keeps the last gradients in its state: one compiled step then shows them, too."""
    return optax.GradientTransformation(lambda params: params, lambda grads, state, params=None: (grads, grads))


def make_optimizer() -> optax.GradientTransformation:
    return optax.chain(remember_gradients(), optax.clip_by_global_norm(0.5), optax.adamw(1e-2))


def small(layout: sl.Layout | None = None, make=None, loss=loss_fn, **options) -> sl.Trainer:
    """A trainer of the annotated MLP, or of another module."""
    layout = layout or sl.Layout(data=2, fsdp=2, tensor=2)
    options = {"devices": jax.devices()[: layout.num_devices]} | options
    return sl.Trainer.from_module(make or Annotated, loss, layout, make_optimizer(), **options)


@functools.cache
def make_trainer(name: str, layout: str) -> sl.Trainer:
    layout = sl.Layout.parse(layout)
    devices = jax.devices()[: layout.num_devices]
    rules = RULES[name] if layout.tensor > 1 else None
    return sl.Trainer.from_module(
        MODULES[name], loss_fn, layout, make_optimizer(), rules=rules, seed=SEED, devices=devices
    )


def arrays(state: nnx.State) -> dict[str, np.ndarray]:
    """A Flax state's arrays by path."""
    flat = nnx.to_flat_state(state)
    return {"/".join(map(str, path)): np.asarray(getattr(x, "get_value", lambda x=x: x)()) for path, x in flat}


def put(module: nnx.Module, values: dict) -> None:
    """Assign arrays to the variables at these paths."""
    for path, value in values.items():
        node = module
        for key in path.split("/"):
            node = node[int(key)] if key.isdigit() else getattr(node, key)
        node[...] = value


@functools.cache
def reference(name: str, accumulate: int) -> dict:
    """Losses and first gradients, then parameters, optimizer state and variables after three updates, on one device."""
    with nnx.use_eager_sharding(False):
        module = MODULES[name](nnx.Rngs(SEED))
    random, optimizer = np.random.default_rng(2), make_optimizer()
    params = {p: x + 0.1 * random.normal(size=x.shape) for p, x in arrays(nnx.state(module, nnx.Param)).items()}
    stats = arrays(nnx.state(module, nnx.BatchStat))

    def loss(params: dict, stats: dict, batch: dict, key: jax.Array):
        with nnx.use_eager_sharding(False):
            module = MODULES[name](nnx.Rngs(SEED))
        put(module, params | stats)
        module.train()
        if name == "cnn":  # its one random stream
            put(module, {"dropout/rngs/key": jax.random.fold_in(key, 0), "dropout/rngs/count": jnp.uint32(0)})
        logits = module(batch["x"])
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], -1)[:, 0]
        new = {path: leaf.get_value() for path, leaf in zip(stats, leaves(module), strict=True)}
        return -(batch["weights"] * log_p).sum(), new

    def leaves(module: nnx.Module) -> list:
        return [variable for _, variable in nnx.to_flat_state(nnx.state(module, nnx.BatchStat))]

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    result = {"start": params, "losses": [], "variables": stats}
    params = unflatten(params)
    opt_state = optimizer.init(params)
    batch = make_batch(name)
    for step in range(STEPS):
        total, sums = 0.0, None
        for k in range(accumulate):
            part = {key: value[k::accumulate] for key, value in batch.items()}
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), step), k)
            (more, stats), grads = gradient(flatten(params), stats, part, key)
            total += float(more)
            sums = grads if sums is None else jax.tree.map(jnp.add, sums, grads)
        weight = batch["weights"].sum()
        result["losses"].append(total / weight)
        grads = unflatten(jax.tree.map(lambda g: g / weight, sums))  # noqa: B023
        result.setdefault("grads", grads)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(np.asarray, result | {"params": params, "opt_state": opt_state, "stats": stats})


def run(name: str, layout: str) -> dict:
    """The same from a trainer that starts at the reference's parameters."""
    trainer = make_trainer(name, layout)
    start = unflatten(reference(name, trainer.layout.accumulate)["start"])
    state = trainer.init()
    state = sl.TrainState(state.step, start, trainer.optimizer.init(start), state.variables)
    state = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), state, trainer.abstract_state)
    losses, first = [], None
    for _ in range(STEPS):
        state, metrics = trainer.step(state, make_batch(name))
        losses.append(float(metrics["loss"]))
        first = jax.tree.map(np.asarray, state.opt_state[0]) if first is None else first
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, trainer.abstract_state)
    stats = {path: x for path, x in flatten(state.variables).items() if path != "shift"}
    return jax.tree.map(
        np.asarray,
        {"losses": losses, "grads": first, "params": state.params, "opt_state": state.opt_state, "stats": stats},
    )


def check(expected: dict, found: dict) -> None:
    tolerances = {"losses": 1e-12, "grads": 1e-12, "params": 1e-10, "opt_state": 1e-10, "stats": 1e-12}
    for what, tolerance in tolerances.items():
        difference, path = worst(expected[what], found[what])
        assert difference < tolerance, f"{what}: {path} differs by {difference:.2g}"


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_a_module_on_a_layout_gives_the_numbers_of_one_device(name: str, layout: str):
    # Accumulation changes what batch statistics are of; elsewhere it changes nothing.
    accumulate = sl.Layout.parse(layout).accumulate if name == "cnn" else 1
    expected = reference(name, accumulate)
    assert (expected["stats"] != {}) == (name == "cnn")
    found = run(name, layout)
    check(expected, found)
    with pytest.raises(AssertionError, match="params: .* differs"):
        check(expected, found | {"params": jax.tree.map(lambda x: x * (1 + 1e-9), found["params"])})


def test_a_comparison_sees_a_mean_of_means(monkeypatch: pytest.MonkeyPatch):
    """Negative control through the whole machinery: each microbatch's own mean, instead of sums."""
    from shardlm.train import module

    def mean(result):
        return result[0] / result[1], jnp.ones(())

    monkeypatch.setattr(module, "_pair", mean)
    make_trainer.cache_clear()
    found = run("annotated", "tensor=2,accumulate=2")
    make_trainer.cache_clear()
    with pytest.raises(AssertionError, match="losses: .* differs"):
        check(reference("annotated", 1), found)


def test_accumulation_changes_the_statistics_of_a_batch_normalisation():
    assert worst(reference("cnn", 1)["grads"], reference("cnn", 3)["grads"])[0] > 1e-3


def test_specs_come_from_rules_annotations_and_zero():
    trainer = make_trainer("attend", "data=2,fsdp=2,tensor=2,zero=2,accumulate=2")
    assert {path: leaf.sharding.spec for path, leaf in flatten(trainer.abstract_state.params).items()} == {
        "attend/key/kernel": P(None, "tensor"),
        "attend/out/kernel": P("tensor"),
        "attend/query/kernel": P(None, "tensor"),
        "attend/value/kernel": P(None, "tensor"),
        "blocks/0/bias": P(),
        "blocks/0/kernel": P(None, "tensor"),
        "blocks/1/bias": P(),
        "blocks/1/kernel": P(None, "tensor"),
        "embed/embedding": P("tensor"),
        "norm/bias": P(),
        "norm/scale": P(),
    }
    moments = trainer.abstract_state.opt_state[0]
    assert moments["embed"]["embedding"].sharding.spec == P("tensor", "fsdp")
    assert moments["norm"]["scale"].sharding.spec == P("fsdp")
    cube = make_trainer("annotated", "data=2,fsdp=2,tensor=2,zero=3")
    assert {path: leaf.sharding.spec for path, leaf in flatten(cube.abstract_state.params).items()} == {
        "down/kernel": P("tensor", "fsdp"),
        "up/bias": P("fsdp"),
        "up/kernel": P("fsdp", "tensor"),
    }
    assert cube.abstract_state.variables["shift"].sharding.spec == P()
    text = cube.describe(parameters=True)
    assert "Annotated on data=2 x fsdp=2 x tensor=2, partitioned by the compiler" in text
    assert "carried from step to step, not trained: shift" in text
    assert "annotation, ZeRO-3 on dim 0" in text
    assert f"{16 * 24 + 24 + 24 * VOCABULARY} parameters; on each device" in text


def test_initial_values_are_the_modules_on_every_layout_and_of_the_seed():
    with nnx.use_eager_sharding(False):
        expected = jax.jit(lambda: arrays_of(Annotated(nnx.Rngs(SEED))))()
    for layout in (sl.Layout(), sl.Layout(data=2, fsdp=2, tensor=2), sl.Layout(fsdp=8)):
        trainer = small(layout, seed=SEED)
        state = trainer.init()
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, trainer.abstract_state)
        for path, value in flatten(state.params).items():
            np.testing.assert_array_equal(value, expected[path], err_msg=path)
        np.testing.assert_array_equal(state.variables["shift"], np.linspace(0, 1, 16))
    other = small(sl.Layout(), seed=SEED + 1).init()
    assert (np.asarray(other.params["up"]["kernel"]) != expected["up/kernel"]).all()


def arrays_of(module: nnx.Module) -> dict:
    return {"/".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def test_evaluation_is_in_eval_mode_and_gradients_change_nothing():
    trainer = make_trainer("cnn", "data=8")
    state, batch = trainer.init(), make_batch("cnn")
    module = CNN(nnx.Rngs(SEED))
    module.eval()
    total, weight = loss_fn(module, batch)
    found = trainer.evaluate(state, [batch])
    np.testing.assert_allclose(found["loss"], total / weight, rtol=1e-12)
    assert found["weight"] == pytest.approx(batch["weights"].sum(), rel=1e-14)
    before = jax.tree.map(np.asarray, state)
    loss, grads = trainer.loss_and_grads(state, batch)
    assert abs(float(loss) - found["loss"]) > 1e-3  # dropout and this batch's statistics
    jax.tree.map(np.testing.assert_array_equal, state, before)
    stepped, metrics = trainer.step(state, batch)
    assert sorted(metrics) == ["grad_norm", "loss", "weight"]
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-12)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-12)
    assert (np.asarray(stepped.variables["batch_norm"]["mean"]) != 0).all()
    with pytest.raises(ValueError, match="nothing to evaluate: 0 batches"):
        trainer.evaluate(stepped, [])


def same(one: sl.TrainState, other: sl.TrainState) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def fit(trainer: sl.Trainer, batches, steps: int, **options) -> tuple[sl.TrainState, str]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        return trainer.fit(batches, steps, **options), output.getvalue()


def test_fit_resumes_with_the_next_batch_and_restores_on_another_layout(tmp_path):
    trainer = make_trainer("cnn", "data=8")
    batches = [make_batch("cnn", seed) for seed in range(4)]
    expected, printed = fit(trainer, batches, 4, log_every=2, held_out=batches[:1], log_dir=tmp_path / "log")
    assert "rows/s" in printed
    lines = [json.loads(line) for line in (tmp_path / "log/metrics.jsonl").read_text().splitlines()]
    assert {"rows_per_second", "weight", "loss"} <= lines[0].keys()
    assert lines[-1].keys() == {"step", "time", "held_out_loss"}
    fit(trainer, batches, 2, checkpoint_dir=tmp_path / "run")
    resumed, printed = fit(trainer, [None, None, *batches[2:]], 4, checkpoint_dir=tmp_path / "run")
    assert "resumed from" in printed
    same(expected, resumed)
    assert (np.asarray(resumed.variables["batch_norm"]["var"]) != 1).all()
    other = make_trainer("cnn", "data=2,fsdp=2,tensor=2")
    restored = sl.restore(tmp_path / "run/4", other)
    same(expected, restored)
    assert restored.params["linear"]["kernel"].sharding.spec == P("tensor", "fsdp")
    with pytest.raises(ValueError, match="params/batch_norm/bias"):
        fit(make_trainer("annotated", "fsdp=8"), batches, 5, checkpoint_dir=tmp_path / "run")


def test_abstract_batches_are_what_place_makes():
    trainer = make_trainer("annotated", "fsdp=8")
    batch = make_batch("annotated")
    placed, abstract = trainer.place(batch), trainer.abstract_batch(batch)
    described = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), placed)
    assert described == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), abstract)
    assert trainer.abstract_batch(abstract) == trainer.abstract_batch(placed) == abstract
    assert placed["x"].sharding == trainer.batch_sharding == NamedSharding(trainer.mesh, P("fsdp"))
    assert trainer.place(placed) is placed
    pair = trainer.place((batch["x"], [batch["y"]]))
    assert isinstance(pair, tuple) and pair[1][0].shape == (ROWS,)
    shapes = jax.eval_shape(trainer.step_function, trainer.abstract_state, abstract)
    assert jax.tree.map(lambda x: x.shape, shapes[0]) == jax.tree.map(lambda x: x.shape, trainer.abstract_state)
    loss, grads = jax.eval_shape(trainer.gradient_function, trainer.abstract_state, abstract)
    assert (loss.shape, jax.tree.structure(grads)) == ((), jax.tree.structure(trainer.abstract_state.params))
    with jax.enable_x64(False), pytest.raises(ValueError, match="y holds numbers beyond int32"):
        trainer.place(batch | {"y": np.full(ROWS, 2**40)})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"y": np.zeros(16)},
            ValueError,
            r"the leaves differ in dim 0, the batch: weights \(24,\), x \(24, 4, 4, 1\), y",
        ),
        ({"y": 3}, TypeError, "batch: y is a int; every leaf is an array of numbers, of NumPy or JAX"),
        ({"y": np.array(["a"] * ROWS)}, TypeError, "batch: y has dtype <U1"),
        ({"y": np.array(3.0)}, ValueError, r"batch: y is a scalar; every leaf is \[batch, ...\]"),
    ],
)
def test_batches_that_cannot_be_split_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        make_trainer("annotated", "fsdp=8").place(make_batch("annotated") | change)


def test_rows_that_do_not_divide_and_empty_batches_are_refused():
    trainer = make_trainer("cnn", "fsdp=4,zero=2,accumulate=3")
    message = r"20 rows are not a positive multiple of fsdp=4 x accumulate=3 = 12: they would leave 1.67 .*use 12 or 24"
    for call in (trainer.place, trainer.abstract_batch, lambda batch: trainer.local_rows(20)):
        with pytest.raises(sl.LayoutError, match=message):
            call(make_batch("cnn", rows=20))
    with pytest.raises(ValueError, match="batch: it holds no arrays"):
        trainer.place({})


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            lambda total, weight: total,
            r"a pair of scalars, \(sum of losses, .*; this one returned one array of shape \(\)",
        ),
        (lambda total, weight: (total, weight, 0), "this one returned 3 values"),
        (lambda total, weight: (total[None], weight), r"its sum of losses has shape \(1,\): sum it"),
        (lambda total, weight: (total, "3"), "its sum of weights is a str"),
        (lambda total, weight: (total.astype(int), weight), "its sum of losses has dtype int64, which has no gradient"),
    ],
)
def test_a_loss_function_returns_a_pair_of_scalars(returned, message):
    trainer = small(sl.Layout(), loss=lambda module, batch: returned(*loss_fn(module, batch)))
    with pytest.raises(TypeError, match=message):
        jax.eval_shape(
            trainer.gradient_function, trainer.abstract_state, trainer.abstract_batch(make_batch("annotated"))
        )


class Odd(nnx.Module):
    """Does whatever `act` does to it when it is called."""

    def __init__(self, act, **attributes):
        self.linear = nnx.Linear(16, VOCABULARY, rngs=nnx.Rngs(0), **WIDE)
        self.calls, self.state, self.act = 0, nnx.Variable(jnp.zeros(2)), act
        for name, value in attributes.items():
            setattr(self, name, value)

    def __call__(self, x):
        self.act(self)
        return self.linear(x.reshape(x.shape[0], -1))


def grow(module):
    module.state = nnx.Variable(jnp.zeros(3))


def enlarge(module):
    module.linear.bias.set_value(jnp.zeros(1))


def count(module):
    module.calls += 1


def remember(module):
    module.seen = nnx.Intermediate(jnp.zeros(2))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (grow, r"state was float64\[2\], is float64\[3\]"),
        (enlarge, r"linear/bias was float64\[20\], is float64\[1\]"),
        (count, "an attribute that is no array changed: keep what changes in an nnx.Variable"),
        (remember, "seen is new: take it out with nnx.pop in loss_fn"),
    ],
)
def test_what_cannot_be_carried_is_an_error(act, message):
    trainer = small(sl.Layout(), lambda rngs: Odd(act))
    with pytest.raises(ValueError, match=f"a step of Odd does what cannot be carried to the next:\n  - {message}"):
        jax.eval_shape(
            trainer.gradient_function, trainer.abstract_state, trainer.abstract_batch(make_batch("annotated"))
        )


def test_what_a_loss_function_takes_out_is_no_matter():
    def loss(module, batch):
        result = loss_fn(module, batch)
        nnx.pop(module, nnx.Intermediate)
        return result

    trainer = small(sl.Layout(), lambda rngs: Odd(remember), loss)
    jax.eval_shape(trainer.gradient_function, trainer.abstract_state, trainer.abstract_batch(make_batch("annotated")))


def nothing(module):
    pass


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (3, TypeError, "make_module is a int; it is a function from nnx.Rngs to an nnx.Module"),
        (lambda rngs: {"a": 1}, TypeError, "make_module returned a dict; it returns an nnx.Module"),
        (
            lambda rngs: nnx.Dropout(0.5, rngs=rngs),
            sl.LayoutError,
            "only nnx.Param are trained, and this module has none",
        ),
        (lambda rngs: Odd(nothing, ids=nnx.Param(jnp.arange(3))), ValueError, "ids is an nnx.Param of dtype int64"),
        (
            lambda rngs: Odd(nothing, key=nnx.Variable(jax.random.key(0))),
            ValueError,
            "key is a random key outside of nnx",
        ),
        (
            lambda rngs: Odd(nothing, none=nnx.Param(jnp.zeros((0, 3)))),
            ValueError,
            r"none has no elements: shape \(0, 3\)",
        ),
        (lambda rngs: Odd(nothing, pair=(jnp.zeros(2), 3)), ValueError, r"plain containers, .*: pair \(tuple\): wrap"),
    ],
)
def test_modules_that_cannot_be_trained_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        small(sl.Layout(), make)


def test_settings_without_effect_are_an_error_that_says_what_to_do_instead():
    layout = sl.Layout(data=4, tensor=2, sequence_parallel=True, remat="full", reduce_gradients="step")
    with pytest.raises(sl.LayoutError) as error:
        small(layout)
    for problem in ("sequence_parallel is of", "use nnx.remat in the module", "reduce_gradients='step' is of"):
        assert problem in str(error.value)
    with pytest.raises(sl.LayoutError, match="pipe=2: only a sl.Transformer is cut into stages; use fsdp or data"):
        small(sl.Layout(pipe=2, data=4))
    with pytest.raises(TypeError, match="loss_fn is a int; it is a function of"):
        small(loss=3)
    with pytest.raises(sl.LayoutError, match="no rule matches these 4 parameters"):
        small(make=CNN, rules=[("linear/kernel", P("tensor"))])
    with pytest.raises(sl.LayoutError, match="tensor=2 splits nothing"):
        small(make=CNN)


def test_a_trainer_of_a_module_has_no_configuration():
    trainer = make_trainer("annotated", "fsdp=8")
    assert not hasattr(trainer, "config")
    with pytest.raises(AttributeError, match="made by from_module has none"):
        sl.sample(trainer, trainer.init(), np.array([1]), tokens=1, window=4)
