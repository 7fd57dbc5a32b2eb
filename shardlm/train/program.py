"""What a Trainer asks of a model on a layout: its arrays, its gradients, its batches, and what to say of it.

Two programs answer: `transformer.py` for our own models, by either engine, and `module.py` for any Flax module. A
Trainer holds one and knows nothing else of the model.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from shardlm.dims import Split
from shardlm.layout import Layout
from shardlm.models.kinds import kind
from shardlm.train.engine import Parameters
from shardlm.train.view import View

Variables = dict[str, Any]
"""A nested dict of arrays that a model carries from step to step and does not train."""


class Gradients(NamedTuple):
    """Of one step.

    Attributes:
        total: the sum of losses over the global batch.
        weight: the sum of weights; the loss is `total / weight`.
        grads: gradients of the loss, like the parameters that are trained, split as the optimizer state is.
        variables: the variables after the step.
        assigned: the parameters to which the model itself gave another value, with that value, on which the optimizer's
            update is made; empty for a `sl.Transformer`.
    """

    total: Array
    weight: Array
    grads: Parameters
    variables: Variables
    assigned: Parameters = {}


class Work(NamedTuple):
    """What one batch makes the devices do.

    Attributes:
        unit: what is counted, "tokens" or "rows".
        count: how many of them this process's batch has.
        flops: of one of them, forward and backward; None where it is not known.
        dtype: what is computed in.
    """

    unit: str
    count: int
    flops: float | None
    dtype: str


class Plan(Protocol):
    """A model's parameters on a layout, known before any array exists: see `engine.Plan`."""

    @property
    def layout(self) -> Layout:
        """With its sizes filled in."""
        ...

    @property
    def mesh(self) -> Any:
        """The devices, or, where they need not exist, their shape."""
        ...

    @property
    def shapes(self) -> Parameters:
        """The parameters as `jax.ShapeDtypeStruct`s."""
        ...

    @property
    def splits(self) -> dict[str, Split]:
        """For each path, how it is split."""
        ...

    @property
    def in_order(self) -> dict[str, Split]:
        """The same of what `Program.in_order` gives."""
        ...

    @property
    def views(self) -> Mapping[str, View]:
        """By path, the parameters that the layout stores otherwise than the model has them."""
        ...

    def shardings(self, which: str) -> Parameters:
        """A sharding for each parameter: `"stored"`, `"sharded"` (as the optimizer state), `"whole"`, `"ordered"`.

        The last is that of a gradient whose layers are in the model's order.
        """
        ...

    def batch_spec(self) -> PartitionSpec:
        """The spec of a batch array."""
        ...


