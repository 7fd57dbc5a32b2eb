"""A Trainer checks what it is given, makes the same state on every layout, and trains it with any optimizer."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import shardlm as sl
from shardlm.train.engine import flatten
from shardlm.train.forward import forward

pytestmark = pytest.mark.usefixtures("x64_module")

VOCABULARY, ROWS, SEQUENCE, SEED = 67, 8, 8, 3
CONFIG = sl.TransformerConfig(
    vocab_size=VOCABULARY, num_layers=1, d_model=16, num_heads=2, d_ff=24, vocab_multiple=8, dtype="float64",
    param_dtype="float64",
)  # fmt: skip
CUBE = sl.Layout(data=2, fsdp=2, tensor=2)


def make_batch(seed: int = 0, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Random tokens with uneven weights, some of them zero."""
    random = np.random.default_rng(seed)
    shape = (rows, SEQUENCE)
    return {
        "tokens": random.integers(0, VOCABULARY, shape),
        "targets": random.integers(0, VOCABULARY, shape),
        "weights": random.random(shape) * (random.random(shape) > 0.3) * 3.0 ** np.arange(rows)[:, None],
    }


def make_trainer(layout: sl.Layout | None, optimizer=None, config=CONFIG, **options) -> sl.Trainer:
    devices = None if layout is None else jax.devices()[: layout.num_devices]
    return sl.Trainer(config, layout, optimizer or sl.adamw(1e-2, steps=4), seed=SEED, devices=devices, **options)


def copy(state: sl.TrainState) -> sl.TrainState:
    """The same state, for a step to use up."""
    return jax.tree.map(jnp.copy, state)


