"""The training loop: batches in order, metrics out, evaluation, checkpoints, resumption, and the reasons to stop."""

import math
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from shardlm._arguments import is_used_up
from shardlm.checkpoint import Checkpoints, SaveError
from shardlm.runtime.paths import local_path
from shardlm.runtime.preemption import Preempted, Preemption
from shardlm.runtime.watch import Watch
from shardlm.train import resume, room, saving, together
from shardlm.train import texts as tokenizers
from shardlm.train.evaluation import not_batches
from shardlm.train.interrupt import uninterrupted
from shardlm.train.left import leave
from shardlm.train.metrics import peak_flops
from shardlm.train.progress import Progress
from shardlm.train.run_record import batches_of, describe_run
from shardlm.train.state import TrainState, check_usable
from shardlm.train.used import Used, check_source

if TYPE_CHECKING:
    from shardlm.train.trainer import Trainer

_IN_FLIGHT = 2  # steps dispatched ahead of the one that runs: enough to hide Python, few enough to stop soon
_END: Any = object()


class NonFiniteLoss(ArithmeticError):
    """A step gave NaN or infinity: loss, gradient or new parameters. Training has stopped, and saved none of it."""


@dataclass
class FitOptions:
    """What `Trainer.fit` was asked for; see there."""

    checkpoint_dir: str | Path | None
    checkpoint_every: int
    keep: int | None
    keep_every: int | None
    keep_best: int | None
    log_every: int
    held_out: Iterable[Mapping[str, Any]] | None
    evaluate_every: int | None
    log_dir: str | Path | None
    tensorboard: bool
    tokenizer: Any
    verbose: bool
    accept_changes: bool = False

    def __post_init__(self):
        self.checkpoint_dir, self.log_dir = (
            None if path is None else local_path(path, name)
            for name, path in (("checkpoint_dir", self.checkpoint_dir), ("log_dir", self.log_dir))
        )
        problems = [
            f"{name}={value!r}; it is a positive integer"
            for name in ("checkpoint_every", "log_every", "evaluate_every")
            if (value := getattr(self, name)) is not None and not _positive(value)
        ]
        problems += [
            f"{name}={value!r}; it is True or False"
            for name in ("tensorboard", "verbose", "accept_changes")
            if not isinstance(value := getattr(self, name), bool)
        ]
        for name in ("checkpoint_dir", "log_dir"):
            if (path := getattr(self, name)) is not None and path.exists() and not path.is_dir():
                problems.append(f"{name}={str(path)!r} is no folder")
        held_out = self.held_out
        if self.evaluate_every is not None and held_out is None:
            problems.append("evaluate_every needs held_out, the batches to evaluate on")
        if held_out is not None and (problem := not_batches("held_out", held_out)):
            problems.append(problem)
        elif isinstance(held_out, Iterator) and self.evaluate_every is not None:
            problems.append("held_out can be read once only, and evaluate_every reads it again: give a list")
        elif hasattr(held_out, "__len__") and not len(held_out):  # pyright: ignore[reportArgumentType]
            problems.append("held_out is empty: give at least one batch, or None")
        if self.keep_best is not None and (not self.evaluate_every or self.checkpoint_every % self.evaluate_every):
            problems.append(
                f"keep_best compares the held-out losses of checkpoints: give an evaluate_every that divides "
                f"checkpoint_every={self.checkpoint_every}, not {self.evaluate_every}"
            )
        if problems:
            raise ValueError("fit: " + "; ".join(problems))


def fit(trainer: "Trainer", batches: Any, steps: int, state: TrainState | None, options: FitOptions) -> TrainState:
    """`Trainer.fit`."""
    if not _positive(steps):
        raise ValueError(f"fit: steps={steps!r}; it is the number of updates of the whole run, at least 1")
    if isinstance(batches, Mapping):
        raise ValueError(
            "fit: batches is one batch: give a list of batches, or itertools.repeat(batch) to train on it alone"
        )
    check_source(batches)
    if state is not None:
        check_usable(state, trainer.abstract_state)
    directory = options.checkpoint_dir
    retention = options.keep, options.keep_every, options.keep_best
    checkpoints = None if directory is None else Checkpoints(directory, *retention)
    with checkpoints or nullcontext():
        claimed = checkpoints is None or saving.claim(checkpoints, steps)
        return _fit(trainer, batches, steps, state, options, checkpoints, claimed)


