"""What a training run carries from step to step, and where each array of it lives."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from shardlm._arguments import USED_UP, is_masked, is_used_up
from shardlm._arguments import check_usable as check_arrays
from shardlm.models.kinds import require_params
from shardlm.train.engine import Parameters, flatten, unflatten
from shardlm.train.kinds import require_same_model, require_state
from shardlm.train.program import Program
from shardlm.train.update import Update


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "params", "opt_state", "variables"),
    meta_fields=("layer_rows",),
)
@dataclass(frozen=True)
class TrainState:
    """A training run between two steps: a pytree of global arrays, nothing else.

    Attributes:
        step: int32 scalar, updates made so far.
        params: a nested dict of arrays, whole or, with ZeRO-3, split over the fsdp axis.
        opt_state: Optax's state for the parameters that are trained; arrays of a parameter's shape are stored as it is,
            and split as its gradient is.
        variables: what the model carries and does not train, such as running statistics: a nested dict of arrays, empty
            for a `sl.Transformer`.
        layer_rows: where a pipeline stores layers otherwise than as [num_layers, ...], which layer each row is, -1 for
            padding: (0, 1, -1, 2, 3, 4), or, with chunks, a tuple of such for each; see `parallel.pipeline.stages`.
            `Trainer.in_order` undoes it.
    """

    step: Any
    params: Parameters
    opt_state: Any
    variables: Any = field(default_factory=dict)
    layer_rows: tuple[Any, ...] | None = None

    def __repr__(self) -> str:
        if is_used_up(self):
            return f"TrainState({USED_UP})"
        try:
            step = str(int(self.step))
        except TypeError:  # a shape, or a value that is being traced
            step = type(self.step).__name__
        parts = {name: jax.tree.leaves(getattr(self, name)) for name in ("params", "opt_state", "variables")}
        sizes = [
            f"{name}={sum(np.size(x) if not hasattr(x, 'size') else x.size for x in leaves):,} numbers in "
            f"{len(leaves)} arrays"
            for name, leaves in parts.items()
            if leaves
        ]
        return f"TrainState(step={step}, {', '.join(sizes)})"


def check_usable(state: TrainState, like: TrainState) -> None:
    """Raise ValueError for a state that a step has used up, on which XLA would crash, or that is another model's.

    Args:
        state: given by a user; what is no state at all is a TypeError.
        like: the trainer's abstract state.
    """
    require_state(state, like)
    if state.layer_rows != like.layer_rows:
        found, expected = (x.layer_rows or "in the model's order" for x in (state, like))
        raise ValueError(
            f"this state's layers are stored for another pipeline: {found}, and here {expected}. Move it by a "
            "checkpoint: sl.save(path, state), then sl.restore(path, trainer)"
        )
    require_same_model(state, like)
    check_arrays(state)


def init(
    program: Program, optimizer: optax.GradientTransformation, seed: int, given: Parameters | None = None
) -> TrainState:
    """The initial state; to be compiled with `abstract`'s shardings, so that each device makes its own part only.

    Args:
        program, optimizer, seed: of the run.
        given: parameters of `place` to start from; what they lack is drawn.
    """
    params, variables = program.initialize(seed)
    params = unflatten(flatten(params) | flatten(given or {}))
    opt_state = Update(program, optimizer).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, variables, program.layer_rows)


def place(program: Program, like: TrainState, params: Parameters) -> Parameters:
    """A copy of parameters as the run stores them; adapters may be missing.

    Args:
        program: of the run.
        like: its abstract state.
        params: arrays of the host or of devices, layers as stored here or in the model's order.

    Raises:
        ValueError: they are not this model's; every difference is listed, up to ten.
    """
    check_arrays(params, "init")
    given, expected = flatten(require_params(params)), flatten(like.params)
    expected = {
        path: leaf
        for path, leaf in expected.items()
        if path in given
        or program.plan.splits[path].frozen
        or not any(split.frozen for split in program.plan.splits.values())
    }
    if any(path in given and given[path].shape != leaf.shape for path, leaf in expected.items()):
        given = flatten(program.arrange(jax.tree.map(np.asarray, params)))
    problems = [f"{path}: missing" for path in expected if path not in given]
    problems += [f"{path}: a masked array, whose mask is not read" for path, leaf in given.items() if is_masked(leaf)]
    problems += [f"{path}: not expected" for path in given if path not in expected]
    for path, leaf in expected.items():
        found, wanted = (f"{x.dtype}{list(x.shape)}" for x in (given.get(path, leaf), leaf))
        problems += [f"{path}: {found}, expected {wanted}"] if found != wanted else []
    if problems:
        raise ValueError(
            f"init: {len(problems)} parameters are not those of this model: {'; '.join(problems[:10])}"
            f"{' ...' * (len(problems) > 10)}"
        )
    # A copy in any case: a step uses up what it is given.
    placed = {path: jax.device_put(given[path], leaf.sharding, may_alias=False) for path, leaf in expected.items()}
    if wrong := not_finite(placed):
        raise ValueError(
            f"init: {len(wrong)} parameters hold NaN or infinity: {', '.join(wrong[:10])}{' ...' * (len(wrong) > 10)}"
        )
    return unflatten(placed)


def not_finite(arrays: dict[str, Array]) -> list[str]:
    """Paths of the arrays of floats that hold NaN or infinity in what this process has of them.

    Each device looks at its own shards: nothing is sent, so that processes need not do it together.
    """
    wrong: set[str] = set()
    on_devices: dict[Any, dict[str, Array]] = {}
    for path, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            continue
        for shard in array.addressable_shards:
            if shard.device.platform != "cpu":
                on_devices.setdefault(shard.device, {})[path] = shard.data
            elif not np.isfinite(np.asarray(shard.data)).all():
                wrong.add(path)
    for found in [jax.device_get(_are_finite(shards)) for shards in on_devices.values()]:
        wrong |= {path for path, is_finite in found.items() if not is_finite}
    return [path for path in arrays if path in wrong]


@jax.jit
def _are_finite(arrays: dict[str, Array]) -> dict[str, Array]:
    return {path: jnp.isfinite(x).all() for path, x in arrays.items()}


def abstract(program: Program, optimizer: optax.GradientTransformation) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`s with shardings; nothing is allocated."""
    plan = program.plan

    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        plan.shapes,
        plan.shardings("stored"),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(plan.mesh, PartitionSpec()))
    opt_state = Update(program, optimizer).abstract
    return TrainState(step, params, opt_state, program.variables, program.layer_rows)
