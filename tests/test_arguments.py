"""Numbers that are none, seeds that would be another's, masks that would be dropped, and states that are gone."""

import dataclasses
import math

import jax
import numpy as np
import optax
import pytest

import shardlm as sl
from shardlm import _arguments
from shardlm.data import Batches
from shardlm.data.loader import Epoch
from shardlm.data.packing import Packed

CONFIG = sl.TransformerConfig(vocab_size=19, num_layers=1, d_model=8, num_heads=2, d_ff=8)
LORA = dataclasses.replace(CONFIG, lora=sl.Lora(rank=2, targets=("query",)))


def make_batch(rows: int = 2, **changes) -> dict:
    tokens = np.arange(rows * 5).reshape(rows, 5) % 19
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]} | changes


@pytest.fixture(scope="module")
def trainer() -> sl.Trainer:
    return sl.Trainer(CONFIG, optimizer=optax.sgd(0.1), devices=jax.devices()[:1])


# States that a step has used up


@pytest.fixture(scope="module")
def gone(trainer) -> sl.TrainState:
    """A state that a step has used up, and the same parameters with adapters, used up too."""
    state = trainer.init()
    trainer.step(state, make_batch())
    return state


USES = {
    "step": lambda trainer, state, path: trainer.step(state, make_batch()),
    "loss_and_grads": lambda trainer, state, path: trainer.loss_and_grads(state, make_batch()),
    "evaluate": lambda trainer, state, path: trainer.evaluate(state, [make_batch()]),
    "init": lambda trainer, state, path: trainer.init(state.params),
    "in_order": lambda trainer, state, path: trainer.in_order(state),
    "fit": lambda trainer, state, path: trainer.fit([make_batch()] * 9, 9, state=state, verbose=False),
    "save": lambda trainer, state, path: sl.save(path, state),
    "save params": lambda trainer, state, path: sl.save(path, state.params),
    "Checkpoints": lambda trainer, state, path: sl.checkpoint.Checkpoints(path).save(1, state),
    "restore": lambda trainer, state, path: restored(trainer, state, path),
    "generate": lambda trainer, state, path: sl.generate(CONFIG, state.params, [[1]], max_new_tokens=1),
    "score": lambda trainer, state, path: sl.score.loglikelihood(CONFIG, state.params, [([1], [2])]),
    "sample": lambda trainer, state, path: sl.sample(trainer, state, np.array([1]), tokens=1, window=4),
    "save_hf": lambda trainer, state, path: sl.save_hf(path, CONFIG, state.params),
    "save_lora": lambda trainer, state, path: sl.save_lora(path, LORA, state.params),
    "adapters": lambda trainer, state, path: sl.adapters(state.params),
    "add_lora": lambda trainer, state, path: sl.add_lora(CONFIG, state.params, LORA.lora),
    "merge_lora": lambda trainer, state, path: sl.merge_lora(LORA, state.params),
}


def restored(trainer, state, path):
    """Into a target of which a part, used up, is to be kept."""
    sl.save(path / "good", trainer.init())
    target = dataclasses.replace(trainer.abstract_state, params=state.params)
    return sl.restore(path / "good", target, mapping={"params/embedding": None}, ignore=["params/embedding"])


@pytest.mark.parametrize("use", USES)
def test_a_used_up_state_is_said_to_be_one_wherever_it_is_given(trainer, gone, tmp_path, use):
    with pytest.raises(
        ValueError, match="this state was used up by a step, which writes the new state in its place: go on"
    ):
        USES[use](trainer, gone, tmp_path / "new")


def test_a_state_prints_in_one_line_used_up_or_not(trainer, gone):
    assert repr(gone) == f"TrainState({_arguments.USED_UP})"
    text = repr(trainer.init())
    assert text.startswith("TrainState(step=0, params=") and "\n" not in text
    assert "numbers in" in repr(trainer.abstract_state)
    assert "TrainState" in str(jax.eval_shape(lambda state: print(state) or state, trainer.abstract_state))


# Numbers


