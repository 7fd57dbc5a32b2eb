"""The loss is a weighted sum over tokens, whatever they are split into; what has no weight has no say."""

import jax
import numpy as np
import pytest
from flax import nnx

import shardlm as sl
from shardlm.train.loss import loss_sum

pytestmark = pytest.mark.usefixtures("x64_module")

VOCABULARY, ROWS, SEQUENCE = 67, 4, 8
CONFIG = sl.TransformerConfig(
    vocab_size=VOCABULARY, num_layers=1, d_model=16, num_heads=2, d_ff=24, vocab_multiple=8,
    positions=sl.LearnedPositions(length=SEQUENCE), dtype="float64", param_dtype="float64",
)  # fmt: skip


def make() -> sl.Transformer:
    return sl.Transformer(CONFIG, rngs=nnx.Rngs(3))


@pytest.fixture(scope="module")
def graph() -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(make))


@pytest.fixture(scope="module")
def state() -> nnx.State:
    return jax.jit(lambda: nnx.state(make()))()


@pytest.fixture(scope="module")
def loss(graph, state):
    """A function of a batch, compiled once."""
    compiled = jax.jit(lambda state, batch: loss_sum(nnx.merge(graph, state), batch))
    return lambda batch: compiled(state, batch)


@pytest.fixture
def batch() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shape = (ROWS, SEQUENCE)
    return {
        "tokens": random.integers(0, VOCABULARY, shape),
        "targets": random.integers(0, VOCABULARY, shape),
        "weights": random.random(shape),
        "segments": np.sort(random.integers(0, 3, shape)),
        "positions": random.integers(0, SEQUENCE, shape),
    }


def test_the_loss_is_the_weighted_sum_of_negative_log_likelihoods(graph, state, loss, batch):
    @jax.jit
    def model(state, tokens, **places):
        return nnx.merge(graph, state)(tokens, **places)

    logits = model(state, batch["tokens"], segments=batch["segments"], positions=batch["positions"])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(loss(batch), (batch["weights"] * nll).sum(), rtol=1e-13)


def test_it_is_the_sum_of_its_parts(loss, batch):
    parts = [loss({name: value[rows] for name, value in batch.items()}) for rows in (slice(0, 1), slice(1, 4))]
    np.testing.assert_allclose(sum(parts), loss(batch), rtol=1e-13)


@pytest.mark.parametrize("target", [-1, VOCABULARY, 71, 72, 2**31 - 1])
def test_a_target_outside_the_vocabulary_is_nan_unless_it_has_no_weight(loss, batch, target):
    batch["targets"][2, 3] = target
    assert np.isnan(loss(batch))
    batch["weights"][2, 3] = 0
    others = {name: value.copy() for name, value in batch.items()}
    others["targets"][2, 3] = 5
    assert float(loss(batch)) == float(loss(others))


@pytest.mark.parametrize("token", [-1, VOCABULARY, 71, 72, 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_nan(loss, batch, token):
    batch["tokens"][2, 3] = token
    assert np.isnan(loss(batch))


def test_the_gradient_of_a_hidden_target_is_zero_and_not_nan(graph, state, batch):
    gradient = jax.jit(jax.grad(lambda state, batch: loss_sum(nnx.merge(graph, state), batch)))
    batch["weights"][:, 1:] = 0
    batch["targets"][:, 1:] = -1
    found = gradient(state, batch)
    batch["targets"][:, 1:] = 7
    jax.tree.map(np.testing.assert_array_equal, found, gradient(state, batch))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(found))
