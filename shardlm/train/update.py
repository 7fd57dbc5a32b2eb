"""One update by any Optax transformation, on the model's arrays whatever the layout stores.

The optimizer runs outside the manual region, on global arrays split as gradients are, so it is right without knowing of
the mesh; what its own global arithmetic needs (a norm over all leaves) the compiler adds.

Where the layout stores a parameter otherwise than the model has it (`view.py`), an optimizer that takes every element
for itself (`elementwise.py`) works on what is stored. Any other is given gradients, parameters and its own state as the
model has them, and what it returns is stored again. Its state is kept in one form in either case: what has a
parameter's shape is stored as the parameter is, everything else as the optimizer made it.
"""

import inspect
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax
import optax
from jax import Array
from jax.extend.core import Literal
from jax.sharding import NamedSharding, PartitionSpec

from shardlm.dims import Split
from shardlm.train import elementwise, masks
from shardlm.train.frozen import trained
from shardlm.train.optimizer import adamw
from shardlm.train.paths import flatten, unflatten
from shardlm.train.program import Program
from shardlm.train.view import View, as_model, as_stored, cleared, owner

_paths = jax.tree_util.tree_leaves_with_path


class Update:
    """An optimizer on a program's parameters.

    Args:
        program: of the run.
        optimizer: any Optax transformation that needs no more than gradients, parameters and the loss.
    """

    def __init__(self, program: Program, optimizer: Any):
        self.program = program
        if isinstance(optimizer, optax.MultiSteps):
            optimizer = optimizer.gradient_transformation()
        self.optimizer = optax.with_extra_args_support(optimizer)
        self._views = {p: v for p, v in program.plan.views.items() if not program.plan.splits[p].frozen}
        self._manual = program.engine == "manual"

    def init(self, params: Any) -> Any:
        """The optimizer's state for stored parameters; traced."""
        params = trained(params, self.program.plan.splits)
        if not self._views:
            return self.optimizer.init(params)
        model = as_model(params, self._views, self._manual)
        return as_stored(self.optimizer.init(model), self._views, self._manual)

    def __call__(self, grads: Any, opt_state: Any, params: Any, loss: Array) -> tuple[Any, Any]:
        """The updated parameters and state; traced.

        Args:
            grads, opt_state, params: as stored, the parameters split as the gradients are.
            loss: passed on as `value` to an optimizer that takes further arguments.
        """
        if not self.rearranges:
            updates, state = self.raw(grads, opt_state, params, loss)
            if self._views and not self._answer.keeps_zeros:
                updates, state = cleared((updates, state), self._views)
        else:
            grads, before, model = as_model((grads, opt_state, params), self._views, self._manual)
            updates, state = as_stored(self.raw(grads, before, model, loss), self._views, self._manual)
        # What the state is, it stays: a number in a wider type, such as the loss, does not widen it.
        state = jax.tree.map(lambda new, old: new if _is_like(new, old) else new.astype(old.dtype), state, opt_state)
        return optax.apply_updates(params, updates), state

    @property
    def rearranges(self) -> bool:
        """Whether the optimizer is given other arrays than those that are stored."""
        return bool(self._views) and not self._answer.elementwise

    @cached_property
    def abstract(self) -> Any:
        """The state as `jax.ShapeDtypeStruct`s with shardings."""
        mesh, splits = self.program.plan.mesh, self.program.plan.splits

        def place(keys: tuple[Any, ...], x: Any) -> jax.ShapeDtypeStruct:
            shape, spec = _stored(x.shape, owner(keys, splits), splits, self._views)
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree_util.tree_map_with_path(place, jax.eval_shape(self.optimizer.init, self.model_params))

    @cached_property
    def model_params(self) -> Any:
        """What is trained, as the model has it, as shapes."""
        flat = flatten(trained(self.program.plan.shapes, self.program.plan.splits))
        shapes = {path: self._views[path].shape if path in self._views else x.shape for path, x in flat.items()}
        return unflatten({path: jax.ShapeDtypeStruct(shapes[path], x.dtype) for path, x in flat.items()})

    @cached_property
    def model_arguments(self) -> tuple[Any, Any, Any, Any]:
        """Gradients, state, parameters and loss as the optimizer sees them, as shapes."""
        state = jax.eval_shape(self.optimizer.init, self.model_params)
        return (
            self.model_params,
            state,
            self.model_params,
            jax.ShapeDtypeStruct((), jax.dtypes.canonicalize_dtype(float)),
        )

    def cost(self) -> tuple[float, int]:
        """Bytes that a device sends to rearrange arrays for one update, and bytes of the copies that it then holds."""
        sent, held = 0.0, 0
        for used, (keys, x) in zip(self._used, _paths(self.model_arguments), strict=True) if self.rearranges else ():
            path, is_parameter = owner(keys, self._views), keys[0].idx == 2
            if path is None or x.shape != self._views[path].shape or (is_parameter and not used):
                continue
            # The state goes back, and so do updates, as many as there are gradients; parameters do not.
            view = self._views[path]
            back = 0.0 if is_parameter or view.dim is None else view.sent(x.dtype.itemsize)
            sent += view.sent(x.dtype.itemsize) + back
            shard = NamedSharding(view.mesh, view.spec).shard_shape(view.shape)
            held += (1 if is_parameter else 2) * math.prod(shard) * x.dtype.itemsize
        return sent, held

    @property
    def _used(self) -> list[bool]:
        """Of each argument, whether the optimizer reads it: the compiler drops what is not."""
        program = jax.make_jaxpr(self.raw)(*self.model_arguments).jaxpr
        read = {x for equation in program.eqns for x in equation.invars if not isinstance(x, Literal)}
        return [x in read for x in program.invars]

    def check(self) -> None:
        """Raise ValueError for an optimizer that a step cannot serve, in which one sentence says why."""
        try:
            grads, state, _, _ = self.model_arguments
            updates, after = jax.eval_shape(self.raw, *self.model_arguments)
        except Exception as error:
            raise ValueError(
                f"optimizer: it fails on the parameters of this model: {error}. A step hands an optimizer the mean "
                "gradients, its state, the parameters and, as value=, the loss; one that needs gradients of single "
                "examples, or functions to call again (value_fn, grad_fn, obj_fn, ...), cannot be used in a Trainer"
            ) from error
        for what, found, expected in (("updates", updates, grads), ("state", after, state)):
            if (difference := _difference(found, expected)) is not None:
                raise ValueError(
                    f"optimizer: {what} that its update returns are not like those that it was given: {difference}. "
                    "An update keeps every structure and shape"
                )

    def raw(self, grads: Any, opt_state: Any, params: Any, loss: Array) -> tuple[Any, Any]:
        """The optimizer's own update, of the model's arrays: updates and state."""
        if not self._takes_value:
            return self.optimizer.update(grads, opt_state, params)
        return self.optimizer.update(grads, opt_state, params, value=loss)

    @cached_property
    def _takes_value(self) -> bool:
        """Whether `update` may be called with value=: those of Optax ignore what they do not know, with exceptions."""
        parameters = inspect.signature(self.optimizer.update).parameters.values()
        return any(p.name == "value" or p.kind is p.VAR_KEYWORD for p in parameters)

    @cached_property
    def _answer(self) -> elementwise.Answer:
        """Whether the optimizer takes every element for itself."""
        grads, _, params, loss = model = self.model_arguments
        shapes = trained(self.program.plan.shapes, self.program.plan.splits)
        # Without shardings, which traced programs would show.
        stored = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (shapes, self.abstract, shapes, loss))
        tags = []
        for keys, x in _paths(model):
            path = owner(keys, self._views)
            tags.append(self._views[path].tag if path is not None and x.shape == self._views[path].shape else None)
        treedef, count = jax.tree.structure(model), len(jax.tree.leaves(params))

        def update(*flat: Any) -> Any:
            return jax.tree.leaves(self.raw(*jax.tree.unflatten(treedef, flat)))

        # The results are updates and state, as the first arguments are gradients and state.
        results = tags[: len(tags) - count - 1]
        try:
            return elementwise.read(update, jax.tree.leaves(stored), jax.tree.leaves(model), tags, results)
        except (TypeError, ValueError):  # it is made for the model's shapes alone
            return elementwise.Answer(False, False)