@pytest.mark.parametrize("name", ["learning_rate", "final", "b1", "b2", "weight_decay", "clip"])
@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf, True, "1e-3", np.ones(2), 1 + 0j, b"1", 10**400])
def test_a_setting_of_adamw_that_is_no_number_is_refused(name, value):
    with pytest.raises(ValueError, match=f"adamw: {name}="):
        sl.adamw(**{"learning_rate": 1e-3, "steps": 10} | {name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"b1": 1.0}, {"b2": 1.0}, {"final": 1.5}, {"clip": 0.0}, {"steps": 0}, {"steps": -3}, {"steps": 10.0},
        {"steps": True}, {"steps": "10"}, {"steps": math.nan}, {"warmup": 11}, {"warmup": -1}, {"warmup": 1.5},
        {"warmup": True},
    ],
)  # fmt: skip
def test_a_setting_of_adamw_out_of_range_is_refused(options):
    [name] = options
    with pytest.raises(ValueError, match=f"adamw: {name}="):
        sl.adamw(**{"learning_rate": 1e-3, "steps": 10} | options)


def test_numbers_of_numpy_and_limits_are_numbers():
    sl.adamw(np.float32(0.0), steps=np.int64(10), warmup=np.int32(10), b1=0, b2=0, final=1, weight_decay=0, clip=None)
    sl.Trainer(CONFIG, seed=np.uint32(2**32 - 1), devices=1)


@pytest.mark.parametrize("seed", ["x", True, None, -1, 2**32, 10**30, 1.0, math.nan, np.arange(2), b"1"])
def test_a_seed_is_a_whole_number_that_is_nobody_elses(trainer, seed):
    """JAX drops the upper half of a large seed, and takes -1 for 2**32 - 1."""
    message = r"seed=.*; it is a whole number from 0 to 4294967295"
    calls = [
        lambda: sl.Trainer(CONFIG, seed=seed, devices=1),
        lambda: sl.sample(trainer, trainer.init(), np.array([1]), tokens=1, window=4, seed=seed),
        lambda: sl.verify(trainer, seed=seed),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("value", [True, "4", 4.0, None, np.arange(1)])
def test_sizes_and_seeds_of_batches_are_whole_numbers(value):
    packed = Packed([np.arange(50) % 18], 5, vocab_size=19, end=18)
    calls = {
        "batch_size": lambda: Batches(packed, value),
        "seed": lambda: Batches(packed, 4, value),
        "sequence": lambda: Packed([np.arange(50) % 18], value, vocab_size=19, end=18),
        "ahead": lambda: Batches(packed, 4).iterate(0, value),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"{name}=.* is a .*; it is a whole number"):
            call()
    with pytest.raises(TypeError, match="batch_size="):
        Epoch(packed, value)


@pytest.mark.parametrize("count", [True, 0, -1, 1.0, "8", 10**9, None])
def test_a_number_of_fake_devices_is_one(count):
    with pytest.raises(ValueError, match="the number of devices is a positive integer, at most 2048"):
        sl.fake_devices(count)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        *(({"devices_per_process": value}, "devices_per_process") for value in (0, -1, True, 1.5, "2")),
        *(({name: value}, f"SHARDLM_{name.upper()}") for name in ("heartbeat", "timeout")
          for value in (0, -5, math.nan, math.inf, True, "10")),
    ],
)  # fmt: skip
def test_a_number_of_initialize_that_is_none_is_refused(options, name):
    place = {"coordinator": "127.0.0.1:1", "processes": 2, "process": 1}
    with pytest.raises(ValueError, match=f"initialize: {name}="):
        sl.initialize(**place | options)


@pytest.mark.parametrize("place", [("127.0.0.1:1", True, 0), ("127.0.0.1:1", 2, True), (17, 2, 0), (b"h:1", 2, 0)])
def test_a_place_that_is_none_is_refused(place):
    with pytest.raises(ValueError, match="initialize: "):
        sl.initialize(*place)


# Batches and parameters


@pytest.mark.parametrize("name", ["tokens", "targets", "weights", "segments", "positions"])
def test_a_mask_is_not_dropped(trainer, name):
    masked = np.ma.masked_array(np.ones((2, 4), np.int32), mask=np.eye(2, 4, dtype=bool))
    with pytest.raises(ValueError, match=f"{name} is a masked array, whose mask is not read: give the plain array"):
        trainer.place(make_batch(**{name: masked}))


