"""Whatever rows a layout stores, an optimizer sees the model's: its updates are those of Optax on one device."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardlm as sl
from shardlm.inspect.hlo import collectives
from shardlm.train.engine import flatten, unflatten
from shardlm.train.update import Update

pytestmark = pytest.mark.usefixtures("x64_module")

# A vocabulary of 9 is padded by the first and the third, layers by the first and the second. Of some parameters no dim
# divides by the first one's 3 stages.
LAYOUTS = {
    "uneven": (5, "pipe=3,tensor=2,pipeline=1f1b:3"),
    "interleaved": (3, "pipe=2,fsdp=2,tensor=2,pipeline=interleaved:2:2:1+0+1+1:ends"),
    "vocabulary": (2, "tensor=4"),
}
OPTIMIZERS = {
    "adamw": sl.adamw(1e-2, steps=8, warmup=0),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4, momentum=0.9),
    "block": optax.chain(optax.clip_by_block_rms(1e-3), optax.sgd(1.0)),
    "muon": sl.muon(1e-2, steps=8, warmup=0),
    "padding": optax.adam(1e-2, eps=0.0),  # makes 0 / 0 of padding
}


def config(num_layers: int, **options) -> sl.TransformerConfig:
    return sl.TransformerConfig(
        vocab_size=9, num_layers=num_layers, d_model=16, num_heads=4, d_ff=24, vocab_multiple=1, dtype="float64",
        param_dtype="float64", tied=True, mlp=sl.MLP(gated=False), **options,
    )  # fmt: skip


def trainer(name: str, optimizer=None, **options) -> sl.Trainer:
    """A trainer of devices that need not exist: nothing is compiled."""
    layers, text = LAYOUTS[name]
    layout = sl.Layout.parse(text)
    return sl.Trainer(config(layers, **options), layout, optimizer, devices=layout.num_devices)


def side_by_side(optimizers: dict) -> optax.GradientTransformationExtraArgs:
    """The sum of several optimizers' updates, each of which stays in the state: they are all compiled in one step."""

    def init(params):
        return {name: (optimizer.init(params), params) for name, optimizer in optimizers.items()}

    def update(grads, state, params=None, **extra):
        results = {name: optimizer.update(grads, state[name][0], params) for name, optimizer in optimizers.items()}
        total = jax.tree.map(lambda *each: sum(each), *(updates for updates, _ in results.values()))
        return total, {name: (inner, updates) for name, (updates, inner) in results.items()}

    return optax.GradientTransformationExtraArgs(init, update)


def random_like(tree, seed: int):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: random.normal(size=x.shape), tree)


def assert_close(expected, found) -> None:
    """Equal to within 1e-10 of each leaf's largest element: rounding of float64, after quotients and two updates."""

    def close(path, a, b):
        assert a.shape == b.shape, jax.tree_util.keystr(path)
        assert np.abs(a - b).max() <= 1e-10 * max(np.abs(a).max(), 1e-30), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(close, expected, found)


@pytest.mark.parametrize("name", LAYOUTS)
def test_updates_are_those_of_optax_on_the_models_arrays(name: str):
    """Adam's and its like on what is stored, all others on what is rearranged for them."""
    layers, text = LAYOUTS[name]
    layout = sl.Layout.parse(text)
    devices = jax.devices()[: layout.num_devices]
    groups = [("adamw", "padding"), ("adafactor", "block", "muon")]
    model = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(sl.Transformer(config(layers), rngs=nnx.Rngs(0)))))
    params, grads = random_like(model, 0), random_like(model, 1)
    for group in groups:
        optimizer = side_by_side({key: OPTIMIZERS[key] for key in group})
        made = sl.Trainer(config(layers), layout, optimizer, devices=devices)
        update = Update(made.program, optimizer)
        assert update.rearranges == (group == groups[-1])

        def plain(grads, state, params, loss, optimizer=optimizer):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        expected = two_updates(plain, optimizer.init, params, grads)
        stored = [as_stored(made, x) for x in (params, grads)]
        places = jax.tree.map(lambda x: x.sharding, (stored[0], update.abstract))
        found = two_updates(update, update.init, *stored, places)
        assert jax.tree.map(np.shape, found[1]) == jax.tree.map(np.shape, update.abstract)
        for path, view in made.plan.views.items():
            assert not np.asarray(flatten(found[0])[path])[view.rows < 0].any()
        assert_close(jax.tree.map(np.asarray, expected), as_model(made, found))


