"""Reads the collectives of a compiled program: how often, of how many elements, over which mesh axes.

HLO is what XLA makes of the traced program. The ledger does not need it; it is the independent check of the ledger, and
the only source for what the compiler adds by itself: all of it, for programs that it partitions.

Read are the forms of XLA's CPU, GPU and TPU compilers. What looks like communication and is none of them is an error.
"""

import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from jax.sharding import Mesh

from shardlm.inspect.walk import TAKEN

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_DTYPES = {
    "f64": "float64", "f32": "float32", "bf16": "bfloat16", "f16": "float16", "pred": "bool",
    "s8": "int8", "s16": "int16", "s32": "int32", "s64": "int64", "u8": "uint8", "u32": "uint32", "u64": "uint64",
}  # fmt: skip
_SHAPE = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLS = re.compile(r"(?:calls|to_apply|true_computation|false_computation|body|condition)=%?([\w.\-]+)")
_LISTS = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
# Names that only communication has. Those that end an operation that another one started are communication once.
_LOOKS_LIKE_ONE = re.compile(r"all-|collective|reduce-scatter|ragged|^send|^recv|nccl|nvshmem", re.IGNORECASE)
_ENDS = re.compile(r"-(done|update)$")


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
    """How often each collective runs in one execution of compiled HLO, loops multiplied by their trip counts.

    What a compiler has combined counts as it is combined: arrays that one operation moves as a tuple are one each,
    arrays that were copied into one are one.

    Args:
        text: of `compiled.as_text()`, from XLA's CPU, GPU or TPU compiler.
        mesh: of the program.

    Raises:
        AssertionError: communication in a form that is not known, or in a loop of unknown length.
    """
    reader = _Reader(_computations(text), mesh)
    reader.walk(next(name for name, body in reader.bodies.items() if body.entry), 1)
    reader.check()
    return reader.total


@dataclass
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str
    line: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%?([\w.\-]+)(?=,|$)", re.sub(r"/\*.*?\*/", "", self.rest.partition(")")[0]))

    @property
    def called(self) -> list[str]:
        """Names of the computations that it names."""
        listed = [name for names in _LISTS.findall(self.line) for name in re.findall(r"[\w.\-]+", names)]
        return _CALLS.findall(self.line) + listed


@dataclass
class _Computation:
    entry: bool
    instructions: dict[str, _Instruction] = field(default_factory=dict)

    @property
    def root(self) -> _Instruction:
        return next(i for i in self.instructions.values() if i.line.lstrip().startswith("ROOT "))


def _computations(text: str) -> dict[str, _Computation]:
    bodies: dict[str, _Computation] = {}
    name = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            bodies[name] = _Computation(line.startswith("ENTRY"))
        elif name and (match := _INSTRUCTION.match(line)):
            bodies[name].instructions[match[1]] = _Instruction(match[1], match[2], match[3], match[4], line)
    assert any(body.entry for body in bodies.values()), "no entry computation in this text"
    return bodies


