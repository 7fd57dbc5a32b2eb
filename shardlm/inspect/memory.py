"""What one device holds during a step: the state to the byte, the rest by following what is alive when."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax

from shardlm.inspect import liveness
from shardlm.inspect.program import Program, bytes_per_device


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        parameters: as they are stored between steps; exact.
        optimizer: the optimizer's state, and whatever else lives between steps; exact.
        batch: the device's part of the batch; exact.
        gradients: as the optimizer receives them; exact.
        activations: what layers keep from their forward for their backward, at the worst moment; None where the program
            is partitioned by the compiler and was not compiled.
        temporaries: everything else that is alive then: gathered weights, scores, logits, results not yet used.
        peak: parameters, optimizer, batch and what is alive besides at the worst moment; None as `activations`.
        where: the line of the operation that runs then.
        largest: the largest single array made on the way, its shape and the line that makes it.
        compiled: what the compiler of the machine at hand says of the whole program (arguments, temporaries and results
            that take no argument's place); None where it was not compiled. XLA's CPU backend computes bfloat16 in
            float32, so there it says more than a GPU would.
    """

    parameters: int
    optimizer: int
    batch: int
    gradients: int
    activations: int | None
    temporaries: int | None
    peak: int | None
    where: str = ""
    largest: tuple[int, str, str] | None = None
    compiled: int | None = None

    @property
    def state(self) -> int:
        """What lives between steps."""
        return self.parameters + self.optimizer


_paths = jax.tree_util.tree_leaves_with_path


def of(program: Program) -> Memory:
    """Follow a step's memory without compiling it."""
    state = program.state
    parameters, everything = bytes_per_device(state.params), bytes_per_device(state)
    batch, gradients = bytes_per_device(program.batch), _gradients(program)
    memory = Memory(parameters, everything - parameters, batch, gradients, None, None, None)
    if not program.manual:
        return memory
    regions = [e.params["jaxpr"] for e in program.jaxpr.jaxpr.eqns if e.primitive.name == "shard_map"]
    worst = max((liveness.peak(region) for region in regions), key=lambda peak: peak.bytes)
    if program.update_copies and gradients + program.update_copies > worst.bytes:
        return dataclasses.replace(
            memory,
            activations=0,
            temporaries=program.update_copies,
            peak=everything + batch + gradients + program.update_copies,
            where="the update, for which the optimizer's arrays are rearranged",
            largest=(worst.largest, worst.largest_shape, worst.largest_where),
        )
    return dataclasses.replace(
        memory,
        activations=worst.kept,
        temporaries=max(0, worst.bytes - worst.kept - gradients),
        peak=everything + batch + worst.bytes,
        where=worst.where,
        largest=(worst.largest, worst.largest_shape, worst.largest_where),
    )


def with_compiled(memory: Memory, compiled: Any) -> Memory:
    """The same with what the compiler says of the compiled step."""
    analysis = compiled.memory_analysis()
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    total = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + max(0, results)
    return dataclasses.replace(memory, compiled=total)


def _gradients(program: Program) -> int:
    """Gradients, of what is trained, are split as the optimizer state is, in the parameters' dtype."""
    sizes, total = program.sizes, 0
    leaves = {"/".join(str(key.key) for key in path): leaf for path, leaf in _paths(program.state.params)}
    for path, split in program.splits.items():
        shards = math.prod(sizes[axis] for axes in (*split.model, split.zero_axes) for axis in axes)
        total += 0 if split.frozen else math.prod(split.shape) // shards * leaves[path].dtype.itemsize
    return total
