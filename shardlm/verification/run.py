"""`verify`: run a layout and one device side by side, compare everything, and explain the first difference."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from shardlm._arguments import seed_of
from shardlm._dtypes import full_name
from shardlm.checkpoint.keys import as_numbers
from shardlm.layout import Layout
from shardlm.models.config import TransformerConfig
from shardlm.models.kinds import require_config
from shardlm.train.state import TrainState
from shardlm.train.trainer import Trainer
from shardlm.verification import explain, inputs, needs
from shardlm.verification.compare import Difference, compare, leaves
from shardlm.verification.result import Verification, VerificationError
from shardlm.verification.tolerance import Arithmetic

DTYPES = ("float32", "float64")


def verify(
    subject: TransformerConfig | Trainer,
    layout: Layout | str | None = None,
    batch: Mapping[str, Any] | None = None,
    steps: int = 3,
    *,
    optimizer: optax.GradientTransformation | None = None,
    dtype: str | None = None,
    seed: int = 0,
    devices: Sequence[Any] | None = None,
    engine: str = "manual",
    tolerance: float | None = None,
) -> Verification:
    """Hold a layout to the numbers of one device: loss, gradients, and parameters and optimizer state after updates.

    The reference is the same model as plain JAX on one device, without any collective. Both start from the same
    parameters, moved away from their initial ones and zeros, and see the same batch. Every copy on every device is
    compared. The whole model must fit on one device, so take few layers of a large one.

    Args:
        subject: a model's configuration; or a trainer, whose own program is then verified.
        layout: what is verified; not given with a trainer.
        batch: see `Trainer.step`; None is a random one, packed and unevenly weighted, in the smallest shape that the
            layout takes.
        steps: updates to make, on the same batch.
        optimizer: default AdamW (rate 1e-2, epsilon 1e-4) after clipping; not given with a trainer.
        dtype: "float32" or "float64" ("f32", "f64"), in which model and parameters are put for this, whatever the
            configuration says; default float32, and a trainer's own. float64 needs no global setting.
        seed: of parameters, batch and dropout.
        devices: default the first of `jax.devices()`, as many as the layout has.
        engine: "manual" or "auto", of the layout's side.
        tolerance: the largest difference allowed, relative to a leaf's largest element; default from the arithmetic
            (`shardlm/verification/tolerance.py`).

    Returns:
        A `Verification`, which prints as a table.

    Raises:
        VerificationError: something differs. The message names the worst leaf, the layer or leaf at which the programs
            part, what the difference looks like (a missing sum over an axis, heads in another order, ...), and the file
            to read.
        ValueError: an argument, the layout or the batch is wrong, or the two sides do not fit in memory.

    Example:
        >>> print(sl.verify(sl.presets.tiny(num_layers=2), sl.Layout(data=2, fsdp=2, tensor=2), dtype="float64"))
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"verify: steps={steps!r}; it is a positive integer")
    seed = seed_of(seed, "verify: seed")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"verify: tolerance={tolerance!r}; it is positive, or None for the default")
    if jax.process_count() > 1:
        raise ValueError(f"verify runs in one process, and there are {jax.process_count()}: use fake devices in one")
    if isinstance(subject, Trainer):
        given = {"layout": layout, "optimizer": optimizer, "dtype": dtype, "devices": devices}
        names = [name for name, value in given.items() if value is not None]
        if names:
            raise ValueError(f"verify: the trainer has its own {' and '.join(names)}: leave out {', '.join(names)}=")
        return _verify(subject, batch, steps, seed, tolerance, ())
    try:
        require_config(subject)
    except TypeError as error:
        name = type(subject).__name__
        raise TypeError(f"verify takes a TransformerConfig or a Trainer, not a {name}: {error}") from error
    if layout is None:
        raise ValueError("verify: with a configuration goes a layout to verify, as in sl.Layout(data=2, tensor=2)")
    layout = Layout.of(layout)
    dtype = "float32" if dtype is None else full_name(dtype)
    if dtype not in DTYPES:
        raise ValueError(f"verify: dtype={dtype!r}; it is one of {', '.join(map(repr, DTYPES))}")
    with _precision(dtype):
        config, notes = _in(subject, dtype)
        if optimizer is None:
            # Updates of full size, but not where a gradient is rounding noise, as with Adam's usual epsilon of 1e-8.
            optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, eps=1e-4, weight_decay=0.1))
        trainer = Trainer(config, layout, optimizer, seed=seed, devices=_devices(layout, devices), engine=engine)
        return _verify(trainer, batch, steps, seed, tolerance, notes)


@contextlib.contextmanager
def _precision(dtype: str) -> Iterator[None]:
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        yield


def _in(config: TransformerConfig, dtype: str) -> tuple[TransformerConfig, tuple[str, ...]]:
    notes = []
    if (config.dtype, config.param_dtype) != (dtype, dtype):
        notes.append(
            f"the configuration computes in {config.dtype} and stores {config.param_dtype}; compared in {dtype}"
        )
    attention = config.attention
    if attention.implementation == "cudnn":
        notes.append(f"attention by cudnn was replaced by plain XLA, which takes {dtype}")
        attention = dataclasses.replace(attention, implementation="xla")
    return dataclasses.replace(config, dtype=dtype, param_dtype=dtype, attention=attention), tuple(notes)


