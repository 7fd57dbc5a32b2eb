"""From a Trainer to the step that `inspect` reports on."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from shardlm import inspect
from shardlm.inspect import program as programs
from shardlm.inspect import render, report
from shardlm.layout import Layout
from shardlm.train import state as states
from shardlm.train.program import Program
from shardlm.train.step import make_step
from shardlm.train.transformer import TransformerProgram
from shardlm.train.update import Update

if TYPE_CHECKING:
    from shardlm.train.trainer import Trainer


def explain(
    trainer: "Trainer", batch_size: int | None, sequence: int | None, batch: Any, hardware: Any, compile: bool
) -> inspect.Report:
    """See `Trainer.explain`."""
    shown, variant = look_at(trainer, _batch(trainer.program, batch_size, sequence, batch))
    return report.of(
        shown,
        model=trainer.program.title,
        num_parameters=trainer.num_parameters,
        on=hardware,
        compiled=compile,
        variant=variant,
    )


def look_at(trainer: "Trainer", batch: Any) -> tuple[programs.Program, Any]:
    """The step to look at, and an `advice.Variant` of it; None for what has no other layout to look at.

    Args:
        trainer: whose step it is.
        batch: arrays or `jax.ShapeDtypeStruct`s.
    """
    abstract = trainer.abstract_batch(batch)
    program, notes = _traceable(trainer.program)

    def compiled() -> Any:
        return trainer._step.lower(trainer.abstract_state, abstract).compile()

    def look(program: Program, batch: Any, notes: tuple[str, ...] = ()) -> programs.Program:
        same = program is trainer.program
        return _look(program, trainer, batch, notes, compiled if same and trainer.has_devices else None)

    def variant(layout: Layout, config: Any) -> programs.Program:
        other = TransformerProgram.of(config, layout, layout.num_devices, trainer.engine)
        return look(other, other.abstract_batch(batch))

    shown = look(program, abstract if program is trainer.program else program.abstract_batch(batch), notes)
    manual = isinstance(program, TransformerProgram) and program.engine == "manual"
    return shown, variant if manual else None


def _batch(program: Program, batch_size: int | None, sequence: int | None, batch: Any) -> Any:
    """The batch to look at, as abstract arrays where it was given by its sizes."""
    sizes = {"batch_size": batch_size, "sequence": sequence}
    if batch is not None:
        given = [name for name, value in sizes.items() if value is not None]
        if given:
            raise ValueError(f"explain: the batch has its own {' and '.join(given)}: leave out {', '.join(given)}=")
        return jax.tree.map(_abstract, batch)
    if not isinstance(program, TransformerProgram):
        raise ValueError(
            "explain: what a module reads is its own affair: give batch=, a global one, of arrays or of "
            "jax.ShapeDtypeStructs"
        )
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"explain: {name}={value!r} is not a positive integer")
    assert batch_size is not None and sequence is not None
    return tokens_of(batch_size, sequence)


def tokens_of(batch_size: int, sequence: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of tokens by its sizes alone."""
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    return {name: jax.ShapeDtypeStruct((batch_size, sequence), dtype) for name, dtype in dtypes.items()}


def _abstract(leaf: Any) -> Any:
    known = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if known else leaf  # what is no array is refused later


def _traceable(program: Program) -> tuple[Program, tuple[str, ...]]:
    """The program, or where it cannot be traced here one that stands in for it."""
    if not isinstance(program, TransformerProgram):
        return program, ()
    config = program.config
    if config.attention.implementation != "cudnn" or jax.default_backend() == "gpu":
        return program, ()
    # cuDNN's kernel can be traced only where cuDNN is.
    attention = dataclasses.replace(config.attention, implementation="chunked")
    layout = program.plan.layout
    other = dataclasses.replace(config, attention=attention)
    note = "cuDNN is not here: its attention is counted as 'chunked', which keeps as little in memory"
    return TransformerProgram.of(other, layout, layout.num_devices, program.engine), (note,)


def _look(program: Program, trainer: "Trainer", batch: Any, notes: tuple[str, ...], compiled: Any) -> programs.Program:
    leaf = jax.tree.leaves(batch)[0]
    state = states.abstract(program, trainer.optimizer)
    tokens = isinstance(batch, Mapping) and isinstance(program, TransformerProgram)
    sent, copies = Update(program, trainer.optimizer).cost()
    if copies:
        notes = (
            *notes,
            "the optimizer looks at more than single elements, so each update gives it the model's layers and "
            f"vocabulary in order and without padding: {render.size(sent)} sent, {render.size(copies)} of copies on "
            "each device",
        )
    return programs.Program(
        step=make_step(program, trainer.optimizer, trainer.seed),
        state=state,
        batch=batch,
        mesh=program.plan.mesh,
        layout=program.plan.layout,
        dtype=program.work(batch).dtype or str(jax.tree.leaves(state.params)[0].dtype),
        config=program.config if isinstance(program, TransformerProgram) else None,
        splits=program.plan.splits,
        manual=program.engine == "manual",
        batch_size=leaf.shape[0],
        sequence=leaf.shape[1] if tokens else None,
        attended=_attended(trainer.program, leaf.shape[1]) if tokens else 1.0,
        update_copies=copies,
        notes=notes,
        compiled=compiled,
    )


def _attended(program: Program, sequence: int) -> float:
    """Which part of each query's keys is computed: cuDNN's kernel leaves out what causality and fixed windows hide."""
    config = program.config if isinstance(program, TransformerProgram) else None
    if config is None or config.attention.implementation != "cudnn":
        return 1.0
    seen = [sequence if window is None else min(window, sequence) for window in config.windows]
    return sum(n - n * (n - 1) / (2 * sequence) for n in seen) / (len(seen) * sequence)