def two_updates(step, init, params, grads, places=(None, None)):
    """Parameters and state after two updates by the same gradients, compiled without what makes programs fast."""
    state, loss = jax.jit(init, out_shardings=places[1])(params), jnp.ones(())
    compiled = jax.jit(step, out_shardings=places if places[0] else None).lower(grads, state, params, loss)
    compiled = compiled.compile(compiler_options={"xla_backend_optimization_level": 0})
    loss = jax.device_put(loss, compiled.input_shardings[0][3])
    for _ in range(2):
        params, state = compiled(grads, state, params, loss)
    return params, state


def as_stored(made: sl.Trainer, tree):
    """Arrays of the host on the devices, as gradients are stored."""
    flat = flatten(tree)
    for path, view in made.plan.views.items():
        flat[path] = np.zeros(view.split.shape)
        flat[path][view.rows >= 0] = flatten(tree)[path]
    return jax.tree.map(jax.device_put, unflatten(flat), made.plan.shardings("sharded"))


def as_model(made: sl.Trainer, tree):
    """Stored arrays on the host, without the rows that are padding; and what is stored as it is."""

    def take(keys, x):
        path = "/".join(str(key.key) for key in keys if hasattr(key, "key"))
        ends = [end for end in made.plan.views if path == end or path.endswith("/" + end)]
        view = made.plan.views[ends[0]] if ends else None
        return np.asarray(x)[view.rows >= 0] if view and x.shape == view.split.shape else np.asarray(x)

    return jax.tree_util.tree_map_with_path(take, tree)


def test_a_step_rearranges_what_the_ledger_says():
    layers, text = LAYOUTS["uneven"]
    layout = sl.Layout.parse(text)
    tokens = np.random.default_rng(0).integers(0, 9, (6, 7))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    optimizer = optax.chain(optax.clip_by_block_rms(1e-3), optax.add_decayed_weights(0.1), optax.sgd(1.0))
    states = []
    for where in (sl.Layout(), layout):
        made = sl.Trainer(config(layers), where, optimizer, devices=jax.devices()[: where.num_devices])
        step = made._step.lower(made.abstract_state, made.place(batch)).compile()
        state, _ = step(made.init(), made.place(batch))
        states.append(as_model(made, state.params))
    assert_close(*states)
    traced = sl.inspect.ledger(made.step_function, made.abstract_state, made.place(batch))
    moved = {key for key in traced.counts() if key.kind == "all-to-all"}
    assert {key.axes for key in moved} == {("pipe",)}
    assert not {key for key in traced.counts() - collectives(step.as_text(), made.mesh)} & moved


def test_gradients_come_with_their_layers_in_order():
    made = trainer("interleaved")
    batch = {name: jax.ShapeDtypeStruct((4, 6), np.int32) for name in ("tokens", "targets")}
    _, grads = jax.eval_shape(made.gradient_function, made.abstract_state, made.abstract_batch(batch))
    for path, leaf in flatten(grads).items():
        stored, in_order = made.plan.splits[path].shape, made.plan.in_order[path].shape
        assert leaf.shape == in_order
        assert not path.startswith("layers/") or stored[:2] == (2, 2) and in_order[0] == 3
    same = made.in_order(jax.tree.map(lambda x: np.zeros(x.shape), grads))
    assert jax.tree.map(np.shape, same) == jax.tree.map(np.shape, grads)


