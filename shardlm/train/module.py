"""The program of any Flax NNX module: plain `jax.jit`, partitioned by XLA from the specs of the parameters.

    loss = sum over microbatches of loss_fn(module, microbatch)[0] / the same sum of loss_fn(...)[1]

Three kinds of arrays make a module: parameters, which are trained or, where `wrt` leaves them out, frozen; random
streams, which start anew in each step from (seed, step, microbatch), so that they depend on no layout and resume
exactly; and all others, its variables, which go from microbatch to microbatch and from step to step. `anatomy.py` takes
a module apart and puts it together again.

A module may give its own parameters another value in its call, as `nnx.WeightNorm` and `nnx.SpectralNorm` do. As in a
loop of plain Flax, the gradient is of the value before, and the optimizer's update is made on the value after. Each
microbatch starts from the step's parameters; what the last one assigns stays.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from shardlm._errors import raise_all
from shardlm._text import fold, size
from shardlm.dims import DimTable
from shardlm.layout import Layout
from shardlm.rules import ParameterTable, match_rules, split_annotated
from shardlm.train import gathered, rows
from shardlm.train.anatomy import Anatomy
from shardlm.train.assigned import handed_through
from shardlm.train.engine import Parameters, flatten, unflatten
from shardlm.train.frozen import trained
from shardlm.train.program import Gradients, Variables, Work, mesh_on

LossFunction = Callable[[Any, Any], tuple[Any, Any]]
"""From (module, batch), the sum of the rows' losses and the sum of their weights."""


@dataclass(frozen=True)
class ModulePlan:
    """How the parameters of a module are split; like `engine.Plan`.

    Attributes:
        layout, mesh: what was asked for, the layout's sizes filled in.
        table: what decided each spec; prints.
        shapes: the parameters as `jax.ShapeDtypeStruct`s, a nested dict.
    """

    layout: Layout
    mesh: jax.sharding.Mesh
    table: ParameterTable
    shapes: Parameters

    @property
    def in_order(self):
        """The same: a module of one's own is stored as it is."""
        return self.table.splits

    @property
    def splits(self):
        """For each path, how it is split."""
        return self.table.splits

    @property
    def views(self) -> dict[str, Any]:
        """None, likewise."""
        return {}

    def shardings(self, which: str) -> Parameters:
        """A sharding for each parameter, of what is named in `program.Plan`."""
        which = "sharded" if which == "ordered" else which
        return unflatten({path: NamedSharding(self.mesh, getattr(split, which)) for path, split in self.splits.items()})

    def batch_spec(self) -> PartitionSpec:
        """The spec of a batch array [batch, ...]."""
        axes = self.layout.batch_axes
        return PartitionSpec(axes[0] if len(axes) == 1 else axes) if axes else PartitionSpec()


