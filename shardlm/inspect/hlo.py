"""Reads the collectives of a compiled program: how often, of how many elements, over which mesh axes.

HLO is what XLA makes of the traced program. The ledger does not need it; it is the independent check of the ledger, and
the only source for what the compiler adds by itself: all of it, for programs that it partitions.
"""

import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_DTYPES = {
    "f64": "float64", "f32": "float32", "bf16": "bfloat16", "f16": "float16", "pred": "bool",
    "s8": "int8", "s16": "int16", "s32": "int32", "s64": "int64", "u8": "uint8", "u32": "uint32", "u64": "uint64",
}  # fmt: skip
_SHAPE = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclass(frozen=True)
class Collective:
    """One array that one kind of collective moves over some axes.

    Attributes:
        kind: "all-reduce", ...
        axes: the mesh axes of more than one device that its groups span, in mesh order.
        elements: of the whole array: of what is reduced, or of what has been gathered.
        dtype: JAX's name of the elements' type.
    """

    kind: str
    axes: tuple[str, ...]
    elements: int
    dtype: str = "float32"


def collectives(text: str, mesh: Mesh) -> Counter[Collective]:
    """How often each collective runs in one execution of compiled HLO, loops multiplied by their trip counts."""
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            bodies[name].append(line)
    assert entry, "no entry computation in this text"
    total: Counter[Collective] = Counter()
    _walk(entry, 1, bodies, mesh, total)
    return total


def _walk(name: str, times: int, bodies: dict[str, list[str]], mesh: Mesh, total: Counter[Collective]) -> None:
    for line in bodies[name]:
        if " while(" in line:
            trips = re.search(r'known_trip_count"?:\s*\{"n":\s*"(\d+)"', line)
            assert trips, f"a loop of unknown length: {line}"
            body = re.search(r"body=%?([\w.\-]+)", line)
            assert body, line
            _walk(body[1], times * int(trips[1]), bodies, mesh, total)
        elif match := re.search(r" (call|conditional|fusion)\(", line):
            for called in re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line):
                _walk(called, times, bodies, mesh, total)
        elif match := re.search(r"= (.*?) (" + "|".join(KINDS) + r")(-start)?\(", line):
            kind = match[2]
            axes = _axes(line, mesh)
            for dtype, dims in _SHAPE.findall(match[1]):
                elements = math.prod(int(d) for d in dims.split(",") if d)
                if kind == "reduce-scatter":
                    elements *= math.prod(mesh.shape[axis] for axis in axes)
                total[Collective(kind, axes, elements, _DTYPES[dtype])] += times


def _axes(line: str, mesh: Mesh) -> tuple[str, ...]:
    groups = {frozenset(group) for group in _groups(line)}
    ids = np.arange(mesh.size).reshape(mesh.devices.shape)
    names = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    for count in range(len(names) + 1):
        for axes in itertools.combinations(names, count):
            moved = np.moveaxis(ids, [mesh.axis_names.index(a) for a in axes], range(-count, 0) if count else [])
            size = math.prod(mesh.shape[a] for a in axes)
            if groups == {frozenset(row) for row in moved.reshape(-1, size).tolist()}:
                return axes
    raise AssertionError(f"these groups follow no axes of the mesh: {line}")


def _groups(line: str) -> list[list[int]]:
    if match := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line):
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])]
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        ids = _iota(f"[{match[3]}]" + (f"T({match[4]})" if match[4] else ""))
        return ids.reshape(int(match[1]), int(match[2])).tolist()
    if match := re.search(
        r"replica_groups=mesh\[((?:'\w+'=\d+,?)+)\](?:, device_ids=\((.*?)\))? \{((?:'\w+',?)+)\}", line
    ):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
        grouped = re.findall(r"'(\w+)'", match[3])
        ids = _iota(match[2]) if match[2] else np.arange(math.prod(sizes.values()))
        ids = ids.reshape(list(sizes.values()))
        ids = np.moveaxis(ids, [list(sizes).index(name) for name in grouped], range(-len(grouped), 0))
        return ids.reshape(-1, math.prod(sizes[name] for name in grouped)).tolist()
    raise AssertionError(f"unknown syntax of replica groups: {line}")


def _iota(text: str) -> np.ndarray:
    """Device ids in one of the forms "[2,4]T(1,0)" and "0,4,1,5"."""
    if match := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        dims = [int(d) for d in match[1].split(",")]
        ids = np.arange(math.prod(dims)).reshape(dims)
        return ids.transpose([int(d) for d in match[2].split(",")]) if match[2] else ids
    return np.array([int(i) for i in text.split(",")])
