"""The communication ledger: every collective of a traced program, what it moves, and the line that asks for it.

Bytes are what one device sends in a ring of n devices, per element of the whole array (of what is reduced, or of what
has been gathered): all-reduce 2(n-1)/n, all-gather, reduce-scatter and all-to-all (n-1)/n, collective-permute 1.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from shardlm.inspect.hlo import Collective
from shardlm.inspect.walk import Place, elements, equations

KINDS = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "psum_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "all-to-all",
    "ppermute": "collective-permute",
    "pbroadcast": "broadcast",
}


@dataclass(frozen=True)
class Entry:
    """One collective of one array at one place of the program.

    Attributes:
        kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute" or "broadcast".
        axes: the mesh axes of more than one device that it spans, in mesh order.
        size: number of devices that take part together.
        dtype: of its elements.
        elements: of the whole array, per group of devices.
        count: how often it runs in a step, loops multiplied.
        phase: "forward", "backward" or "update".
        recomputed: whether backward does it to make an activation again.
        branch: the branches of conditionals that it is in; empty where it always runs.
        endless: whether it is inside a `while` loop, and so counted once although it may run more often.
        source: "file.py:12" of the line that asks for it; empty where the compiler added it.
    """

    kind: str
    axes: tuple[str, ...]
    size: int
    dtype: str
    elements: int
    count: int
    phase: str
    recomputed: bool = False
    branch: tuple[str, ...] = ()
    endless: bool = False
    source: str = ""

    @property
    def bytes(self) -> float:
        """What one device sends in one step, in bytes."""
        return wire(self.kind, self.size) * self.elements * _itemsize(self.dtype) * self.count

    @property
    def key(self) -> Collective:
        """The same in the form in which a compiled program's collectives are read."""
        return Collective(self.kind, self.axes, self.elements, self.dtype)


@dataclass(frozen=True)
class Ledger:
    """All collectives of one step.

    Attributes:
        entries: one for each collective, in the order of execution.
        added: what the compiler adds on its own, read from a compiled program; empty where none was compiled.
        compiled: whether `added` was read, so that an empty one says "nothing".
    """

    entries: tuple[Entry, ...]
    added: tuple[Entry, ...] = ()
    compiled: bool = False

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries + self.added)

    def select(self, kind: str | None = None, axis: str | None = None, phase: str | None = None) -> tuple[Entry, ...]:
        """The entries of one kind, over one axis (alone or with others), in one phase."""
        return tuple(
            entry
            for entry in self
            if (kind is None or entry.kind == kind)
            and (axis is None or axis in entry.axes)
            and (phase is None or entry.phase == phase)
        )

    def bytes(self, kind: str | None = None, axis: str | None = None, phase: str | None = None) -> float:
        """What one device sends in one step in the selected entries; of a conditional, its most expensive branch."""
        return total_bytes(self.select(kind, axis, phase))

    def by_axes(self) -> dict[tuple[str, ...], tuple[Entry, ...]]:
        """The entries over each set of axes."""
        groups: dict[tuple[str, ...], list[Entry]] = {}
        for entry in self:
            groups.setdefault(entry.axes, []).append(entry)
        return {axes: tuple(entries) for axes, entries in groups.items()}

    def counts(self) -> Counter[Collective]:
        """How often each collective runs, as `hlo.collectives` counts a compiled program's; without `added`."""
        return Counter({key: n for key, n in _counts(self.entries).items() if n})


def wire(kind: str, size: int) -> float:
    """Of each element of the whole array, how often one device sends it, in a ring of `size` devices."""
    if kind == "all-reduce":
        return 2 * (size - 1) / size
    return 1.0 if kind in ("collective-permute", "broadcast") else (size - 1) / size


def of(jaxpr: Any) -> Ledger:
    """The ledger of a traced program, which `jax.make_jaxpr` gives."""
    return Ledger(tuple(entry for equation, place in equations(jaxpr) for entry in _entries(equation, place)))