@dataclass(frozen=True)
class ModuleProgram:
    """A module and its loss on a layout; see `program.Program`.

    Attributes:
        plan: how the parameters are split.
        anatomy: what the module is made of.
        loss_fn, rules: as given.
        variables: shapes and shardings of what is carried and not trained.
        batch_sharding: of a batch array [batch, ...].
    """

    plan: ModulePlan
    anatomy: Anatomy
    loss_fn: LossFunction
    variables: Variables
    batch_sharding: NamedSharding
    rules: Sequence[tuple[str, PartitionSpec]] | None = None
    engine: str = "auto"
    weight_name: str = "weight"

    @classmethod
    def of(
        cls,
        make_module: Callable[[nnx.Rngs], nnx.Module],
        loss_fn: LossFunction,
        layout: Layout,
        devices: Sequence[Any] | int,
        rules: Sequence[tuple[str, PartitionSpec]] | None,
        wrt: Any = nnx.Param,
    ) -> "ModuleProgram":
        """Plan a module on `layout`, whose sizes are filled in; see `Trainer.from_module`."""
        _check_layout(layout)
        if not callable(loss_fn):
            raise TypeError(f"loss_fn is a {type(loss_fn).__name__}; it is a function of (module, batch)")
        anatomy = Anatomy.of(make_module, wrt)
        mesh, carried = mesh_on(layout, devices), anatomy.variables
        annotations = anatomy.parameters.annotations | _specs_of_dims(anatomy, layout)
        table = match_rules(anatomy.parameters.shapes, rules, layout, annotations, carried.annotations)
        table = _freeze(table, anatomy.trained)
        plan = ModulePlan(layout, mesh, table, unflatten(anatomy.parameters.shapes))
        variables = {}
        for path, leaf in carried.shapes.items():
            split = split_annotated(path, leaf.shape, carried.annotations.get(path), layout, rules)
            sharding = NamedSharding(mesh, split.whole)
            variables[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return cls(plan, anatomy, loss_fn, unflatten(variables), NamedSharding(mesh, plan.batch_spec()), rules)

    def on_one_device(self, device: Any) -> "ModuleProgram":
        """The module on one device, with as many microbatches: its randomness and its variables go by them."""
        layout, anatomy = Layout(accumulate=self.plan.layout.accumulate), self.anatomy
        return ModuleProgram.of(anatomy.make_module, self.loss_fn, layout, [device], self.rules, anatomy.wrt)

    @property
    def title(self) -> str:
        """The module in words."""
        return self.anatomy.name

    @property
    def num_parameters(self) -> int:
        """Number of parameters, those that are frozen among them."""
        return sum(leaf.size for leaf in self.anatomy.parameters.shapes.values())

    def initialize(self, seed: int) -> tuple[Parameters, Variables]:
        """The arrays of `make_module(nnx.Rngs(seed))`."""
        params, variables = self.anatomy.initialize(seed)
        return unflatten(params), unflatten(variables)

    def gradients(self, params: Parameters, variables: Variables, batch: Any, key: Array) -> Gradients:
        """Loss and gradients over all microbatches, the variables handed from one to the next."""
        flat, count = flatten(params), self.plan.layout.accumulate
        part = {path: x for path, x in flat.items() if path in self.anatomy.trained}
        shardings = {path: NamedSharding(self.plan.mesh, self.plan.splits[path].sharded) for path in part}
        microbatches = self._microbatches(batch, count) if count > 1 else None
        first = batch if microbatches is None else jax.tree.map(lambda x: x[0], microbatches)
        changed = self._assigns(flat, flatten(variables), first, key)

        def run(part: dict[str, Array], variables: dict[str, Array], batch: Any, key: Array):
            total, weight, carried, after = self._loss(
                gathered.gather(flat | part, self._to_gather), variables, batch, key
            )
            return total, (weight, carried, {path: after[path] for path in changed})

        loss = jax.value_and_grad(run, has_aux=True)
        if microbatches is None:
            found = loss(part, flatten(variables), batch, jax.random.fold_in(key, 0))
            (total, (weight, carried, assigned)), grads = found
        else:

            def body(carry: Any, each: Any):
                total, weight, sums, carried, _ = carry
                index, microbatch = each
                found = loss(part, carried, microbatch, jax.random.fold_in(key, index))
                (more, (heavier, carried, assigned)), grads = found
                sums = jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, grads)
                if self.plan.layout.zero > 1:
                    sums = jax.lax.with_sharding_constraint(sums, shardings)
                return (total + more, weight + heavier, sums, carried, assigned), None

            zero = jnp.zeros((), _wide())
            zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)), part)
            start = zero, zero, zeros, flatten(variables), {path: flat[path] for path in changed}
            total, weight, grads, carried, assigned = jax.lax.scan(body, start, (jnp.arange(count), microbatches))[0]
        grads = jax.tree.map(lambda g, p: (g / weight).astype(p.dtype), grads, part)
        grads = jax.lax.with_sharding_constraint(grads, shardings)
        stored = {path: NamedSharding(self.plan.mesh, self.plan.splits[path].stored) for path in changed}
        assigned = jax.lax.with_sharding_constraint(assigned, stored) if changed else {}
        return Gradients(total, weight, unflatten(grads), unflatten(carried), unflatten(assigned))

    def evaluate(self, params: Parameters, batch: Any, variables: Variables | None = None) -> tuple[Array, Array]:
        """Sum of losses and of weights under `module.eval()`; what it does to the variables is not kept."""
        key = jax.random.key(0)
        flat = gathered.gather(flatten(params), self._to_gather)
        module = self.anatomy.assemble(flat, flatten(variables or {}), key, training=False)
        return _pair(self.loss_fn(module, batch))

    @cached_property
    def _to_gather(self) -> dict[str, NamedSharding]:
        return gathered.shardings(self.plan.splits, self.plan.mesh, self.plan.layout.batch_axes)

    def stored(self, shards: Parameters) -> Parameters:
        """Updated parameters where they are stored; the compiler gathers them."""
        return jax.lax.with_sharding_constraint(shards, trained(self.plan.shardings("stored"), self.plan.splits))

    def place(self, batch: Any, *, may_be_empty: bool = False) -> Any:
        """Check a batch and put it on the devices, its rows split over the data axes."""
        count = rows.count(batch)
        if rows.is_placed(batch, self.batch_sharding):
            self.check_rows(count)
            return batch
        self.check_rows(rows.global_count(self.batch_sharding, self.plan.layout.batch_shards, count))
        return rows.place(batch, self.batch_sharding)

    def abstract_batch(self, batch: Any) -> Any:
        """What `place` makes of a batch, as shapes; a batch of shapes is the global one."""
        count, sharding = rows.count(batch, may_be_abstract=True), self.batch_sharding
        is_global = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(batch))
        if not is_global and not rows.is_placed(batch, sharding):
            count = rows.global_count(sharding, self.plan.layout.batch_shards, count)
        self.check_rows(count)
        return rows.shapes(batch, sharding, count)

    def check_rows(self, batch_size: int) -> None:
        """Raise LayoutError where a global batch of so many rows cannot be split."""
        raise_all("the batch does not fit the layout", rows.problems(batch_size, self.plan.layout))

    @property
    def layer_rows(self) -> None:
        """None: a module of one's own is stored as it is."""
        return None

    def in_order(self, tree: Any) -> Any:
        """The tree itself."""
        return tree

    def arrange(self, tree: Any) -> Any:
        """The tree itself."""
        return tree

    def padded_rows(self, path: str, shape: tuple[int, ...]) -> int | None:
        """None: nothing is padded."""
        return None

    def describe(self, held: Mapping[str, int], *, parameters: bool) -> str:
        """Sizes of the layout and of the state; the whole table of specs on request."""
        layout, sizes = self.plan.layout, [f"{a}={n}" for a, n in self.plan.layout.sizes.items() if n > 1]
        lines = [f"{self.anatomy.name} on {' x '.join(sizes) or 'one device'}, partitioned by the compiler"]
        if layout.fsdp > 1:
            lines.append(f"ZeRO-{layout.zero} over fsdp={layout.fsdp}")
        if layout.accumulate > 1:
            lines.append(
                f"accumulate {layout.accumulate}: gradients of {layout.accumulate} microbatches summed per step"
            )
        whole = [path for path, split in self.plan.splits.items() if not split.sharded]
        if sizes and whole:
            named = ", ".join(f"{path} {self.plan.splits[path].shape}" for path in whole)
            lines.append(f"parameters that no axis splits: {named}")
        lines += gathered.describe(self._to_gather, self.anatomy.parameters.shapes)
        frozen = self.anatomy.parameters.shapes.keys() - self.anatomy.trained
        if frozen:
            kept = {path: split for path, split in self.plan.splits.items() if not split.frozen}
            count = sum(math.prod(split.shape) for split in kept.values())
            lines.append(
                f"trained are {count:,} of {self.num_parameters:,} parameters, {count / self.num_parameters:.2%}, as "
                f"wrt says: {', '.join(kept)}"
            )
        carried = ", ".join(self.anatomy.variables.shapes)
        lines += [f"carried from step to step, not trained: {carried}"] if carried else []
        lines.append(
            f"{self.num_parameters:,} parameters; on each device {size(held['params'])} of parameters and "
            f"{size(held['opt_state'])} of optimizer state"
        )
        return "\n".join([*map(fold, lines), *([str(self.plan.table)] if parameters else [])])

    def evaluation(self, loss: float, weight: float) -> dict[str, float]:
        """Loss and weight."""
        return {"loss": loss, "weight": weight}

    def work(self, batch: Any) -> Work:
        """Rows; what they cost is not known."""
        return Work("rows", rows.count(batch, may_be_abstract=True), None, "")

    def identity(self) -> dict[str, Any]:
        """The module's class; its arrays are compared when they are restored."""
        return {"module": self.anatomy.name}

    def changes(self, saved: Mapping[str, Any], where: str) -> dict[str, tuple[Any, Any]]:
        """A class of another name, which may hold the same arrays."""
        if "module" not in saved:
            of = "a sl.Transformer" if "config" in saved else "unknown: fit did not save it. Use sl.restore"
            raise ValueError(f"the checkpoint of {where} is of another model, not of a {self.anatomy.name}: it is {of}")
        return {"module": (saved["module"], self.anatomy.name)}

    def _loss(self, params: dict[str, Array], variables: dict[str, Array], batch: Any, key: Array):
        """Sum of losses, sum of weights, and the variables and parameters that the module has after the call."""
        module = self.anatomy.assemble(params, variables, key, training=True)
        total, weight = _pair(self.loss_fn(module, batch))
        return total, weight, *self.anatomy.after(module)

    def _assigns(self, params: dict[str, Array], variables: dict[str, Array], batch: Any, key: Array) -> list[str]:
        """The parameters that the module gives another value; see `assigned.py`."""
        paths = list(params)

        def after(values: list[Array]) -> list[Array]:
            found = self._loss(dict(zip(paths, values, strict=True)), variables, batch, key)[3]
            return [found[path] for path in paths]

        origins = handed_through(jax.make_jaxpr(after)([params[path] for path in paths]))
        return [path for number, path in enumerate(paths) if origins[number] != number]

    def _microbatches(self, batch: Any, count: int) -> Any:
        # Rows that a device holds stay on it: microbatch k takes every count-th row.
        spec = NamedSharding(self.plan.mesh, PartitionSpec(None, *self.plan.batch_spec()))

        def split(x: Array) -> Array:
            return jax.lax.with_sharding_constraint(x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), spec)

        return jax.tree.map(split, batch)


