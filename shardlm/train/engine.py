"""Loss and gradients of one step: by our own collectives (manual), or by the compiler's (auto), from the same model.

Both give functions of (parameters, batch, dropout key) on global arrays, to be called under `jax.jit`:

- manual: one `jax.shard_map` over the whole mesh; the program communicates exactly where `collectives` is called.
- auto: plain JAX, partitioned by XLA from the parameters' shardings. It shares no communication with manual, which
makes it an
  independent check.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from shardlm import collectives
from shardlm.dims import DimTable, Split
from shardlm.layout import Axis, Layout
from shardlm.models import embedding, lora
from shardlm.models.config import TransformerConfig
from shardlm.models.dropout import Dropout
from shardlm.models.stack import Execution
from shardlm.models.transformer import Transformer, parameter_dims
from shardlm.parallel import zero
from shardlm.parallel.pipeline.stages import Stages
from shardlm.train import arrange, pipelined
from shardlm.train.loss import loss_sum, nll_sum
from shardlm.train.paths import flatten, unflatten
from shardlm.train.view import View, layers, views

Parameters = dict[str, Any]
"""A nested dict of arrays: the model's parameters, or their gradients."""

Ready = Callable[[dict[str, Array]], tuple[Transformer, Execution]]
"""From the parameters that a step differentiates, the model with those that it computes with, and how to run it."""

ENGINES = ("manual", "auto")
_LAYERS = "layers/"
_BATCH_AXES = (Axis.DATA, Axis.FSDP, Axis.EXPERT, Axis.CONTEXT)


@dataclass(frozen=True)
class Plan:
    """Everything about a model on a layout that is known before any array exists.

    Attributes:
        config, layout, mesh: what was asked for, the layout's sizes resolved.
        stages: which layers each stage of a pipeline holds, and how they are stored.
        table: the dims' rules.
        graph: the model's NNX graph definition.
        shapes: its parameters as `jax.ShapeDtypeStruct`s, a nested dict.
        splits: for each path, how it is split.
    """

    config: TransformerConfig
    layout: Layout
    mesh: Mesh | AbstractMesh
    stages: Stages
    table: DimTable
    graph: Any
    shapes: Parameters
    splits: dict[str, Split]

    @classmethod
    def of(cls, config: TransformerConfig, layout: Layout, mesh: Mesh | AbstractMesh) -> "Plan":
        """Plan `config` on `layout`; raises `LayoutError` where a dim does not divide."""
        stages = Stages.of(layout, config.num_layers)
        graph, shapes, dims = parameter_dims(config, stages.rows)
        table = DimTable.of(layout, config.num_kv_heads)
        splits = flatten(table.splits(dims))
        if config.lora is not None:
            splits = {p: split if lora.is_adapter(p) else replace(split, frozen=True) for p, split in splits.items()}
        return cls(config, layout, mesh, stages, table, graph, shapes, splits)

    @property
    def in_order(self) -> dict[str, Split]:
        """The splits of parameters as `arrange.gathered` gives them, their layers in the model's order."""
        return {path: arrange.split_in_order(split, self.stages) for path, split in self.splits.items()}

    @cached_property
    def views(self) -> dict[str, View]:
        """The parameters that the layout stores otherwise than the model has them."""
        return views(self.config, self.splits, self.stages, self.mesh)

    def shardings(self, which: str) -> Parameters:
        """A sharding for each parameter, of what is named in `program.Plan`."""
        specs = {
            path: getattr(split, "sharded" if which == "ordered" else which) for path, split in self.splits.items()
        }
        if which == "ordered":
            specs |= {path: view.spec for path, view in layers(self.views).items()}
        return unflatten({path: NamedSharding(self.mesh, spec) for path, spec in specs.items()})

    def batch_spec(self) -> PartitionSpec:
        """The spec of a batch array [batch, sequence]."""
        return self.table.activation("batch", "sequence")


def merge(graph: Any, parameters: Parameters) -> Transformer:
    """The module whose parameters are these."""
    return nnx.merge(graph, nnx.State(parameters))


