"""A run that goes on says every difference, goes on with the very next row, and refuses what it cannot go on with."""

import contextlib
import io
import itertools
import json

import grain
import jax
import numpy as np
import optax
import pytest
from flax import nnx

import shardlm as sl
from shardlm.__main__ import main
from shardlm.checkpoint import Checkpoints
from shardlm.data import Batches
from shardlm.data.packing import Packed
from shardlm.train import resume, run_record
from shardlm.train.used import Used

SEQUENCE, VOCABULARY = 8, 67
DOCUMENTS = [np.arange(300) % 60, np.arange(250) % 50]


class Remembered(Batches):
    """Batches that remember which rows were taken from them; a row is known by its bytes."""

    def _from(self, first):
        batch = super()._from(first)
        self.__dict__.setdefault("taken", []).append([row.tobytes() for row in batch["tokens"]])
        return batch


def batches_of(size: int, sequence: int = SEQUENCE, seed: int = 0, documents=DOCUMENTS) -> Remembered:
    return Remembered(Packed(documents, sequence, vocab_size=VOCABULARY, end=66), size, seed)


def make_batch(step: int, rows: int = 4, sequence: int = SEQUENCE) -> dict[str, np.ndarray]:
    random = np.random.default_rng(step)
    return {name: random.integers(0, VOCABULARY, (rows, sequence)) for name in ("tokens", "targets")}


class Weight(nnx.Module):
    """As small as a module can be: what is tested here is not what it computes."""

    def __init__(self, rngs: nnx.Rngs):
        self.scale = nnx.Param(rngs.normal((2, 3)))


def loss_fn(module, batch):
    return (module.scale[...].sum() * batch["tokens"]).sum(), batch["tokens"].size


def make_trainer(optimizer=None, seed: int = 0) -> sl.Trainer:
    return sl.Trainer.from_module(
        Weight, loss_fn, optimizer=optimizer or optax.sgd(0.1), seed=seed, devices=jax.devices()[:1]
    )


@pytest.fixture(scope="module")
def trainer() -> sl.Trainer:
    return make_trainer()


def fit(trainer, batches, steps, folder, **options) -> str:
    """What `fit` printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        trainer.fit(batches, steps, checkpoint_dir=folder, keep=None, **options)
    return output.getvalue()


def differences(output: str) -> list[str]:
    """The lines that say what a resumed run changes."""
    lines = itertools.takewhile(lambda line: not line.startswith(("first step", "nothing to do")), output.splitlines())
    return [line.strip() for line in lines if line.startswith("  ")]


def saved(folder, step: int) -> dict:
    return Checkpoints(folder).metadata(step)["run"]


def test_nothing_is_said_where_nothing_has_changed(trainer, tmp_path):
    fit(trainer, batches_of(4), 4, tmp_path, checkpoint_every=2)
    (tmp_path / "4").rename(tmp_path / "kept")
    assert differences(fit(trainer, batches_of(4), 4, tmp_path)) == []
    assert saved(tmp_path, 4) == json.loads((tmp_path / "kept/metadata.json").read_text())["metadata"]["run"]


@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4), (4, 6), (3, 5)])
def test_with_another_batch_size_the_run_goes_on_with_the_very_next_row(trainer, tmp_path, before, after):
    """Rows of all batches together are those of one pass, none left out and none twice, across an epoch's end."""
    whole = batches_of(1)
    order = [whole._from(row)["tokens"][0].tobytes() for row in range(200)]
    first, second, third = batches_of(before), batches_of(after), batches_of(before)
    assert 4 * before + 3 * after + 2 * before < len(order)
    fit(trainer, first, 4, tmp_path)
    output = fit(trainer, second, 7, tmp_path)
    assert (
        f"batch size was {before} rows, is now {after}: the run goes on with row {4 * before}, the very next"
        in differences(output)
    )
    fit(trainer, third, 9, tmp_path)
    used = [*first.taken[:4], *second.taken[:3], *third.taken[:2]]
    found = [row for batch in used for row in batch]
    assert found == order[: len(found)]
    assert saved(tmp_path, 9)["rows"] == len(found) == saved(tmp_path, 9)["batches"]["position"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "seed of their order was 0, is now 1"),
        ({"sequence": 16}, "sequence was 8, is now 16"),
        ({"documents": [np.arange(300) % 60, np.arange(250) % 49]}, "content differs"),
        ({"documents": DOCUMENTS[:1]}, "rows in an epoch was 69, is now 38"),
        ({"seed": 1, "size": 6}, "seed of their order was 0, is now 1"),
    ],
    ids=["seed", "sequence", "data", "fewer", "seed and size"],
)
def test_other_data_need_a_word_and_begin_with_their_first_row(trainer, tmp_path, other, message):
    fit(trainer, batches_of(4), 3, tmp_path)
    options = {"size": 4} | other
    with pytest.raises(ValueError, match="the data are others, or in another order") as error:
        fit(trainer, batches_of(**options), 5, tmp_path)
    assert message in str(error.value)
    assert "To go on all the same, say accept_changes=True (--accept-changes)" in str(error.value)
    assert Checkpoints(tmp_path).steps() == [3]
    batches = batches_of(**options)
    output = fit(trainer, batches, 5, tmp_path, accept_changes=True)
    assert any(message in line for line in differences(output))
    assert batches.taken[0] == [row.tobytes() for row in batches_of(**options)[0]["tokens"]]
    assert saved(tmp_path, 5)["batches"]["position"] == 2 * options["size"]
    # Once accepted, it is the run's own.
    assert differences(fit(trainer, batches_of(**options), 6, tmp_path)) == ["steps was 5, is now 6"]


