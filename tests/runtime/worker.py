"""A script for tests: as one of several processes, trains a tiny model on several layouts and says what it saw.

worker.py FOLDER train LAYOUT...     each layout; then a Trainer that differs between processes; then SIGTERM
worker.py FOLDER elastic LAYOUT      process 1 kills itself on the way, once
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

import shardlm as sl
from shardlm.hub import write
from shardlm.runtime import begin

ROWS, SEQUENCE, STEPS = 8, 12, 4
CONFIG = sl.TransformerConfig(
    vocab_size=67, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, d_ff=24, vocab_multiple=8
)


class Batches:
    """Of the rows given, after what `before` does at a step."""

    def __init__(self, rows: slice, before=lambda step: None):
        self._rows, self._before = rows, before

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        self._before(step)
        random = np.random.default_rng(step)
        whole = {name: random.integers(0, CONFIG.vocab_size, (ROWS, SEQUENCE)) for name in ("tokens", "targets")}
        whole["weights"] = random.random((ROWS, SEQUENCE))
        return {name: value[self._rows] for name, value in whole.items()}


def trainer_of(layout: str, **options) -> sl.Trainer:
    config = sl.TransformerConfig(**vars(CONFIG) | {"dtype": "float64", "param_dtype": "float64"})
    return sl.Trainer(config, sl.Layout.parse(layout), sl.adamw(1e-2, steps=STEPS, warmup=1), **options)


def records(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def fit(trainer: sl.Trainer, folder: Path, before=lambda step: None, steps: int = STEPS) -> sl.TrainState:
    batches = Batches(trainer.local_rows(ROWS), before)
    return trainer.fit(batches, steps, checkpoint_dir=folder, checkpoint_every=2, keep=None, log_every=1)


def train(trainer: sl.Trainer, folder: Path) -> dict:
    """Train, restore, evaluate and sample."""
    state = fit(trainer, folder)
    rows = trainer.local_rows(ROWS)
    held_out = Batches(rows)
    total = jax.jit(lambda params: sum(abs(x).sum() for x in jax.tree.leaves(params)))
    sums = [float(total(s.params)) for s in (state, sl.restore(folder / str(STEPS), trainer))]
    sample = sl.sample(trainer, state, np.array([3, 5]), tokens=4, window=SEQUENCE, temperature=0)
    return {
        "rows": [rows.start, rows.stop],
        "held_out": trainer.evaluate(state, [held_out[100], held_out[101]])["loss"],
        "sums": sums,
        "sample": sample.tolist(),
    }


def exchange_with_hugging_face(trainer: sl.Trainer, folder: Path) -> dict:
    """Write a model and read it again; then fail to write two on the first process alone."""
    params = trainer.init().params
    sl.save_hf(folder / "model", trainer.config, params, max_shard_size="10KB", verbose=False)
    _, read, _ = sl.load_hf(folder / "model", trainer.layout, verbose=False)
    rows = CONFIG.vocab_size  # without the padding of the vocabulary, of which the configuration that is read has more
    same = jax.jit(lambda a, b: jax.tree.map(lambda x, y: (x[:rows] == y[:rows]).all(), a, b))
    (folder / "file").touch()
    errors = []
    for name in ("file/model", "full"):
        if name == "full" and jax.process_index() == 0:  # after the first of several files
            write.os = SimpleNamespace(fsync=no_room)
        try:
            sl.save_hf(folder / name, trainer.config, params, max_shard_size="10KB", verbose=False)
        except OSError as error:
            errors.append(str(error))
    return {"equal": all(map(bool, jax.tree.leaves(same(params, read)))), "errors": errors}


def no_room(descriptor: int) -> None:
    raise OSError("No space left on device")


def other_shapes(trainer: sl.Trainer, index: int) -> dict:
    """Steps of shapes not seen before: another one on each process; then one that process 1 is slow to compile."""
    state, times, errors = trainer.init(), {}, []

    def batch(rows: int) -> dict[str, np.ndarray]:
        return {"tokens": np.full((rows, SEQUENCE), 1), "targets": np.full((rows, SEQUENCE), 2)}

    state, _ = trainer.step(state, batch(4))
    try:
        trainer.step(state, batch(6 + 2 * index))
    except ValueError as error:
        errors.append(str(error))
    lower = begin.compiled

    def slow(traced):
        time.sleep(2.0 * index)
        lower(traced)
        times["compiled"] = time.time()

    begin.compiled = slow
    begun = begin.begin

    def noted(*arguments):
        begun(*arguments)
        times["ran"] = time.time()

    begin.begin = noted
    state, metrics = trainer.step(state, batch(2))
    begin.compiled, begin.begin = lower, begun
    return {"errors": errors, "step": int(state.step), **times}


def say(word: str, value) -> None:
    print(word, json.dumps(value), flush=True)


def main() -> None:
    folder, what, *layouts = Path(sys.argv[1]), *sys.argv[2:]
    jax.config.update("jax_enable_x64", True)
    sl.initialize()
    sl.initialize()  # again does nothing
    index = jax.process_index()
    if what == "elastic":
        struck = folder / "struck"

        def strike(step: int) -> None:
            if step == 3 and index == 1 and not struck.exists():
                struck.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        fit(trainer_of(layouts[0]), folder, strike)
        return
    trainers = [trainer_of(layout) for layout in layouts]
    for number, (layout, trainer) in enumerate(zip(layouts, trainers, strict=True)):
        say("RESULT", {"layout": layout, "process": index, **train(trainer, folder / str(number))})
    say("HUB", exchange_with_hugging_face(trainers[0], folder))
    try:
        trainer_of(layouts[0], seed=index).init()
    except ValueError as error:
        say("DIFFERENT", str(error))

    say("SHAPES", other_shapes(trainers[0], index))

    def end(step: int) -> None:
        if step == 1 and index == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    fit(trainers[0], folder / "preempted", end, steps=10_000)
    say("NOT PREEMPTED", index)


if __name__ == "__main__":
    main()
