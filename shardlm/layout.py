"""The mesh axes, and how a model, its batch and its optimizer state are laid out over them.

A `Layout` says how many devices each axis has and what a training step may choose besides. It checks itself when it is
built, against a model in `check`, and against the devices in `mesh`; each error lists every conflict at once.
"""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from shardlm._errors import LayoutError, is_int, raise_all
from shardlm._layout_table import REDUCE_GRADIENTS, REMAT, ZERO, as_html, as_text
from shardlm._layout_text import read
from shardlm._pipeline import Pipeline
from shardlm._placement import place


class Axis(StrEnum):
    """A mesh axis. All six always exist, slowest network first; nowhere else are their names written."""

    PIPE = "pipe"
    DATA = "data"
    FSDP = "fsdp"
    EXPERT = "expert"
    CONTEXT = "context"
    TENSOR = "tensor"


_NOT_YET: tuple[Axis, ...] = (
    Axis.EXPERT,
    Axis.CONTEXT,
)
_BATCH = (Axis.DATA, Axis.FSDP, Axis.EXPERT)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many devices each mesh axis has, and how a training step uses them.

    Attributes:
        pipe: layers are split over it, into stages.
        data: the batch is split over it, and nothing else.
        fsdp: the batch is split over it, and what `zero` says besides.
        expert: the batch is split over it, and the experts' weights.
        context: the sequence is split over it.
        tensor: heads, MLP width and vocabulary are split over it.
        zero: what `fsdp` shards (arXiv:1910.02054): 1 optimizer state, 2 gradients as well, 3 parameters as well.
        sequence_parallel: activations between blocks are split over `tensor` by sequence (arXiv:2205.05198).
        accumulate: microbatches per step, whose gradients are summed before one update.
        remat: what the backward pass recomputes: "none", "dots" (all but matrix products) or "full".
        reduce_gradients: when gradients are summed over the batch axes: "layer" is inside the backward pass, layer by
            layer (it can overlap with computation), "step" is once after it. None is "layer" without accumulation and
            "step" with it; `gradient_reduction` says which one it is.

        pipeline: how the stages of `pipe` take turns; default `Pipeline()` where there are several.

    One size may be -1: it is filled from the number of devices.

    Raises:
        LayoutError: settings that are out of range or contradict each other.

    Example:
        >>> Layout(data=2, fsdp=-1, tensor=2).resolve(8).fsdp
        2
    """

    pipe: int = 1
    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    zero: int = 3
    sequence_parallel: bool = False
    accumulate: int = 1
    remat: str = "none"
    reduce_gradients: str | None = None
    pipeline: Pipeline | None = None

    def __post_init__(self):
        problems = []
        for axis, size in self.sizes.items():
            if not is_int(size) or (size < 1 and size != -1):
                problems.append(f"{axis}={size!r} is not a positive integer, nor -1 (fill from the number of devices)")
            elif size != 1 and axis in _NOT_YET:
                available = ", ".join(other for other in Axis if other not in _NOT_YET)
                problems.append(f"{axis}={size}: the {axis} axis is not available yet; available are {available}")
        free = [axis for axis, size in self.sizes.items() if size == -1 and axis not in _NOT_YET]
        if len(free) > 1:
            problems.append(f"{' and '.join(free)} are -1, but only one size can be filled from the others")
        if not is_int(self.zero) or self.zero not in ZERO:
            problems.append(f"zero={self.zero!r} is not one of {_legal(ZERO)}")
        if not isinstance(self.sequence_parallel, bool):
            problems.append(f"sequence_parallel={self.sequence_parallel!r} is not True or False")
        elif self.sequence_parallel and self.tensor == 1:
            problems.append(
                "sequence_parallel=True has no effect on tensor=1, the axis it splits activations over: "
                "set tensor to 2 or more, or leave sequence_parallel out"
            )
        if not is_int(self.accumulate) or self.accumulate < 1:
            problems.append(f"accumulate={self.accumulate!r} is not a positive integer (microbatches per step)")
        if self.remat not in REMAT:
            problems.append(f"remat={self.remat!r} is not one of {_legal(REMAT)}")
        if self.reduce_gradients is not None and self.reduce_gradients not in REDUCE_GRADIENTS:
            problems.append(
                f"reduce_gradients={self.reduce_gradients!r} is not one of {_legal(REDUCE_GRADIENTS)}, or None"
            )
        problems += self._pipeline_problems()
        raise_all("this layout contradicts itself", problems)
        if self.pipe != 1 and self.pipeline is None:
            object.__setattr__(self, "pipeline", Pipeline())
        if self.zero < 3 and self.fsdp == 1:
            warnings.warn(
                f"zero={self.zero} has no effect: it shards over the fsdp axis, and fsdp=1. "
                f"To shard {ZERO[self.zero]} over data-parallel devices, move them from data to fsdp.",
                stacklevel=3,
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """The layout that `text` describes: settings separated by commas, flags bare or with true or false.

        Raises:
            LayoutError: an unknown or repeated setting, or a value of the wrong kind.

        Example:
            >>> Layout.parse("fsdp=4, tensor=2, sequence_parallel") == Layout(fsdp=4, tensor=2, sequence_parallel=True)
            True
        """
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        settings, problems = read(text, defaults, {"pipeline": Pipeline.parse})
        raise_all(f"cannot read the layout {text!r}", problems)
        return cls(**settings)

    @classmethod
    def of(cls, layout: "Layout | str | None") -> Self:
        """The layout that a user gave: itself, what a text describes, or one device for None.

        Raises:
            LayoutError: the text describes no layout.
            TypeError: it is neither; settings in a dict, for example, go to the constructor: Layout(**settings).
        """
        if isinstance(layout, str):
            return cls.parse(layout)
        if layout is None:
            return cls()
        if not isinstance(layout, cls):
            raise TypeError(
                f"layout is {_kind(layout)}; give a sl.Layout, as in sl.Layout(data=2, tensor=4), or its text, as in "
                '"data=2,tensor=4"'
            )
        return layout

    def __str__(self) -> str:
        """What differs from the defaults, in the form `parse` reads."""
        changed = {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }
        return ",".join(name if value is True else f"{name}={value}" for name, value in changed.items()) or "data=1"

    @property
    def sizes(self) -> dict[Axis, int]:
        """Number of devices of each axis, in mesh order; an unresolved one is -1."""
        return {axis: getattr(self, axis) for axis in Axis}

    @property
    def num_devices(self) -> int:
        """Number of devices in the mesh. Raises LayoutError while a size is -1."""
        for axis, size in self.sizes.items():
            if size == -1:
                raise LayoutError(
                    f"{axis}=-1 is not filled yet: give {axis} a size, or fill it in from the number of devices, as a "
                    "Trainer does and layout.resolve(number)"
                )
        return math.prod(self.sizes.values())

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The axes of more than one device that split the batch, in mesh order."""
        assert self.num_devices  # an error while a size is -1
        return tuple(str(axis) for axis in _BATCH if self.sizes[axis] > 1)

    @property
    def batch_shards(self) -> int:
        """Into how many parts the batch is split over devices."""
        return math.prod(getattr(self, axis) for axis in self.batch_axes)

    @property
    def gradient_reduction(self) -> str:
        """`reduce_gradients` with its default filled in: "layer" or "step"."""
        return self.reduce_gradients or ("layer" if self.microbatches == 1 and self.pipe == 1 else "step")

    @property
    def microbatches(self) -> int:
        """Into how many parts the rows of a step are cut, one after another: by `accumulate` or by the pipeline."""
        return self.accumulate if self.pipeline is None else self.pipeline.microbatches

    @property
    def vocabulary_axes(self) -> tuple[Axis, ...]:
        """The axes that split the vocabulary, the first one major."""
        ends = self.pipeline is not None and self.pipeline.vocabulary == "ends"
        return (Axis.TENSOR,) if ends else (Axis.PIPE, Axis.TENSOR)

    def _pipeline_problems(self) -> list[str]:
        problems = []
        if self.pipe == 1 and self.pipeline is not None:
            problems.append(f"pipeline={self.pipeline} has no effect on pipe=1: set pipe to 2 or more, or leave it out")
        if self.pipeline is not None and not isinstance(self.pipeline, Pipeline):
            problems.append(f"pipeline={self.pipeline!r} is not a Pipeline")
        if isinstance(self.pipeline, Pipeline) and self.pipe > 1:
            if self.pipeline.schedule == "interleaved":
                problems += filter(None, [_divides("microbatches", self.pipeline.microbatches, Axis.PIPE, self.pipe)])
            if self.pipeline.gather == "use" and (self.fsdp == 1 or self.zero == 1):
                problems.append(
                    f"gather='use' has no effect with fsdp={self.fsdp} and zero={self.zero}: it is about parameters or "
                    "gradients that are split over fsdp; set fsdp to 2 or more and zero to 2 or 3, or leave it out"
                )
            if self.pipeline.schedule == "zb-h1" and self.remat != "none":
                problems.append(
                    f"remat={self.remat!r} with schedule 'zb-h1', whose split backward makes nothing again: "
                    "set remat='none', or take schedule '1f1b'"
                )
        if self.pipe != 1 and self.accumulate != 1:
            problems.append(
                f"accumulate={self.accumulate} with pipe={self.pipe}: a pipeline accumulates over its own "
                f"microbatches; use pipeline=Pipeline(microbatches=...) and leave accumulate out"
            )
        if self.pipe != 1 and self.reduce_gradients == "layer":
            problems.append("reduce_gradients='layer' with a pipeline, which sums gradients once, after its last tick")
        return problems

    def resolve(self, num_devices: int) -> Self:
        """This layout on exactly `num_devices` devices, a size of -1 filled in.

        Raises:
            LayoutError: the sizes do not multiply to `num_devices`, or leave nothing whole for the -1.
        """
        known = {axis: size for axis, size in self.sizes.items() if size > 1}
        product = math.prod(known.values())
        arithmetic = _arithmetic(known) if known else "1"
        for axis, size in self.sizes.items():
            if size == -1:
                if num_devices < product or num_devices % product:
                    raise LayoutError(
                        f"{axis}=-1 cannot be filled: {arithmetic} does not divide the {num_devices} devices. "
                        f"Let the other sizes multiply to a divisor: {_near(_divisors(num_devices), product)}"
                    )
                return dataclasses.replace(self, **{axis: num_devices // product})
        if product != num_devices:
            fits = [
                f"{axis}={num_devices // (product // size)}"
                for axis, size in self.sizes.items()
                if axis not in _NOT_YET and num_devices % (product // size) == 0
            ]
            raise LayoutError(
                f"{arithmetic} devices, but there are {num_devices}. Change one size"
                + (f" ({' or '.join(fits)})" if fits else "")
                + ", set one to -1 to have it filled in, "
                + (
                    f"or use fewer devices: mesh(devices=jax.devices()[:{product}])"
                    if product < num_devices
                    else f"or, on a CPU, call fake_devices({product}) before JAX starts"
                )
            )
        return self

    def mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh of all six axes over `devices`, each placed where its axes' traffic suits the hardware.

        On CPU the devices are taken by process, then by id. On TPU and GPU the topology decides, and slices, hosts or
        NVLink domains are spread over the slowest axes.

        Args:
            devices: default all of `jax.devices()`. On CPU and GPU their order does not matter.

        Raises:
            LayoutError: the sizes do not multiply to the number of devices, or the hardware has no such arrangement.
        """
        devices = list(jax.devices() if devices is None else devices)
        layout = self.resolve(len(devices))
        try:
            placed = place(tuple(layout.sizes.values()), devices)
        except (ValueError, NotImplementedError, AssertionError) as error:
            raise LayoutError(f"{layout} does not fit these {len(devices)} devices: {error}") from error
        return Mesh(placed, tuple(str(axis) for axis in Axis), axis_types=(AxisType.Auto,) * len(Axis))

    def abstract_mesh(self) -> AbstractMesh:
        """The mesh of all six axes without devices: enough to trace a program, not to run it."""
        assert self.num_devices  # an error while a size is -1
        names = tuple(str(axis) for axis in Axis)
        return AbstractMesh(tuple(self.sizes.values()), names, axis_types=(AxisType.Auto,) * len(Axis))

    def check(self, config: Any, batch_size: int | None = None, sequence: int | None = None) -> None:
        """Check that a model, and a global batch if given, can be split this way.

        Args:
            config: the model's sizes: num_heads, num_kv_heads, d_ff, d_model. the vocabulary never
                conflicts, as it is padded.
            batch_size: rows of the global batch, all microbatches together.
            sequence: tokens per row.

        Raises:
            LayoutError: one line for every size that does not divide, with those that would.
        """
        assert self.num_devices  # an error while a size is -1
        tensor = self.tensor
        problems = [
            _divides("num_heads", config.num_heads, Axis.TENSOR, tensor),
            _divides("d_ff", config.d_ff, Axis.TENSOR, tensor),
            # Every zero level splits at least the optimizer state, along the embed dim.
            _divides("d_model", config.d_model, Axis.FSDP, self.fsdp),
        ]
        if self.pipeline is not None:
            problems += self.pipeline.layers_problems(config.num_layers, self.pipe)
        kv = config.num_kv_heads
        if kv % tensor and tensor % kv:
            legal = [n for n in _divisors(config.num_heads) if kv % n == 0 or n % kv == 0]
            problems.append(
                f"num_kv_heads={kv} and tensor={tensor}: one must be a multiple of the other; "
                f"tensor can be {_near(legal, tensor)}"
            )
        if sequence is not None and self.sequence_parallel:
            problems.append(_divides("sequence", sequence, Axis.TENSOR, tensor))
        if batch_size is not None:
            split: dict[str, int] = {axis: getattr(self, axis) for axis in self.batch_axes}
            split |= {"accumulate" if self.pipeline is None else "microbatches": self.microbatches}
            parts = math.prod(split.values())
            if batch_size < 1 or batch_size % parts:
                problems.append(
                    f"batch_size={batch_size} is not a positive multiple of {_arithmetic(split)}: it would leave "
                    f"{batch_size / parts:.3g} rows per device and microbatch; use {_multiples(batch_size, parts)}"
                )
        raise_all(f"the layout {self} does not fit", filter(None, problems))

    def describe(self, config: Any = None) -> str:
        """A table of what each axis does; with a model's `config`, also what is replicated or padded for it."""
        return as_text(self, config)

    def _repr_html_(self) -> str:
        return as_html(self)


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"the class {value.__name__}" if isinstance(value, type) else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _legal(choices: Iterable[Any]) -> str:
    return ", ".join(repr(choice) for choice in choices)


def _arithmetic(sizes: dict[Any, int]) -> str:
    """As in "data=2 x fsdp=3 = 6"."""
    return " x ".join(f"{name}={size}" for name, size in sizes.items()) + f" = {math.prod(sizes.values())}"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _near(values: Iterable[int], target: int) -> str:
    """The up to six `values` nearest to `target`, in order."""
    return ", ".join(map(str, sorted(sorted(values, key=lambda value: abs(value - target))[:6])))


def _multiples(value: int, step: int) -> str:
    """The positive multiples of `step` on either side of `value`."""
    below = max(value, 0) // step * step
    return " or ".join(str(multiple) for multiple in (below, below + step) if multiple)


def _divides(name: str, value: int, axis: Axis, size: int) -> str | None:
    if value > 0 and value % size == 0:
        return None
    return (
        f"{name}={value} is not a positive multiple of {axis}={size}: "
        f"{axis} can be {_near(_divisors(value), size)}, or {name} {_multiples(value, size)}"
    )
