"""Assertions for tests of your own: what a step may send and keep. Each names what broke the budget, and its line."""

from collections.abc import Iterator, Sequence
from typing import Any

from shardlm.inspect.ledger import KINDS, Entry, Ledger, total_bytes
from shardlm.inspect.report import Report
from shardlm.inspect.walk import Place, at, equations, inside

Subject = Report | Ledger


def assert_no(subject: Subject, kind: str | None = None, axis: str | None = None, *, smallest: int = 0) -> None:
    """No collective of this kind, over this axis.

    Args:
        subject: a report, or a ledger.
        kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"; None is any.
        axis: a mesh axis; None is any.
        smallest: leave out those of fewer elements, such as sums of scalars.

    Raises:
        AssertionError: there is one.
        ValueError: there is no such kind.

    Example:
        >>> assert_no(trainer.explain(batch_size=8, sequence=128), "all-gather", "tensor")
    """
    found = [entry for entry in _select(subject, kind, axis) if entry.elements >= smallest]
    if found:
        raise AssertionError(f"no {_what(kind, axis)} is allowed, and there are {_list(found)}")


def assert_at_most(subject: Subject, limit: float, kind: str | None = None, axis: str | None = None) -> None:
    """At most `limit` bytes that one device sends in a step, in collectives of this kind over this axis.

    Raises:
        AssertionError: there are more.
        ValueError: there is no such kind.
    """
    found = _select(subject, kind, axis)
    total = total_bytes(found)
    if total > limit:
        raise AssertionError(
            f"{_what(kind, axis)} may send {limit:,.0f} bytes a step and send {total:,.0f}: {_list(found)}"
        )


def assert_fits(report: Report, memory: float | None = None) -> None:
    """The predicted peak is within `memory` bytes, by default the memory of the report's hardware.

    Raises:
        AssertionError: it is not.
        ValueError: neither a limit nor hardware is known, or the report has no peak.
    """
    limit = memory if memory is not None else None if report.hardware is None else report.hardware.memory
    if limit is None:
        raise ValueError("how much memory is there? give assert_fits(report, 80e9), or the report its hardware")
    if report.peak is None:
        raise ValueError("this report has no peak: make it with compile=True")
    if report.peak > limit:
        hints = "".join(f"\n  - {line}" for line in report.advice)
        raise AssertionError(
            f"the step needs {report.peak:,} bytes on each device at {report.memory.where}, "
            f"{report.peak - limit:,.0f} more than the {limit:,.0f} there are{hints}"
        )


def assert_uniform_branches(jaxpr: Any) -> None:
    """Whether a device communicates is decided alike on all of them.

    A device that takes a branch with a collective, while others that it communicates with do not, waits for ever: so no
    conditional around a collective, nor a loop's end, may depend on what differs between devices. JAX knows over which
    mesh axes each array in `shard_map` varies, with its default of `check_vma=True`; that is what is looked at.

    Args:
        jaxpr: a traced program, of `jax.make_jaxpr`.

    Raises:
        AssertionError: a predicate varies over an axis, or cannot be known, as `check_vma=False`.

    Example:
        >>> assert_uniform_branches(jax.make_jaxpr(trainer.step_function)(trainer.abstract_state, batch))
    """
    wrong = list(_devices_decide(jaxpr, Place(), None))
    if wrong:
        raise AssertionError("devices may take different branches, and wait for each other for ever: " + "".join(wrong))


def _devices_decide(jaxpr: Any, place: Place, region: Any) -> Iterator[str]:
    """What is wrong in a program; `region` are the parameters of the `shard_map` around it, if there is one."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, here = equation.primitive.name, at(equation, place)
        programs = list(inside(equation, here))
        if name in ("cond", "while") and region is not None:
            moved = {KINDS.get(e.primitive.name) for program, _ in programs for e, _ in equations(program)} - {None}
            flag = equation.invars[0] if name == "cond" else equation.params["cond_jaxpr"].jaxpr.outvars[0]
            varies = [axis for axis in flag.aval.manual_axis_type.varying if region["mesh"].shape[axis] > 1]
            if moved and (varies or not region["check_vma"]):
                why = f"varies over {', '.join(sorted(varies))}" if varies else "may vary: check_vma=False"
                yield f"\n  - {here.source}: {' and '.join(sorted(map(str, moved)))} in a {name} whose predicate {why}"
        for program, around in programs:
            yield from _devices_decide(program, around, equation.params if name == "shard_map" else region)


def _select(subject: Subject, kind: str | None, axis: str | None) -> Sequence[Entry]:
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "broadcast")
    if kind is not None and kind not in kinds:
        raise ValueError(f"kind={kind!r}; it is one of {', '.join(kinds)}, or None for all")
    if isinstance(subject, Report):
        if axis is not None and axis not in subject.sizes:
            raise ValueError(f"axis={axis!r}; the mesh has {', '.join(subject.sizes)}")
        subject = subject.ledger
    return subject.select(kind, axis)


def _what(kind: str | None, axis: str | None) -> str:
    return f"{kind or 'collective'}{'' if axis is None else f' over {axis}'}"


def _list(entries: Sequence[Entry]) -> str:
    largest = sorted(entries, key=lambda entry: -entry.bytes)
    lines = [
        f"\n  - {entry.count} x {entry.kind} over {' x '.join(entry.axes)} of {entry.dtype}[{entry.elements}], "
        f"{entry.bytes:,.0f} bytes, {entry.phase}, {entry.source or 'added by the compiler'}"
        for entry in largest[:8]
    ]
    more = f"\n  - and {len(largest) - 8} more" if len(largest) > 8 else ""
    return f"{len(largest)}:{''.join(lines)}{more}"