def injected(rate: float):
    """Whose rate is in its state, so that what is saved holds on."""
    return optax.inject_hyperparams(optax.sgd)(learning_rate=rate)


def plateau(factor: float):
    """Which wants the loss."""
    return optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(factor=factor))


def own(rows: int, sequence: int = SEQUENCE):
    return [make_batch(step, rows, sequence) for step in range(8)]


@pytest.mark.parametrize(
    "source",
    [list, iter, lambda batches: grain.MapDataset.source(batches)],
    ids=["list", "iterator", "grain"],
)
def test_of_own_batches_another_number_of_rows_needs_a_word(trainer, tmp_path, source):
    fit(trainer, source(own(4)), 3, tmp_path)
    message = "batches had 4 rows, and have 8: of the caller's own batches only the number is known"
    for _ in range(2):  # the first refusal has changed nothing
        with pytest.raises(ValueError, match=message):
            fit(trainer, source(own(8)), 5, tmp_path)
    assert Checkpoints(tmp_path).steps() == [3]
    output = fit(trainer, source(own(8)), 5, tmp_path, accept_changes=True)
    assert "batches had 4 rows, and have 8" in output
    assert saved(tmp_path, 5)["rows"] == 3 * 4 + 2 * 8


def test_own_batches_may_differ_in_rows_among_themselves(trainer, tmp_path):
    """Those that did so before, and those whose last used one is still there, are what they were."""
    uneven = [make_batch(step, rows) for step, rows in enumerate((4, 4, 2, 3, 1, 4))]
    for source in (list, iter):
        folder = tmp_path / source.__name__
        for steps in (2, 3, 6):  # between the first two nothing but the digest of the last one tells
            assert "batches had" not in fit(trainer, source(uneven), steps, folder)
        assert saved(folder, 6)["rows"] == 18


def test_own_batches_that_are_others_are_noticed_by_the_last_one_used(trainer, tmp_path):
    fit(trainer, own(4), 3, tmp_path)
    for others in ([make_batch(step + 10) for step in range(8)], (make_batch(step + 10) for step in range(8))):
        assert "batch 2 (from 0), the last that was used, is not what it was" in fit(trainer, others, 3 + 1, tmp_path)
        (tmp_path / "4").rename(tmp_path / f"gone-{id(others)}")
    assert "is not what it was" not in fit(trainer, own(4), 4, tmp_path)


def test_from_batches_to_a_list_needs_a_word(trainer, tmp_path):
    fit(trainer, batches_of(4), 3, tmp_path)
    message = "batches were shardlm.data.Batches, and are the caller's own batches: which of them the run has used"
    with pytest.raises(ValueError, match=message):
        fit(trainer, own(4), 5, tmp_path)
    fit(trainer, own(4), 5, tmp_path, accept_changes=True)