def ledger(function: Callable[..., Any], *arguments: Any) -> Ledger:
    """The ledger of any function, traced with arrays or `jax.ShapeDtypeStruct`s; nothing is allocated.

    It sees what is written in `shard_map`; what XLA adds to partition a plain `jit` is in no traced program, see
    `hlo.collectives`.

    Example:
        >>> moved = ledger(jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"),
        ...                out_specs=P()), jax.ShapeDtypeStruct((8, 4), jnp.float32))
        >>> moved.bytes(axis="data")
        48.0
    """
    return of(jax.make_jaxpr(function)(*arguments))


def compiler_adds(traced: Ledger, compiled: Counter[Collective], sizes: dict[str, int]) -> Ledger:
    """The traced ledger with what a compiled program does besides.

    Compilers move several arrays as one, or one in parts: of a kind over some axes, only what is more than the traced
    elements is added. What a compiler does by another kind (XLA:TPU sums a small array where it was asked to
    reduce-scatter it) counts as added.

    Args:
        traced: of `of`.
        compiled: of `hlo.collectives`, for the same program.
        sizes: number of devices along each mesh axis.
    """
    more = _beyond(compiled, traced.counts())
    added = tuple(
        Entry(
            kind=key.kind,
            axes=key.axes,
            size=int(np.prod([sizes[axis] for axis in key.axes], dtype=int)),
            dtype=key.dtype,
            elements=key.elements,
            count=count,
            phase="added by the compiler",
        )
        for key, count in sorted(more.items(), key=lambda item: (item[0].axes, item[0].kind, -item[0].elements))
    )
    return Ledger(traced.entries, added, compiled=True)


def total_bytes(entries: Iterable[Entry]) -> float:
    """The sum of the entries' bytes; of the branches of one conditional only the most expensive one runs."""
    certain, branches = 0.0, {}
    for entry in entries:
        if entry.branch:
            where, _, index = entry.branch[0].partition(" branch ")
            sums = branches.setdefault(where, Counter())
            sums[index] += entry.bytes
        else:
            certain += entry.bytes
    return certain + sum(max(sums.values()) for sums in branches.values())


def _beyond(compiled: Counter[Collective], traced: Counter[Collective]) -> Counter[Collective]:
    missing: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for key, n in (traced - compiled).items():
        missing[key.kind, key.axes] += key.elements * n
    found: dict[tuple[str, tuple[str, ...]], list[tuple[Collective, int]]] = {}
    for key, n in (compiled - traced).items():
        found.setdefault((key.kind, key.axes), []).append((key, n))
    more: Counter[Collective] = Counter()
    for which, group in found.items():
        extra = sum(key.elements * n for key, n in group) - missing[which]
        if not missing[which]:
            more.update(dict(group))
        elif extra > 0:
            more[Collective(*which, extra, group[0][0].dtype)] = 1
    return more


def _counts(entries: Iterable[Entry]) -> Counter[Collective]:
    counts: Counter[Collective] = Counter()
    for entry in entries:
        counts[entry.key] += entry.count
    return counts


def _entries(equation: Any, place: Place) -> Iterator[Entry]:
    kind = KINDS.get(equation.primitive.name)
    if kind is None or place.mesh is None:
        return
    params = equation.params
    names = params.get("axes", params.get("axis_name", ()))
    names = names if isinstance(names, tuple | list) else (names,)
    axes = tuple(axis for axis in place.mesh.axis_names if axis in names and place.mesh.shape[axis] > 1)
    size = int(np.prod([place.mesh.shape[axis] for axis in axes], dtype=int))
    if size == 1:
        return
    whole = equation.outvars if kind == "all-gather" else equation.invars
    for variable in whole:
        yield Entry(
            kind=kind,
            axes=axes,
            size=size,
            dtype=str(variable.aval.dtype),
            elements=elements(variable.aval),
            count=place.times,
            phase=place.phase,
            recomputed=place.recomputed,
            branch=place.branch,
            endless=place.endless,
            source=place.source,
        )


def _itemsize(dtype: str) -> int:
    return jax.numpy.dtype(dtype).itemsize
