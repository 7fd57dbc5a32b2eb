"""Our Transformer over the stages of a pipeline: what `engine` does without one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from shardlm import collectives
from shardlm._errors import LayoutError
from shardlm.layout import Axis, Layout
from shardlm.models.config import TransformerConfig
from shardlm.models.dropout import Dropout
from shardlm.models.stack import Execution
from shardlm.models.transformer import Transformer
from shardlm.parallel import tensor
from shardlm.parallel.pipeline.backward import Stack
from shardlm.parallel.pipeline.execute import Model, execute, forward, part
from shardlm.parallel.pipeline.stages import Stages
from shardlm.parallel.pipeline.ticks import make_table
from shardlm.train.loss import nll_sum
from shardlm.train.paths import flatten, unflatten

Build = Callable[[dict[str, Array]], tuple[Transformer, Execution]]
"""From parameters, the model with those that it computes with, and how to run it."""

_LAYERS = "layers/"
_BATCH_AXES = (Axis.DATA, Axis.FSDP, Axis.EXPERT, Axis.CONTEXT)


def accumulate(
    config: TransformerConfig,
    layout: Layout,
    stages: Stages,
    ready: Build,
    parameters: dict[str, Array],
    batch: dict[str, Array],
    key: Array,
    frozen: dict[str, Array],
) -> tuple[Array, dict[str, Array]]:
    """Sum of losses, and its gradient in at least float32, over the microbatches of the batch held here.

    Args:
        config, layout, stages: what is run; the layout has several stages.
        ready: builds the model.
        parameters: those to differentiate, by path; of the layers this stage's.
        batch: a device's rows of it, with `rows` and `columns`.
        key: of the step's dropout.
        frozen: the other parameters.
    """
    pipeline = layout.pipeline
    assert pipeline is not None
    model = _model(config, layout, stages, ready, parameters, batch, key, pipeline.microbatches, None, frozen)
    table = make_table(pipeline.schedule, layout.pipe, pipeline.microbatches, pipeline.chunks)
    # A user's schedule; of ours it is known before.
    if table.split and (pipeline.recompute or layout.remat != "none" or pipeline.gather == "use"):
        raise LayoutError(
            f"schedule {pipeline} splits backwards (I and W) with recompute={pipeline.recompute}, "
            f"remat={layout.remat!r} and gather={pipeline.gather!r}, but each half would make the forward again: set "
            "recompute=False, remat='none' and gather='step', or schedule whole backwards (B)"
        )
    axes = (*_BATCH_AXES, *((Axis.PIPE,) if model.ends else ()))
    start = collectives.mark_varying(jnp.zeros((), jnp.promote_types(config.dtype, jnp.float32)), axes)
    total, outer, inner = execute(model, table, start, pipeline.recompute)
    if model.ends:
        total, outer = jax.tree.map(lambda x: collectives.all_reduce(x, Axis.PIPE), (total, outer))
    if stages.chunks == 1:
        inner = jax.tree.map(lambda x: x[0], inner)
    return total, outer | flatten(inner, _LAYERS)


def hidden(
    config: TransformerConfig,
    layout: Layout,
    stages: Stages,
    ready: Build,
    parameters: dict[str, Array],
    batch: dict[str, Array],
    key: Array | None,
    layers: Array | None,
) -> Array:
    """The last layer's output [batch, sequence, embed], the same on all stages; arguments as of `accumulate`.

    Args:
        key: of the dropout masks; None for no dropout.
        layers: stop after so many layers of the model; None runs all.
    """
    assert layout.pipeline is not None
    rows = batch["tokens"].shape[0]
    count = max(n for n in range(1, layout.pipeline.microbatches + 1) if rows % n == 0)
    model = _model(config, layout, stages, ready, parameters, batch, key, count, layers, {})
    parts = forward(model, layout.pipe, stages.chunks, count)
    return parts.swapaxes(0, 1).reshape(rows, *parts.shape[2:])


def _model(
    config: TransformerConfig,
    layout: Layout,
    stages: Stages,
    ready: Build,
    parameters: dict[str, Array],
    batch: dict[str, Array],
    key: Array | None,
    count: int,
    stop: Array | None,
    frozen: dict[str, Array],
) -> Model:
    """The model as the executor needs it, on `count` microbatches; microbatch k takes every count-th row."""
    ends = layout.pipeline is not None and layout.pipeline.vocabulary == "ends"
    outer = {path: x for path, x in parameters.items() if not path.startswith(_LAYERS)}
    inner = {path: x for path, x in parameters.items() if path.startswith(_LAYERS)}
    nested = unflatten({path.removeprefix(_LAYERS): x for path, x in inner.items()})
    if ends:
        outer = {
            path: collectives.mark_varying(x, Axis.PIPE) for path, x in outer.items()
        }  # gradients summed at the end
    fixed = unflatten({path.removeprefix(_LAYERS): x for path, x in frozen.items() if path.startswith(_LAYERS)})
    if stages.chunks == 1:
        nested, fixed = jax.tree.map(lambda x: x[None], (nested, fixed))
    rowwise = {name: x for name, x in batch.items() if name != "columns"}
    microbatches = {name: x.reshape(-1, count, *x.shape[1:]) for name, x in rowwise.items()}
    held = jnp.asarray(stages.of_stage())[collectives.index(Axis.PIPE)]

    def of(number: Array) -> tuple[dict[str, Array], Dropout | None]:
        one = {name: jax.lax.dynamic_index_in_dim(x, number, 1, keepdims=False) for name, x in microbatches.items()}
        if not config.dropout or key is None:
            return one, None
        return one, Dropout(config.dropout, key, one["rows"], batch["columns"])

    def embed(outer: Any, number: Array) -> Array:
        (model, execution), (one, dropout) = ready(outer | inner | frozen), of(number)
        return model.embed(one["tokens"], one.get("positions"), dropout, execution)[0]

    def layers(x: Array, number: Array, chunk: Array) -> Stack:
        (model, execution), (one, dropout) = ready(outer | inner | frozen), of(number)
        numbers = jax.lax.dynamic_index_in_dim(held, chunk, keepdims=False)
        runs = numbers >= 0 if stages.padding else None
        if stop is not None:
            runs = (numbers < stop) if runs is None else runs & (numbers < stop)
        if stages.chunks > 1:
            beside = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, chunk, keepdims=False), execution.beside)
            execution = dataclasses.replace(execution, beside=beside)
        taken = model.stack(
            x,
            segments=one.get("segments"),
            positions=one.get("positions"),
            dropout=model.dropout_of(dropout, execution),
            execution=execution,
            layers=jnp.maximum(numbers, 0),
            runs=runs,
        )
        if not frozen:
            return Stack(taken.layer, taken.inputs)

        def layer(parameters: Any, x: Array, given: Any) -> Array:
            inputs, fixed = given
            return taken.layer(unflatten(flatten(fixed) | flatten(parameters)), x, inputs)

        # What is frozen is no argument of what the executor differentiates.
        return Stack(layer, (taken.inputs, part(fixed, chunk)))

    def head(outer: Any, x: Array, number: Array) -> Array:
        (model, _), (one, _) = ready(outer | inner | frozen), of(number)
        return nll_sum(model, x, one)

    rows, _, sequence = microbatches["tokens"].shape
    split = layout.sequence_parallel
    like = jnp.zeros((rows, sequence // (tensor.parts() if split else 1), config.d_model), config.dtype)
    like = collectives.mark_varying(like, (Axis.PIPE, *_BATCH_AXES, *((Axis.TENSOR,) if split else ())))
    return Model(embed, layers, head, outer, nested, like, ends)
