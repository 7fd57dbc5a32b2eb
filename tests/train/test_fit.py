"""A run goes on where it stopped, whatever stopped it, and saves nothing that is not good."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import resource
import signal
import threading
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardlm as sl
from shardlm.checkpoint import Checkpoints, record
from shardlm.data import Batches
from shardlm.data.packing import Packed
from shardlm.train import fit as module
from shardlm.train import interrupt
from shardlm.train.interrupt import uninterrupted
from shardlm.train.metrics import model_flops_per_token

pytestmark = pytest.mark.usefixtures("x64_module")

VOCABULARY, ROWS, SEQUENCE, STEPS = 67, 4, 8, 6
CONFIG = sl.TransformerConfig(
    vocab_size=VOCABULARY, num_layers=1, d_model=12, num_heads=6, num_kv_heads=6, head_dim=2, d_ff=24, vocab_multiple=5,
    dtype="float64", param_dtype="float64",
)  # fmt: skip
DATA, TENSOR = sl.Layout(data=2, fsdp=2), sl.Layout(tensor=3)


def make_batch(step: int, **changes) -> dict[str, np.ndarray]:
    random = np.random.default_rng(step)
    batch = {name: random.integers(0, VOCABULARY, (ROWS, SEQUENCE)) for name in ("tokens", "targets")}
    return batch | {"weights": random.random((ROWS, SEQUENCE))} | changes


BATCHES = [make_batch(step) for step in range(STEPS)]
BAD_TOKENS = np.full((ROWS, SEQUENCE), VOCABULARY)


def make_trainer(layout: sl.Layout, config=CONFIG, optimizer=None) -> sl.Trainer:
    optimizer = optimizer or sl.adamw(1e-2, steps=STEPS, warmup=1)
    return sl.Trainer(config, layout, optimizer, devices=jax.devices()[: layout.num_devices])


@pytest.fixture(scope="module")
def trainer() -> sl.Trainer:
    return make_trainer(DATA)


@pytest.fixture(scope="module")
def other() -> sl.Trainer:
    """The same model on a layout that pads the vocabulary to 75 rows, and not to 70."""
    return make_trainer(TENSOR)


@pytest.fixture(scope="module")
def undisturbed(trainer) -> dict[str, np.ndarray]:
    """The whole state after all steps, by path."""
    return by_path(fit(trainer)[0])


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """No thread lives longer than the call that started it, and Ctrl-C is handled as before."""
    threads, handler = set(threading.enumerate()), signal.getsignal(signal.SIGINT)
    yield
    for thread in set(threading.enumerate()) - threads:
        if not thread.daemon:
            thread.join(timeout=10)
            assert not thread.is_alive(), thread.name
    assert signal.getsignal(signal.SIGINT) is handler


def fit(trainer, batches=BATCHES, steps=STEPS, **options) -> tuple[sl.TrainState, str]:
    """The state that `fit` returns, and what it printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        state = trainer.fit(batches, steps, **options)
    return state, output.getvalue()


