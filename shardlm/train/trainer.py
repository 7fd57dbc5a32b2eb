"""The Trainer: a model, a layout and an optimizer, compiled once, and the calls a user makes of them."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import jax
import optax
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from shardlm._arguments import check_usable, seed_of
from shardlm.inspect import Hardware, Report
from shardlm.inspect.program import bytes_per_device
from shardlm.layout import Layout
from shardlm.models.config import TransformerConfig
from shardlm.models.kinds import require_config
from shardlm.train import batch as batches_
from shardlm.train import room, together
from shardlm.train import state as states
from shardlm.train.engine import Parameters
from shardlm.train.evaluation import evaluate
from shardlm.train.explain import explain
from shardlm.train.facts import Facts
from shardlm.train.fit import FitOptions, fit
from shardlm.train.frozen import trained
from shardlm.train.kinds import require_optimizer
from shardlm.train.module import LossFunction, ModuleProgram
from shardlm.train.program import Program, require_devices, resolve
from shardlm.train.state import TrainState
from shardlm.train.step import Metrics, make_gradients, make_step
from shardlm.train.transformer import TransformerProgram
from shardlm.train.update import chosen

Batch = Any
"""Of a `sl.Transformer`: arrays [batch, sequence] by name, see `Trainer.step`; `sl.data.batch(tokens)` makes one.
Of another module: any pytree of arrays [batch, ...]."""


class Trainer(Facts):
    """Trains one model on one layout. Nothing is allocated, and nothing compiled, before the first call that needs it.

    Args:
        config: the model.
        layout: how many devices serve each kind of parallelism, a `Layout` or its text; default one device.
        optimizer: any Optax transformation. Default: `sl.adamw(3e-4, steps=1000)`.
        seed: of initial parameters and dropout.
        devices: default all of `jax.devices()`, or the first one for the default layout. A number means that many
            devices that need not exist: nothing can run on them, but `describe` and `explain` say what would.
        engine: `"manual"` (our collectives) or `"auto"` (the compiler's), which computes the same by other means.

    Attributes:
        config: as given; where `layout.tensor` does not divide the padded vocabulary, padded further.
        layout: with its sizes filled in.
        mesh: the devices; an `AbstractMesh` where they need not exist.
        program: what the trainer asks of the model.
        plan: how every parameter is split; `plan.table` prints the rules.
        abstract_state: the state as `jax.ShapeDtypeStruct`s with shardings.
        state: what a `fit` that an error or Ctrl-C ended has left, to go on with; None otherwise.

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
        layout: Layout | str | None = None,
        optimizer: optax.GradientTransformation | None = None,
        *,
        seed: int = 0,
        devices: Sequence[Any] | int | None = None,
        engine: str = "manual",
    ):
        require_config(config)
        chosen, devices = resolve(layout, devices)
        self._hold(TransformerProgram.of(config, chosen, devices, engine), optimizer, seed)

    @classmethod
    def from_module(
        cls,
        make_module: Callable[[nnx.Rngs], nnx.Module],
        loss_fn: LossFunction,
        layout: Layout | str | None = None,
        optimizer: optax.GradientTransformation | None = None,
        *,
        rules: Sequence[tuple[str, PartitionSpec]] | None = None,
        wrt: Any = nnx.Param,
        seed: int = 0,
        devices: Sequence[Any] | int | None = None,
    ) -> Self:
        """A trainer of any Flax NNX module with any loss, partitioned by the compiler.

        A parameter is split as the first rule found in its path says, else as its annotation (`out_sharding`, naming
        mesh axes) says; ZeRO then takes the largest dim without an axis that divides by `fsdp`. Random streams
        (`nnx.Dropout`) start anew from (seed, step, microbatch) in each step; every array that is no parameter
        (`nnx.BatchStat`) is carried in `state.variables`. Steps run under `module.train()`, evaluations under `eval()`.

        Args:
            make_module: from `nnx.Rngs`, the module. It is traced: it computes nothing until `init`.
            loss_fn: from (module, batch), the pair (sum of losses, sum of weights) of the rows it is given; the weights
                do not depend on the parameters. The loss is sum / weight over all rows and microbatches.
            layout: data, fsdp, tensor, zero and accumulate; default one device.
            optimizer: any Optax transformation. Default: `sl.adamw(3e-4, steps=1000)`.
            rules: (regular expression, spec) pairs, see `sl.match_rules`. None: annotations and ZeRO alone.
            wrt: what is trained, a filter of Flax as nnx.LoRAParam; every other `nnx.Param` is frozen: split and saved.
            seed, devices: as for a `Trainer`; the seed is of random streams too.

        Raises:
            LayoutError: layout, rules, annotations and module contradict one another; every conflict is listed.
            TypeError, ValueError: what was given makes no module, or one that cannot be carried from step to step.

        Example:
            >>> def loss_fn(module, batch):
            ...     losses = optax.softmax_cross_entropy_with_integer_labels(module(batch["x"]), batch["y"])
            ...     return losses.sum(), losses.size
            >>> rules = [(r"hidden/kernel", P(None, "tensor")), (r".*", P())]
            >>> trainer = sl.Trainer.from_module(MLP, loss_fn, sl.Layout(fsdp=4, tensor=2), rules=rules)
        """
        chosen, devices = resolve(layout, devices)
        trainer = cls.__new__(cls)
        trainer._hold(ModuleProgram.of(make_module, loss_fn, chosen, devices, rules, wrt), optimizer, seed)
        return trainer

    def on_one_device(self) -> Self:
        """The same model, optimizer and seed on the first device alone, as plain JAX: what `sl.verify` compares to."""
        trainer = type(self).__new__(type(self))
        trainer._hold(self.program.on_one_device(self.first_device), self.optimizer, self.seed)
        return trainer

    def _hold(self, program: Program, optimizer: optax.GradientTransformation | None, seed: int) -> None:
        plan: Any = program.plan  # of our own kind, or of a module's
        self.program, self.plan, self.layout, self.mesh = program, plan, plan.layout, plan.mesh
        self.engine, self.seed = program.engine, seed_of(seed)
        self.optimizer = chosen(program, require_optimizer(optimizer))
        self.abstract_state = states.abstract(program, self.optimizer)
        self.state: TrainState | None = None

    def describe(self, *, parameters: bool = False) -> str:
        """What the layout does to this model, and what its state takes on a device; nothing is allocated for it.

        Parameters that ZeRO leaves whole, because none of their dims divides, are named with their size.

        Args:
            parameters: add a line for each: path, shape, the spec in which it is stored, bytes per device, and its dims
                or what decided its spec.
        """
        held = {name: bytes_per_device(getattr(self.abstract_state, name)) for name in ("params", "opt_state")}
        return self.program.describe(held, parameters=parameters)

    def explain(
        self,
        batch_size: int | None = None,
        sequence: int | None = None,
        *,
        batch: Batch | None = None,
        hardware: Hardware | str | None = None,
        compile: bool = False,
    ) -> Report:
        """What a step costs: what each device keeps, sends and computes. Nothing is run, and nothing allocated.

        Args:
            batch_size, sequence: of the global batch.
            batch: an example of it instead of the two numbers, arrays or `jax.ShapeDtypeStruct`s.
            hardware: judge it by this: a name ("h100", "v5p", ...) or an `inspect.Hardware`. Without it there is no
                time, and no answer to whether it fits.
            compile: compile the step too, for what the compiler adds and its own view of the memory; of `from_module`
                there is no other. The devices must exist; fake ones are enough.

        Raises:
            LayoutError: the batch does not fit the layout.
            ValueError: unknown hardware.

        Example:
            >>> trainer = sl.Trainer(sl.presets.llama3_70b(), sl.Layout(fsdp=64, tensor=8), devices=512)
            >>> trainer.explain(batch_size=512, sequence=8192, hardware="h100").fits
            False
        """
        return explain(self, batch_size, sequence, batch, hardware, compile)

    def init(self, params: Parameters | None = None) -> TrainState:
        """The initial state, each device making its part and no more; ValueError where the memory is not enough.

        The values depend on the seed alone, not on the layout, and the parameters are those of
        `Transformer(config, rngs=nnx.Rngs(seed))`.

        Args:
            params: start from copies of these, layers as stored here or in order; they may lack adapters.
        """
        room.check_state(self)
        return self._run(self._init, {} if params is None else states.place(self.program, self.abstract_state, params))

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update. The state is donated: its arrays are gone afterwards, use those that are returned.

        Args:
            state: of `init`, `step` or `sl.restore`.
            batch: the global batch, all microbatches together: arrays of the host, or of `place`, by name, each [batch,
                sequence]. `tokens` are the ids that the model reads. `targets` are the ids that it is to say, those of
                `tokens` moved on by one: `targets[:, i]` is what follows `tokens[:, i]`. `sl.data.batch(tokens)` makes
                both. Optional are `weights`, of each target in the loss (default
                1, 0 for padding); `segments`, the document of each place, beyond which no place attends; `positions`.
                Of a trainer made by `from_module`, what its loss function reads.

        Returns:
            The new state, and scalars still on their way: `loss`, the mean over weights before the update; `tokens`
            (`weight` where made by `from_module`), the sum of weights; `grad_norm`, before any clipping.

        Raises:
            ValueError: something is wrong with the batch; or the state was used up by another step.
        """
        states.check_usable(state, self.abstract_state)
        return self._run(self._step, state, self.place(batch))

    def loss_and_grads(self, state: TrainState, batch: Batch) -> tuple[Array, Parameters]:
        """The mean loss and its gradients with respect to `state.params`, under the step's dropout masks; no update.

        Returns:
            A scalar, and a nested dict of global arrays like `in_order(state).params`, layers in the model's order,
            split as the optimizer state is (over fsdp at every ZeRO level).
        """
        states.check_usable(state, self.abstract_state)
        return self._run(self._loss_and_grads, state, self.place(batch))

    def evaluate(self, state: TrainState, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean loss over all tokens of `batches`, without dropout; weights count as in training.

        Returns:
            `loss`, `perplexity` and `tokens`, the sum of weights; of a trainer made by `from_module`, `loss` and
            `weight`.

        Raises:
            ValueError: there is no batch, or no weight in any of them.
        """
        return evaluate(self, state, batches)

    def place(self, batch: Batch, *, may_be_empty: bool = False) -> Any:
        """Check a batch and put it on the devices, split as the layout says; what `place` returned is not moved again.

        Arrays from the host are checked value by value. Values of placed arrays are not: an id outside the vocabulary
        would make the loss NaN.

        Args:
            batch: see `step`. In a run of several processes, each gives the rows that `local_rows` names.
            may_be_empty: allow a batch whose weights are all zero.
        """
        require_devices(self.mesh)
        return self.program.place(batch, may_be_empty=may_be_empty)

    def abstract_batch(self, batch: Batch) -> Any:
        """What `place` would make of a batch: `jax.ShapeDtypeStruct`s with shardings; nothing is moved or allocated.

        Args:
            batch: arrays, or `jax.ShapeDtypeStruct`s of the global batch; checked for structure as `place` does.
        """
        return self.program.abstract_batch(batch)

    def in_order(self, tree: Any) -> Any:
        """Parameters, gradients or a state with their layers as [num_layers, ...] in the model's order, on every stage.

        A pipeline splits layers over its stages, and with chunks or uneven stages it stores them otherwise
        (`parallel.pipeline.stages`). Each array is gathered over `pipe`; without a pipeline the tree comes back as is.
        """
        check_usable(tree, "in_order")
        return self.program.in_order(tree)

    def local_rows(self, batch_size: int) -> slice:
        """The rows of a global batch that this process reads; all of them where there is one process."""
        self.program.check_rows(batch_size)
        return batches_.local_rows(self.batch_sharding, batch_size)

    def padded_rows(self, path: str, shape: tuple[int, ...]) -> int | None:
        """How many rows of the parameter, or its optimizer moment, at `path` are real; None where none is padding.

        Checkpoints restore by it between layouts that pad the vocabulary differently.
        """
        return self.program.padded_rows(path, shape)

    def fit(
        self,
        batches: Any,
        steps: int,
        *,
        state: TrainState | None = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int = 100,
        keep: int | None = 3,
        keep_every: int | None = None,
        keep_best: int | None = None,
        log_every: int = 10,
        held_out: Iterable[Batch] | None = None,
        evaluate_every: int | None = None,
        log_dir: str | Path | None = None,
        tensorboard: bool = False,
        tokenizer: Any = None,
        verbose: bool = True,
        accept_changes: bool = False,
    ) -> TrainState:
        """Train until `steps` updates have been made in all, those before a resumption included.

        Args:
            batches: batch i is for update i: an object indexed by step (a list, a Grain dataset), or an iterable, of
                which a resumed run drops what it has used. `shardlm.data.Batches` goes on with the very next row, in
                batches of any size. `step` says what a batch is.
            steps: number of the last update.
            state: where to start, which is used up; default `init()`, or the newest checkpoint in `checkpoint_dir`,
                whatever its layout.
            checkpoint_dir: where checkpoints are saved and found; None saves nothing.
            checkpoint_every: updates between checkpoints; the last update is always saved.
            keep, keep_every, keep_best: which stay: the newest, so many (None: all); of steps this divides; the best.
            log_every: updates between log lines; every update is checked for NaN and infinity, logged or not.
            held_out: batches to evaluate on at the end, and every `evaluate_every` updates: a list, or what else can be
                read again and has an end.
            log_dir: where metrics.jsonl goes; default `checkpoint_dir`, and nowhere without either.
            tensorboard: write TensorBoard events there too (needs the extra tensorboard).
            tokenizer: what made the tokens, to be kept in every checkpoint; default that of `batches`, where they
                are of `sl.data`. `sl.load_tokenizer(checkpoint)` reads it.
            verbose: False prints and writes nothing.
            accept_changes: go on from a checkpoint although the batches are others (data, order, sequence; with an
                iterable of one's own, the number of rows). Every other difference is said, and needs no word.

        Returns:
            The state after the last update.

        Raises:
            NonFiniteLoss: a loss, a gradient or a new parameter was NaN or infinite; nothing of it is saved.
            SaveError: nothing can be saved there, or not the last state; any other save that fails is a warning.
            ValueError: the checkpoint is of another model, or of other batches; the batches end early; an option is out
                of range.

        Ctrl-C and errors are raised again once the last update is saved; saved or not, its state is in `trainer.state`.
        SIGTERM saves it too, and ends with status 0.
        """
        options = FitOptions(
            checkpoint_dir, checkpoint_every, keep, keep_every, keep_best, log_every, held_out, evaluate_every, log_dir,
            tensorboard, tokenizer, verbose, accept_changes,
        )  # fmt: skip
        return fit(self, batches, steps, state, options)

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return together.run(self, function, *arguments)

    @cached_property
    def step_function(self) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
        """What `step` compiles: (state, placed batch) -> (state, metrics)."""
        return make_step(self.program, self.optimizer, self.seed)

    @cached_property
    def gradient_function(self) -> Callable[[TrainState, Any], tuple[Array, Parameters]]:
        """What `loss_and_grads` compiles: (state, placed batch) -> (mean loss, gradients)."""
        return make_gradients(self.program, self.seed)

    @cached_property
    def _init(self):
        function = partial(states.init, self.program, self.optimizer, self.seed)
        return jax.jit(function, donate_argnums=0, out_shardings=self._shardings)

    @cached_property
    def _step(self):
        return jax.jit(self.step_function, donate_argnums=0, out_shardings=(self._shardings, None))

    @cached_property
    def _loss_and_grads(self):
        shardings = trained(self.plan.shardings("ordered"), self.plan.splits)
        return jax.jit(self.gradient_function, out_shardings=(None, shardings))

    @cached_property
    def _evaluate(self):
        return jax.jit(self.program.evaluate)

    @property
    def _shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
