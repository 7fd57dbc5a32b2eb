"""The Trainer: a model, a layout and an optimizer, compiled once, and the calls a user makes of them."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding

from shardlm.inspect import Hardware, Report
from shardlm.layout import Layout
from shardlm.models.config import TransformerConfig
from shardlm.models.transformer import count_parameters
from shardlm.train import batch as batches_
from shardlm.train import engine as engines
from shardlm.train import state as states
from shardlm.train.engine import Parameters, Plan
from shardlm.train.explain import explain
from shardlm.train.fit import FitOptions, fit
from shardlm.train.optimizer import adamw
from shardlm.train.state import TrainState
from shardlm.train.step import Metrics, dropout_key, make_step

Batch = Mapping[str, Any]
"""Arrays [batch, sequence] by name: tokens, targets; optionally weights, segments, positions."""


class Trainer:
    """Trains one model on one layout. Nothing is allocated, and nothing compiled, before the first call that needs it.

    Args:
        config: the model.
        layout: how many devices serve each kind of parallelism; default one device.
        optimizer: any Optax transformation. Default: `sl.adamw(3e-4, steps=1000)`.
        seed: of initial parameters and dropout.
        devices: default all of `jax.devices()`, or the first one for the default layout. A number means that many
            devices that need not exist: nothing can run on them, but `describe` and `explain` say what would.
        engine: `"manual"` (our collectives) or `"auto"` (the compiler's), which computes the same by other means.

    Attributes:
        config: as given; where `layout.tensor` does not divide the padded vocabulary, padded further.
        layout: with its sizes filled in.
        mesh: the devices; an `AbstractMesh` where they need not exist.
        plan: how every parameter is split; `plan.table` prints the rules.
        abstract_state: the state as `jax.ShapeDtypeStruct`s with shardings.

    Raises:
        LayoutError: the layout does not fit the devices or the model; every conflict is listed.

    Example:
        >>> trainer = sl.Trainer(sl.presets.tiny(), sl.Layout(data=2, fsdp=2, tensor=2), sl.adamw(1e-3, steps=200))
        >>> state = trainer.init()
        >>> state, metrics = trainer.step(state, batch)
    """

    def __init__(
        self,
        config: TransformerConfig,
        layout: Layout | None = None,
        optimizer: optax.GradientTransformation | None = None,
        *,
        seed: int = 0,
        devices: Sequence[Any] | int | None = None,
        engine: str = "manual",
    ):
        if engine not in engines.ENGINES:
            raise ValueError(f"engine={engine!r}; it is one of {', '.join(map(repr, engines.ENGINES))}")
        if devices is None:
            devices = jax.devices()[:1] if layout is None else jax.devices()
        layout = (layout or Layout()).resolve(devices if isinstance(devices, int) else len(devices))
        layout.check(config)
        if "float64" in (config.dtype, config.param_dtype) and not jax.config.read("jax_enable_x64"):
            raise ValueError(
                f"dtype={config.dtype!r}, param_dtype={config.param_dtype!r}: JAX computes in float64 only after "
                'jax.config.update("jax_enable_x64", True)'
            )
        if config.padded_vocab_size % layout.tensor:
            config = dataclasses.replace(config, vocab_multiple=math.lcm(config.vocab_multiple, layout.tensor))
        self.config, self.layout, self.seed, self.engine = config, layout, seed, engine
        self.optimizer = adamw(3e-4, steps=1000) if optimizer is None else optimizer
        self.mesh = layout.abstract_mesh() if isinstance(devices, int) else layout.mesh(devices)
        self.plan = Plan.of(config, layout, self.mesh)
        self.abstract_state = states.abstract(self.plan, self.optimizer)
        self._checked: set[tuple[int, int]] = set()

    @cached_property
    def num_parameters(self) -> int:
        """Number of the model's parameters, padding of the vocabulary not counted."""
        return count_parameters(self.config)

    @property
    def has_devices(self) -> bool:
        """Whether the mesh has devices to run on."""
        return isinstance(self.mesh, Mesh)

    @cached_property
    def batch_sharding(self) -> NamedSharding:
        """The sharding of a batch array [batch, sequence]."""
        return NamedSharding(self.mesh, self.plan.batch_spec())

    def describe(self, *, parameters: bool = False) -> str:
        """What the layout does to this model, and what its state takes on a device; nothing is allocated for it.

        Parameters that ZeRO leaves whole, because none of their dims divides, are named with their size.

        Args:
            parameters: add a line for each: path, shape, dims, the spec in which it is stored, and bytes per device.
        """
        config, whole = self.config, []
        if self.plan.table.zero_axes:
            whole = [split for split in self.plan.splits.values() if not split.zero_axes]
        lines = [self.layout.describe(config)]
        if whole:
            sizes = [f"{split.path} {split.shape}" for split in whole]
            lines.append(f"not split by ZeRO, as no dim divides by fsdp={self.layout.fsdp}: {', '.join(sizes)}")
        held = {name: _bytes_per_device(getattr(self.abstract_state, name)) for name in ("params", "opt_state")}
        lines.append(
            f"{self.num_parameters:,} parameters ({config.param_dtype}, computing in {config.dtype}); on each device "
            f"{_megabytes(held['params'])} of parameters and {_megabytes(held['opt_state'])} of optimizer state"
        )
        if parameters:
            rows = [("parameter", "shape", "dims", "stored as", "bytes per device")]
            for path, leaf in engines.flatten(self.abstract_state.params).items():
                dims = ", ".join(str(dim) for dim in self.plan.splits[path].dims)
                spec = f"P({', '.join(map(repr, leaf.sharding.spec))})"
                rows.append((path, str(leaf.shape), dims, spec, f"{_bytes_per_device(leaf):,}"))
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines += [
                "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
            ]
        return "\n".join(lines)

    def explain(
        self, batch_size: int, sequence: int, *, hardware: Hardware | str | None = None, compile: bool = False
    ) -> Report:
        """What a step costs: what each device keeps, sends and computes. Nothing is run, and nothing allocated.

        Args:
            batch_size, sequence: of the global batch.
            hardware: judge it by this: a name ("h100", "v5p", ...) or an `inspect.Hardware`. Without it there is no time,
                and no answer to whether it fits.
            compile: compile the step too, to add what the compiler sends on its own and its own view of the memory. The
                devices must exist; fake ones are enough.

        Raises:
            LayoutError: the batch does not fit the layout.
            ValueError: unknown hardware.

        Example:
            >>> report = sl.Trainer(sl.presets.llama3_70b(), sl.Layout(fsdp=64, tensor=8), devices=512).explain(
            ...     batch_size=512, sequence=8192, hardware="h100")
            >>> report.fits
            False
        """
        return explain(self, batch_size, sequence, hardware, compile)

    def init(self) -> TrainState:
        """The initial state, each device making the part that it holds and no more.

        The values depend on the seed alone, not on the layout, and the parameters are those of
        `Transformer(config, rngs=nnx.Rngs(seed))`.
        """
        return self._run(self._init)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update. The state is donated: its arrays are gone afterwards, use those that are returned.

        Args:
            state: of `init`, `step` or `sl.restore`.
            batch: the global batch, all microbatches together: arrays of the host, or of `place`.

        Returns:
            The new state, and scalars still on their way: `loss`, the mean over weights before the update; `tokens`,
            the sum of weights; `grad_norm`, before any clipping.

        Raises:
            ValueError: something is wrong with the batch; or the state was used up by another step.
        """
        states.check_usable(state)
        return self._run(self._step, state, self.place(batch))

    def loss_and_grads(self, state: TrainState, batch: Batch) -> tuple[Array, Parameters]:
        """The mean loss and its gradients with respect to `state.params`, under the step's dropout masks; no update.

        Returns:
            A scalar, and a nested dict like `state.params` of global arrays, split as the optimizer state is (over
            fsdp at every ZeRO level).
        """
        states.check_usable(state)
        return self._run(self._loss_and_grads, state, self.place(batch))

    def evaluate(self, state: TrainState, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean loss over all tokens of `batches`, without dropout; weights count as in training.

        Returns:
            `loss`, `perplexity` and `tokens`, the sum of weights.

        Raises:
            ValueError: there is no batch, or no weight in any of them.
        """
        states.check_usable(state)
        sums = [self._run(self._evaluate, state.params, self.place(batch, may_be_empty=True)) for batch in batches]
        total, weight = (
            (math.fsum(float(x) for x in column) for column in zip(*sums, strict=True)) if sums else (0.0, 0.0)
        )
        if weight == 0:
            raise ValueError(f"nothing to evaluate: {len(sums)} batches with a total weight of 0")
        loss = total / weight
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": weight}

    def place(self, batch: Batch, *, may_be_empty: bool = False) -> dict[str, Array]:
        """Check a batch and put it on the devices, split as the layout says; what `place` returned is not moved again.

        Arrays from the host are checked value by value. Values of placed arrays are not: an id outside the vocabulary
        would make the loss NaN.

        Args:
            batch: see `step`. In a run of several processes, each gives the rows that `local_rows` names.
            may_be_empty: allow a batch whose weights are all zero.
        """
        shape = batches_.check_structure(batch, self.config.max_sequence)
        placed = batches_.is_placed(batch, self.batch_sharding)
        if shape not in self._checked:
            rows = shape[0] if placed else self._global_rows(shape[0])
            self.layout.check(self.config, batch_size=rows, sequence=shape[1])
            self._checked.add(shape)
        if placed:
            return dict(batch)
        host = batches_.to_host(batch)
        batches_.check_values(host, self.config.vocab_size, self.config.max_sequence, may_be_empty=may_be_empty)
        return batches_.place(host, self.batch_sharding)

    def local_rows(self, batch_size: int) -> slice:
        """The rows of a global batch that this process reads; all of them where there is one process."""
        self.layout.check(self.config, batch_size=batch_size)
        return batches_.local_rows(self.batch_sharding, batch_size)

    def padded_rows(self, path: str, shape: tuple[int, ...]) -> int | None:
        """How many rows of the parameter, or its optimizer moment, at `path` are real; None where none is padding.

        Checkpoints restore by it between layouts that pad the vocabulary differently.
        """
        tables = ("embedding/table", "head/table")
        return (
            self.config.vocab_size if path.endswith(tables) and shape[:1] == (self.config.padded_vocab_size,) else None
        )

    def fit(
        self,
        batches: Any,
        steps: int,
        *,
        state: TrainState | None = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int = 100,
        keep: int | None = 3,
        log_every: int = 10,
        held_out: Iterable[Batch] | None = None,
        evaluate_every: int | None = None,
        log_dir: str | Path | None = None,
        tensorboard: bool = False,
        verbose: bool = True,
    ) -> TrainState:
        """Train until `steps` updates have been made in all, those before a resumption included.

        Args:
            batches: batch i is for update i: an object indexed by step (`shardlm.data.Batches`, a list, a Grain
                dataset), or an iterable, of which a resumed run drops what it has used.
            steps: number of the last update.
            state: where to start, which is used up; default `init()`, or the newest checkpoint in `checkpoint_dir`,
                whatever its layout.
            checkpoint_dir: where checkpoints are saved and found; None saves nothing.
            checkpoint_every: updates between checkpoints; the last update is always saved.
            keep: how many checkpoints stay; None keeps all.
            log_every: updates between log lines; every update is checked for NaN and infinity, logged or not.
            held_out: batches to evaluate on at the end, and every `evaluate_every` updates: a list, or what else can be
                read again and has an end.
            log_dir: where metrics.jsonl goes; default `checkpoint_dir`, and nowhere without either.
            tensorboard: write TensorBoard events there too (`pip install 'shardlm[tensorboard]'`).
            verbose: False prints and writes nothing.

        Returns:
            The state after the last update.

        Raises:
            NonFiniteLoss: a loss, a gradient or a new parameter was NaN or infinite; nothing of it is saved.
            ValueError: the checkpoint is of another model; the batches end early; an option is out of range.

        Ctrl-C and any other error, of the source of batches too, are raised again once the last update is saved.
        """
        options = FitOptions(
            checkpoint_dir, checkpoint_every, keep, log_every, held_out, evaluate_every, log_dir, tensorboard, verbose
        )
        return fit(self, batches, steps, state, options)

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a compiled function; on several CPU devices, return when its result is there.

        XLA's CPU backend runs all devices on one small pool of threads, in which each collective blocks a thread until
        its peers arrive. With several programs in flight the peers may find no thread, and all wait for ever.
        """
        if not self.has_devices:
            raise ValueError(
                f"the {self.mesh.size} devices of this Trainer do not exist, as devices={self.mesh.size} says: give it "
                f"devices to run on, or on a CPU call sl.fake_devices({self.mesh.size}) first and leave devices out"
            )
        if type(self.mesh.devices.flat[0].client).__name__ == "CompileOnlyPyClient":
            raise ValueError("these devices can be compiled for (explain(..., compile=True)), but nothing runs there")
        result = function(*arguments)
        if self.mesh.size > 1 and self.mesh.devices.flat[0].platform == "cpu":
            jax.block_until_ready(result)
        return result

    def _global_rows(self, rows: int) -> int:
        if jax.process_count() == 1:
            return rows
        shards = self.layout.batch_shards
        held = batches_.local_rows(self.batch_sharding, shards)
        return rows * shards // (held.stop - held.start)

    @cached_property
    def _init(self):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        return jax.jit(lambda: states.init(self.plan, self.optimizer, self.seed), out_shardings=shardings)

    @cached_property
    def _step(self):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        return jax.jit(self.step_function, donate_argnums=0, out_shardings=(shardings, None))

    @cached_property
    def step_function(self) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, Metrics]]:
        """The step before it is compiled: a function (state, batch) -> (state, metrics)."""
        return make_step(self.plan, self.optimizer, self.seed, self.engine)

    @cached_property
    def _loss_and_grads(self):
        function = engines.loss_and_grads(self.plan, self.engine)

        def mean(state: TrainState, batch: dict[str, Array]) -> tuple[Array, Parameters]:
            total, weight, grads = function(state.params, batch, dropout_key(self.seed, state.step))
            return total / weight, grads

        return jax.jit(mean, out_shardings=(None, self.plan.shardings("sharded")))

    @cached_property
    def _evaluate(self):
        return jax.jit(engines.evaluate(self.plan, self.engine))


def _bytes_per_device(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _megabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