def shardings(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


@pytest.fixture(scope="module")
def cube() -> sl.Trainer:
    return make_trainer(CUBE)


@pytest.fixture(scope="module")
def state(cube) -> sl.TrainState:
    """The initial state on the cube, not to be used up."""
    return cube.init()


@pytest.fixture(scope="module")
def module() -> dict:
    """The plain module: its parameters by path, and the weighted sum and weight of a batch's losses."""
    graph, state = jax.jit(lambda: nnx.split(sl.Transformer(CONFIG, rngs=nnx.Rngs(SEED))))()

    @jax.jit
    def losses(batch):
        logits = nnx.merge(graph, state)(batch["tokens"])
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
        return -(batch["weights"] * log_p).sum(), batch["weights"].sum()

    return {"params": flatten(nnx.to_pure_dict(state)), "losses": losses}


@pytest.mark.parametrize(
    ("layout", "config", "message"),
    [
        ({"data": 3}, {}, r"data=3 = 3 devices, but there are 8\. Change one size"),
        ({"data": 3, "fsdp": -1}, {}, "fsdp=-1 cannot be filled: data=3 = 3 does not divide the 8 devices"),
        ({"data": 2, "tensor": 4}, {}, "num_heads=2 is not a positive multiple of tensor=4: tensor can be 1"),
        ({"data": 4, "tensor": 2}, {"d_ff": 25}, "d_ff=25 is not a positive multiple of tensor=2"),
        ({"fsdp": 8}, {"d_model": 20}, "d_model=20 is not a positive multiple of fsdp=8"),
        ({"data": 2, "tensor": 4}, {"num_heads": 12, "num_kv_heads": 6, "head_dim": 2}, "num_kv_heads=6 and tensor=4"),
        ({"fsdp": 8, "accumulate": 3}, {}, None),
        ({"expert": 2, "data": 4}, {}, "expert=2: the expert axis is not available yet"),
    ],
)  # fmt: skip
def test_a_layout_that_does_not_fit_is_refused_before_anything_is_allocated(layout, config, message):
    before = len(jax.live_arrays())
    if message is None:
        sl.Trainer(dataclasses.replace(CONFIG, **config), sl.Layout(**layout))
    else:
        with pytest.raises(sl.LayoutError, match=message):
            sl.Trainer(dataclasses.replace(CONFIG, **config), sl.Layout(**layout))
    assert len(jax.live_arrays()) == before


def test_every_conflict_with_the_model_is_in_one_error():
    config = dataclasses.replace(CONFIG, d_model=14, d_ff=27, num_heads=7, head_dim=2, num_kv_heads=7)
    with pytest.raises(sl.LayoutError) as error:
        sl.Trainer(config, sl.Layout(fsdp=4, tensor=2))
    for conflict in ("num_heads=7", "d_ff=27", "d_model=14", "num_kv_heads=7 and tensor=2"):
        assert f"- {conflict}" in str(error.value)


def test_rows_that_do_not_divide_are_an_error_of_the_call(cube, state):
    for call in (cube.place, lambda b: cube.step(state, b), lambda b: cube.evaluate(state, [b])):
        with pytest.raises(sl.LayoutError, match="batch_size=6 is not a positive multiple of data=2 x fsdp=2"):
            call(make_batch(rows=6))
    assert not state.step.is_deleted()


def test_an_unknown_engine_is_an_error_that_lists_them():
    with pytest.raises(ValueError, match="engine='magic'; it is one of 'manual', 'auto'"):
        make_trainer(None, engine="magic")


def test_float64_must_be_switched_on():
    with (
        jax.enable_x64(False),
        pytest.raises(ValueError, match="dtype='float64'.*: JAX computes in float64 only after"),
    ):
        make_trainer(None)


def test_the_default_is_one_device():
    assert list(make_trainer(None).mesh.devices.flat) == jax.devices()[:1]
    fourth = sl.Trainer(CONFIG, devices=jax.devices()[3:4])
    assert list(fourth.mesh.devices.flat) == jax.devices()[3:4]
    assert fourth.layout == sl.Layout()
    with pytest.raises(sl.LayoutError, match="1 devices, but there are 2"):
        sl.Trainer(CONFIG, devices=jax.devices()[:2])


def test_a_size_of_minus_one_is_filled_in():
    trainer = sl.Trainer(CONFIG, sl.Layout(data=-1, tensor=2))
    assert trainer.layout == sl.Layout(data=4, tensor=2)
    assert trainer.mesh.shape["data"] == 4


@pytest.mark.parametrize("layout", [sl.Layout(), sl.Layout(fsdp=8), CUBE], ids=str)
def test_the_initial_parameters_are_the_modules_on_every_layout(module, layout):
    found = flatten(make_trainer(layout).init().params)
    assert found.keys() == module["params"].keys()
    for path, value in found.items():
        np.testing.assert_array_equal(value, module["params"][path], err_msg=path)


def test_the_initial_parameters_do_not_depend_on_the_padding():
    config = dataclasses.replace(CONFIG, vocab_multiple=5, num_heads=6, num_kv_heads=6, head_dim=2)
    one, three = (make_trainer(sl.Layout(tensor=n), config=config) for n in (1, 3))
    assert (one.config.padded_vocab_size, three.config.padded_vocab_size) == (70, 75)
    assert one.num_parameters == three.num_parameters
    found, all_expected = (flatten(trainer.init().params) for trainer in (three, one))
    for path, value in found.items():
        expected = all_expected[path]
        real = one.padded_rows(path, expected.shape)
        assert three.padded_rows(path, value.shape) == real == (67 if path.endswith("table") else None)
        np.testing.assert_array_equal(value[:real], expected[:real], err_msg=path)
        assert real is None or not np.asarray(value[real:]).any()


def test_another_seed_gives_another_state(module):
    found = flatten(sl.Trainer(CONFIG, seed=SEED + 1).init().params)
    assert (np.asarray(found["head/table"]) != module["params"]["head/table"]).mean() > 0.9


def test_the_number_of_parameters_is_that_of_the_module_without_padding(cube, module):
    padding = 2 * (72 - VOCABULARY) * 16
    assert cube.num_parameters == sum(value.size for value in module["params"].values()) - padding


def test_the_state_is_laid_out_as_announced_from_init_on(cube, state):
    assert jax.tree.structure(state) == jax.tree.structure(cube.abstract_state)
    assert shardings(state) == shardings(cube.abstract_state)
    stepped, _ = cube.step(copy(state), make_batch())
    assert shardings(stepped) == shardings(cube.abstract_state)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), cube.abstract_state)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), stepped) == shapes
    table = state.params["head"]["table"]
    assert (table.sharding.spec, table.sharding.shard_shape(table.shape)) == (P("tensor", "fsdp"), (36, 8))
    adam = next(
        part for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu")
    )
    assert shardings(adam.mu) == shardings(adam.nu) == shardings(state.params)  # under ZeRO-3


