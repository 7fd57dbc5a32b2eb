"""The pieces of tensor parallelism, each against the same function on whole arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from shardlm import collectives
from shardlm.layout import Axis, Layout
from shardlm.parallel import tensor

pytestmark = pytest.mark.usefixtures("x64_module")
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def mesh():
    return Layout(tensor=4).mesh(jax.devices()[:4])


def manual(mesh, function, in_specs, out_specs=P()):
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def test_cross_entropy_and_its_gradient_without_gathering_the_vocabulary(mesh):
    # 9 tokens and 7 columns of padding: the last device holds padding alone, and its maximum is minus infinity.
    logits = jnp.where(jnp.arange(16) < 9, jnp.asarray(RANDOM.normal(size=(2, 3, 16)) * 50), -jnp.inf)
    targets = jnp.asarray(RANDOM.integers(0, 9, (2, 3)))

    def whole(z):
        return -jnp.take_along_axis(jax.nn.log_softmax(z), targets[..., None], -1)[..., 0]

    split = manual(mesh, tensor.cross_entropy, (P(None, None, "tensor"), P()))
    np.testing.assert_allclose(split(logits, targets), whole(logits), rtol=1e-12)
    np.testing.assert_allclose(tensor.cross_entropy(logits, targets), whole(logits), rtol=1e-12)
    expected = jax.grad(lambda z: (whole(z) ** 2).sum())(logits)
    found = jax.grad(lambda z: (split(z, targets) ** 2).sum())(logits)
    np.testing.assert_allclose(found, expected, atol=1e-12 * np.abs(expected).max())
    assert not np.asarray(found)[..., 9:].any()


def test_embedding_rows_come_from_whoever_holds_them(mesh):
    table, ids = jnp.asarray(RANDOM.normal(size=(12, 5))), jnp.asarray([[0, 2, 3, 11], [5, 6, 8, 9]])
    look_up = manual(mesh, lambda t, i: tensor.all_reduce(tensor.embed(t, i)), (P("tensor"), P()))
    np.testing.assert_array_equal(look_up(table, ids), table[ids])
    grad = jax.grad(lambda t: (look_up(t, ids) ** 2).sum())(table)
    np.testing.assert_allclose(grad, jax.grad(lambda t: (t[ids] ** 2).sum())(table), rtol=1e-14)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 2), (8, 2), (8, 4), (8, 8), (12, 4)])
def test_each_device_attends_to_its_own_kv_heads(mesh, heads: int, kv_heads: int):
    group = heads // kv_heads
    kv = jnp.arange(kv_heads)  # a "weight" that is its own head's number
    split = kv_heads % 4 == 0

    def own(kv):
        held = heads // 4
        needed = tensor.own_kv_heads(kv, 0, held, group)
        return jnp.repeat(collectives.vary(needed, Axis.TENSOR), held // needed.shape[0])  # one per query head held

    found = manual(mesh, own, P("tensor") if split else P(), P("tensor"))(kv)
    np.testing.assert_array_equal(found, np.repeat(np.arange(kv_heads), group))
    assert tensor.own_kv_heads(kv, 0, heads, group) is kv


@pytest.mark.parametrize("split", [False, True])
def test_a_branch_enters_and_leaves_as_the_stream_is_laid_out(mesh, split: bool):
    x = jnp.asarray(RANDOM.normal(size=(2, 8, 3)))
    up, down = jnp.asarray(RANDOM.normal(size=(3, 12))), jnp.asarray(RANDOM.normal(size=(12, 3)))
    spec = P(None, "tensor") if split else P()

    def branch(x, up, down):
        assert tensor.is_split(x) == (split and bool(collectives.active(Axis.TENSOR)))
        return x + tensor.leave(jnp.tanh(tensor.enter(x) @ up) @ down, like=x)

    sharded = manual(mesh, branch, (spec, P(None, "tensor"), P("tensor")), spec)

    def loss(function):
        return jax.value_and_grad(lambda *a: (function(*a) ** 2).sum(), argnums=(0, 1, 2))(x, up, down)

    expected = loss(lambda x, up, down: x + jnp.tanh(x @ up) @ down)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), loss(sharded), expected)


def test_ids_of_the_logits_that_a_device_holds(mesh):
    np.testing.assert_array_equal(manual(mesh, lambda: tensor.vocabulary_ids(3), (), P("tensor"))(), np.arange(12))
    np.testing.assert_array_equal(tensor.vocabulary_ids(3), np.arange(3))