def _specs_of_dims(anatomy: Anatomy, layout: Layout) -> dict[str, PartitionSpec]:
    """The specs of parameters whose annotations name the logical dims of shardlm's own layers."""
    rules, specs = DimTable.of(layout).rules, {}
    for path, dims in anatomy.dims.items():
        axes = [rules[dim] if dim else () for dim in dims]
        for place, (dim, length) in enumerate(zip(dims, anatomy.parameters.shapes[path].shape, strict=True)):
            if dim == "kv_head" and length % layout.tensor:  # fewer than devices: whole on each
                axes[place] = ()
        specs[path] = PartitionSpec(*(names or None for names in axes))
    return specs


def _freeze(table: ParameterTable, trained: frozenset[str]) -> ParameterTable:
    """The table in which the parameters that are not trained are frozen, and their reasons say so."""
    kept = {path: path in trained for path in table.splits}
    splits = {path: replace(split, frozen=not kept[path]) for path, split in table.splits.items()}
    reasons = {path: reason + ", frozen" * (not kept[path]) for path, reason in table.reasons.items()}
    return replace(table, splits=splits, reasons=reasons)


def _wide() -> Any:
    """The widest float that JAX computes in: what losses and weights are summed in."""
    return jax.dtypes.canonicalize_dtype(float)