ELEMENTWISE = {
    "adamw": sl.adamw(1e-3, steps=10),
    "sgd": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "lion": optax.lion(1e-3),
    "clipped": optax.chain(optax.scale_by_adam(), optax.clip_by_global_norm(0.1), optax.scale(-1e-2)),
    "clip": optax.chain(optax.clip(0.1), optax.rmsprop(1e-3)),
    "several": optax.MultiSteps(optax.adam(1e-3), 4),
    "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=optax.cosine_decay_schedule(1e-3, 10)),
    "masked": optax.masked(optax.adam(1e-3), sl.decayed),
    "finite": optax.apply_if_finite(optax.adam(1e-3), 3),
    "parts": optax.partition(
        {True: optax.adam(1e-3), False: optax.sgd(0.1)}, lambda params: jax.tree.map(lambda x: x, sl.decayed(params))
    ),
}
OTHERS = {
    "adafactor": optax.adafactor(1e-3),
    "block": optax.clip_by_block_rms(1.0),
    "agc": optax.adaptive_grad_clip(0.01),
    "muon": sl.muon(1e-3, steps=10),
    "noise": optax.noisy_sgd(0.1, key=1),
    "flat": optax.flatten(optax.adam(1e-3)),
    "centred": optax.centralize(),
    "maximum": optax.stateless(lambda g, p: jax.tree.map(lambda x: x / jnp.max(jnp.abs(x)), g)),
    "mean": optax.stateless(lambda g, p: jax.tree.map(lambda x: x / jnp.mean(x**2), g)),
    "by shape": optax.stateless(lambda g, p: jax.tree.map(lambda x: x * x.shape[0], g)),
    "rows": optax.stateless(lambda g, p: jax.tree.map(lambda x: x / (1 + jnp.sum(x**2, axis=-1, keepdims=True)), g)),
    "places": optax.stateless(lambda g, p: jax.tree.map(lambda x: x * jnp.arange(x.size).reshape(x.shape), g)),
    "order": optax.stateless(lambda g, p: jax.tree.map(lambda x: x[::-1], g)),
}


@pytest.mark.parametrize("name", ["uneven", "interleaved"])
@pytest.mark.parametrize("optimizer", [*ELEMENTWISE, *OTHERS])
def test_its_arithmetic_tells_whether_an_optimizer_takes_every_element_for_itself(name: str, optimizer: str):
    update = Update(trainer(name).program, (ELEMENTWISE | OTHERS)[optimizer])
    assert update.rearranges == (optimizer in OTHERS)
    assert bool(update.cost()[1]) == update.rearranges


def test_where_everything_is_stored_in_order_nothing_is_rearranged():
    even = sl.Layout.parse("pipe=2,fsdp=2,pipeline=1f1b:2")
    made = sl.Trainer(dataclasses.replace(config(4), vocab_size=10), even, OTHERS["adafactor"], devices=4)
    assert not made.plan.views
    assert not Update(made.program, made.optimizer).rearranges


def test_explain_says_what_the_rearrangement_costs():
    plain, other = (trainer("uneven", o).explain(6, 6) for o in (ELEMENTWISE["sgd"], OPTIMIZERS["block"]))
    assert not any("rearranged" in note or "in order and without padding" in note for note in plain.notes)
    [note] = [note for note in other.notes if "in order and without padding" in note]
    sent, copies = Update(trainer("uneven").program, OPTIMIZERS["block"]).cost()
    assert other.ledger.bytes(kind="all-to-all") + other.ledger.bytes(kind="all-gather") == pytest.approx(
        sent + plain.ledger.bytes(kind="all-gather")
    )
    assert copies > 0 and "of copies on each device" in note
    assert other.memory.peak >= other.memory.state + other.memory.gradients + copies


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda: optax.lbfgs(), "value_fn"),
        (lambda: optax.contrib.differentially_private_aggregate(1.0, 1.0, key=0), "batch dimension"),
        (lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True), "grad_fn"),
        (lambda: optax.stateless(lambda g, p: jax.tree.map(jnp.sum, g)), "has shape .* and had"),
    ],
)
def test_what_a_step_cannot_serve_is_refused_when_the_trainer_is_made(optimizer, message):
    with pytest.raises(ValueError, match=f"optimizer: .*{message}"):
        trainer("vocabulary", optimizer())