def test_a_step_uses_its_state_up(cube, state):
    old = copy(state)
    new, metrics = cube.step(old, make_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    for call in (cube.step, cube.loss_and_grads, lambda state, batch: cube.evaluate(state, [batch])):
        with pytest.raises(ValueError, match="this state was used up by a step, .*: go on with what the step returned"):
            call(old, make_batch())
    with pytest.raises(ValueError, match="this state was used up by a step"):
        sl.sample(cube, old, [1], tokens=1, window=SEQUENCE)
    assert int(new.step) == 1
    assert sorted(metrics) == ["grad_norm", "loss", "tokens"]
    assert all(value.shape == () for value in metrics.values())


def test_the_metrics_of_a_step_are_those_of_its_gradients_before_clipping(cube, state, module):
    batch = make_batch()
    loss, grads = cube.loss_and_grads(state, batch)
    _, metrics = cube.step(copy(state), batch)
    total, weight = module["losses"](batch)
    norm = math.sqrt(sum(float((np.asarray(leaf) ** 2).sum()) for leaf in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["loss"], total / weight, rtol=1e-7)  # weights travel in float32
    np.testing.assert_allclose(metrics["tokens"], weight, rtol=1e-7)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-12)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-12)


def test_loss_and_grads_are_laid_out_as_the_optimizer_state_and_change_nothing(cube, state):
    before = jax.tree.map(np.asarray, state)
    loss, grads = cube.loss_and_grads(state, make_batch())
    assert loss.shape == ()
    assert jax.tree.structure(grads) == jax.tree.structure(state.params)
    assert jax.tree.map(lambda g: (g.shape, g.dtype), grads) == jax.tree.map(lambda p: (p.shape, p.dtype), state.params)
    assert shardings(grads) == shardings(state.params)  # under ZeRO-3
    jax.tree.map(np.testing.assert_array_equal, state, before)


def test_evaluation_is_the_mean_over_all_tokens_however_they_are_split(cube, state, module):
    batches = [make_batch(seed) for seed in range(3)]
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    total, weight = module["losses"](rows | {"weights": rows["weights"].astype(np.float32).astype(np.float64)})
    means = [float(cube.evaluate(state, [batch])["loss"]) for batch in batches]
    for size in (8, 12, 24):
        split = ({name: x[at : at + size] for name, x in rows.items()} for at in range(0, 24, size))
        found = cube.evaluate(state, split)
        np.testing.assert_allclose(found["loss"], total / weight, rtol=1e-12)
        np.testing.assert_allclose(found["tokens"], weight, rtol=1e-12)
        assert found["perplexity"] == math.exp(found["loss"])
    assert abs(np.mean(means) - found["loss"]) > 1e-4  # a mean of means is something else
    assert not state.step.is_deleted()


def test_evaluation_counts_a_batch_without_weight_as_nothing(cube, state):
    batch, empty = make_batch(), make_batch() | {"weights": np.zeros((ROWS, SEQUENCE))}
    assert cube.evaluate(state, [empty, batch, empty]) == cube.evaluate(state, [batch])
    with pytest.raises(ValueError, match="nothing to evaluate: 2 batches with a total weight of 0"):
        cube.evaluate(state, [empty, empty])
    with pytest.raises(ValueError, match="nothing to evaluate: 0 batches"):
        cube.evaluate(state, iter([]))
    with pytest.raises(ValueError, match="all weights are zero"):
        cube.step(state, empty)


OPTIMIZERS = {
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=8, momentum=0.9),
    "sgd": optax.sgd(0.5, momentum=0.9, nesterov=True),
    "lion": optax.lion(1e-3),
    "muon": sl.muon(1e-2, steps=10, warmup=0),
}


def side_by_side(optimizers: dict) -> optax.GradientTransformation:
    """The sum of several optimizers' updates, each of which stays in the state: they are all compiled in one step."""

    def init(params):
        return {name: (optimizer.init(params), params) for name, optimizer in optimizers.items()}

    def update(grads, state, params=None):
        results = {name: optimizer.update(grads, state[name][0], params) for name, optimizer in optimizers.items()}
        total = jax.tree.map(lambda *each: sum(each), *(updates for updates, _ in results.values()))
        return total, {name: (inner, updates) for name, (updates, inner) in results.items()}

    return optax.GradientTransformation(init, update)


