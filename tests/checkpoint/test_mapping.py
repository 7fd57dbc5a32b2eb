"""Parts of a checkpoint, and models with differences, are loaded when the caller says which."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardlm.checkpoint import restore, save


def tree(seed: int, **shapes: tuple[int, ...]) -> dict:
    generator = np.random.default_rng(seed)
    return {name: {"table": jnp.asarray(generator.random(shape, np.float32))} for name, shape in shapes.items()}


def state(seed: int, **shapes) -> dict:
    return {"step": jnp.int32(seed), "params": tree(seed, **shapes), "opt_state": tree(seed + 100, **shapes)}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A checkpoint, not to be changed, and its state."""
    path, saved = tmp_path_factory.mktemp("mapping") / "c", state(1, embedding=(6, 4), mlp=(4, 4), old=(2,))
    save(path, saved)
    return path, saved


def test_parameters_alone(tied):
    path, saved = tied
    target = {"params": saved["params"], "opt_state": {"another": jnp.zeros(1)}}
    found = restore(path, target, only="params")
    assert jax.tree.map(lambda x, y: bool((x == y).all()), found, saved["params"]) == jax.tree.map(
        lambda x: True, saved["params"]
    )
    assert int(restore(path, saved, only="step")) == 1
    with pytest.raises(ValueError, match="only='param': the target's fields are params, opt_state"):
        restore(path, target, only="param")


def test_only_still_compares_what_it_loads(tied):
    path, _ = tied
    with pytest.raises(ValueError, match="is of another model") as error:
        restore(path, {"params": tree(0, embedding=(6, 5), new=(2,), mlp=(4, 4))}, only="params")
    assert [line.strip() for line in str(error.value).splitlines()[1:-1]] == [
        "params/embedding/table: shape expected (6, 5), found (6, 4)",
        "params/new/table: missing, expected float32 (2,)",
        "params/old/table: not expected float32 (2,)",
    ]


def test_differences_are_named(tied):
    path, saved = tied
    target = {"params": tree(5, embedding=(6, 4), head=(6, 4), feed=(4, 4), new=(3,))}
    mapping = {"params/head": "params/embedding", "params/feed/table": "params/mlp/table", "params/new": None}
    found = restore(path, target, only="params", mapping=mapping, ignore=["params/old"])
    expected = {
        "embedding": saved["params"]["embedding"], "head": saved["params"]["embedding"],
        "feed": saved["params"]["mlp"], "new": target["params"]["new"],
    }  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name]["table"], value["table"])
    jax.block_until_ready(jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)(found))  # each its own


def test_the_longest_path_decides(tied):
    path, saved = tied
    target = {"params": {"all": {"embedding": {"table": jnp.zeros((6, 4))}, "mlp": {"table": jnp.ones((4, 4))}}}}
    mapping = {"params/all": "params", "params/all/mlp": None}
    found = restore(path, target, only="params", mapping=mapping, ignore=("params/old", "params/mlp"))
    np.testing.assert_array_equal(found["all"]["embedding"]["table"], saved["params"]["embedding"]["table"])
    assert (found["all"]["mlp"]["table"] == 1).all()


def test_a_wrong_mapping_is_one_error_with_every_mismatch(tied):
    path, _ = tied
    shapes = {"embedding": (6, 4), "head": (6, 3), "mlp": (4, 4), "old": (2,)}
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), {"params": tree(0, **shapes, new=(2,))}
    )
    mapping = {"params/head": "params/embedding", "params/new": None, "params/nowhere": None, "params/old": "x"}
    with pytest.raises(ValueError) as error:
        restore(path, target, only="params", mapping=mapping, ignore=["params/olds"])
    assert [line.strip() for line in str(error.value).splitlines()[1:-1]] == [
        "params/head/table (mapped to params/embedding/table): shape expected (6, 3), found (6, 4)",
        "params/new/table: mapped to None, to stay as it is, but the target gives no values: give a state",
        "params/nowhere: mapped, but the target has nothing there",
        "params/old/table (mapped to x/table): missing, expected float32 (2,)",
        "params/old/table: not expected float32 (2,)",
        "params/olds: ignored, but the checkpoint has nothing there",
    ]
