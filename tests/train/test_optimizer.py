"""The default optimizer warms up, decays, clips, and decays no scale or bias."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardlm as sl
from shardlm.models.transformer import parameter_dims
from shardlm.train.optimizer import decayed
from shardlm.train.paths import flatten


def rates(count: int, **options) -> np.ndarray:
    """The learning rates of the first `count` updates.

    Under a constant gradient both moments' quotient is 1 from the first update on: each update is minus the rate.
    """
    optimizer = sl.adamw(clip=None, **options)
    params = {"scale": jnp.zeros(())}  # a name that is not decayed

    def update(state, _):
        updates, state = optimizer.update({"scale": jnp.ones(())}, state, params)
        return state, -updates["scale"]

    return np.asarray(jax.lax.scan(update, optimizer.init(params), length=count)[1])


def test_the_rate_rises_to_its_peak_and_falls_to_a_tenth():
    found = rates(101, learning_rate=0.5, steps=100, warmup=20)
    np.testing.assert_allclose(found[[0, 1, 10, 20]], [0, 0.5 / 20, 0.25, 0.5], rtol=1e-6)
    np.testing.assert_allclose(found[60], 0.5 * (0.1 + 0.9 * 0.5), rtol=1e-6)  # half of the cosine
    np.testing.assert_allclose(found[100], 0.05, rtol=1e-6)
    assert (np.diff(found[:21]) > 0).all()
    assert (np.diff(found[20:]) < 0).all()


def test_without_a_warm_up_the_first_rate_is_the_peak():
    np.testing.assert_allclose(rates(3, learning_rate=0.5, steps=2, warmup=0, final=0.0), [0.5, 0.25, 0], atol=1e-7)


def test_a_run_may_be_all_warm_up():
    np.testing.assert_allclose(rates(5, learning_rate=1.0, steps=4, warmup=4)[:5], [0, 0.25, 0.5, 0.75, 1], rtol=1e-6)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (9, 0), (10, 1), (50, 5), (20_000, 1000)])
def test_the_warm_up_is_a_tenth_of_the_run_and_at_most_a_thousand_updates(steps, warmup):
    found = rates(warmup + 2, learning_rate=1.0, steps=steps)
    assert found.argmax() == warmup
    np.testing.assert_allclose(found[0], 0 if warmup else 1, rtol=1e-6)  # the one update of a run of one is not wasted


def test_scales_and_biases_are_not_decayed():
    config = sl.TransformerConfig(
        vocab_size=67, num_layers=2, d_model=16, num_heads=2, attention=sl.Attention(bias=True, output_bias=True),
        mlp=sl.MLP(gated=False, bias=True), norm=sl.Norm(kind="layer"), positions=sl.LearnedPositions(length=8),
    )  # fmt: skip
    _, shapes, _ = parameter_dims(config)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    optimizer = sl.adamw(0.5, steps=4, warmup=0, weight_decay=0.2)

    @jax.jit
    def first_update(params):
        return optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)[0]

    updates = first_update(params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        decays = path[-1].key not in ("scale", "bias")
        np.testing.assert_allclose(update, -0.5 * 0.2 if decays else 0, rtol=1e-6)
    mask = jax.tree.leaves(decayed(params))
    assert mask.count(True) == 3 + 6  # tables of tokens, positions and head; q, k, v, output, up, down
    assert mask.count(False) == 2 + 4 + 6  # the final norm; two norms of a layer; the biases of the six


def test_gradients_are_clipped_by_their_global_norm():
    params = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    grads = {"a": jnp.full(3, 20.0), "b": jnp.full(4, 10.0)}  # of norm 40

    def moment(clip: float | None) -> dict:
        optimizer = sl.adamw(1.0, steps=4, clip=clip, b1=0.5)
        state = jax.jit(lambda: optimizer.update(grads, optimizer.init(params), params)[1])()
        return next(
            part.mu for part in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu")
        )

    for clip, scale in ((None, 1.0), (100.0, 1.0), (1.0, 1 / 40)):
        for name, value in moment(clip).items():
            np.testing.assert_allclose(value, 0.5 * scale * grads[name], rtol=1e-6)


def test_the_rows_and_columns_of_a_matrix_go_by_its_name():
    config = sl.TransformerConfig(
        vocab_size=67, num_layers=2, d_model=16, num_heads=2, attention=sl.Attention(bias=True)
    )
    found = flatten(jax.tree.map(lambda dims: dims, sl.matrix_dims(config), is_leaf=lambda x: x is None))
    expected = {"query": ((1,), (2, 3)), "key": ((1,), (2, 3)), "value": ((1,), (2, 3)), "output": ((1, 2), (3,))}
    for name, dims in expected.items():
        assert found[f"layers/attention/{name}/kernel"] == dims
    for name in ("gate", "up", "down"):
        assert found[f"layers/mlp/{name}/kernel"] == ((1,), (2,))
    assert sum(dims is not None for dims in found.values()) == 7
    lora = dataclasses.replace(config, lora=sl.Lora(rank=4, alpha=8.0, targets=("query", "output")))
    found = flatten(sl.matrix_dims(lora))
    assert found["layers/attention/query/lora_b"] == ((1,), (2, 3))
    assert found["layers/attention/output/lora_a"] == ((1, 2), (3,))
    assert set(found) == {f"layers/attention/{name}/lora_{x}" for name in ("query", "output") for x in "ab"}


def test_muon_makes_each_layers_matrix_orthogonal_and_adam_does_the_rest():
    """Of the first update only the direction is left: singular values near 0.2 sqrt(max(rows, columns)), or signs."""
    random = np.random.default_rng(0)
    params = {
        "embedding": {"table": jnp.zeros((8, 6))},
        "layers": {
            "attention": {"output": {"kernel": jnp.zeros((2, 2, 3, 6))}, "norm": {"scale": jnp.ones((2, 6))}},
        },
    }
    grads = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), params)
    optimizer = sl.muon(0.5, steps=4, warmup=0, weight_decay=0.0, clip=None)
    updates = jax.jit(lambda: optimizer.update(grads, optimizer.init(params), params)[0])()
    for layer, gradient in zip(*(x["layers"]["attention"]["output"]["kernel"] for x in (updates, grads)), strict=True):
        values = np.linalg.svd(np.asarray(layer).reshape(6, 6), compute_uv=False) / (0.5 * 0.2 * 6**0.5)
        assert ((values > 0.5) & (values < 1.3)).all()
        assert (layer * gradient).sum() < 0
    for path in (("embedding", "table"), ("layers", "attention", "norm", "scale")):
        update, gradient = (functools.reduce(lambda tree, key: tree[key], path, tree) for tree in (updates, grads))
        np.testing.assert_allclose(update, -0.5 * np.sign(gradient), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "adamw: steps=0; the schedule needs the number of updates of the whole run, at least 1"),
        ({"steps": 10, "warmup": 11}, "adamw: warmup=11 of steps=10; it is a whole number between 0 and steps"),
        ({"steps": 10, "warmup": -1}, "warmup=-1 of steps=10"),
        ({"steps": 10, "clip": 0.0}, "adamw: clip=0.0; it is positive, or None not to clip"),
        ({"steps": -3, "clip": -1.0}, "steps=-3; .* at least 1; clip=-1.0"),
    ],
)
def test_a_number_out_of_range_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        sl.adamw(**options)
    with pytest.raises(ValueError, match=message.replace("adamw", "muon")):
        sl.muon(**options)
