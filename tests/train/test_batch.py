"""A wrong batch is one error that says where; a right one is on the devices once, as the layout splits it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import shardlm as sl
from shardlm.train import batch as module

VOCABULARY, ROWS, SEQUENCE = 67, 4, 8
CONFIG = sl.TransformerConfig(vocab_size=VOCABULARY, num_layers=1, d_model=16, num_heads=2, d_ff=24, vocab_multiple=8)
LEARNED = sl.TransformerConfig(
    vocab_size=VOCABULARY, num_layers=1, d_model=16, num_heads=2, positions=sl.LearnedPositions(length=SEQUENCE)
)


def make_batch(**changes) -> dict:
    """A right batch with keys replaced, or, where the value is None, left out."""
    random = np.random.default_rng(0)
    batch = {
        "tokens": random.integers(0, VOCABULARY, (ROWS, SEQUENCE), np.int32),
        "targets": random.integers(0, VOCABULARY, (ROWS, SEQUENCE), np.int32),
    }
    return {name: value for name, value in (batch | changes).items() if value is not None}


def changed(name: str, place: tuple[int, int], value: float, dtype=None, **others) -> dict:
    batch = make_batch(**others)
    batch[name] = np.array(batch[name], dtype)
    batch[name][place] = value
    return batch


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.fixture(scope="module")
def trainer() -> sl.Trainer:
    layout = sl.Layout(data=2, fsdp=2, tensor=2)
    return sl.Trainer(CONFIG, layout, sl.adamw(steps=4))


@pytest.fixture(scope="module")
def state(trainer) -> sl.TrainState:
    return trainer.init()


@pytest.fixture(scope="module")
def learned() -> sl.Trainer:
    return sl.Trainer(LEARNED)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (make_batch(targets=None), "the key 'targets' is missing"),
        ({}, "the key 'tokens' is missing; the key 'targets' is missing"),
        (
            make_batch(weight=ones(ROWS, SEQUENCE)),
            "unknown key 'weight', did you mean 'weights'? (legal: tokens, targets,",
        ),
        (
            make_batch(labels=ones(ROWS, SEQUENCE)),
            "unknown key 'labels' (legal: tokens, targets, weights, segments, pos",
        ),
        (make_batch() | {3: ones(ROWS, SEQUENCE)}, "unknown key 3 (legal"),
        (make_batch(tokens=np.zeros(8, np.int32)), "tokens has shape (8,); it is [batch, sequence]"),
        (make_batch(targets=np.zeros((4, 9), np.int32)), "targets has shape (4, 9), tokens (4, 8)"),
        (make_batch(weights=ones(ROWS)), "weights has shape (4,); it is [batch, sequence]"),
        (
            make_batch(tokens=np.zeros((4, 0), np.int32)),
            "tokens has shape (4, 0); it is [batch, sequence], with somethi",
        ),
        (make_batch(tokens=np.zeros((4, 8))), "tokens has dtype float64; it is an integer array"),
        (make_batch(tokens=np.ones((4, 8), bool)), "tokens has dtype bool; it is an integer array"),
        (make_batch(segments=ones(4, 8)), "segments has dtype float32; it is an integer array"),
        (make_batch(weights=np.ones((4, 8), complex)), "weights has dtype complex128; it is a float array"),
        (make_batch(weights=np.full((4, 8), "1")), "weights has dtype <U1; it is a float array"),
        (make_batch(tokens=np.zeros((4, 8), object)), "tokens has dtype object; it is an integer array"),
        (make_batch(tokens=[[1, 2], [3, 4]]), "tokens is a list; it is an array of NumPy or JAX"),
        (make_batch(targets=[[1, 2], [3]]), "targets is a list; it is an array of NumPy or JAX"),
        (make_batch() | {"weights": None}, "weights is a NoneType; it is an array"),
        (changed("tokens", (1, 3), 67), "tokens[1, 3] = 67 is outside the vocabulary of 67 ids (0 to 66); 1 such ids"),
        (changed("tokens", (3, 7), -1), "tokens[3, 7] = -1 is outside"),
        (changed("targets", (0, 0), 71), "targets[0, 0] = 71 is outside"),  # a row of the table, but a padded one
        (changed("tokens", (0, 1), 2**31, np.int64), "tokens holds numbers beyond int32"),
        (changed("targets", (0, 1), 2**32 + 5, np.uint64), "targets holds numbers beyond int32"),
        (changed("weights", (2, 2), -0.5, weights=ones(4, 8)), "weights must be finite and not negative"),
        (changed("weights", (2, 2), np.nan, weights=ones(4, 8)), "weights must be finite and not negative"),
        (changed("weights", (2, 2), np.inf, weights=ones(4, 8)), "weights must be finite and not negative"),
        (make_batch(weights=np.zeros((4, 8))), "all weights are zero: the loss, a mean over weights, has no value"),
        (make_batch(weights=np.full((4, 8), 1e-60)), "all weights are zero"),  # in float32
    ],
)
def test_a_wrong_batch_is_an_error_that_says_what_is_wrong(trainer, batch, message):
    with pytest.raises(ValueError, match=f"^batch: .*{re.escape(message)}"):
        trainer.place(batch)


TEXT = np.random.default_rng(1).integers(0, VOCABULARY, (ROWS, SEQUENCE))


@pytest.mark.parametrize("weights", [None, "rows", "every other", "from the third"])
@pytest.mark.parametrize("segments", [False, True])
def test_targets_equal_to_tokens_are_refused_and_those_moved_on_are_not(trainer, weights, segments):
    given = {
        None: np.ones(TEXT.shape),
        "rows": np.repeat([[1], [0], [1], [1]], SEQUENCE, 1),
        "every other": np.tile([0, 1], (ROWS, SEQUENCE // 2)),
        "from the third": np.tile(np.arange(SEQUENCE) > 2, (ROWS, 1)),
    }[weights]
    targets = np.where(given, TEXT, 5)
    wrong = {"tokens": TEXT, "targets": targets} | ({} if weights is None else {"weights": given.astype(np.float32)})
    wrong |= {"segments": np.repeat([[0, 1]], SEQUENCE // 2, 1).repeat(ROWS, 0)} if segments else {}
    with pytest.raises(ValueError, match=r"batch: targets are equal to tokens.*sl.data.batch\(tokens\) makes them"):
        trainer.place(wrong)
    right = sl.data.batch(TEXT, weights=given, segments=wrong.get("segments"))
    assert sorted(trainer.place(right)) == sorted(right)


@pytest.mark.parametrize("changes", [
    {"targets": np.where(np.arange(SEQUENCE) == 4, (TEXT + 1) % VOCABULARY, TEXT)},  # but for a column
    {"tokens": np.full((ROWS, SEQUENCE), 3), "targets": np.full((ROWS, SEQUENCE), 3)},  # a row of one token, moved on
    {"targets": TEXT, "weights": np.eye(ROWS, SEQUENCE) * (np.arange(ROWS) == 1)[:, None]},  # one answer
    {"tokens": np.repeat([[1, 2, 3, 3]], ROWS, 0), "targets": np.repeat([[2, 3, 3, 4]], ROWS, 0),
     "weights": np.repeat([[0.0, 0, 1, 0]], ROWS, 0)},
])  # fmt: skip
def test_what_is_equal_by_chance_is_taken(trainer, changes):
    trainer.place({"tokens": TEXT} | changes)


def test_tokens_alone_are_told_what_makes_a_batch(trainer):
    with pytest.raises(ValueError, match=r"'targets' is missing: .* sl.data.batch\(tokens\) makes a batch with them"):
        trainer.place({"tokens": TEXT})


def test_all_that_is_wrong_is_one_error(trainer):
    with pytest.raises(ValueError) as error:
        trainer.place({"token": ones(4, 8), "targets": np.zeros((4, 8)), "weights": ones(4)})
    assert str(error.value).split("; ") == [
        "batch: unknown key 'token', did you mean 'tokens'? (legal: tokens, targets, weights, segments, positions)",
        "the key 'tokens' is missing",
        "targets has dtype float64",
        "it is an integer array",
        "weights has shape (4,)",
        "it is [batch, sequence], with something in it",
    ]
    batch = changed("tokens", (0, 2), 99, weights=-ones(4, 8))
    batch["targets"][1:, 0] = -3
    with pytest.raises(
        ValueError, match=r"tokens\[0, 2\] = 99 .*; targets\[1, 0\] = -3 .*; 3 such ids; weights must be"
    ):
        trainer.place(batch)


@pytest.mark.parametrize("batch", [None, [ones(4, 8)], (1, 2), "tokens", ones(4, 8)], ids=lambda b: type(b).__name__)
def test_what_is_no_dict_is_refused(trainer, batch):
    with pytest.raises(
        TypeError, match=rf"batch: a {type(batch).__name__}; it is a dict of arrays, tokens, targets, wei"
    ):
        trainer.place(batch)


def test_rows_that_the_layout_cannot_split_are_an_error_of_the_layout(trainer):
    with pytest.raises(sl.LayoutError, match="batch_size=3 is not a positive multiple of data=2 x fsdp=2"):
        trainer.place({name: value[:3] for name, value in make_batch().items()})


def test_a_target_without_weight_may_be_anything(trainer, state):
    weights = ones(ROWS, SEQUENCE)
    weights[1, 3] = 0
    for target in (-100, VOCABULARY, 2**31 - 1):
        placed = trainer.place(changed("targets", (1, 3), target, weights=weights))
        assert np.isfinite(trainer.evaluate(state, [placed])["loss"])
    with pytest.raises(ValueError, match=r"tokens\[1, 3\] = -100 is outside"):
        trainer.place(changed("tokens", (1, 3), -100, weights=weights))


def test_positions_beyond_the_learned_ones(learned):
    positions = np.arange(SEQUENCE, dtype=np.int32)[None] + np.zeros((ROWS, 1), np.int32)
    assert "positions" in learned.place(make_batch(positions=positions))
    with pytest.raises(ValueError, match="positions go from 1 to 8; the model has 0 to 7"):
        learned.place(make_batch(positions=positions + 1))
    with pytest.raises(ValueError, match="positions go from -1 to 6; the model has 0 to 7"):
        learned.place(make_batch(positions=positions - 1))
    with pytest.raises(ValueError, match="a sequence of 9 tokens; the model has 8 learned positions"):
        learned.place({name: np.zeros((ROWS, 9), np.int32) for name in ("tokens", "targets")})


def test_positions_beyond_the_learned_ones_in_a_placed_batch_make_the_loss_nan(learned):
    placed = learned.place(make_batch(positions=np.arange(SEQUENCE)[None] + np.zeros((ROWS, 1), int)))
    state = learned.init()
    assert np.isfinite(learned.evaluate(state, [placed])["loss"])
    for bad in (-1, SEQUENCE):
        assert np.isnan(learned.evaluate(state, [spoilt(learned, placed, "positions", bad)])["loss"])


def test_rotary_positions_have_no_limit(trainer):
    assert int(trainer.place(make_batch(positions=np.full((ROWS, SEQUENCE), 10**6)))["positions"].max()) == 10**6


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int64", "uint64", ">i4", "uint16 of JAX"])
def test_any_integers_become_int32(trainer, dtype):
    name, _, of_jax = dtype.partition(" of ")
    batch = {key: value.astype(name) for key, value in make_batch().items()}
    batch = {key: jnp.asarray(value) for key, value in batch.items()} if of_jax else batch
    placed = trainer.place(batch)
    assert {name: str(x.dtype) for name, x in placed.items()} == {
        "tokens": "int32", "targets": "int32", "weights": "float32",
    }  # fmt: skip
    np.testing.assert_array_equal(placed["tokens"], make_batch()["tokens"])
    assert (np.asarray(placed["weights"]) == 1).all()


@pytest.mark.parametrize("weights", [np.ones((4, 8), bool), np.ones((4, 8), int), jnp.ones((4, 8), jnp.bfloat16)])
def test_any_real_weights_become_float32(trainer, weights):
    assert trainer.place(make_batch(weights=weights))["weights"].dtype == np.float32


def test_arrays_that_are_not_contiguous_or_not_writable_are_fine(trainer):
    tokens = np.arange(2 * ROWS * SEQUENCE, dtype=np.int32).reshape(SEQUENCE, -1)[:, ::2].T % VOCABULARY
    tokens.flags.writeable = False
    np.testing.assert_array_equal(trainer.place(make_batch(tokens=tokens))["tokens"], tokens)


def test_a_placed_batch_is_split_as_the_layout_says_and_not_moved_again(trainer):
    placed = trainer.place(make_batch(segments=np.ones((ROWS, SEQUENCE), int)))
    assert list(placed) == ["tokens", "targets", "segments", "weights"]
    for array in placed.values():
        assert array.sharding == NamedSharding(trainer.mesh, P(("data", "fsdp")))
        assert array.sharding.shard_shape(array.shape) == (1, SEQUENCE)
    again = trainer.place(placed)
    assert again is not placed
    assert all(again[name] is placed[name] for name in placed)


def test_a_batch_placed_otherwise_is_placed_anew(trainer):
    placed = trainer.place(make_batch())
    elsewhere = {name: jax.device_put(np.asarray(x), jax.devices()[3]) for name, x in placed.items()}
    without_weights = {name: x for name, x in placed.items() if name != "weights"}
    of_another_dtype = placed | {"tokens": placed["tokens"].astype("int8")}
    for batch in (elsewhere, without_weights, of_another_dtype, placed | {"targets": np.asarray(placed["targets"])}):
        again = trainer.place(batch)
        assert {x.sharding for x in again.values()} == {trainer.batch_sharding}
        for name, x in again.items():
            assert x.dtype == placed[name].dtype
            np.testing.assert_array_equal(x, placed[name])


def test_a_source_may_fill_its_buffers_again(trainer):
    """JAX may read a NumPy array's memory after `device_put` has returned, so what is placed is a copy."""
    for layout in (sl.Layout(), sl.Layout(data=8)):
        sharding = NamedSharding(layout.mesh(jax.devices()[: layout.num_devices]), P("data"))
        for _ in range(20):  # whether memory is shared depends on its alignment
            batch = {"tokens": np.zeros((8, 1024), np.int32), "weights": ones(8, 1024)}
            placed = module.place(module.to_host(batch), sharding)
            for array in batch.values():
                array[:] = 7
            assert not np.asarray(placed["tokens"]).any()
            assert (np.asarray(placed["weights"]) == 1).all()