def _fit(
    trainer: "Trainer",
    batches: Any,
    steps: int,
    state: TrainState | None,
    options: FitOptions,
    checkpoints: Checkpoints | None,
    claimed: bool,
) -> TrainState:
    """The run, with its folder claimed; else it has nothing to do but evaluate, and records nothing."""
    directory = options.checkpoint_dir
    latest, resumption, metadata = None if checkpoints is None else checkpoints.latest(), resume.Resumption(), {}
    run = {} if checkpoints is None else describe_run(trainer, batches, steps, options.held_out)
    texts, without = tokenizers.of_run(options.tokenizer, batches)
    asked = {"steps": steps, "newest checkpoint": latest, "checkpoints": directory is not None}
    asked |= {"batches": batches_of(batches), "tokenizer": tokenizers.digest(texts)}
    together.check_run(trainer, asked)
    if checkpoints is not None and latest is not None:
        if state is not None:
            raise ValueError(
                f"fit: a state was given, and {directory} holds step {latest}: give no state, to resume from there, or "
                "another checkpoint_dir"
            )
        room.check_state(trainer, f"the state in {directory}")
        state, metadata, resumption = saving.newest_good(trainer, checkpoints, run, options.accept_changes)
        texts = tokenizers.resumed(checkpoints, int(state.step), texts)
    if state is None:
        if options.verbose and jax.process_index() == 0 and "_init" not in vars(trainer):
            print("compiling the initial parameters ...", flush=True)
        state = trainer.init()
    check_usable(state, trainer.abstract_state)
    start = int(state.step)
    log_dir = options.log_dir or directory
    with together.by_all(
        Progress,
        total=steps,
        start=start,
        log_every=options.log_every,
        directory=log_dir if claimed else None,
        tensorboard=options.tensorboard,
        enabled=jax.process_index() == 0 and options.verbose,
    ) as progress:
        for line in resumption.lines:
            progress.message(line)
        if start >= steps:
            progress.message(f"nothing to do: the run is at step {start} of {steps}")
            if options.held_out is not None:
                progress.message(f"held_out_loss {trainer.evaluate(state, options.held_out)['loss']:.4f}")
            return state
        saver = None
        with Preemption() as preemption, Watch(together.name()) as watch:
            if checkpoints is not None:
                saver = saving.Saver(checkpoints, progress.message, start if metadata else None, texts)
                if without is not None:
                    progress.message(without)
            tokens = metadata.get("tokens", 0.0)
            used = Used(run, resumption, batches, start, progress.message, options.accept_changes)
            loop = _Loop(trainer, progress, saver, options, preemption, watch, steps, state, start, tokens, used)
            return loop.run(batches)