def _devices(layout: Layout, devices: Sequence[Any] | None) -> Sequence[Any] | None:
    if devices is not None or -1 in layout.sizes.values():
        return devices
    available = jax.devices()
    return available[: layout.num_devices] if layout.num_devices < len(available) else available


def _verify(
    trainer: Trainer, batch: Any, steps: int, seed: int, tolerance: float | None, notes: tuple[str, ...]
) -> Verification:
    config = getattr(trainer, "config", None)
    if batch is None:
        if not isinstance(config, TransformerConfig):
            raise ValueError("verify: a module that is not ours needs batch=, as what it reads is not known")
        batch = inputs.random_batch(config, trainer.layout, seed)
    trainer.place(batch)  # raises what is wrong with it, or with the devices
    needs.check(trainer, trainer.on_one_device())
    batch = jax.tree.map(np.asarray, batch)
    side = _Sides(trainer, batch, seed, tolerance)
    differences: list[Difference] = []

    def result(done: int) -> Verification:
        dtype = config.dtype if isinstance(config, TransformerConfig) else "its own dtype"
        return Verification(
            str(trainer.layout), trainer.engine, trainer.mesh.size, dtype, done, tuple(differences), notes
        )

    expected, found, near = side.gradients()
    for name in ("loss", "gradients"):
        differences += side.compare(name, expected[name], found[name], near[name], 0)
    if any(d.fails for d in differences):
        place, diagnosis = explain.gradients(side.forwards(), expected, found, differences)
        raise VerificationError(result(0), place, diagnosis)
    for update in range(1, steps + 1):
        before = side.state
        expected, found, near = side.update()
        if update > 1:
            differences += side.compare("loss", expected["loss"], found["loss"], near["loss"], update - 1)
        state: list[Difference] = []
        for name, part in (("parameters", "params"), ("optimizer state", "opt_state")):
            wanted, got, moved = (getattr(x["state"], part) for x in (expected, found, near))
            state += side.compare(name, wanted, got, moved, update)
        last = [d for d in differences if d.quantity in ("loss", "gradients")]
        differences = last + state
        if any(d.fails for d in differences):
            place, diagnosis = explain.update(trainer, before, expected["state"], found["state"], differences, update)
            raise VerificationError(result(update), place, diagnosis)
    return result(steps)


class _Sides:
    """The layout, the reference, and the reference from parameters moved by rounding."""

    def __init__(self, trainer: Trainer, batch: Any, seed: int, tolerance: float | None):
        self.trainer, self.reference, self.batch, self._tolerance = trainer, trainer.on_one_device(), batch, tolerance
        params = inputs.perturbed(trainer, self.reference.init().params, seed)
        config = getattr(trainer, "config", None)
        config = config if isinstance(config, TransformerConfig) else None
        dtype = config.dtype if config is not None else str(jax.tree.leaves(params)[0].dtype)
        tokens = int(np.prod(jax.tree.leaves(batch)[0].shape))
        self.arithmetic = Arithmetic(config, params, tokens, dtype)
        self.start = self.state = inputs.start(self.reference, params)
        moved = inputs.rounded(params, self.arithmetic.rounding(), seed)
        # Expected, found, near.
        self._trainers = (self.reference, trainer, self.reference)
        near = inputs.start(self.reference, moved)
        self._states = [inputs.put(t, s) for t, s in zip(self._trainers, (self.start, self.start, near), strict=True)]

    def compare(self, quantity: str, expected: Any, found: Any, near: Any, update: int) -> list[Difference]:
        """The differences of two trees."""
        mesh, names = self.trainer.mesh, frozenset(leaves(self.start.params))
        return list(compare(quantity, expected, found, near, mesh, self.arithmetic, self._tolerance, names, update))

    def gradients(self) -> list[dict[str, Any]]:
        """Loss and gradients before any update: expected, found, near; on the host but for those found."""
        results = []
        for trainer, state in zip(self._trainers, self._states, strict=True):
            loss, grads = trainer.loss_and_grads(state, self.batch)
            results.append({"loss": loss, "gradients": grads})
        return self._to_host(results)

    def update(self) -> list[dict[str, Any]]:
        """One more update: the loss before it and the state after it: expected, found, near."""
        results = []
        for i, trainer in enumerate(self._trainers):
            self._states[i], metrics = trainer.step(self._states[i], self.batch)
            results.append({"loss": metrics["loss"], "state": self._states[i]})
        results = self._to_host(results)
        self.state: TrainState = results[0]["state"]
        return results

    def forwards(self) -> explain.Context:
        """What an explanation of wrong gradients works with."""
        return explain.Context(self.trainer, self.reference, self.start, self.batch, self.arithmetic)

    def _to_host(self, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        results = jax.tree.map(as_numbers, results)  # of random keys
        return [self.trainer.in_order(r) if i == 1 else jax.tree.map(np.array, r) for i, r in enumerate(results)]
