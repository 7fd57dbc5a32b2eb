"""The training loop: batches in order, metrics out, evaluation, checkpoints, resumption, and the reasons to stop."""

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from shardlm.checkpoint import Checkpoints
from shardlm.models.config import TransformerConfig
from shardlm.train.metrics import model_flops_per_token, peak_flops
from shardlm.train.progress import Progress
from shardlm.train.state import TrainState

if TYPE_CHECKING:
    from shardlm.train.trainer import Trainer

_IN_FLIGHT = 2  # steps dispatched ahead of the one that runs: enough to hide Python, few enough to stop soon


class NonFiniteLoss(ArithmeticError):
    """The loss or the gradient of a step was NaN or infinite; training has stopped before saving anything of it."""


@dataclass
class FitOptions:
    """What `Trainer.fit` was asked for; see there."""

    checkpoint_dir: str | Path | None
    checkpoint_every: int
    keep: int | None
    log_every: int
    held_out: Iterable[Mapping[str, Any]] | None
    evaluate_every: int | None
    log_dir: str | Path | None
    tensorboard: bool
    verbose: bool

    def __post_init__(self):
        problems = [
            f"{name}={value!r}; it is a positive integer"
            for name in ("checkpoint_every", "log_every", "evaluate_every")
            if (value := getattr(self, name)) is not None and (not isinstance(value, int) or value < 1)
        ]
        if self.evaluate_every is not None and self.held_out is None:
            problems.append("evaluate_every needs held_out, the batches to evaluate on")
        if problems:
            raise ValueError("fit: " + "; ".join(problems))


def fit(trainer: "Trainer", batches: Any, steps: int, state: TrainState | None, options: FitOptions) -> TrainState:
    """`Trainer.fit`."""
    if steps < 1:
        raise ValueError(f"fit: steps={steps}; it is the number of updates of the whole run, at least 1")
    directory = options.checkpoint_dir
    checkpoints = Checkpoints(directory, keep=options.keep) if directory is not None else None
    resumed = None
    if checkpoints is not None and (latest := checkpoints.latest()) is not None:
        if state is not None:
            raise ValueError(
                f"fit: a state was given, and {directory} holds step {latest}: give one of them (no state, to resume; or "
                "another checkpoint_dir)"
            )
        resumed = check_resumable(trainer, checkpoints.metadata(latest), f"{directory}, step {latest}")
        state = checkpoints.restore(latest, trainer)
    state = trainer.init() if state is None else state
    start = int(state.step)
    main = jax.process_index() == 0
    with Progress(
        total=steps,
        start=start,
        log_every=options.log_every,
        directory=options.log_dir or directory,
        tensorboard=options.tensorboard,
        enabled=main and options.verbose,
    ) as progress:
        for line in resumed or ():
            progress.message(line)
        if start >= steps:
            progress.message(f"nothing to do: the run is at step {start} of {steps}")
            return state
        loop = _Loop(trainer, progress, checkpoints, options, steps)
        try:
            return loop.run(state, batches, start)
        finally:
            if checkpoints is not None:
                checkpoints.close()


def check_resumable(trainer: "Trainer", metadata: Mapping[str, Any], where: str) -> list[str]:
    """Lines that say what resuming from a checkpoint with `metadata` changes.

    Raises:
        ValueError: the checkpoint is of a model that computes something else, listing each difference.
    """
    saved = TransformerConfig.from_dict(metadata["config"]).to_dict()
    now = trainer.config.to_dict()
    free = {"dtype", "vocab_multiple"}  # how it is computed and padded, not what it is
    different = [f"{key}: {saved[key]!r} there, {now[key]!r} here" for key in now if key not in free and saved[key] != now[key]]
    if different:
        raise ValueError(f"the checkpoint of {where} is of another model: " + "; ".join(different))
    lines = [f"resumed from {where}"]
    changes = [("layout", metadata["layout"], str(trainer.layout)), ("dtype", saved["dtype"], now["dtype"])]
    changes.append(("seed", metadata["seed"], trainer.seed))
    lines += [f"  {what} was {before}, is now {after}" for what, before, after in changes if before != after]
    return lines


