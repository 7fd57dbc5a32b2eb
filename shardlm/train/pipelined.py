"""Loss and gradients of our Transformer over the stages of a pipeline: what `engine` does without one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from shardlm import collectives
from shardlm.layout import Axis, Layout
from shardlm.models.config import TransformerConfig
from shardlm.models.dropout import Dropout
from shardlm.models.stack import Execution
from shardlm.models.transformer import Transformer
from shardlm.parallel import tensor
from shardlm.parallel.pipeline import execute
from shardlm.parallel.pipeline.ticks import make_table
from shardlm.train.loss import nll_sum

Build = Callable[[dict[str, Array]], tuple[Transformer, Execution]]
"""From parameters, the model with those that it computes with, and how to run it."""

_LAYERS = "layers/"


def accumulate(
    config: TransformerConfig,
    layout: Layout,
    ready: Build,
    parameters: dict[str, Array],
    batch: dict[str, Array],
    key: Array,
) -> tuple[Array, dict[str, Array]]:
    """Sum of losses, and its gradient in at least float32, over the microbatches of the batch held here.

    Args:
        config, layout: what is run; the layout has several stages.
        ready: builds the model.
        parameters: by path; of the layers this stage's.
        batch: a device's rows of it, with `rows` and `columns`.
        key: of the step's dropout.
    """
    pipeline = layout.pipeline
    assert pipeline is not None
    outer = {path: x for path, x in parameters.items() if not path.startswith(_LAYERS)}
    inner = {path: x for path, x in parameters.items() if path.startswith(_LAYERS)}
    columns = batch["columns"]
    rowwise = {name: x for name, x in batch.items() if name != "columns"}
    count = pipeline.microbatches
    microbatches = {name: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1) for name, x in rowwise.items()}
    held = config.num_layers // layout.pipe
    ids = collectives.index(Axis.PIPE) * held + jnp.arange(held)

    def of(number: Array) -> tuple[dict[str, Array], Dropout | None]:
        one = {name: jax.lax.dynamic_index_in_dim(x, number, keepdims=False) for name, x in microbatches.items()}
        return one, Dropout(config.dropout, key, one["rows"], columns) if config.dropout else None

    def embed(outer: Any, number: Array) -> Array:
        (model, execution), (one, dropout) = ready(outer | inner), of(number)
        return model.embed(one["tokens"], one.get("positions"), dropout, execution)[0]

    def layers(inner: Any, x: Array, number: Array) -> Array:
        (model, execution), (one, dropout) = ready(outer | inner), of(number)
        return model.run(
            x,
            segments=one.get("segments"),
            positions=one.get("positions"),
            dropout=model.dropout_of(dropout, execution),
            execution=execution,
            layers=ids,
        )

    def head(outer: Any, x: Array, number: Array) -> Array:
        (model, _), (one, _) = ready(outer | inner), of(number)
        return nll_sum(model, x, one)

    rows, sequence = microbatches["tokens"].shape[1:]
    split = tensor.parts() if layout.sequence_parallel else 1
    like = jnp.zeros((rows, sequence // split, config.d_model), config.dtype)
    axes = (Axis.PIPE, Axis.DATA, Axis.FSDP, Axis.EXPERT, Axis.CONTEXT)
    like = collectives.mark_varying(like, axes + ((Axis.TENSOR,) if layout.sequence_parallel else ()))
    start = collectives.mark_varying(jnp.zeros((), jnp.promote_types(config.dtype, jnp.float32)), axes[1:])
    table = make_table(pipeline.schedule, layout.pipe, count, pipeline.chunks)
    model = execute.Model(embed, layers, head, outer, inner, like)
    total, outer_sums, inner_sums = execute.execute(model, table, start)
    return total, outer_sums | inner_sums
