"""What the fault campaign runs and disturbs: a tiny model, trained by `fit`, whose every loss is recorded.

`python -m shardlm.bench.faulty FOLDER`, one process or one of several.
"""

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import shardlm as sl
from shardlm._command_line import Parser
from shardlm.data import Batches
from shardlm.data.packing import Packed

STEPS, EVERY, ROWS, SEQUENCE = 12, 3, 8, 8
LAYOUT = "data=-1,fsdp=2"
CONFIG = sl.TransformerConfig(
    vocab_size=32, num_layers=2, d_model=8, num_heads=2, d_ff=16, dtype="float64", param_dtype="float64"
)


class Paced:
    """Batches, each after a pause, so that there are moments to disturb."""

    def __init__(self, batches: Batches, pause: float):
        self._batches, self._pause = batches, pause

    def iterate(self, start: int) -> Iterator[Any]:
        """From step `start` on."""
        for step in itertools.count(start):
            time.sleep(self._pause)
            yield self._batches[step]


def make_trainer(layout: str = LAYOUT, devices: Sequence[Any] | None = None) -> sl.Trainer:
    """The trainer, on all devices if none are given."""
    return sl.Trainer(CONFIG, sl.Layout.parse(layout), sl.adamw(1e-2, steps=STEPS, warmup=1), devices=devices)


def train(trainer: sl.Trainer, folder: Path, pause: float = 0.0, verbose: bool = True) -> None:
    """Train to the last step, from the newest checkpoint in `folder` if there is one."""
    tokens = np.random.default_rng(0).integers(1, CONFIG.vocab_size, 2000)
    packed = Packed([tokens], SEQUENCE, vocab_size=CONFIG.vocab_size, end=0)
    batches = Batches(packed, ROWS, rows=trainer.local_rows(ROWS))
    trainer.fit(
        Paced(batches, pause), STEPS, checkpoint_dir=folder, checkpoint_every=EVERY, keep=None, log_every=1,
        verbose=verbose,
    )  # fmt: skip


def main() -> int:
    """As a process of a run."""
    parser = Parser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pause", type=float, default=0.1, help="seconds before each batch")
    parser.add_argument("--layout", default=LAYOUT)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    sl.initialize()
    train(make_trainer(options.layout), options.folder, options.pause)
    return 0


if __name__ == "__main__":
    sys.exit(main())