def loss_and_grads(
    plan: Plan, engine: str
) -> Callable[[Parameters, dict[str, Array], Array], tuple[Array, Array, Parameters]]:
    """A function (parameters, batch, dropout key) -> (sum of losses, sum of weights, gradients of the mean).

    Gradients are of what is trained; nothing is differentiated with respect to a frozen parameter.
    """
    local = _manual_step if engine == "manual" else _auto_step

    def function(parameters: Parameters, batch: dict[str, Array], key: Array):
        flat = flatten(parameters)
        total, weight, grads = local(plan, flat, _with_places(_widen(plan.config, batch)), key)
        means = {path: (g / weight).astype(flat[path].dtype) for path, g in grads.items()}
        return total, weight, unflatten(means)

    return function


def evaluate(plan: Plan, engine: str) -> Callable[[Parameters, dict[str, Array]], tuple[Array, Array]]:
    """A function (parameters, batch) -> (sum of losses, sum of weights), without dropout."""

    def local(parameters: dict[str, Array], batch: dict[str, Array]) -> tuple[Array, Array]:
        ready, begun = _prepare(plan, parameters)
        total = nll_sum(ready(begun)[0], _hidden(plan, ready, begun, batch), batch)
        return collectives.all_reduce(total, _BATCH_AXES), collectives.all_reduce(batch["weights"].sum(), _BATCH_AXES)

    def function(parameters: Parameters, batch: dict[str, Array]) -> tuple[Array, Array]:
        batch = _widen(plan.config, batch)
        if engine == "auto":
            return loss_sum(_plainly(plan)(flatten(parameters))[0], batch), batch["weights"].sum()
        return _manual(plan, local, batch, (PartitionSpec(), PartitionSpec()))(flatten(parameters), batch)

    return function


def logits(plan: Plan) -> Callable[[Parameters, Array], Array]:
    """A function (parameters, tokens[batch, sequence]) -> logits[batch, sequence, padded vocabulary], manual engine."""

    def local(parameters: dict[str, Array], batch: dict[str, Array]) -> Array:
        ready, begun = _prepare(plan, parameters)
        return ready(begun)[0].logits(_hidden(plan, ready, begun, batch))

    batch_axes, vocab = plan.table.activation("batch"), plan.table.rules["vocab"]
    spec = PartitionSpec(*(batch_axes or (None,)), None, vocab or None)

    def function(parameters: Parameters, tokens: Array) -> Array:
        batch = {"tokens": tokens}
        return _manual(plan, local, batch, spec)(flatten(parameters), batch)

    return function


def forward(plan: Plan, engine: str) -> Callable[[Parameters, dict[str, Array], Array, Array], dict[str, Array]]:
    """A function (parameters, batch, dropout key, layers) -> what the forward holds after so many layers.

    That is `hidden`[batch, sequence, embed], and, as if no layer followed, `logits`[batch, sequence, padded vocabulary]
    and `nll`[batch, sequence], without the weights. The batch is that of a step; it may bring `rows` and `columns`, the
    places from which dropout masks are drawn.
    """

    def run(ready: Ready, begun: dict[str, Array], batch: dict[str, Array], key: Array, layers: Array):
        model, hidden = ready(begun)[0], _hidden(plan, ready, begun, batch, key, layers, piped=engine == "manual")
        logits = model.logits(hidden)
        return {
            "hidden": hidden,
            "logits": logits,
            "nll": embedding.cross_entropy(logits, batch["targets"], plan.config),
        }

    def local(parameters: dict[str, Array], batch: dict[str, Array], key: Array, layers: Array) -> dict[str, Array]:
        return run(*_prepare(plan, parameters), batch, key, layers)

    rules = plan.table.rules
    sequence = rules["sequence"] + ((str(Axis.TENSOR),) if plan.layout.sequence_parallel else ())
    specs = {
        "hidden": PartitionSpec(rules["batch"] or None, sequence or None),
        "logits": PartitionSpec(rules["batch"] or None, rules["sequence"] or None, rules["vocab"] or None),
        "nll": plan.batch_spec(),
    }

    def function(parameters: Parameters, batch: dict[str, Array], key: Array, layers: Array) -> dict[str, Array]:
        batch = _with_places(batch) | batch
        if engine == "auto":
            return run(_plainly(plan), flatten(parameters), batch, key, layers)
        extra = (PartitionSpec(), PartitionSpec())
        return _manual(plan, local, batch, specs, *extra)(flatten(parameters), batch, key, layers)

    return function