@dataclass
class _Loop:
    """One call of `fit`: the state's way from step to step.

    Attributes:
        done: the last step made.
        tokens: sum of the batches' weights so far, of steps checked.
        loss, held_out: losses of the last step checked, and of the last evaluation with its step.
        pending: metrics of steps that were not checked yet.
        since: when the time of the last `timed` steps began.
    """

    trainer: "Trainer"
    progress: Progress
    saver: saving.Saver | None
    options: FitOptions
    preemption: Preemption
    watch: Watch
    steps: int
    state: TrainState
    done: int
    tokens: float
    used: Used
    loss: float | None = None
    held_out: tuple[int, float] = (0, math.nan)
    pending: deque[tuple[int, dict[str, jax.Array]]] = field(default_factory=deque)
    since: float = 0.0
    timed: int = 0

    def run(self, batches: Any) -> TrainState:
        """Make the steps that are missing."""
        options, start = self.options, self.done
        self.trainer.state, stream = None, None
        try:
            with self.watch.phase("batch", start):
                stream = self.used.stream(batches)
            for step in range(start + 1, self.steps + 1):
                with self.watch.phase("batch", step):
                    batch = next(stream, _END)
                if batch is _END:
                    raise ValueError(
                        f"the batches ended after {step - 1} steps of {self.steps}: give more, or fewer steps"
                    )
                self.used.take(self.trainer, step, batch)
                with uninterrupted(), self.watch.phase("step", step, together.waits_in(self.trainer, batch)):
                    self._step(step, batch, first=step == start + 1)
                    self.progress.advance(step)
                    if self.progress.due(step):
                        self._log(step, batch)
                last = step == self.steps
                if options.held_out is not None and (last or _due(step, options.evaluate_every)):
                    self._evaluate(step)
                if last or _due(step, options.checkpoint_every):
                    self._save(step)
                if self.preemption.reached(step):
                    self._preempted(step)
        except BaseException as error:
            self._rescue(error, start)
            kept, say = (start, self.progress.message) if self.saver is None else (self.saver.saved or start, None)
            leave(self.trainer, self.state, self.done, error, kept, say)
            raise
        finally:
            close = getattr(stream, "close", None)
            if close is not None:
                close()
        return self.state

    def _step(self, step: int, batch: Any, first: bool) -> None:
        began = time.perf_counter()
        if first and "_step" not in vars(self.trainer):  # its compiled functions are made when first used
            self.progress.message("compiling the step ...")
        try:
            self.state, metrics = self.trainer.step(self.state, batch)
            self.done = step
            self.used.made(batch)
        except (TypeError, ValueError) as error:
            error.add_note(f"This is the batch of step {step}.")
            raise
        if first:
            jax.block_until_ready(metrics)
            self.progress.message(f"first step after {time.perf_counter() - began:.1f} s, compilation included")
            self.since, self.timed = time.perf_counter(), -1  # the first step is not counted among those timed
        self.pending.append((step, metrics))
        self._collect(ahead=_IN_FLIGHT)

    def _collect(self, ahead: int = 0) -> dict[str, float]:
        """Check the metrics of all steps but the last `ahead`, once each; returns those of the last one checked."""
        values: dict[str, float] = {}
        while len(self.pending) > ahead:
            step, metrics = self.pending.popleft()
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            self.timed += 1
            self.loss, self.tokens = values["loss"], self.tokens + values[self.trainer.program.weight_name]
            if bad := [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]:
                raise self._stop(step, f"{bad[0]} is {values[bad[0]]}")
        return values

    def _stop(self, step: int, what: str) -> NonFiniteLoss:
        saved = None
        if self.saver is not None:
            with suppress(SaveError):
                self.saver.wait()
            saved = self.saver.saved
        where = f"the last good checkpoint is step {saved} in {self.options.checkpoint_dir}"
        return NonFiniteLoss(
            f"step {step}: {what}; stopped, and {'there is no checkpoint' if saved is None else where}. Common "
            "causes: a learning rate that is too high, token ids outside the vocabulary in batches placed beforehand, "
            "float16 without loss scaling"
        )

    def _log(self, step: int, batch: Any) -> None:
        values = self._collect()
        elapsed = time.perf_counter() - self.since
        if self.timed > 0:
            step_time = elapsed / self.timed
            work, mesh = self.trainer.program.work(batch), self.trainer.mesh
            count = work.count * (1 if jax.process_count() == 1 else self._processes())
            values |= {f"{work.unit}_per_second": count / step_time, "step_time": step_time}
            peak = peak_flops(self.trainer.first_device, work.dtype)
            if peak is not None and work.flops is not None:
                values["utilisation"] = work.flops * count / step_time / (peak * mesh.size)
        self.progress.log(step, values)
        self.since, self.timed = time.perf_counter(), 0

    def _processes(self) -> int:
        held = self.trainer.local_rows(self.trainer.layout.batch_shards * self.trainer.layout.microbatches)
        return self.trainer.layout.batch_shards * self.trainer.layout.microbatches // (held.stop - held.start)

    def _evaluate(self, step: int) -> None:
        assert self.options.held_out is not None
        with self._untimed(), self.watch.phase("evaluation", step):
            result = self.trainer.evaluate(self.state, self.options.held_out)
            self.held_out = step, float(result["loss"])
            shown = {name: value for name, value in result.items() if name != self.trainer.program.weight_name}
            self.progress.log(step, {f"held_out_{name}": value for name, value in shown.items()})

    def _save(self, step: int) -> None:
        """Save the state after `step`, unless that is done or nowhere to be done; what is not finite is never saved."""
        if self.saver is None or self.saver.has(step):
            return
        with self._untimed(), uninterrupted(), self.watch.phase("save", step):
            if wrong := _non_finite(self.trainer, self.state):
                raise self._stop(step, f"{', '.join(wrong[:5])} not finite after the update")
            evaluated, loss = self.held_out
            loss = loss if evaluated == step and math.isfinite(loss) else None
            measured = {"tokens": self.tokens, "loss": self.loss} | ({} if loss is None else {"held_out_loss": loss})
            metadata = resume.metadata(self.trainer, step, self.used.record(step)) | measured
            save = self.saver.finish if step == self.steps else self.saver.save
            save(step, self.state, metadata, loss)

    def _preempted(self, step: int) -> None:
        """End the run after SIGTERM, once the state after `step` is saved; all processes do at the same step."""
        self._collect()
        self._save(step)
        saved, why = False, ""
        if self.saver is not None:
            try:
                self.saver.wait()
            except SaveError as error:
                why = f": {error}"
            saved = self.saver.saved == step
        what = f"step {step} is saved in {self.options.checkpoint_dir}" if saved else f"step {step} is not saved{why}"
        raise Preempted(f"ended by SIGTERM: {what}", 0 if saved else 128 + signal.SIGTERM)

    def _rescue(self, error: BaseException, start: int) -> None:
        """Save the state that an error or Ctrl-C leaves behind, where there is one and it is good."""
        if isinstance(error, Preempted):
            self.progress.message(str(error))
        if self.saver is None or self.done == start or isinstance(error, NonFiniteLoss | SaveError | Preempted):
            return
        # Saving takes all processes, at the same step; and a step that failed half-way has used up its state.
        if jax.process_count() > 1 or is_used_up(self.state):
            return
        with uninterrupted():
            try:
                self._save(self.done)
                self.saver.wait()
                if self.saver.saved != self.done:
                    return  # which the saver has said
            except Exception as second:
                self.progress.message(f"stopped; step {self.done} is not saved: {second}")
            else:
                self.progress.message(f"stopped: step {self.done} is saved in {self.options.checkpoint_dir}")

    @contextmanager
    def _untimed(self) -> Iterator[None]:
        """Leaves the block's time out of the time per step."""
        self._collect()
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _non_finite(trainer: "Trainer", state: TrainState) -> list[str]:
    """Paths of parameters that are not all finite, and of optimizer state with NaN: infinity may be meant there."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    good = jax.device_get(together.run(trainer, _are_good, leaves))
    return [path for path in leaves if not good[path]]


@jax.jit
def _are_good(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {
        path: jnp.isfinite(leaf).all() if path.startswith("params/") else ~jnp.isnan(leaf).any()
        for path, leaf in leaves.items()
    }


def _positive(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0