def spoilt(trainer: sl.Trainer, placed: dict, name: str, bad: int) -> dict:
    """The batch with one value changed behind the trainer's back."""
    values = np.array(placed[name])
    values[2, 5] = bad
    return placed | {name: jax.device_put(values, trainer.batch_sharding)}


@pytest.mark.parametrize("name", ["tokens", "targets"])
@pytest.mark.parametrize("bad", [-1, VOCABULARY, 71, 72, 10**6])  # 71 is the table's last row, padding
def test_ids_outside_the_vocabulary_in_a_placed_batch_make_the_loss_nan(trainer, state, name, bad):
    placed = trainer.place(make_batch())
    assert np.isfinite(trainer.evaluate(state, [placed])["loss"])
    assert np.isnan(trainer.evaluate(state, [spoilt(trainer, placed, name, bad)])["loss"])


@pytest.mark.parametrize("name", ["tokens", "targets"])
def test_they_make_the_loss_of_a_step_nan_too(trainer, state, name):
    wrong = spoilt(trainer, trainer.place(make_batch()), name, 71)
    loss, _ = trainer.loss_and_grads(state, wrong)
    assert np.isnan(float(loss))


def test_one_process_reads_all_rows(trainer):
    assert trainer.local_rows(8) == slice(0, 8)
    with pytest.raises(sl.LayoutError, match="batch_size=6 is not a positive multiple of data=2 x fsdp=2"):
        trainer.local_rows(6)


class _Sharding:
    """A sharding of which this process has some of the devices."""

    def __init__(self, *spans: tuple[int, int] | None):
        self.spans = spans

    def addressable_devices_indices_map(self, shape):
        rows = [slice(None) if span is None else slice(*span) for span in self.spans]
        return {i: (span, slice(None)) for i, span in enumerate(rows)}


def test_rows_of_one_process_among_several():
    assert module.local_rows(_Sharding((4, 6), (2, 4), (4, 6)), 8) == slice(2, 6)
    assert module.local_rows(_Sharding(None, None), 8) == slice(0, 8)
    with pytest.raises(ValueError, match=r"rows of the batch are not consecutive: \[\(0, 2\), \(4, 6\)\]"):
        module.local_rows(_Sharding((0, 2), (4, 6)), 8)


def test_is_placed_looks_at_every_array():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    sharding = NamedSharding(mesh, P("data"))
    placed = module.place(module.to_host(make_batch()), sharding)
    assert module.is_placed(placed, sharding)
    assert not module.is_placed(placed, NamedSharding(mesh, P()))
    assert not module.is_placed({}, sharding)