@dataclass
class _Reader:
    bodies: dict[str, _Computation]
    mesh: Mesh
    total: Counter[Collective] = field(default_factory=Counter)
    walked: set[str] = field(default_factory=set)
    started: set[str] = field(default_factory=set)
    continued: set[str] = field(default_factory=set)

    def walk(self, name: str, times: int) -> None:
        self.walked.add(name)
        body = self.bodies[name]
        for instruction in body.instructions.values():
            opcode = instruction.opcode
            if opcode == "while":
                trips = self.trips(instruction, body)
                for called in instruction.called:
                    self.walk(called, times * trips)
            elif opcode == "conditional":
                for called in instruction.called:
                    self.walk(called, self.taken(called, times))
            elif opcode in ("call", "fusion", "async-start", "custom-call"):
                target = re.search(r'custom_call_target="([^"]*)"', instruction.line)
                named = "" if target is None else target[1]
                known = named in ("AsyncCollectiveStart", "AsyncCollectiveDone")
                assert known or not _LOOKS_LIKE_ONE.search(named), f"unknown communication: {instruction.line}"
                for called in instruction.called:
                    self.walk(called, times)
            elif opcode.removesuffix("-start") in KINDS:
                if self.is_first(instruction, body):
                    self.count(instruction, times, scattered="all-reduce-scatter" in name)
            elif not _ENDS.search(opcode):
                assert not _LOOKS_LIKE_ONE.search(opcode), f"unknown communication: {instruction.line}"

    def taken(self, branch: str, times: int) -> int:
        """How often a branch runs of `times`: as a named scope around what is in it says, else always."""
        lines = (instruction.line for instruction in self.bodies[branch].instructions.values())
        match = next(filter(None, map(TAKEN.search, lines)), None)
        return times * int(match[1]) // int(match[2]) if match else times

    def check(self) -> None:
        """Nothing was left out."""
        assert self.continued <= self.started, f"continued but never started: {self.continued - self.started}"
        for name in self.bodies.keys() - self.walked:
            for instruction in self.bodies[name].instructions.values():
                found = _LOOKS_LIKE_ONE.search(instruction.opcode) and not _ENDS.search(instruction.opcode)
                assert not found, f"nothing is known to call {name}: {instruction.line}"

    def is_first(self, instruction: _Instruction, body: _Computation) -> bool:
        """Whether it is the whole operation, or its start.

        XLA:TPU overlaps a collective with computation by fusing steps of it into operations on its way: each of them
        has a copy of the instruction, with the same chain's number.
        """
        chain = re.search(r'chain_id="(\w+)"', instruction.line)
        if chain is None:
            return True
        start = '"AsyncCollectiveStart"' in body.root.line
        (self.started if start else self.continued).add(chain[1])
        return start

    def count(self, instruction: _Instruction, times: int, scattered: bool) -> None:
        kind, started = instruction.opcode.removesuffix("-start"), instruction.opcode.endswith("-start")
        axes = (
            _permuted(instruction.line, self.mesh)
            if kind == "collective-permute"
            else _axes(instruction.line, self.mesh)
        )
        shape = instruction.shape
        if started and (kind != "all-reduce" or shape.startswith("((")):
            # Of a pair (operands, results), and what the operation needs besides; older all-reduces have results alone.
            parts = _split(shape)
            assert len(parts) >= 2, f"no pair of operands and results: {instruction.line}"
            shape = parts[1]
        arrays = [
            (_DTYPES[dtype], math.prod(int(d) for d in dims.split(",") if d)) for dtype, dims in _SHAPE.findall(shape)
        ]
        if kind == "all-to-all" and "dimensions=" not in instruction.line:
            # One operand and one result for each device of the group: together, one array.
            arrays = [(arrays[0][0], sum(elements for _, elements in arrays))]
        for dtype, elements in arrays:
            if kind == "reduce-scatter":
                elements *= math.prod(self.mesh.shape[axis] for axis in axes)
            self.total[Collective("reduce-scatter" if scattered else kind, axes, elements, dtype)] += times

    def trips(self, loop: _Instruction, body: _Computation) -> int:
        """How often a loop runs: as the compiler says, or from a counter that is compared with a constant."""
        if known := re.search(r'known_trip_count"?:\s*\{"n":\s*"(\d+)"', loop.line):
            return int(known[1])
        unknown = f"a loop of unknown length: {loop.line}"
        [condition] = re.findall(r"condition=%?([\w.\-]+)", loop.line)
        [repeated] = re.findall(r"body=%?([\w.\-]+)", loop.line)
        inside = self.bodies.get(condition)
        assert inside and inside.root.opcode == "compare" and "direction=LT" in inside.root.line, unknown
        counter, bound = (_behind_copies(name, inside) for name in inside.root.operands)
        index = re.search(r"index=(\d+)", counter.line)
        assert counter.opcode == "get-tuple-element" and bound.opcode == "constant" and index, unknown
        begin = _behind_copies(_behind_copies(loop.operands[0], body).operands[int(index[1])], body)
        step = _behind_copies(self.bodies[repeated].root.operands[int(index[1])], self.bodies[repeated])
        assert begin.opcode == "constant" and step.opcode == "add", unknown
        added = [_behind_copies(name, self.bodies[repeated]) for name in step.operands]
        by = [i for i in added if i.opcode == "constant"]
        of = [i for i in added if i.opcode == "get-tuple-element" and f"index={index[1]}" in i.line]
        assert len(by) == len(of) == 1 and _value(by[0]) == 1, unknown
        return max(0, _value(bound) - _value(begin))


def _behind_copies(name: str, body: _Computation) -> _Instruction:
    instruction = body.instructions[name]
    while instruction.opcode in ("copy", "bitcast"):
        instruction = body.instructions[instruction.operands[0]]
    return instruction


def _value(constant: _Instruction) -> int:
    return int(constant.rest.partition(")")[0])


def _split(shape: str) -> list[str]:
    """The parts of a tuple's shape."""
    parts, depth, begin = [], 0, 1
    for i, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (i == len(shape) - 1 and letter == ")"):
            parts.append(shape[begin:i])
            begin = i + 1
    return parts


def _permuted(line: str, mesh: Mesh) -> tuple[str, ...]:
    """The axes along which a permutation moves anything."""
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", line)
    assert pairs, f"unknown syntax of a permutation: {line}"
    ends = np.array([[int(i) for i in pair] for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1])])
    source, target = (np.array(np.unravel_index(column, mesh.devices.shape)) for column in ends.T)
    return tuple(axis for axis, moved in zip(mesh.axis_names, (source != target).any(1), strict=True) if moved)


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