def test_nor_is_that_of_documents_parameters_or_batches_of_a_module(trainer):
    with pytest.raises(ValueError, match="document 0 is a masked array"):
        Packed([np.ma.masked_equal(np.arange(9), 3)], 4, vocab_size=19, end=18)
    params = jax.tree.map(np.asarray, trainer.init().params)
    params["embedding"]["table"] = np.ma.masked_array(params["embedding"]["table"], mask=False)
    with pytest.raises(ValueError, match="init: .* embedding/table: a masked array"):
        trainer.init(params)
    from shardlm.train import rows

    with pytest.raises(TypeError, match="x.* is a masked array, whose mask is not read"):
        rows.count({"x": [np.ma.masked_equal(np.arange(4), 2)]})


def test_positions_begin_at_0(trainer):
    positions = np.arange(4)[None] + np.zeros((2, 1), int)
    trainer.place(make_batch(positions=positions))
    with pytest.raises(ValueError, match="positions go from -1 to 2; they begin at 0"):
        trainer.place(make_batch(positions=positions - 1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_parameters_to_start_from_are_finite(trainer, bad):
    params = jax.tree.map(np.array, trainer.init().params)
    trainer.init(params)
    params["embedding"]["table"][3, 1] = bad
    with pytest.raises(ValueError, match="init: 1 parameters hold NaN or infinity: embedding/table"):
        trainer.init(params)
    with pytest.raises(ValueError, match="init: 1 parameters hold NaN or infinity: embedding/table"):
        trainer.init(jax.tree.map(jax.numpy.asarray, params))


# Sources of batches


@pytest.mark.parametrize("source", ["folder", b"x", 5, None, object(), lambda: 1])
def test_what_is_no_source_of_batches_is_refused_before_anything_begins(trainer, source):
    with pytest.raises(TypeError, match="fit: batches is a .*; it is a list of batches, something indexed by step"):
        trainer.fit(source, 2)
    if source is not None:
        with pytest.raises(ValueError, match=r"fit: held_out is a .*: give a list"):
            trainer.fit([make_batch()] * 2, 2, held_out=source)
    with pytest.raises(ValueError, match="evaluate: batches is a .*: give a list of batches"):
        trainer.evaluate(trainer.init(), source)


def test_data_of_two_parts_is_not_one_of_them(trainer):
    data = sl.data.load([sl.data.Document("a", "to be " * 30)], sequence=4, batch_size=2, held_out=0)
    with pytest.raises(TypeError, match=r"with a part to train on and one held out: give data\.train"):
        trainer.fit(data, 2)
    with pytest.raises(
        ValueError, match="evaluate: batches is a Batches, which has no end: give a list, or data.held_out"
    ):
        trainer.evaluate(trainer.init(), data.train)
    with pytest.raises(ValueError, match="evaluate: batches is one batch: give a list of batches"):
        trainer.evaluate(trainer.init(), make_batch())


@pytest.mark.parametrize("name", ["verbose", "tensorboard", "accept_changes"])
@pytest.mark.parametrize("value", ["no", 0, None])
def test_a_choice_of_fit_is_true_or_false(trainer, name, value):
    with pytest.raises(ValueError, match=f"fit: {name}=.*; it is True or False"):
        trainer.fit([make_batch()], 1, **{name: value})


@pytest.mark.parametrize("name", ["keep", "keep_every", "keep_best", "checkpoint_every", "log_every", "evaluate_every"])
@pytest.mark.parametrize("value", [0, -1, True, 2.5, "3", math.nan])
def test_a_count_of_fit_is_one(trainer, tmp_path, name, value):
    options = {"checkpoint_dir": tmp_path, "held_out": [make_batch()], "evaluate_every": 1, "checkpoint_every": 1}
    with pytest.raises(ValueError, match=f"{name}="):
        trainer.fit([make_batch()], 1, **options | {name: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [0, -1, True, 2.5, "3", None, math.nan])
def test_a_number_of_steps_is_one(trainer, steps):
    with pytest.raises(ValueError, match=r"fit: steps=.*; it is the number of updates of the whole run, at least 1"):
        trainer.fit([make_batch()], steps)