def stopped(trainer, error, batches, steps=STEPS, match=None, **options) -> str:
    """What `fit` printed before it raised `error`."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(error, match=match):
        trainer.fit(batches, steps, **options)
    return output.getvalue()


def by_path(state: sl.TrainState) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def assert_same(expected: dict, found: dict, tolerance: float = 0.0) -> None:
    assert expected.keys() == found.keys()
    for path, value in expected.items():
        a, b = (x[:VOCABULARY] if path.endswith("/table") else x for x in (value, found[path]))
        assert np.abs(a - b).max() <= tolerance * np.abs(a).max(), path


def saved_steps(directory: Path) -> list[int]:
    return Checkpoints(directory).steps()


def records(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def interrupt_before(step: int, error: type[BaseException] = KeyboardInterrupt):
    """The batches, up to an interruption in place of that of `step`."""
    for i, batch in enumerate(BATCHES, 1):
        if i == step:
            raise error("the source")
        yield batch


# What is written


def test_a_run_records_its_metrics_and_evaluations(trainer, tmp_path):
    held_out = [make_batch(100), make_batch(101)]
    state, output = fit(trainer, log_dir=tmp_path, log_every=2, held_out=held_out, evaluate_every=4)
    lines = records(tmp_path)
    assert [(line["step"], sorted(line.keys() - {"step", "time"})) for line in lines] == [
        (2, ["grad_norm", "loss", "step_time", "tokens", "tokens_per_second"]),
        (4, ["grad_norm", "loss", "step_time", "tokens", "tokens_per_second"]),
        (4, ["held_out_loss", "held_out_perplexity"]),
        (6, ["grad_norm", "loss", "step_time", "tokens", "tokens_per_second"]),
        (6, ["held_out_loss", "held_out_perplexity"]),
    ]
    for line in lines:
        if "loss" in line:
            assert line["tokens"] == pytest.approx(BATCHES[line["step"] - 1]["weights"].sum(), rel=1e-6)
            assert line["tokens_per_second"] * line["step_time"] == pytest.approx(ROWS * SEQUENCE)
    evaluated = trainer.evaluate(state, held_out)
    assert (lines[-1]["held_out_loss"], lines[-1]["held_out_perplexity"]) == (
        evaluated["loss"],
        evaluated["perplexity"],
    )
    printed = [line for line in output.splitlines() if not line.startswith("compiling ")]  # where it is the first run
    assert printed[0].startswith("first step after ")
    assert [line.split()[:3] for line in printed[1:]] == [
        ["step", "2/6", "loss"], ["step", "4/6", "loss"], ["step", "4/6", "held_out_loss"],
        ["step", "6/6", "loss"], ["step", "6/6", "held_out_loss"],
    ]  # fmt: skip


def test_the_logged_loss_is_that_of_the_step(trainer, tmp_path):
    fit(trainer, log_dir=tmp_path, log_every=1)
    state, losses = trainer.init(), []
    for batch in BATCHES:
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert [line["loss"] for line in records(tmp_path)] == losses


def test_the_time_of_a_step_is_without_evaluations(trainer, tmp_path, monkeypatch):
    """A clock that only the evaluations move, between the log lines too, stands still for the steps."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    evaluate = trainer.evaluate

    def slow(*arguments):
        now[0] += 60.0
        return evaluate(*arguments)

    def ticking():
        for batch in BATCHES:
            now[0] += 0.5
            yield batch

    monkeypatch.setattr(trainer, "evaluate", slow)
    fit(trainer, ticking(), log_dir=tmp_path, log_every=3, held_out=BATCHES[:1], evaluate_every=1)
    assert now[0] == 6 * 60.5
    step_times = [line["step_time"] for line in records(tmp_path) if "step_time" in line]
    assert step_times == pytest.approx([0.5, 0.5])


def test_fewer_steps_than_log_every_log_the_last(trainer, tmp_path):
    fit(trainer, steps=3, log_dir=tmp_path, log_every=100)
    assert [line["step"] for line in records(tmp_path)] == [3]


def test_a_quiet_run_prints_and_writes_nothing(trainer, tmp_path):
    state, output = fit(trainer, steps=2, verbose=False, log_dir=tmp_path / "logs")
    assert (int(state.step), output, list(tmp_path.iterdir())) == (2, "", [])


def test_utilisation_is_logged_where_the_peak_is_known(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "peak_flops", lambda device, dtype: 1e12)
    fit(trainer, steps=2, log_dir=tmp_path, log_every=2)
    [line] = records(tmp_path)
    flops = model_flops_per_token(trainer.config, SEQUENCE) * ROWS * SEQUENCE
    assert line["utilisation"] == pytest.approx(flops / line["step_time"] / (4 * 1e12))  # of four devices


