"""Data parallelism and ZeRO (arXiv:1910.02054): where parameters are gathered, and where their gradients are summed.

Between steps a parameter is stored whole or, at level 3, split along one dim over the ZeRO axes. A device computes
with the whole (of its tensor shard) and finds a gradient of its own rows of the batch, G[I]{U_data, U_zero}. What
every level needs in the end is the gradient that belongs to its part of the optimizer state:

    reduce-scatter over the ZeRO axes, then all-reduce of the shard over the rest:    G[I]{U} -> G[I_zero]

(in this order the all-reduce moves 1/n of the bytes). A parameter's `Plan` says where that happens:

- `per_use`: inside backward, as the transpose of the gather: for the layers' matrices in the scan, layer by layer, for
  the tables where they are looked up. Autodiff sees one function whose forward is "the whole weight" and whose backward
  is the reduction above. At levels 1 and 2 the whole weight is there already, so the function takes it beside a
  placeholder of the shard's shape, which exists only to receive the gradient.
- otherwise once per step, after accumulation: vectors, and every weight that is to be summed once. In a pipeline that
  is every weight, unless it is told to gather the layers' matrices where they are used, in every tick.

A frozen parameter is gathered, at level 3, and never summed: for what is no function of it, autodiff asks nothing.

All functions here run inside a fully manual `shard_map`; shapes are per device. Parameters and gradients go by their
path.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from shardlm import collectives
from shardlm.dims import Split
from shardlm.layout import Axis, Layout
from shardlm.parallel import tensor

VECTORS = ("scale", "bias")
"""Names of a layer's vectors, norm scales and biases: too small to gather and sum one by one, and never decayed."""

WEIGHTS = ("/kernel", "/lora_a", "/lora_b")
"""What the paths of weights end in that multiply."""


@dataclass(frozen=True)
class Plan:
    """What happens to one parameter within a step.

    Attributes:
        split: how it is split over the mesh.
        axes: the axes over which its use varies: its gradient is a partial sum over those that do not split it.
        per_use: whether it is gathered, and its gradient summed, where it is used, and not once per step.
        late: of the axes summed over, those summed once per step although `per_use`.
        dtype: what it is cast to before it is gathered; None keeps its own.
    """

    split: Split
    axes: tuple[str, ...]
    per_use: bool
    late: tuple[str, ...]
    dtype: str | None

    @property
    def summed(self) -> tuple[str, ...]:
        """The axes over which the gradient is all-reduced; the ZeRO axes are reduce-scattered."""
        split = {axis for axes in self.split.model for axis in axes}.union(self.split.zero_axes)
        return tuple(axis for axis in self.axes if axis not in split)

    @property
    def has_placeholder(self) -> bool:
        """Whether autodiff needs a placeholder for the shard, as its gradient is split while the parameter is whole.

        At levels 1 and 2 it is stored whole. At level 3 that is so of the tables, which are gathered once per step.
        """
        return self.per_use and bool(self.split.zero_axes) and not (self.split.stored_sharded and self.in_layers)

    @property
    def in_layers(self) -> bool:
        """Whether it belongs to the stacked layers, and is used one layer at a time."""
        return self.split.stacked > 0


def plan(split: Split, layout: Layout, dtype: str) -> Plan:
    """Decide how the parameter of `split` is treated under `layout`, computing in `dtype`."""
    batch = (Axis.DATA, Axis.FSDP, Axis.EXPERT, Axis.CONTEXT)
    axes = batch + ((Axis.TENSOR,) if layout.sequence_parallel or tensor.in_branch(split.dims) else ())
    axes = tuple(str(axis) for axis in axes if layout.sizes[axis] > 1)
    matrix = split.path.rsplit("/", 1)[-1] not in VECTORS
    # What multiplies in the computation's dtype may travel in it; a table is looked up, and summed into, in its own.
    dtype_moved = dtype if split.path.endswith(WEIGHTS) else None
    at_once = layout.gradient_reduction == "step"
    gathers = bool(split.zero_axes) and (layout.zero == 3 or (layout.zero == 2 and at_once))
    where_used = layout.pipeline is None or layout.pipeline.gather == "use"
    if split.frozen:
        gathers = bool(split.zero_axes) and split.stored_sharded
        per_use = gathers and matrix and split.stacked > 0 and where_used
        # Where it stays as it is, its user casts it, one layer at a time: no second copy of it all in `dtype`.
        return Plan(split, axes, per_use, (), dtype_moved if gathers or at_once else None)
    per_use = matrix and bool(axes) and (gathers or not at_once)
    if layout.pipeline is not None:
        # Everything is gathered before the first tick, and summed after the last, or the layers' matrices are not.
        per_use = per_use and where_used and split.stacked > 0
    result = Plan(split, axes, per_use, (), dtype_moved)
    return dataclasses.replace(result, late=result.summed) if per_use and at_once else result


