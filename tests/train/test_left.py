"""Whatever ends `fit`, the state after its last update is in `trainer.state`, usable, checkpoints or not."""

import jax
import numpy as np
import optax
import pytest

import shardlm as sl
from shardlm.train import fit as module

CONFIG = sl.TransformerConfig(vocab_size=19, num_layers=1, d_model=8, num_heads=2, d_ff=8)
STEPS = 5


def make_batch(step: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(step).integers(0, 19, (2, 5))
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


BATCHES = [make_batch(step) for step in range(STEPS)]


@pytest.fixture(scope="module")
def trainer() -> sl.Trainer:
    return sl.Trainer(CONFIG, optimizer=optax.adam(0.1), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def whole(trainer) -> list[np.ndarray]:
    return leaves(trainer.fit(BATCHES, STEPS, verbose=False))


def leaves(state) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


class Stopped(Exception):
    """What a user's own code raises."""


def until(step: int, error: type[BaseException]):
    """The batches, up to an error in place of that of `step`."""
    yield from BATCHES[: step - 1]
    raise error("the source")


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped, SystemExit, GeneratorExit, MemoryError])
@pytest.mark.parametrize("verbose", [True, False])
def test_an_interrupted_run_goes_on_from_the_state_that_it_left(trainer, whole, error, verbose, capsys):
    with pytest.raises(error) as caught:
        trainer.fit(until(4, error), STEPS, verbose=verbose)
    assert int(trainer.state.step) == 3
    [note] = caught.value.__notes__
    assert note.startswith(
        "The state after step 3 is in trainer.state: go on with trainer.fit(..., state=trainer.state)"
    )
    assert ("The state after step 3 is in trainer.state" in capsys.readouterr().out) == verbose
    found = trainer.fit(BATCHES, STEPS, state=trainer.state, verbose=False)
    assert trainer.state is None  # it is used up, and keeps no memory
    for a, b in zip(whole, leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)


def test_so_it_is_after_a_wrong_batch_after_too_few_and_after_an_evaluation_that_fails(trainer):
    runs = {
        3: lambda: trainer.fit([*BATCHES[:3], {"tokens": 1}], STEPS, verbose=False),
        2: lambda: trainer.fit(BATCHES[:2], STEPS, verbose=False),
        4: lambda: trainer.fit(BATCHES, STEPS, held_out=[{}], evaluate_every=4, verbose=False),
    }
    for step, run in runs.items():
        with pytest.raises((TypeError, ValueError)) as caught:
            run()
        assert int(trainer.state.step) == step
        assert any("is in trainer.state" in note for note in caught.value.__notes__)
        trainer.evaluate(trainer.state, BATCHES[:1])


def test_before_the_first_step_it_is_the_state_that_was_given(trainer):
    given = trainer.init()
    with pytest.raises(Stopped):
        trainer.fit(until(1, Stopped), STEPS, state=given, verbose=False)
    assert trainer.state is given
    trainer.evaluate(given, BATCHES[:1])


def test_a_saved_step_needs_no_word_and_is_there_all_the_same(trainer, tmp_path):
    with pytest.raises(Stopped) as caught:
        trainer.fit(until(3, Stopped), STEPS, checkpoint_dir=tmp_path, verbose=False)
    assert not hasattr(caught.value, "__notes__")
    assert int(trainer.state.step) == 2


def test_a_step_that_fails_half_way_leaves_nothing_and_says_so(trainer, monkeypatch):
    def step(state, batch):
        jax.tree.map(lambda leaf: leaf.delete(), state)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(trainer, "step", step)
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        trainer.fit(BATCHES, STEPS, verbose=False)
    assert trainer.state is None
    assert caught.value.__notes__ == [
        "The step after 0 failed half-way and has used up the state: nothing is left of it."
    ]


def test_a_loss_that_is_not_finite_leaves_its_state_for_a_look(trainer):
    bad = trainer.place(make_batch(0))
    bad = bad | {"tokens": jax.device_put(np.full((2, 4), 99, np.int32), bad["tokens"].sharding)}
    with pytest.raises(module.NonFiniteLoss) as caught:
        trainer.fit([*BATCHES[:2], bad, *BATCHES], STEPS, verbose=False)
    assert trainer.state is not None
    assert not any("go on" in note for note in getattr(caught.value, "__notes__", []))