@pytest.mark.parametrize(
    ("optimizer", "warns"),
    [
        (lambda: optax.contrib.muon(1e-2), True),
        (lambda: optax.adamw(1e-3, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)), True),
        (lambda: optax.masked(optax.sgd(0.1, momentum=0.9), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)), True),
        (lambda: optax.adamw(1e-3), False),
        (lambda: optax.adamw(1e-3, mask=sl.decayed), False),
        (lambda: sl.adamw(1e-3, steps=10), False),
        (lambda: sl.muon(1e-3, steps=10), False),
        (lambda: optax.contrib.muon(1e-2, muon_weight_dimension_numbers=sl.matrix_dims(config(5))), False),
        (lambda: optax.adafactor(1e-3), False),
        (lambda: optax.lamb(1e-3, weight_decay=0.1), False),
    ],
)
def test_a_mask_by_ndim_that_takes_stacked_vectors_for_matrices_is_said(optimizer, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer("uneven", optimizer())
    found = [str(w.message) for w in caught if "by their number of dims" in str(w.message)]
    assert bool(found) == warns, found
    assert all("layers/attention_norm/scale [5, 16]" in text and "mask=sl.decayed" in text for text in found)


def linear(optimizer, layout=None):
    def loss(module, batch):
        losses = (module(batch["x"]) - batch["y"]) ** 2
        return losses.sum(), losses.size

    make = lambda rngs: nnx.Linear(3, 2, rngs=rngs)  # noqa: E731
    return sl.Trainer.from_module(
        make, loss, layout, optimizer, devices=jax.devices()[: layout.num_devices if layout else 1]
    )


def points(seed: int) -> dict:
    random = np.random.default_rng(seed)
    return {"x": random.normal(size=(4, 3)).astype(np.float32), "y": random.normal(size=(4, 2)).astype(np.float32)}


def test_an_optimizer_that_asks_for_the_loss_is_given_it():
    made = linear(optax.polyak_sgd(max_learning_rate=10.0))
    state = made.init()
    loss, grads = made.loss_and_grads(state, points(0))
    rate = float(loss) / sum(float((g**2).sum()) for g in jax.tree.leaves(grads))
    expected = jax.tree.map(lambda p, g: p - rate * g, state.params, grads)
    found = made.step(state, points(0))[0].params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), expected, found)


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg"])
def test_random_keys_are_saved_and_go_on_as_they_were(tmp_path, generator):
    def optimizer(start=1):
        return optax.noisy_sgd(0.1, key=jax.random.key(start, impl=generator))

    batches = [points(i) for i in range(4)]
    straight = linear(optimizer()).fit(batches, 4, verbose=False)
    linear(optimizer()).fit(batches, 2, checkpoint_dir=tmp_path, verbose=False)
    made = linear(optimizer(7), sl.Layout(data=2))  # the seed is that of the checkpoint
    state = sl.restore(tmp_path / "2", made)
    key = next(x for x in jax.tree.leaves(state.opt_state) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key))
    assert jax.random.key_impl(key) == generator
    assert len(key.sharding.device_set) == 2
    resumed = linear(optimizer(7)).fit(batches, 4, checkpoint_dir=tmp_path, verbose=False)
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)
    other = "rbg" if generator == "threefry2x32" else "threefry2x32"
    with pytest.raises(ValueError, match=f"rng_key: expected keys .* found those of {generator}|rng_key: shape"):
        sl.restore(tmp_path / "2", linear(optax.noisy_sgd(0.1, key=jax.random.key(0, impl=other))))
