"""Assertions for tests of your own: what a step may send and keep. Each names what broke the budget, and its line."""

from collections.abc import Sequence

from shardlm.inspect.ledger import Entry, Ledger, total_bytes
from shardlm.inspect.report import Report

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
