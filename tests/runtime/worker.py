"""A script for tests: as one of several processes, or alone, trains a tiny model on several layouts and says what it saw.

worker.py FOLDER LAYOUT...
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

import shardlm as sl

ROWS, SEQUENCE, STEPS = 8, 12, 4
CONFIG = sl.TransformerConfig(
    vocab_size=67, num_layers=4, d_model=16, num_heads=8, num_kv_heads=8, d_ff=24, vocab_multiple=8, dtype="float64",
    param_dtype="float64",
)  # fmt: skip


def batch(step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
    random = np.random.default_rng(step)
    whole = {name: random.integers(0, CONFIG.vocab_size, (ROWS, SEQUENCE)) for name in ("tokens", "targets")}
    return {name: value[rows] for name, value in (whole | {"weights": random.random((ROWS, SEQUENCE))}).items()}


def trainer_of(layout: str, steps: int = STEPS, **options) -> sl.Trainer:
    return sl.Trainer(CONFIG, sl.Layout.parse(layout), sl.adamw(1e-2, steps=steps, warmup=1), **options)


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def train(layout: str, folder: Path, **options) -> dict:
    """Fit, with a checkpoint after each second step; then evaluate, and sum up the parameters that were saved."""
    trainer = trainer_of(layout, **options)
    rows = trainer.local_rows(ROWS)
    batches = [batch(step, rows) for step in range(STEPS)]
    state = trainer.fit(batches, STEPS, checkpoint_dir=folder, checkpoint_every=2, log_every=1)
    evaluation = trainer.evaluate(state, [batch(100, rows), batch(101, rows)])
    total = jax.jit(lambda params: sum(abs(x).sum() for x in jax.tree.leaves(params)))
    sums = [float(total(s.params)) for s in (state, sl.restore(folder / str(STEPS), trainer))]
    return {"rows": [rows.start, rows.stop], "held_out": evaluation["loss"], "sums": sums}


def main() -> None:
    folder, layouts = Path(sys.argv[1]), sys.argv[2:]
    jax.config.update("jax_enable_x64", True)
    sl.initialize()
    for number, layout in enumerate(layouts):
        result = train(layout, folder / str(number))
        print("RESULT", json.dumps({"layout": layout, "process": jax.process_index(), **result}), flush=True)


if __name__ == "__main__":
    main()