def held(plan: Plan, stored: Parameters) -> tuple[Transformer, Execution]:
    """Within a `shard_map` over `plan.mesh`: the model with the parameters that a device holds, and how to run it."""
    ready, begun = _prepare(plan, flatten(stored))
    return ready(begun)


def gather_updated(plan: Plan, shards: Parameters) -> Parameters:
    """Updated parameters as they are stored, from updated shards: ZeRO-1 and 2 gather them."""
    flat = flatten(shards)
    moved = {path: x for path, x in flat.items() if plan.splits[path].stored != plan.splits[path].sharded}
    if not moved:
        return shards
    gather = jax.shard_map(
        partial(zero.gather_updated, splits=plan.splits),
        mesh=plan.mesh,
        in_specs=({path: plan.splits[path].sharded for path in moved},),
        out_specs={path: plan.splits[path].stored for path in moved},
        check_vma=False,  # the type system takes a gathered array for one that varies
    )
    return unflatten(flat | gather(moved))


def _manual(plan: Plan, local: Callable, batch: dict[str, Array], out_specs: Any, *extra: PartitionSpec) -> Callable:
    in_specs = ({path: split.stored for path, split in plan.splits.items()}, _batch_specs(plan, batch), *extra)
    return jax.shard_map(local, mesh=plan.mesh, in_specs=in_specs, out_specs=out_specs)


def _batch_specs(plan: Plan, batch: dict[str, Array]) -> dict[str, PartitionSpec]:
    dims = {"rows": ("batch",), "columns": ("sequence",)}
    return {name: plan.table.activation(*dims.get(name, ("batch", "sequence"))) for name in batch}


def _with_places(batch: dict[str, Array]) -> dict[str, Array]:
    # Each row and column carries its global index along, so that dropout needs to know of no split.
    rows, columns = batch["tokens"].shape
    return batch | {"rows": jnp.arange(rows), "columns": jnp.arange(columns)}


def _widen(config: TransformerConfig, batch: dict[str, Array]) -> dict[str, Array]:
    # The sum of weights is as exact as the sum of losses that it divides.
    return batch | {"weights": batch["weights"].astype(jnp.promote_types(config.dtype, jnp.float32))}


def _zero_plans(plan: Plan) -> dict[str, zero.Plan]:
    return {path: zero.plan(split, plan.layout, plan.config.dtype) for path, split in plan.splits.items()}


def _prepare(plan: Plan, stored: dict[str, Array]) -> tuple[Ready, dict[str, Array]]:
    """How to run the model with the parameters as the step differentiates them, and those."""
    plans = _zero_plans(plan)
    begun = {path: zero.begin(x, plans[path]) for path, x in stored.items()}
    per_use = {path: p for path, p in plans.items() if p.per_use}
    whole = {path: zero.whole(stored[path], p) for path, p in per_use.items() if p.has_placeholder}
    in_layers = {path.removeprefix(_LAYERS): p for path, p in per_use.items() if path.startswith(_LAYERS)}

    def prepare(layer: Parameters, beside: dict[str, Array]) -> Parameters:
        flat = flatten(layer)
        return unflatten(flat | {path: zero.use(flat[path], beside.get(path), p) for path, p in in_layers.items()})

    execution = Execution(
        remat=plan.layout.remat,
        sequence_parallel=plan.layout.sequence_parallel,
        prepare=prepare if in_layers else None,
        beside={path: whole[_LAYERS + path] for path in in_layers if _LAYERS + path in whole},
    )

    def ready(begun: dict[str, Array]) -> tuple[Transformer, Execution]:
        tables = [path for path in per_use if not path.startswith(_LAYERS)]
        used = {path: zero.use(begun[path], whole.get(path), per_use[path]) for path in tables}
        return merge(plan.graph, unflatten(begun | used)), execution

    return ready, begun


