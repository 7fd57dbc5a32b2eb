"""From a Trainer to the program that `inspect` reports on."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from shardlm.inspect import report
from shardlm.inspect.program import Program
from shardlm.layout import Layout

if TYPE_CHECKING:
    from shardlm.train.trainer import Trainer


def explain(trainer: "Trainer", batch_size: int, sequence: int, hardware: Any, compile: bool) -> report.Report:
    """See `Trainer.explain`."""
    for name, value in (("batch_size", batch_size), ("sequence", sequence)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} is not a positive integer")
    c = trainer.config
    if c.max_sequence is not None and sequence > c.max_sequence:
        raise ValueError(f"sequence={sequence}, but the model has {c.max_sequence} learned positions")
    trainer.layout.check(c, batch_size=batch_size, sequence=sequence)

    def variant(layout: Layout, config: Any) -> Program:
        if layout == trainer.layout and config == trainer.config:
            return program
        other = type(trainer)(
            config, layout, trainer.optimizer, seed=trainer.seed, devices=layout.num_devices, engine=trainer.engine
        )
        other.layout.check(config, batch_size=batch_size, sequence=sequence)
        return _program(other, batch_size, sequence)

    program = _program(trainer, batch_size, sequence)
    model = (
        f"{c.num_layers} layers, d_model {c.d_model}, {c.num_heads} heads ({c.num_kv_heads} kv) of {c.head_dim}, "
        f"d_ff {c.d_ff}, vocabulary {c.vocab_size}"
    )
    manual = trainer.engine == "manual"
    return report.of(
        program,
        model=model,
        num_parameters=trainer.num_parameters,
        on=hardware,
        compiled=compile,
        variant=variant if manual else None,
    )


def _program(trainer: "Trainer", batch_size: int, sequence: int) -> Program:
    sharding = trainer.batch_sharding
    batch: dict[str, Any] = {
        name: jax.ShapeDtypeStruct((batch_size, sequence), dtype, sharding=sharding)
        for name, dtype in (("tokens", jnp.int32), ("targets", jnp.int32), ("weights", jnp.float32))
    }
    shown, notes = trainer, ()
    attention = trainer.config.attention
    if attention.implementation == "cudnn" and jax.default_backend() != "gpu":
        # cuDNN's kernel can be traced only where cuDNN is.
        stand_in = dataclasses.replace(attention, implementation="chunked")
        shown = type(trainer)(
            dataclasses.replace(trainer.config, attention=stand_in), trainer.layout, trainer.optimizer,
            seed=trainer.seed, devices=trainer.layout.num_devices, engine=trainer.engine,
        )  # fmt: skip
        notes = ("cuDNN is not here: its attention is counted as 'chunked', which keeps as little in memory",)
        batch = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shown.batch_sharding) for name, x in batch.items()
        }
    manual = trainer.engine == "manual"
    real = shown is trainer and trainer.has_devices
    return Program(
        step=shown.step_function,
        state=shown.abstract_state,
        batch=batch,
        mesh=shown.mesh,
        layout=trainer.layout,
        dtype=trainer.config.dtype,
        config=trainer.config,
        splits=shown.plan.splits if manual else None,
        batch_size=batch_size,
        sequence=sequence,
        notes=notes,
        compiled=(lambda: trainer._step.lower(trainer.abstract_state, batch).compile()) if real else None,
    )