def test_a_home_folder_is_the_users(trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    fit(trainer, steps=1, checkpoint_dir="~/run")
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == ["1", "metrics.jsonl"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


# Sources of batches


class _Iterable:
    def __iter__(self):
        return iter(BATCHES)


class _Indexed:
    """Indexed by step, without an end."""

    def __getitem__(self, step: int) -> dict:
        return BATCHES[step % STEPS]


@pytest.mark.parametrize(
    "source",
    [lambda: BATCHES, lambda: tuple(BATCHES), _Iterable, _Indexed, lambda: iter(BATCHES),
     lambda: grain.MapDataset.source(BATCHES), lambda: grain.MapDataset.source(BATCHES).repeat(),
     lambda: grain.MapDataset.source(BATCHES).to_iter_dataset()],
    ids=["list", "tuple", "iterable", "indexed", "iterator", "grain", "grain repeated", "grain iterable"],
)  # fmt: skip
def test_batch_i_is_that_of_update_i_from_any_source(trainer, undisturbed, tmp_path, source):
    fit(trainer, source(), 2, checkpoint_dir=tmp_path)
    assert_same(undisturbed, by_path(fit(trainer, source(), checkpoint_dir=tmp_path)[0]))


def test_batches_of_the_data_module_are_read_from_where_the_run_is(trainer, tmp_path):
    packed = Packed([np.arange(60) % 66, np.arange(90) % 50], SEQUENCE, vocab_size=VOCABULARY, end=66)
    whole = by_path(fit(trainer, Batches(packed, ROWS))[0])
    fit(trainer, Batches(packed, ROWS), 4, checkpoint_dir=tmp_path)
    assert_same(whole, by_path(fit(trainer, Batches(packed, ROWS), checkpoint_dir=tmp_path)[0]))


def test_placed_batches_are_fine(trainer, undisturbed):
    assert_same(undisturbed, by_path(fit(trainer, [trainer.place(batch) for batch in BATCHES])[0]))


def test_a_source_that_fills_one_buffer_again_and_again(trainer, undisturbed):
    def source():
        buffer = make_batch(0)
        for batch in BATCHES:
            for name, value in batch.items():
                buffer[name][:] = value
            yield buffer

    assert_same(undisturbed, by_path(fit(trainer, source())[0]))


def test_a_generator_of_the_caller_stays_open(trainer, undisturbed):
    source = (batch for batch in BATCHES)
    state, _ = fit(trainer, source, 2)
    for batch in source:
        state, _ = trainer.step(state, batch)
    assert_same(undisturbed, by_path(state))


def test_batches_that_end_early_are_an_error_and_the_steps_made_are_saved(trainer, undisturbed, tmp_path):
    message = "the batches ended after 3 steps of 6: give more, or fewer steps"
    for source in (BATCHES[:3], iter(BATCHES[:3]), grain.MapDataset.source(BATCHES[:3])):
        stopped(trainer, ValueError, source, match=message)
    output = stopped(trainer, ValueError, BATCHES[:3], match=message, checkpoint_dir=tmp_path)
    assert f"stopped: step 3 is saved in {tmp_path}" in output
    assert_same(undisturbed, by_path(fit(trainer, checkpoint_dir=tmp_path)[0]))


def test_a_wrong_batch_is_named_and_the_steps_made_are_saved(trainer, tmp_path):
    batches = [*BATCHES[:4], make_batch(4, tokens=BAD_TOKENS)]
    with pytest.raises(ValueError, match=r"tokens\[0, 0\] = 67 is outside") as error:
        trainer.fit(batches, STEPS, checkpoint_dir=tmp_path, verbose=False)
    assert error.value.__notes__ == ["This is the batch of step 5."]
    assert saved_steps(tmp_path) == [4]
    with pytest.raises(TypeError, match="a NoneType; it is a dict") as error:
        trainer.fit([None], 1, verbose=False)
    assert error.value.__notes__[0] == "This is the batch of step 1."


# Going on


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(trainer, undisturbed, tmp_path):
    fit(trainer, steps=2, checkpoint_dir=tmp_path)
    fit(trainer, steps=3, checkpoint_dir=tmp_path)
    state, output = fit(trainer, checkpoint_dir=tmp_path, checkpoint_every=2)
    assert_same(undisturbed, by_path(state))
    assert output.splitlines()[0] == f"resumed from {tmp_path}, step 3"
    assert output.splitlines()[1] == "  steps was 3, is now 6"
    assert output.splitlines()[2].startswith("first step after ")
    assert saved_steps(tmp_path) == [3, 4, 6]
    metadata = Checkpoints(tmp_path).metadata(6)
    assert metadata["next_batch"] == 6
    assert metadata["layout"] == "data=2,fsdp=2"
    assert sl.TransformerConfig.from_dict(metadata["config"]) == trainer.config
    assert metadata["versions"]["jax"] == jax.__version__


def test_it_goes_on_on_another_layout_and_says_so(trainer, other, undisturbed, tmp_path):
    """Its sums are made in another order: float64 rounds at 1e-16, and Adam's quotients enlarge that."""
    assert (trainer.config.padded_vocab_size, other.config.padded_vocab_size) == (70, 75)
    fit(trainer, steps=2, checkpoint_dir=tmp_path)
    state, output = fit(other, steps=4, checkpoint_dir=tmp_path)
    assert output.splitlines()[1] == "  layout was data=2,fsdp=2, is now tensor=3"
    assert not np.asarray(state.params["head"]["table"])[VOCABULARY:].any()
    state, output = fit(trainer, checkpoint_dir=tmp_path)
    assert output.splitlines()[1] == "  layout was tensor=3, is now data=2,fsdp=2"
    found = by_path(state)
    assert_same(undisturbed, found, tolerance=1e-10)
    with pytest.raises(AssertionError):
        assert_same(undisturbed, found)  # not by having been the same run


def test_metrics_of_steps_that_are_made_again_are_not_there_twice(trainer, tmp_path):
    fit(trainer, steps=2, checkpoint_dir=tmp_path, log_every=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:  # as a run that was killed after its last checkpoint
        file.write('{"step": 3, "time": 0.0, "loss": 9.9}\n{"step": 4, "ti')
    _, output = fit(trainer, steps=4, checkpoint_dir=tmp_path, log_every=1)
    assert "dropped 2 line(s)" in output
    assert [line["step"] for line in records(tmp_path)] == [1, 2, 3, 4]


def test_a_run_that_is_complete_is_evaluated_and_left_alone(trainer, undisturbed, tmp_path):
    fit(trainer, checkpoint_dir=tmp_path)
    written = (tmp_path / "metrics.jsonl").read_bytes()
    for steps in (6, 4):
        state, output = fit(trainer, iter(()), steps, checkpoint_dir=tmp_path, held_out=BATCHES[:1])
        loss = trainer.evaluate(state, BATCHES[:1])["loss"]
        assert output.splitlines()[-2:] == [
            f"nothing to do: the run is at step 6 of {steps}", f"held_out_loss {loss:.4f}",
        ]  # fmt: skip
        assert_same(undisturbed, by_path(state))
    assert saved_steps(tmp_path) == [6]
    assert (tmp_path / "metrics.jsonl").read_bytes() == written


def test_a_state_may_be_given_where_there_is_no_checkpoint(trainer, undisturbed, tmp_path):
    half, _ = fit(trainer, steps=3)
    state, _ = fit(trainer, state=half, checkpoint_dir=tmp_path)
    assert_same(undisturbed, by_path(state))
    message = rf"fit: a state was given, and {tmp_path} holds step 6: give no state, to resume from there, or another"
    stopped(trainer, ValueError, BATCHES, match=message, state=state, checkpoint_dir=tmp_path)


def test_another_model_is_refused_with_the_list_of_differences(trainer, tmp_path):
    fit(trainer, steps=1, checkpoint_dir=tmp_path)
    config = dataclasses.replace(
        CONFIG, d_ff=36, norm=sl.Norm(epsilon=1e-5), positions=sl.LearnedPositions(length=8), dropout=0.5
    )
    stranger = make_trainer(DATA, config)
    with pytest.raises(ValueError) as error:
        stranger.fit(BATCHES, STEPS, checkpoint_dir=tmp_path)
    assert str(error.value).split(": ", 1) == [
        f"the checkpoint of {tmp_path}, step 1 is of another model",
        "d_ff: 24 there, 36 here; norm/epsilon: 1e-06 there, 1e-05 here; "
        "positions/type: 'Rope' there, 'LearnedPositions' here; positions/theta: 10000.0 there, None here; "
        "positions/length: None there, 8 here",
    ]
    assert saved_steps(tmp_path) == [1]


def test_another_optimizer_is_refused(trainer, tmp_path):
    fit(trainer, steps=1, checkpoint_dir=tmp_path)
    stranger = make_trainer(DATA, optimizer=optax.sgd(0.1, momentum=0.9))
    with pytest.raises(ValueError, match="of another model or optimizer than the target"):
        stranger.fit(BATCHES, STEPS, checkpoint_dir=tmp_path)


def test_what_may_change_is_said(trainer, tmp_path):
    fit(trainer, steps=1, checkpoint_dir=tmp_path)
    config = dataclasses.replace(CONFIG, dropout=0.1, dtype="float32")
    stranger = sl.Trainer(config, DATA, trainer.optimizer, seed=7, devices=jax.devices()[:4])
    _, output = fit(stranger, steps=1, checkpoint_dir=tmp_path)
    assert output.splitlines() == [
        f"resumed from {tmp_path}, step 1", "  dtype was float64, is now float32", "  dropout was 0.0, is now 0.1",
        "  seed was 0, is now 7", "nothing to do: the run is at step 1 of 1",
    ]  # fmt: skip


def test_a_checkpoint_that_fit_did_not_write_is_refused(trainer, tmp_path):
    sl.save(tmp_path / "3", trainer.init())
    with pytest.raises(
        ValueError, match="step 3 does not say what its model is, so fit did not save it: use sl.restore"
    ):
        trainer.fit(BATCHES, STEPS, checkpoint_dir=tmp_path)


def largest_file(directory: Path) -> Path:
    return max(directory.rglob("*"), key=lambda entry: entry.stat().st_size if entry.is_file() else 0)


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(trainer, undisturbed, tmp_path):
    fit(trainer, steps=5, checkpoint_dir=tmp_path, checkpoint_every=2)
    (tmp_path / "5/metadata.json").unlink()
    file = largest_file(tmp_path / "4/state")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(sl.CheckpointWarning) as warned:
        state, output = fit(trainer, checkpoint_dir=tmp_path, checkpoint_every=2)
    five, four = (str(warning.message) for warning in warned)
    assert f"{tmp_path}/5 is damaged: metadata.json is missing" in five
    assert f"{tmp_path}/4 is damaged: state/" in four and f"{file.name} has " in four
    assert "It is now called 4.damaged. The run goes on from step 2" in four
    assert f"resumed from {tmp_path}, step 2\n" in output and five in output and four in output
    assert_same(undisturbed, by_path(state))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "2",
        "4",
        "4.damaged",
        "5.damaged",
        "6",
        "metrics.jsonl",
    ]


def test_a_run_of_which_no_checkpoint_is_whole_does_not_start_anew_unasked(trainer, tmp_path):
    fit(trainer, steps=2, checkpoint_dir=tmp_path, checkpoint_every=1)
    for step in (1, 2):
        (tmp_path / f"{step}/state/manifest.ocdbt").unlink()
    message = rf"(?s)no checkpoint in {tmp_path} is whole:.*/2 is damaged: .*/1 is damaged: .*choose another checkpoint"
    stopped(trainer, sl.DamagedCheckpoint, BATCHES, match=message, checkpoint_dir=tmp_path)


def test_what_a_checkpoint_says_of_its_run(trainer, tmp_path):
    held_out = BATCHES[:1]
    fit(trainer, steps=2, checkpoint_dir=tmp_path)
    state, _ = fit(trainer, checkpoint_dir=tmp_path, log_every=1, held_out=held_out)
    metadata = sl.read_metadata(tmp_path / "6")
    assert metadata["tokens"] == pytest.approx(sum(batch["weights"].sum() for batch in BATCHES), rel=1e-6)
    assert metadata["loss"] == records(tmp_path)[-2]["loss"]
    assert metadata["held_out_loss"] == trainer.evaluate(state, held_out)["loss"]
    assert "held_out_loss" not in sl.read_metadata(tmp_path / "2")
    assert (metadata["seed"], metadata["next_batch"]) == (0, 6)


def test_the_best_checkpoints_stay(trainer, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, float("nan"), 4.0, 5.0])
    monkeypatch.setattr(trainer, "evaluate", lambda state, batches: {"loss": next(losses)})
    options = {"checkpoint_every": 1, "evaluate_every": 1, "held_out": BATCHES[:1]}
    fit(trainer, checkpoint_dir=tmp_path, keep=1, keep_best=2, keep_every=4, **options)
    assert saved_steps(tmp_path) == [2, 3, 4, 6]


@pytest.fixture
def full_from():
    """Gives the batches, with the disk full while those of steps `first` to `last` are trained on and saved.

    Every write beyond 8 kB of a file fails, as on a disk without room: of Orbax, and of Python.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_limit(size: int) -> None:
        while any(thread.name == "shardlm checkpoint" for thread in threading.enumerate()):
            time.sleep(0.01)  # a save is running, for which this comes too late
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    def batches(first: int, last: int):
        for step, batch in enumerate(BATCHES, 1):
            if step in (first, last + 1):
                set_limit(8192 if step == first else before[0])
            yield batch

    yield batches
    set_limit(before[0])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax drops its other coroutines
def test_a_run_goes_on_when_a_save_fails_and_saves_the_next(trainer, undisturbed, tmp_path, full_from):
    text = f"{tmp_path}/2 could not be saved: .*The run goes on; the newest checkpoint is step 1"
    with pytest.warns(sl.CheckpointWarning, match=text):
        state, output = fit(trainer, full_from(2, 3), checkpoint_dir=tmp_path, checkpoint_every=1, keep=2)
    assert "2 could not be saved" in output and "3 could not be saved" in output
    assert_same(undisturbed, by_path(state))
    assert saved_steps(tmp_path) == [5, 6]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["5", "6", "metrics.jsonl"]
    assert_same(undisturbed, by_path(sl.restore(tmp_path / "6", trainer)))


@pytest.mark.filterwarnings("ignore::shardlm.CheckpointWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_last_state_that_cannot_be_saved_is_an_error_that_holds_it(trainer, undisturbed, tmp_path, full_from):
    message = rf"{tmp_path}/6 could not be saved: .* last step, tried twice: the newest checkpoint is step 4"
    with pytest.raises(sl.SaveError, match=message) as error:
        trainer.fit(full_from(5, 99), STEPS, checkpoint_dir=tmp_path, checkpoint_every=2, verbose=False)
    assert_same(undisturbed, by_path(error.value.state))
    assert saved_steps(tmp_path) == [2, 4]
    next(full_from(0, 0))  # there is room again
    assert_same(undisturbed, by_path(fit(trainer, checkpoint_dir=tmp_path)[0]))


def test_a_folder_that_cannot_be_written_to_is_an_error_before_the_first_step(trainer, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(sl.SaveError, match=rf"cannot save to {tmp_path}/file/run: NotADirectoryError"):
        trainer.fit(iter(()), STEPS, checkpoint_dir=tmp_path / "file/run", verbose=False, log_dir=tmp_path)


def test_metadata_that_somebody_else_wrote_is_one_clear_error(trainer, tmp_path):
    fit(trainer, steps=1, checkpoint_dir=tmp_path)
    content = record.read_record(tmp_path / "1")
    content.pop("digest")
    for changes, message in (
        ({"tokens": "many"}, "was not saved by fit: its metadata has tokens='many'"),
        ({"tokens": float("nan")}, "was not saved by fit: its metadata has tokens=nan"),
        ({"layout": ["\x1b[2J"], "versions": 3}, r"its metadata has layout=\['\\x1b\[2J'\], versions=3"),
        ({"config": []}, r"its metadata has config=\[\]"),
        ({"config": {"type": []}}, "these values are not those of a configuration"),
    ):
        record.write_record(tmp_path / "1", content | {"metadata": content["metadata"] | changes})
        with pytest.raises(ValueError, match=message):
            trainer.fit(BATCHES, STEPS, checkpoint_dir=tmp_path, verbose=False)


# Two runs on one folder


def test_a_second_run_on_the_folder_changes_nothing_of_the_first(trainer, undisturbed, tmp_path):
    refused = []

    def batches():
        for i, batch in enumerate(BATCHES, 1):
            if i == 4:
                for options in ({"checkpoint_dir": tmp_path}, {"log_dir": tmp_path}):
                    before = (tmp_path / "metrics.jsonl").read_bytes()
                    assert before
                    with pytest.raises((sl.SaveError, OSError), match="another run .*which is this one") as error:
                        trainer.fit(BATCHES, STEPS, **options)
                    refused.append(type(error.value))
                    assert (tmp_path / "metrics.jsonl").read_bytes() == before
            yield batch

    state, _ = fit(trainer, batches(), checkpoint_dir=tmp_path, checkpoint_every=2, log_every=1)
    assert refused == [sl.SaveError, OSError]
    assert_same(undisturbed, by_path(state))
    assert [line["step"] for line in records(tmp_path)] == list(range(1, STEPS + 1))
    assert saved_steps(tmp_path) == [2, 4, 6]


def test_a_run_claims_its_folder_before_it_looks_at_it(trainer, tmp_path, monkeypatch):
    looked, steps = [], Checkpoints.steps
    monkeypatch.setattr(Checkpoints, "steps", lambda self: (looked.append(self._claimed), steps(self))[1])
    fit(trainer, checkpoint_dir=tmp_path, checkpoint_every=2)
    assert looked and all(looked)


def test_a_complete_run_is_evaluated_while_another_holds_its_folder(trainer, undisturbed, tmp_path):
    fit(trainer, checkpoint_dir=tmp_path)
    written = (tmp_path / "metrics.jsonl").read_bytes()
    with Checkpoints(tmp_path) as other:
        other.claim()
        assert_same(undisturbed, by_path(fit(trainer, checkpoint_dir=tmp_path)[0]))
        with pytest.raises(sl.SaveError, match="another run is saving there"):
            trainer.fit(BATCHES * 2, STEPS + 1, checkpoint_dir=tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == written


# Reasons to stop


def spoilt(trainer: sl.Trainer, step: int) -> list:
    """The batches, with ids outside the vocabulary in that of `step`, placed beforehand so that nothing checks them."""
    wrong = trainer.place(make_batch(step))
    wrong["tokens"] = jax.device_put(BAD_TOKENS.astype(np.int32), trainer.batch_sharding)
    return [*BATCHES[: step - 1], wrong, *BATCHES[step:]]


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_finite_stops_the_run_with_the_last_good_checkpoint(
    trainer, undisturbed, tmp_path, log_every
):
    message = (
        rf"^step 4: loss is nan; stopped, and the last good checkpoint is step 3 in {tmp_path}\. Common causes: a le"
    )
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 3, "log_every": log_every}
    output = stopped(trainer, sl.NonFiniteLoss, spoilt(trainer, 4), match=message, **options)
    assert "stopped" not in output
    assert saved_steps(tmp_path) == [3]
    assert_same(undisturbed, by_path(fit(trainer, **options)[0]))


def test_it_stops_soon_and_not_at_the_next_log(trainer):
    asked = []

    class Watched:
        def __getitem__(self, step: int) -> dict:
            asked.append(step + 1)
            return spoilt(trainer, 2)[step % STEPS]

    stopped(trainer, sl.NonFiniteLoss, Watched(), 50, match="step 2: loss is nan; stopped, and there is no checkpoint")
    stopped(trainer, sl.NonFiniteLoss, Watched(), 50, match="step 2", log_every=50)
    assert max(asked) <= 2 + module._IN_FLIGHT


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    """An update may spoil the parameters while its loss and gradient are finite."""
    trainer = make_trainer(DATA, optimizer=optax.sgd(lambda count: jnp.where(count < 2, 1e-2, np.inf)))
    message = r"^step 3: params/embedding/table, .* not finite after the update; .* last good checkpoint is step 2 in"
    stopped(trainer, sl.NonFiniteLoss, BATCHES, 3, match=message, checkpoint_dir=tmp_path, checkpoint_every=1)
    assert saved_steps(tmp_path) == [1, 2]


def test_infinity_in_the_optimizer_state_may_be_meant(trainer):
    state = trainer.init()
    state = dataclasses.replace(state, opt_state=(state.opt_state, {"best": jnp.array(np.inf)}))
    assert module._non_finite(trainer, state) == []
    state = dataclasses.replace(state, opt_state={"best": jnp.array(np.nan)})
    assert module._non_finite(trainer, state) == ["opt_state/best"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
def test_an_interruption_saves_the_last_step_and_is_raised_again(trainer, undisturbed, tmp_path, error):
    output = stopped(trainer, error, interrupt_before(4, error), match="the source", checkpoint_dir=tmp_path)
    assert output.splitlines()[-1] == f"stopped: step 3 is saved in {tmp_path}"
    assert saved_steps(tmp_path) == [3]
    output = stopped(trainer, error, _from(interrupt_before, 5, error), match="the source", checkpoint_dir=tmp_path)
    assert_same(undisturbed, by_path(fit(trainer, checkpoint_dir=tmp_path)[0]))


def _from(source, *arguments):
    """An iterable that is interrupted each time that it is read."""

    class Source:
        def __iter__(self):
            return source(*arguments)

    return Source()


def test_an_interruption_before_the_first_step_saves_nothing(trainer, tmp_path):
    output = stopped(trainer, KeyboardInterrupt, interrupt_before(1), checkpoint_dir=tmp_path)
    assert (output, saved_steps(tmp_path)) == ("", [])


def test_an_interruption_after_a_loss_that_is_not_finite_saves_nothing(trainer, tmp_path):
    def source():
        yield from spoilt(trainer, 3)[:3]
        raise KeyboardInterrupt

    output = stopped(trainer, KeyboardInterrupt, source(), checkpoint_dir=tmp_path, log_every=100)
    assert "stopped; step 3 is not saved: step 3: loss is nan" in output
    assert saved_steps(tmp_path) == []


def test_ctrl_c_in_the_middle_of_a_step_waits_for_its_end(trainer, undisturbed, tmp_path, monkeypatch):
    """The step has used the old state up, so that there is nothing to save until it has returned the new one."""
    step = trainer.step

    def interrupted_step(state, batch):
        result = step(state, batch)
        if int(result[0].step) == 3:
            for _ in range(2):  # as a launcher does that passes signals on
                os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(trainer, "step", interrupted_step)
    output = stopped(trainer, KeyboardInterrupt, BATCHES, checkpoint_dir=tmp_path)
    assert f"stopped: step 3 is saved in {tmp_path}" in output
    monkeypatch.undo()
    assert_same(undisturbed, by_path(fit(trainer, checkpoint_dir=tmp_path)[0]))


def test_ctrl_c_pressed_again_after_a_second_does_not_wait(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(interrupt, "_ONE_PRESS", 1e-9)
    step = trainer.step

    def stuck_step(state, batch):
        result = step(state, batch)
        if int(result[0].step) == 3:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("never here")
        return result

    monkeypatch.setattr(trainer, "step", stuck_step)
    stopped(trainer, KeyboardInterrupt, BATCHES, checkpoint_dir=tmp_path, checkpoint_every=2)
    assert saved_steps(tmp_path) == [2]  # step 3's state is lost, and nothing else


def test_fit_runs_outside_of_the_main_thread(trainer, undisturbed):
    states = []

    def run():
        with jax.enable_x64(True):  # for this thread
            states.append(trainer.fit(BATCHES, STEPS, verbose=False))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert_same(undisturbed, by_path(states[0]))


def test_a_save_that_fails_is_said_and_the_first_error_is_raised(trainer, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr(Checkpoints, "save", full)
    output = stopped(trainer, KeyboardInterrupt, interrupt_before(3), checkpoint_dir=tmp_path)
    assert output.splitlines()[-1] == "stopped; step 2 is not saved: No space left on device"


# Evaluation and options


def test_the_last_step_is_evaluated_without_evaluate_every(trainer, tmp_path):
    fit(trainer, steps=2, log_dir=tmp_path, held_out=iter(BATCHES[:2]))
    assert [line["step"] for line in records(tmp_path) if "held_out_loss" in line] == [2]


def test_an_evaluation_that_fails_loses_no_step(trainer, tmp_path):
    held_out = [make_batch(0, tokens=BAD_TOKENS)]
    stopped(trainer, ValueError, BATCHES, match="outside the voc", checkpoint_dir=tmp_path, held_out=held_out)
    assert saved_steps(tmp_path) == [6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "fit: steps=0; it is the number of updates of the whole run, at least 1"),
        ({"steps": 2.5}, "fit: steps=2.5"),
        ({"steps": True}, "fit: steps=True"),
        ({"log_every": 0}, "fit: log_every=0; it is a positive integer"),
        ({"checkpoint_every": 2.0, "log_every": -1}, "checkpoint_every=2.0; .*; log_every=-1; it is a positive"),
        ({"evaluate_every": 5}, "evaluate_every needs held_out, the batches to evaluate on"),
        ({"held_out": []}, "held_out is empty: give at least one batch, or None"),
        ({"held_out": make_batch(0)}, "held_out is one batch: give a list of batches"),
        ({"held_out": iter([]), "evaluate_every": 2}, "held_out can be read once only, and evaluate_every re"),
        ({"batches": make_batch(0)}, r"batches is one batch: give a list of batches, or itertools.repeat\(batch\)"),
        ({"keep": 0, "checkpoint_dir": "x"}, "keep=0: expected how many checkpoints stay"),
        ({"keep_best": 1}, "keep_best compares .*: give an evaluate_every that divides checkpoint_every=100, not None"),
        ({"keep_best": 1, "held_out": [{}], "evaluate_every": 30}, "that divides checkpoint_every=100, not 30"),
        ({"tensorboard": True}, "tensorboard=True, but there is no directory to write the events to"),
        ({"log_dir": "gs://bucket/run"}, "log_dir='gs://bucket/run' is an address"),
        ({"log_dir": ""}, "log_dir='' is empty"),
        ({"checkpoint_dir": "s3://bucket/run"}, "checkpoint_dir='s3://bucket/run' is an address: give a local folder"),
        ({"checkpoint_dir": Path("gs://bucket/run")}, "checkpoint_dir='gs:/bucket/run' is an address"),
        ({"checkpoint_dir": ""}, "checkpoint_dir='' is empty"),
        ({"checkpoint_dir": "/dev/null", "log_dir": __file__}, "checkpoint_dir=.* is no folder; log_dir=.* is no f"),
    ],
)  # fmt: skip
def test_an_option_out_of_range_is_an_error(trainer, options, message):
    with pytest.raises(ValueError, match=message):
        trainer.fit(**({"batches": BATCHES, "steps": STEPS} | options))


def test_held_out_batches_without_end_are_refused(trainer):
    packed = Packed([np.arange(60)], SEQUENCE, vocab_size=VOCABULARY, end=66)
    with pytest.raises(ValueError, match="held_out is a Batches, which has no end: give a list"):
        trainer.fit(BATCHES, STEPS, held_out=Batches(packed, ROWS))


def test_numbers_of_numpy_and_one_batch_repeated_are_fine(trainer):
    state, _ = fit(trainer, itertools.repeat(BATCHES[0]), np.int64(3), log_every=np.int32(2))
    assert int(state.step) == 3


def test_an_ignored_ctrl_c_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