def begin(stored: Array, plan: Plan) -> Array:
    """What the step differentiates: the parameter ready for use, or, if that happens where it is used, its shard."""
    if not plan.per_use:
        return _gather(stored, plan, plan.split.zero_dim)
    if plan.has_placeholder:
        dim, count = plan.split.zero_dim, collectives.size(_axes(plan.split.zero_axes))
        count = 1 if plan.split.stored_sharded else count
        shape = tuple(n // count if i == dim else n for i, n in enumerate(stored.shape))
        split = [Axis(axis) for axes in (*plan.split.model, plan.split.zero_axes) for axis in axes]
        stored = collectives.mark_varying(jnp.zeros(shape, stored.dtype), split)
    return collectives.mark_varying(stored, _axes(plan.late))


def whole(stored: Array, plan: Plan) -> Array:
    """What `use` takes beside the placeholder: the stored parameter, or what it was gathered to, once per step."""
    return stored if plan.in_layers else _gather(stored, plan, plan.split.zero_dim)


def use(shard: Array, whole: Array | None, plan: Plan) -> Array:
    """A weight, whole and ready, from what `begin` gave; its transpose sums the gradient into the shard.

    Args:
        shard: `begin`'s result; in a layer one layer of it, the leading layer dim taken off by the scan.
        whole: `whole`'s result, or one layer of it, where `plan.has_placeholder`; else None.
        plan: a plan with `per_use`.
    """
    dim = None if plan.split.zero_dim is None else plan.split.zero_dim - plan.split.stacked
    if plan.split.frozen:
        return _gather(shard, plan, dim)
    now = tuple(axis for axis in plan.summed if axis not in plan.late)

    @jax.custom_vjp
    def weight(shard: Array, whole: Array | None) -> Array:
        return _gather(shard if whole is None else whole, plan, None if whole is not None else dim)

    def backward(_: None, gradient: Array) -> tuple[Array, None]:
        return _reduce(gradient, plan, dim, now).astype(shard.dtype), None

    weight.defvjp(lambda shard, whole: (weight(shard, whole), None), backward)
    return weight(shard, whole)


def finish(gradient: Array, plan: Plan) -> Array:
    """From the step's gradient with respect to `begin`'s result, the gradient of the parameter's shard."""
    if plan.per_use:
        return collectives.all_reduce(gradient, _axes(plan.late))
    return _reduce(gradient, plan, plan.split.zero_dim, plan.summed)


def gather_updated(shards: Mapping[str, Array], splits: Mapping[str, Split]) -> dict[str, Array]:
    """The updated parameters whole again (levels 1 and 2): each path's shard [I_zero] -> [I]."""
    return {
        path: collectives.all_gather(x, _axes(splits[path].zero_axes), dim)
        if (dim := splits[path].zero_dim) is not None
        else x
        for path, x in shards.items()
    }


def _gather(x: Array, plan: Plan, dim: int | None) -> Array:
    x = x if plan.dtype is None else x.astype(plan.dtype)
    if dim is not None and plan.split.stored_sharded:
        x = collectives.all_gather(x, _axes(plan.split.zero_axes), dim)
    return collectives.mark_varying(x, _axes(plan.axes))


def _reduce(gradient: Array, plan: Plan, dim: int | None, axes: tuple[str, ...]) -> Array:
    gradient = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
    if dim is not None:
        gradient = collectives.reduce_scatter(gradient, _axes(plan.split.zero_axes), dim)
    return collectives.all_reduce(gradient, _axes(axes))


def _axes(names: tuple[str, ...]) -> tuple[Axis, ...]:
    return tuple(Axis(name) for name in names)