class Program(Protocol):
    """A model on a layout. Parameters, variables and batches are pytrees of global arrays.

    Functions named as computing (`initialize`, `gradients`, `evaluate`, `stored`) are called under `jax.jit`.
    """

    @property
    def plan(self) -> Plan:
        """How the parameters are split."""
        ...

    @property
    def engine(self) -> str:
        """Whose collectives run it: `"manual"` or `"auto"`."""
        ...

    @property
    def variables(self) -> Variables:
        """The variables as `jax.ShapeDtypeStruct`s with shardings; empty where there are none."""
        ...

    @property
    def layer_rows(self) -> tuple[Any, ...] | None:
        """Where layers are not stored in the model's order, which each row is; see `TrainState`."""
        ...

    def in_order(self, tree: Any) -> Any:
        """Arrays like the parameters or the optimizer state, their layers in the model's order and on every stage."""
        ...

    def arrange(self, tree: Any) -> Any:
        """The inverse of `in_order`, of NumPy arrays."""
        ...

    @property
    def batch_sharding(self) -> NamedSharding:
        """The sharding of a batch array."""
        ...

    def on_one_device(self, device: Any) -> "Program":
        """The same model as plain JAX on one device, whose layout splits nothing."""
        ...

    @property
    def title(self) -> str:
        """The model in words."""
        ...

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        ...

    @property
    def weight_name(self) -> str:
        """What the metrics call the sum of weights."""
        ...

    def initialize(self, seed: int) -> tuple[Parameters, Variables]:
        """The initial values, which depend on the seed alone."""
        ...

    def gradients(self, params: Parameters, variables: Variables, batch: Any, key: Array) -> Gradients:
        """Loss, gradients and the variables' next values; `key` is of the step's randomness."""
        ...

    def evaluate(self, params: Parameters, batch: Any, variables: Variables | None = None) -> tuple[Array, Array]:
        """Sum of losses and sum of weights, without randomness."""
        ...

    def stored(self, shards: Parameters) -> Parameters:
        """Updated parameters, split as the optimizer state is, to where they are stored."""
        ...

    def place(self, batch: Any, *, may_be_empty: bool = False) -> Any:
        """Check a batch and put it on the devices."""
        ...

    def abstract_batch(self, batch: Any) -> Any:
        """Check a batch's structure; what `place` would make of it, as `jax.ShapeDtypeStruct`s with shardings."""
        ...

    def check_rows(self, batch_size: int) -> None:
        """Raise LayoutError where a global batch of so many rows cannot be split."""
        ...

    def padded_rows(self, path: str, shape: tuple[int, ...]) -> int | None:
        """How many rows of what is stored at `path` are real; None where none is padding."""
        ...

    def describe(self, held: Mapping[str, int], *, parameters: bool) -> str:
        """What the layout does to the model; `held` is the bytes of `params` and `opt_state` on a device."""
        ...

    def evaluation(self, loss: float, weight: float) -> dict[str, float]:
        """What `evaluate` returns for a mean loss and a sum of weights."""
        ...

    def work(self, batch: Any) -> Work:
        """What a batch of this process makes the devices do."""
        ...

    def identity(self) -> dict[str, Any]:
        """What a checkpoint says of its model: a dict that JSON can hold."""
        ...

    def changes(self, saved: Mapping[str, Any], where: str) -> dict[str, tuple[Any, Any]]:
        """What differs from a checkpoint's `identity` and may; raises ValueError for what may not."""
        ...


def count_devices(devices: Sequence[Any] | int) -> int:
    """How many devices were given, themselves or as a number; ValueError for a number that cannot be one."""
    if not isinstance(devices, int):
        if isinstance(devices, str) or not isinstance(devices, Sequence | np.ndarray):
            raise TypeError(
                f"devices is {kind(devices)}: give a list of devices, as jax.devices() returns, or a number"
            )
        return len(devices)
    if isinstance(devices, bool) or devices < 1:
        raise ValueError(f"devices={devices!r}: give devices, or a positive number of devices that need not exist")
    return devices


def resolve(layout: Layout | str | None, devices: Sequence[Any] | int | None) -> tuple[Layout, Sequence[Any] | int]:
    """The layout, or its text, with its sizes filled in, and its devices: all, or the first for the default layout."""
    chosen = Layout.of(layout)
    if devices is None:
        devices = jax.devices()[:1] if layout is None else jax.devices()
    return chosen.resolve(count_devices(devices)), devices


def require_devices(mesh: Mesh | AbstractMesh) -> None:
    """Raise ValueError for a mesh on which nothing can run."""
    if isinstance(mesh, AbstractMesh) or mesh.devices is None:
        raise ValueError(
            f"the {mesh.size} devices of this Trainer do not exist, as devices={mesh.size} says: give it "
            f"devices to run on, or on a CPU call sl.fake_devices({mesh.size}) first and leave devices out"
        )
    if type(mesh.devices.flat[0].client).__name__ == "CompileOnlyPyClient":
        raise ValueError("these devices can be compiled for (explain(..., compile=True)), but nothing runs there")


def mesh_on(layout: Layout, devices: Sequence[Any] | int) -> Any:
    """The layout's mesh over these devices, or, where only their number is given, over none."""
    return layout.abstract_mesh() if isinstance(devices, int) else layout.mesh(devices)
