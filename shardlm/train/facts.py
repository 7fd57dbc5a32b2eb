"""What a trainer says of itself before anything runs: its model, its size, its devices."""

from functools import cached_property
from typing import Any

from jax.sharding import Mesh, NamedSharding

from shardlm.layout import Layout
from shardlm.models.config import TransformerConfig
from shardlm.train.program import Program
from shardlm.train.transformer import TransformerProgram


class Facts:
    """Read-only facts of a `Trainer`, which all follow from its program and mesh."""

    program: Program
    layout: Layout
    mesh: Any
    engine: str

    @property
    def config(self) -> TransformerConfig:
        """The configuration of a `sl.Transformer`, padded as the layout needs."""
        if isinstance(self.program, TransformerProgram):
            return self.program.config
        raise AttributeError("config: a trainer made by from_module has none, it is of a sl.Transformer alone")

    @cached_property
    def num_parameters(self) -> int:
        """Number of the model's parameters, padding of the vocabulary not counted."""
        return self.program.num_parameters

    @property
    def has_devices(self) -> bool:
        """Whether the mesh has devices to run on."""
        return isinstance(self.mesh, Mesh)

    @property
    def first_device(self) -> Any:
        """The mesh's first device; all are of its kind."""
        return self.mesh.devices.flat[0]

    @property
    def batch_sharding(self) -> NamedSharding:
        """The sharding of a batch array [batch, ...]."""
        return self.program.batch_sharding

    def __repr__(self) -> str:
        """The model, its size, the layout and the devices, in one line."""
        devices = f"{self.mesh.size} device{'s' * (self.mesh.size > 1)}"
        if self.has_devices:
            devices = f"{self.mesh.size} x {self.first_device.device_kind}"
        else:
            devices += " that need not exist"
        return (
            f"Trainer({self.program.title}: {self.num_parameters:,} parameters; layout {self.layout} on {devices}; "
            f"{self.engine} engine)"
        )