def _manual_step(plan: Plan, parameters: dict[str, Array], batch: dict[str, Array], key: Array):
    plans = _zero_plans(plan)

    def local(stored: dict[str, Array], batch: dict[str, Array], key: Array):
        ready, begun = _prepare(plan, stored)
        trained, frozen = _parted(plan, begun)
        if plan.layout.pipe > 1:
            total, grads = pipelined.accumulate(
                plan.config, plan.layout, plan.stages, ready, trained, batch, key, frozen
            )
        else:
            total, grads = _accumulate(plan, ready, trained, frozen, batch, key)
        with jax.named_scope("backward"):
            grads = {path: zero.finish(g, plans[path]) for path, g in grads.items()}
        weight = collectives.all_reduce(batch["weights"].sum(), _BATCH_AXES)
        return collectives.all_reduce(total, _BATCH_AXES), weight, grads

    specs = {path: split.sharded for path, split in plan.splits.items() if not split.frozen}
    out_specs = (PartitionSpec(), PartitionSpec(), specs)
    return _manual(plan, local, batch, out_specs, PartitionSpec())(parameters, batch, key)


def _auto_step(plan: Plan, parameters: dict[str, Array], batch: dict[str, Array], key: Array):
    total, grads = _accumulate(plan, _plainly(plan), *_parted(plan, parameters), batch, key)
    shardings = {path: NamedSharding(plan.mesh, plan.splits[path].sharded) for path in grads}
    return total, batch["weights"].sum(), jax.lax.with_sharding_constraint(grads, shardings)


def _parted(plan: Plan, parameters: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """What is trained and what is frozen."""
    trained = {path: x for path, x in parameters.items() if not plan.splits[path].frozen}
    return trained, {path: x for path, x in parameters.items() if path not in trained}


def _plainly(plan: Plan) -> Ready:
    def ready(parameters: dict[str, Array]) -> tuple[Transformer, Execution]:
        ordered = arrange.in_order(unflatten(parameters), plan.stages, plan.splits)
        return merge(plan.graph, ordered), Execution(remat=plan.layout.remat)

    return ready


def _hidden(
    plan: Plan,
    ready: Ready,
    begun: dict[str, Array],
    batch: dict[str, Array],
    key: Array | None = None,
    layers: Array | None = None,
    piped: bool = True,
) -> Array:
    """The last layer's output, or that after `layers` of them, with the dropout of `key`."""
    if piped and plan.layout.pipe > 1:
        return pipelined.hidden(plan.config, plan.layout, plan.stages, ready, begun, batch, key, layers)
    model, execution = ready(begun)
    rate = plan.config.dropout
    return model.hidden(
        batch["tokens"],
        segments=batch.get("segments"),
        positions=batch.get("positions"),
        dropout=Dropout(rate, key, batch["rows"], batch["columns"]) if rate and key is not None else None,
        execution=execution,
        runs=None if layers is None else jnp.arange(plan.config.num_layers) < layers,
    )


def _accumulate(
    plan: Plan,
    ready: Ready,
    parameters: dict[str, Array],
    frozen: dict[str, Array],
    batch: dict[str, Array],
    key: Array,
) -> tuple[Array, dict[str, Array]]:
    """Sum of losses, and its gradient in at least float32, over the microbatches of the batch held here."""
    columns = batch["columns"]

    def loss(parameters: dict[str, Array], microbatch: dict[str, Array]) -> Array:
        rate = plan.config.dropout
        dropout = Dropout(rate, key, microbatch["rows"], columns) if rate else None
        model, execution = ready(frozen | parameters)
        return loss_sum(model, microbatch, dropout, execution)

    rowwise = {name: x for name, x in batch.items() if name != "columns"}
    count = plan.layout.accumulate
    if count == 1:
        return jax.value_and_grad(loss)(parameters, rowwise)

    def body(carry: tuple[Array, dict[str, Array]], microbatch: dict[str, Array]):
        total, sums = carry
        more, grads = jax.value_and_grad(loss)(parameters, microbatch)
        return (total + more, jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, grads)), None

    wide = jnp.promote_types(plan.config.dtype, jnp.float32)
    start = collectives.mark_varying(jnp.zeros((), wide), _BATCH_AXES)
    zeros = {path: collectives.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)) for path, x in parameters.items()}
    # Rows that a device holds stay on it: microbatch k takes every count-th row, so that in auto mode the rows of each
    # microbatch are spread over the devices as the batch is.
    microbatches = {name: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1) for name, x in rowwise.items()}
    return jax.lax.scan(body, (start, zeros), microbatches)[0]