def _pair(result: Any) -> tuple[Array, Array]:
    """What a loss function returned, checked, as two wide scalars; only the first is differentiated."""
    expected = "loss_fn returns a pair of scalars, (sum of losses, sum of weights)"
    if not isinstance(result, tuple | list) or len(result) != 2:
        kind = f"{len(result)} values" if isinstance(result, tuple | list) else f"a {type(result).__name__}"
        kind = f"one array of shape {result.shape}" if isinstance(result, Array) else kind
        raise TypeError(f"{expected}; this one returned {kind}")
    found = []
    for name, value in zip(("sum of losses", "sum of weights"), result, strict=True):
        if not isinstance(value, int | float | Array) and not hasattr(value, "dtype"):
            raise TypeError(f"{expected}; its {name} is a {type(value).__name__}")
        if jnp.shape(value):
            raise TypeError(f"{expected}; its {name} has shape {jnp.shape(value)}: sum it, do not average")
        if not jnp.issubdtype(jnp.result_type(value), jnp.floating) and name == "sum of losses":
            raise TypeError(f"{expected}; its {name} has dtype {jnp.result_type(value)}, which has no gradient")
        found.append(jnp.asarray(value).astype(_wide()))
    return found[0], jax.lax.stop_gradient(found[1])


def _check_layout(layout: Layout) -> None:
    problems = []
    if layout.sequence_parallel:
        problems.append("sequence_parallel is of sl.Transformer: constrain activations in the module, or leave it out")
    if layout.remat != "none":
        problems.append(f"remat={layout.remat!r} is of sl.Transformer: use nnx.remat in the module, and remat='none'")
    if layout.reduce_gradients is not None:
        problems.append(
            f"reduce_gradients={layout.reduce_gradients!r} is of sl.Transformer: the compiler decides when gradients "
            "of your own module are summed; leave it out"
        )
    if layout.pipe > 1:
        problems.append(
            f"pipe={layout.pipe}: only a sl.Transformer is cut into stages; use fsdp or data, or, for a "
            "sl.Transformer, sl.Trainer(config, ...)"
        )
    raise_all("these settings have no effect on a module of your own", problems)