class _Loop:
    """One call of `fit`: the state's way from step to step."""

    def __init__(self, trainer: "Trainer", progress: Progress, checkpoints: Checkpoints | None, options: FitOptions, steps: int):
        self.trainer, self.progress, self.checkpoints, self.options, self.steps = trainer, progress, checkpoints, options, steps
        self.pending: deque[tuple[int, dict[str, jax.Array]]] = deque()
        self.tokens, self.since, self.timed = 0.0, time.perf_counter(), 0
        self.saved: int | None = checkpoints.latest() if checkpoints is not None else None

    def run(self, state: TrainState, batches: Any, start: int) -> TrainState:
        options, step = self.options, start
        stream = iterate(batches, start)
        try:
            for step in range(start + 1, self.steps + 1):
                batch = next(stream, None)
                if batch is None:
                    raise ValueError(f"the batches ended after {step - 1} steps of {self.steps}: give more, or fewer steps")
                began = time.perf_counter()
                state, metrics = self.trainer.step(state, batch)
                if step == start + 1:
                    self._first_step(began, metrics, batch)
                self.pending.append((step, metrics))
                if len(self.pending) > _IN_FLIGHT:
                    jax.block_until_ready(self.pending[-1 - _IN_FLIGHT][1]["loss"])
                self.progress.advance(step)
                last = step == self.steps
                if step % options.log_every == 0 or last:
                    self._log(step, batch)
                if options.held_out is not None and (last or (options.evaluate_every and step % options.evaluate_every == 0)):
                    self._evaluate(step, state)
                if self.checkpoints is not None and (step % options.checkpoint_every == 0 or last):
                    self._save(step, state)
        except KeyboardInterrupt:
            done = int(state.step)
            if self.checkpoints is not None and done > (self.saved or 0):
                self._save(done, state)
                self.progress.message(f"interrupted: step {done} is saved in {options.checkpoint_dir}")
            raise
        finally:
            close = getattr(stream, "close", None)
            if close is not None:
                close()
        return state

    def _first_step(self, began: float, metrics: dict[str, jax.Array], batch: Mapping[str, Any]) -> None:
        jax.block_until_ready(metrics)
        self.progress.message(f"first step after {time.perf_counter() - began:.1f} s, compilation included")
        self.since, self.timed = time.perf_counter(), -1  # the first step is not counted among those timed

    def _collect(self) -> dict[str, float]:
        """The last step's metrics as floats, after checking those of every step since the last call."""
        values: dict[str, float] = {}
        while self.pending:
            step, metrics = self.pending.popleft()
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            self.tokens += values["tokens"]
            self.timed += 1
            bad = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
            if bad:
                last = "there is no checkpoint" if self.saved is None else (
                    f"the last good checkpoint is step {self.saved} in {self.options.checkpoint_dir}"
                )
                raise NonFiniteLoss(
                    f"step {step}: {bad[0]} is {values[bad[0]]}; stopped, and {last}. Common causes: a learning rate that is too "
                    "high, token ids outside the vocabulary in batches placed beforehand, float16 without loss scaling"
                )
        return values

    def _log(self, step: int, batch: Mapping[str, Any]) -> None:
        values = self._collect()
        elapsed = time.perf_counter() - self.since
        if self.timed > 0:
            step_time = elapsed / self.timed
            positions = math.prod(batch["tokens"].shape) * (1 if jax.process_count() == 1 else self._processes())
            values |= {"tokens_per_second": positions / step_time, "step_time": step_time}
            device = self.trainer.mesh.devices.flat[0]
            peak = peak_flops(device, self.trainer.config.dtype)
            if peak is not None:
                flops = model_flops_per_token(self.trainer.config, batch["tokens"].shape[1]) * positions
                values["utilisation"] = flops / step_time / (peak * self.trainer.mesh.size)
        self.progress.log(step, values)
        self._restart_clock()

    def _processes(self) -> int:
        held = self.trainer.local_rows(self.trainer.layout.batch_shards * self.trainer.layout.accumulate)
        return self.trainer.layout.batch_shards * self.trainer.layout.accumulate // (held.stop - held.start)

    def _evaluate(self, step: int, state: TrainState) -> None:
        assert self.options.held_out is not None
        result = self.trainer.evaluate(state, self.options.held_out)
        self.progress.log(step, {"held_out_loss": result["loss"], "held_out_perplexity": result["perplexity"]})
        self._restart_clock()

    def _save(self, step: int, state: TrainState) -> None:
        assert self.checkpoints is not None
        self._collect()  # nothing that is not finite is ever saved
        if step == self.saved:
            return
        metadata = {
            "config": self.trainer.config.to_dict(),
            "layout": str(self.trainer.layout),
            "seed": self.trainer.seed,
            "next_batch": step,
            "versions": {name: version(name) for name in ("shardlm", "jax", "flax", "optax", "orbax-checkpoint")},
        }
        self.checkpoints.save(step, state, metadata)
        self.saved = step
        self._restart_clock()

    def _restart_clock(self) -> None:
        self.since, self.timed, self.tokens = time.perf_counter(), 0, 0.0


def iterate(batches: Any, start: int) -> Iterator[Mapping[str, Any]]:
    """The batches from step `start` on, so that a resumed run continues with the very next one.

    Args:
        batches: something with `iterate(start)` (as `shardlm.data.Batches`), something indexed by step, or an iterable,
            whose first `start` items are then taken and dropped.
        start: updates made so far.
    """
    if hasattr(batches, "iterate"):
        return iter(batches.iterate(start))
    if hasattr(batches, "__getitem__"):
        return _indexed(batches, start)
    stream = iter(batches)
    for _ in range(start):
        next(stream, None)
    return stream


def _indexed(batches: Any, start: int) -> Iterator[Mapping[str, Any]]:
    step = start
    while not hasattr(batches, "__len__") or step < len(batches):
        yield batches[step]
        step += 1