def chosen(program: Program, optimizer: Any) -> Any:
    """The optimizer of a Trainer, `sl.adamw(3e-4, steps=1000)` for None.

    Raises:
        ValueError: a step cannot serve it.
    """
    optimizer = adamw(3e-4, steps=1000) if optimizer is None else optimizer
    update = Update(program, optimizer)
    update.check()
    masks.warn(update.raw, update.model_arguments, program.plan.splits)
    return optimizer


def _stored(
    shape: tuple[int, ...], path: str | None, splits: Mapping[str, Split], views: Mapping[str, View]
) -> tuple[tuple[int, ...], PartitionSpec]:
    """Shape and spec in which a part of the state is stored that belongs to the parameter at `path`.

    What has the parameter's shape is stored and split as its gradient, dim by dim. An array with one dim fewer
    (Adafactor's factored moments) is split as the dims that are left; all else is whole.
    """
    if path is None:
        return shape, PartitionSpec()
    split = splits[path]
    whole, spec = (views[path].shape, views[path].spec) if path in views else (split.shape, split.sharded)
    if shape == whole:
        return split.shape, split.sharded
    names = tuple(spec) + (None,) * (len(whole) - len(spec))
    for dim in range(len(whole)):
        if shape == whole[:dim] + whole[dim + 1 :]:
            return shape, PartitionSpec(*names[:dim], *names[dim + 1 :])
    return shape, PartitionSpec()


def _is_like(new: Any, old: Any) -> bool:
    return getattr(new, "dtype", old.dtype) == old.dtype


def _difference(found: Any, expected: Any) -> str | None:
    """The first difference of structure or shape, in words."""
    if (a := jax.tree.structure(found)) != (b := jax.tree.structure(expected)):
        return f"the structure is {str(a)[:200]}, and was {str(b)[:200]}"
    for (keys, x), y in zip(_paths(found), jax.tree.leaves(expected), strict=True):
        if x.shape != y.shape:
            return f"{jax.tree_util.keystr(keys, simple=True, separator='/')} has shape {x.shape}, and had {y.shape}"
    return None