def test_another_length_of_the_run_and_what_follows_from_it_is_said(tmp_path):
    fit(make_trainer(sl.adamw(3e-3, steps=40)), batches_of(4), 2, tmp_path)
    output = fit(make_trainer(sl.adamw(1e-3, steps=80)), batches_of(4), 3, tmp_path)
    said = differences(output)
    assert said[0] == "steps was 2, is now 3"
    assert said[1].startswith("optimizer computes something else (rates, decays, or the steps of a schedule): ")
    before, after = said[1].partition(": ")[2].split(" was in it, and ")
    assert {"0.003", "36"} <= set(before.split(", "))
    assert {"0.001", "72"} <= set(after.removesuffix(" is now").split(", "))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (lambda: optax.adam(1e-3), lambda: optax.adam(2e-3)),
        (lambda: optax.adam(1e-3), lambda: optax.adam(1e-3, b1=0.8)),
        (lambda: optax.adam(1e-3), lambda: optax.adam(1e-3, eps=1e-6)),
        (lambda: optax.sgd(optax.linear_schedule(1, 0, 50)), lambda: optax.sgd(optax.linear_schedule(1, 0, 60))),
        (
            lambda: optax.sgd(optax.piecewise_constant_schedule(1.0, {5: 0.5})),
            lambda: optax.sgd(optax.piecewise_constant_schedule(1.0, {6: 0.5})),
        ),
        (lambda: optax.adamw(1e-3, weight_decay=0.1), lambda: optax.adamw(1e-3, weight_decay=0.2)),
        (lambda: sl.adamw(1e-3, steps=10), lambda: sl.adamw(1e-3, steps=10, clip=0.5)),
        (lambda: injected(1e-3), lambda: injected(2e-3)),
        (lambda: plateau(0.5), lambda: plateau(0.25)),
    ],
    ids=["rate", "b1", "eps", "schedule", "boundaries", "decay", "clip", "injected", "extra arguments"],
)
def test_an_optimizer_is_known_by_what_it_computes(one, two):
    a, again, b = (run_record.optimizer_of(make_trainer(make())) for make in (one, one, two))
    assert a == again != b
    versions = {name: resume._version(name) for name in ("jax", "optax")}
    [line] = resume._optimizers(a, b, {"versions": versions})
    assert "optimizer computes something else" in line
    assert resume._optimizers(a, again, {}) == []


def test_an_optimizer_is_the_same_on_every_layout():
    def on(layout: str):
        trainer = sl.Trainer(
            sl.TransformerConfig(vocab_size=VOCABULARY, num_layers=3, d_model=8, num_heads=2, d_ff=8),
            sl.Layout.parse(layout),
            sl.adamw(1e-3, steps=10),
            devices=sl.Layout.parse(layout).num_devices,
        )
        return run_record.optimizer_of(trainer)

    one = on("data=1")
    assert one is not None
    for layout in ("fsdp=2,tensor=2", "pipe=2", "pipe=2,pipeline=interleaved:2:2"):
        assert on(layout) == one


def test_another_held_out_set_is_said(trainer, tmp_path):
    fit(trainer, batches_of(4), 2, tmp_path, held_out=own(4)[:1])
    said = differences(fit(trainer, batches_of(4), 2, tmp_path, held_out=own(4)[1:2]))
    assert said == ["held-out batches are others: their losses cannot be compared with those before"]
    assert differences(fit(trainer, batches_of(4), 2, tmp_path, held_out=own(4)[:1])) == []


def test_of_a_checkpoint_without_the_record_it_is_said_that_nothing_is_known(trainer, tmp_path):
    state = trainer.fit(batches_of(4), 2, verbose=False)
    metadata = resume.metadata(trainer, 2, {})
    del metadata["run"]
    sl.save(tmp_path / "2", state, metadata)
    batches = batches_of(4)
    said = differences(fit(trainer, batches, 3, tmp_path))
    assert said == [
        "it does not say with which batches, steps and optimizer it was made: whether they are the same is not known"
    ]
    assert batches.taken[0] == [row.tobytes() for row in batches_of(4)[2]["tokens"]]
    assert saved(tmp_path, 3)["rows"] is None


def test_rows_are_counted_over_batches_of_any_size(trainer):
    """A last batch with fewer rows counts as what it is."""
    run = run_record.describe_run(trainer, [], 3, None)
    used = Used(run, resume.Resumption(), [], 0, print, False)
    for step, rows in enumerate((4, 4, 2), 1):
        batch = make_batch(step, rows)
        used.take(trainer, step, batch)
        used.made(batch)
    used.take(trainer, 4, make_batch(4))  # of a step that fails
    assert used.record(3)["rows"] == 10


@pytest.mark.parametrize("word", [[], ["--accept-changes"]])
def test_the_command_line_has_the_word(word, tmp_path, monkeypatch, capsys):
    asked = []

    def fit(trainer, batches, steps, **options):
        asked.append(options["accept_changes"])
        raise ValueError("fit: that is enough")

    monkeypatch.setattr(sl.Trainer, "fit", fit)
    (tmp_path / "a.txt").write_text("to be or not to be " * 40)
    assert main(["train", "--data", str(tmp_path / "a.txt"), "--held-out", "0", "--sequence", "8", *word]) == 2
    assert asked == [bool(word)]
    assert "that is enough" in capsys.readouterr().err