@pytest.fixture(scope="module")
def after_two_steps() -> list[sl.TrainState]:
    """The states of one device and of the cube, on the host."""
    states = []
    for layout in (sl.Layout(), CUBE):
        trainer = make_trainer(layout, side_by_side(OPTIMIZERS))
        state = trainer.init()
        assert shardings(state) == shardings(trainer.abstract_state)
        for seed in range(2):
            state, _ = trainer.step(state, make_batch(seed))
        assert shardings(state) == shardings(trainer.abstract_state)
        states.append(jax.tree.map(np.asarray, state))
    return states


def assert_close(expected, found) -> None:
    """Equal to within 1e-10 of each leaf's largest element: rounding of float64, after quotients and two updates."""

    def close(path, a, b):
        assert np.abs(a - b).max() <= 1e-10 * np.abs(a).max(), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(close, expected, found)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_gives_the_numbers_of_one_device(after_two_steps, name):
    """Their arithmetic is global (factored moments, products of whole matrices), and knows of no mesh."""
    one, many = (state.opt_state[name] for state in after_two_steps)
    assert all(update.any() for update in jax.tree.leaves(one[1]))
    assert_close(one, many)


def test_so_do_the_parameters_that_they_update(after_two_steps):
    one, many = (state.params for state in after_two_steps)
    assert_close(one, many)
    one = jax.tree.map(np.array, one)
    one["head"]["table"][0, 0] *= 1 + 1e-5  # the comparison can fail
    with pytest.raises(AssertionError, match="'head'.*'table'"):
        assert_close(one, many)


def test_factored_moments_are_split_as_the_dims_that_are_left():
    trainer = make_trainer(CUBE, OPTIMIZERS["adafactor"])
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(trainer.abstract_state.opt_state)
        if leaf.ndim
    }
    rows = next(spec for path, spec in specs.items() if path.endswith("v_row/layers/mlp/up/kernel"))
    columns = next(spec for path, spec in specs.items() if path.endswith("v_col/layers/mlp/up/kernel"))
    assert {rows, columns} == {P(None, "fsdp"), P(None, "tensor")}  # of [layer, embed over fsdp, mlp over tensor]


def test_float64_needs_x64():
    config = sl.TransformerConfig(vocab_size=67, num_layers=1, d_model=16, num_heads=4, dtype="float64")
    with jax.enable_x64(False), pytest.raises(ValueError, match="only after jax.config.update"):
        sl.Trainer(config)


def test_programs_do_not_overlap_on_fake_devices():
    """Several collective programs in flight can wait for one another for ever on the CPU's threads."""
    config = sl.TransformerConfig(vocab_size=67, num_layers=1, d_model=16, num_heads=4, vocab_multiple=8)
    trainer = sl.Trainer(config, sl.Layout(data=8))
    batch = {name: np.zeros((8, 4), np.int32) for name in ("tokens", "targets")}
    state = trainer.init()
    assert all(leaf.is_ready() for leaf in jax.tree.leaves(state))
    results = trainer.loss_and_grads(state, batch)
    assert all(leaf.is_ready() for leaf in jax.tree.leaves(results))
    assert all(leaf.is_ready() for leaf in jax.tree.leaves(trainer.step(state, batch)))


@pytest.mark.parametrize("engine", ["manual", "auto"])
def test_forward_shows_what_the_loss_is_made_of(cube, state, engine):
    trainer = cube if engine == "manual" else make_trainer(CUBE, engine="auto")
    batch = make_batch()
    after = [forward(trainer, state, batch, layers) for layers in (None, 1, 0)]
    weights, nll = batch["weights"].astype(np.float32), np.asarray(after[0]["nll"])
    loss = cube.evaluate(state, [batch])["loss"]
    assert (weights * nll).sum() / weights.sum(dtype=np.float64) == pytest.approx(loss, rel=1e-12)
    real = np.asarray(after[0]["logits"])[..., :VOCABULARY]
    picked = np.take_along_axis(real, batch["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(jax.nn.logsumexp(real, -1) - picked, nll, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(after[0]["hidden"], after[1]["hidden"])  # it has one layer
    table = np.asarray(state.params["embedding"]["table"])
    np.testing.assert_allclose(after[2]["hidden"], table[batch["tokens"]], rtol=0, atol=1e-15)
