"""The report on a step: what it keeps, sends and computes, and how long that takes at best; before it ever runs."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardlm.inspect import advice, flops, hardware, hlo, ledger, memory, pipeline, render, theory, timeline
from shardlm.inspect.flops import Flops
from shardlm.inspect.hardware import Hardware
from shardlm.inspect.ledger import Ledger, total_bytes
from shardlm.inspect.memory import Memory
from shardlm.inspect.pipeline import PipelineCost
from shardlm.inspect.program import Program
from shardlm.inspect.theory import Expected
from shardlm.inspect.timeline import Timeline


@dataclass(frozen=True)
class Report:
    """What a training step costs one device.

    Prints as tables, and shows as HTML in a notebook.

    Attributes:
        layout: as text, the form `Layout.parse` reads.
        sizes: devices along each mesh axis, in mesh order.
        model: the model in words.
        num_parameters: padding of the vocabulary not counted.
        batch_size, sequence: of the global batch; sequence is None where the batch is not of tokens.
        dtype: of the computation.
        memory, flops, ledger: see there. The ledger of a program that the compiler partitions is empty unless it was
            compiled.
        theory: what the textbook says has to be sent; None where there is no textbook (a user's module). Of a pipeline
            whose schedule is the user's own, some of its lines do not say how much.
        pipeline: bubble, stashed inputs, and what is sent between stages; None without a pipeline.
        timeline: seconds on the hardware; None where none was given.
        remat: for each recomputation policy, peak bytes and recomputed FLOPs; empty for a user's module.
        advice: what would make it fit, or what would be cheaper; empty where no hardware was given. That on the bubble
            is in `pipeline`.
        notes: what a reader must know.
        parameters: by path: shape, dtype, and the axes that split each dim.
    """

    layout: str
    sizes: Mapping[str, int]
    model: str
    num_parameters: int
    batch_size: int
    sequence: int | None
    dtype: str
    memory: Memory
    flops: Flops
    ledger: Ledger
    theory: tuple[Expected, ...] | None
    pipeline: PipelineCost | None
    timeline: Timeline | None
    remat: Mapping[str, tuple[int, float]]
    advice: tuple[str, ...]
    notes: tuple[str, ...]
    parameters: Mapping[str, tuple[tuple[int, ...], str, tuple[tuple[str, ...], ...]]]

    @property
    def num_devices(self) -> int:
        """Number of devices in the mesh."""
        return math.prod(self.sizes.values())

    @property
    def hardware(self) -> Hardware | None:
        """The hardware it was asked about."""
        return None if self.timeline is None else self.timeline.hardware

    @property
    def peak(self) -> int | None:
        """Bytes of one device at the worst moment, as predicted; the compiler's own figure where there is no other."""
        return self.memory.compiled if self.memory.peak is None else self.memory.peak

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the hardware's memory; None without hardware or without a peak."""
        return None if self.hardware is None or self.peak is None else self.peak <= self.hardware.memory

    def against_theory(self) -> dict[tuple[str, ...], tuple[float, float | None]]:
        """By mesh axes, what the ledger and what the textbook says one device sends in a step, in bytes.

        What the compiler adds (scalars of a gradient's norm) is left out. The second is None where there is no
        textbook, or where it does not say how much.
        """
        found: dict[tuple[str, ...], float] = {}
        for axes, entries in Ledger(self.ledger.entries).by_axes().items():
            found[axes] = total_bytes(entries)
        expected: dict[tuple[str, ...], float | None] = {}
        for line in self.theory or ():
            before = expected.get(line.axes, 0.0)
            expected[line.axes] = None if before is None or line.bytes is None else before + line.bytes
        keys = sorted(found.keys() | expected.keys(), key=lambda axes: [list(self.sizes).index(a) for a in axes])
        return {axes: (found.get(axes, 0.0), None if self.theory is None else expected.get(axes, 0.0)) for axes in keys}

    def utilisation(self, seconds: float) -> float:
        """Model FLOPs utilisation (MFU) of a step that was measured to take `seconds`.

        Raises:
            ValueError: the report was made without hardware, or the time is not above 0.
        """
        if self.timeline is None:
            raise ValueError('utilisation needs a peak: make the report with explain(..., hardware="h100") or the like')
        return self.timeline.utilisation(seconds)

    def diff(self, other: "Report") -> "Comparison":
        """The two side by side; `other` is the second column."""
        return compare({self.layout: self, other.layout if other.layout != self.layout else "other": other})

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists, strings and numbers; tuples of axes are joined by "x"."""
        return render.as_dict(self)

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __repr__(self) -> str:
        # The fields in full are thousands of lines, and end up in every notebook's file beside the tables.
        peak = "" if self.peak is None else f", peak {render.size(self.peak)} on each"
        return f"<Report on {self.layout}: {self.num_devices} devices{peak}; print it for its tables>"

    def __str__(self) -> str:
        return render.as_text(render.sections(self))

    def __rich__(self) -> Any:
        return render.as_rich(render.sections(self))

    def _repr_html_(self) -> str:
        return render.as_html(render.sections(self))


@dataclass(frozen=True)
class Comparison:
    """Reports side by side, by the names they were given.

    Attributes:
        reports: the reports.
    """

    reports: Mapping[str, Report]

    def to_dict(self) -> dict[str, Any]:
        """The rows as {quantity: {name: value}}, in bytes, FLOPs and seconds; what a report lacks is None."""
        return {
            row: {name: function(report) for name, report in self.reports.items()}
            for row, (function, _) in render.QUANTITIES.items()
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __repr__(self) -> str:
        return f"<Comparison of {', '.join(self.reports)}; print it for its table>"

    def __str__(self) -> str:
        return render.as_text(render.comparison(self.reports))

    def __rich__(self) -> Any:
        return render.as_rich(render.comparison(self.reports))

    def _repr_html_(self) -> str:
        return render.as_html(render.comparison(self.reports))


def compare(reports: Mapping[str, Report]) -> Comparison:
    """Set reports side by side.

    Args:
        reports: at least two, by the names they shall have.

    Raises:
        ValueError: fewer than two.
    """
    if len(reports) < 2:
        raise ValueError(f"{len(reports)} reports to compare; give at least two, as in compare({{'a': a, 'b': b}})")
    return Comparison(dict(reports))


def of(
    program: Program,
    *,
    model: str,
    num_parameters: int,
    on: Hardware | str | None = None,
    compiled: bool = False,
    variant: advice.Variant | None = None,
) -> Report:
    """Trace a step, and say what it costs.

    Args:
        program: the step.
        model: in words.
        num_parameters: of the model.
        on: the hardware to judge it by.
        compiled: compile it too, for the compiler's own view: what it adds to the ledger, and its memory.
        variant: makes the same step on another layout, for what remat would change and for advice; None gives neither.

    Raises:
        ValueError: unknown hardware; `compiled` where the devices do not exist.
    """
    known = None if on is None else hardware.get(on)
    peak_of = memory.of(program)
    traced, counted = ledger.of(program.jaxpr), flops.of(program.jaxpr, program.num_devices, pipeline.used(program))
    notes = program.notes
    if compiled:
        if program.compiled is None:
            raise ValueError(
                f"the {program.num_devices} devices of this mesh do not exist, so nothing can be compiled for them: "
                f"leave out compile=True, or start that many CPU devices with sl.fake_devices({program.num_devices})"
            )
        executable = program.compiled()
        found = hlo.collectives(executable.as_text(), program.mesh)
        traced = ledger.compiler_adds(traced, found, program.sizes)
        peak_of = memory.with_compiled(peak_of, executable)
    elif not program.manual:
        notes = (*notes, "the compiler decides what is sent and kept: make the report with compile=True to see it")
    if any(entry.endless for entry in traced) or counted.endless:
        notes = (*notes, "the step has a while loop, whose length no trace knows: what is in it is counted once")
    textbook, piped, times = None, None, None
    if program.manual and program.sequence is not None:
        textbook = theory.expected(program.config, program.layout, program.batch_size, program.sequence)
        piped = advice.with_bubble(program, pipeline.of(program, textbook))
    if known is not None:
        given = program.jaxpr, counted, traced, peak_of.state, known, program.sizes, program.dtype
        times = timeline.estimate(*given, attended=program.attended)
    others, hints = {}, ()
    if variant is not None:
        others = advice.remat(program, variant)
        if known is not None:
            hints = advice.fitting(program, variant, peak_of, known)
    return Report(
        layout=str(program.layout),
        sizes=program.sizes,
        model=model,
        num_parameters=num_parameters,
        batch_size=program.batch_size,
        sequence=program.sequence,
        dtype=program.dtype,
        memory=peak_of,
        flops=counted,
        ledger=traced,
        theory=textbook,
        pipeline=piped,
        timeline=times,
        remat=others,
        advice=hints,
        notes=notes,
        parameters=parameters_of(program.state.params),
    )


def parameters_of(params: Any, prefix: str = "") -> dict[str, Any]:
    """Of a nested dict of arrays with shardings, by path: shape, dtype, and the axes that split each dim."""
    found = {}
    for key, leaf in params.items():
        path = f"{prefix}{key}"
        if isinstance(leaf, Mapping):
            found |= parameters_of(leaf, f"{path}/")
        else:
            spec = tuple(leaf.sharding.spec) + (None,) * (leaf.ndim - len(leaf.sharding.spec))
            axes = tuple(() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec)
            found[path] = (tuple(leaf.shape), str(leaf.dtype), axes)
    return found
