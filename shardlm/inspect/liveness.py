"""How much memory a traced program needs at its worst moment, found by following which arrays are alive when.

XLA decides that for good, differently on each backend. Followed here are the habits that all of them have, which takes
no device and no compiler:

- What only rearranges, or acts element by element, is *fused* into its users and takes no memory of its own. Matrix
  products, collectives, reductions, gathers and loops write their results to memory and read their operands from it. So
  is what is costly (exp, division, ...) and used more than once.
- A result may take the place of an operand of its size that nothing needs any more; a loop's carry is such a result,
  outside the loop and from one iteration to the next. A conditional's branch is as if it stood there.
- What a loop stacks is there from its first iteration to the last use of the stack.
- A collective along any dim but the first needs a transposed copy while it runs.

Shapes are taken as the program has them: per device inside `shard_map`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend.core import Literal

from shardlm.inspect.walk import Place, at, elements, inside

_COLLECTIVES = {
    "all_gather", "all_gather_invariant", "reduce_scatter", "psum", "psum_invariant", "pmax", "pmin", "ppermute",
    "all_to_all",
}  # fmt: skip
# Read their operands from memory, so what is fused into these is written first.
_READS = _COLLECTIVES | {"dot_general", "conv_general_dilated", "sort", "top_k", "scan", "while", "cond"}
# Write their results to memory.
_WRITES = _READS | {
    "gather", "scatter", "scatter-add", "cumsum", "argmax", "argmin", "dynamic_update_slice", "concatenate",
    "random_bits", "threefry2x32", "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or",
}  # fmt: skip
_IN_PLACE = {"psum", "psum_invariant", "pmax", "ppermute", "scatter", "scatter-add", "dynamic_update_slice"}
_VIEWS = {
    "reshape", "squeeze", "expand_dims", "pcast", "pvary", "copy", "name", "sharding_constraint", "stop_gradient",
}  # fmt: skip
_REGIONS = {"scan", "while", "cond", "shard_map"}
_WHOLE_VIEWS = {"slice", "dynamic_slice", "broadcast_in_dim"}  # where they keep every element, once
_COSTLY = {"exp", "exp2", "log", "tanh", "logistic", "div", "rsqrt", "sqrt", "pow", "integer_pow", "erf", "sin", "cos"}
_ATTENTION = "dot_product_attention"  # how the names of cuDNN's operations begin


@dataclass(frozen=True)
class Peak:
    """The worst moment of a program.

    Attributes:
        bytes: what is alive then besides the program's inputs, its results included.
        where: the line of the operation that runs then.
        kept: how much of that loops of the forward pass have stacked for the backward pass.
        largest: the largest single array, in bytes.
        largest_shape: that array's shape and dtype, as in "float32[8,256,4096]".
        largest_where: the line that makes it.
    """

    bytes: int
    where: str
    kept: int
    largest: int
    largest_shape: str
    largest_where: str


@dataclass(eq=False)
class _Variable:
    """One array of the flattened program; `uses` counts the operations, and results, that need it."""

    aval: Any
    uses: int = 0
    left: int = 0
    reads: Any = None  # a tuple of buffers, once it is there
    buffer: "_Buffer | None" = None

    @property
    def size(self) -> int:
        aval = self.aval
        return elements(aval) * getattr(getattr(aval, "dtype", None), "itemsize", 0)


@dataclass(eq=False)
class _Buffer:
    """Memory of one array. Not `owned` is what the caller gave, or what another array has taken over.

    A loop's carry is `lent` to its body, which may write the next one there: it stays when nothing needs it any more.
    """

    size: int
    owned: bool
    users: int = 0
    kept: bool = False
    lent: bool = False


@dataclass
class _Memory:
    """What is allocated now, and the worst moment so far."""

    now: int = 0
    peak: int = 0
    where: str = "?"
    kept: int = 0
    kept_at_peak: int = 0
    largest: tuple[int, str, str] = (0, "", "")

    def allocate(self, size: int, shape: str, where: str, kept: bool = False) -> _Buffer:
        self.now += size
        if kept:
            self.kept += size
        elif size > self.largest[0]:
            self.largest = (size, shape, where)
        self.reach(self.now, where, self.kept)
        return _Buffer(size, True, kept=kept)

    def reach(self, level: int, where: str, kept: int) -> None:
        if level > self.peak:
            self.peak, self.where, self.kept_at_peak = level, where, kept

    def hold(self, buffers: tuple[_Buffer, ...]) -> tuple[_Buffer, ...]:
        for buffer in buffers:
            buffer.users += 1
        return buffers

    def release(self, buffers: tuple[_Buffer, ...]) -> None:
        for buffer in buffers:
            buffer.users -= 1
            if buffer.users == 0 and buffer.owned:
                buffer.owned = False
                self.now -= 0 if buffer.lent else buffer.size
                self.kept -= buffer.size if buffer.kept else 0


@dataclass
class _Program:
    """A jaxpr with its calls inlined and what nothing needs left out.

    Attributes:
        operations: (equation, its operands, its results, where it stands); an operand that is a literal is None.
        inputs, results: as of the jaxpr.
    """

    operations: list[tuple[Any, list[Any], list[Any], Place]]
    inputs: list[_Variable]
    results: list[_Variable | None]
    constants: list[_Variable] = field(default_factory=list)


def peak_memory(function: Callable[..., Any], *arguments: Any) -> Peak:
    """The worst moment of any function, traced with arrays or `jax.ShapeDtypeStruct`s; nothing is allocated.

    Shapes count as the function has them: whole arrays, or, inside `shard_map`, one device's.
    """
    return peak(jax.make_jaxpr(function)(*arguments))


def peak(jaxpr: Any) -> Peak:
    """The worst moment of a traced program, which `jax.make_jaxpr` gives, or of a region within one."""
    memory = _run(_flatten(jaxpr, Place()), Place())
    size, shape, where = memory.largest
    return Peak(memory.peak, memory.where, memory.kept_at_peak, size, shape, where)


def _flatten(jaxpr: Any, place: Place) -> _Program:
    program = _Program([], [_Variable(v.aval) for v in getattr(jaxpr, "jaxpr", jaxpr).invars], [])
    inputs: list[_Variable | None] = list(program.inputs)
    program.results = _inline(jaxpr, inputs, place, program)
    needed = {id(v) for v in program.results if v is not None}
    kept = []
    for operation in reversed(program.operations):
        _, operands, results, _ = operation
        if any(id(v) in needed for v in results):
            kept.append(operation)
            needed.update(id(v) for v in operands if v is not None)
    program.operations = kept[::-1]
    for _, operands, _, _ in program.operations:
        for variable in {id(v): v for v in operands if v is not None}.values():
            variable.uses += 1
    for variable in program.results:
        if variable is not None:
            variable.uses += 1
    return program


def _inline(jaxpr: Any, inputs: list[_Variable | None], place: Place, program: _Program) -> list[_Variable | None]:
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    known: dict[Any, _Variable | None] = dict(zip(inner.invars, inputs, strict=True))
    for variable in inner.constvars:
        constant = known[variable] = _Variable(variable.aval)
        program.constants.append(constant)

    def read(atom: Any) -> _Variable | None:
        return None if isinstance(atom, Literal) else known[atom]

    for equation in inner.eqns:
        here = at(equation, place)
        operands = [read(atom) for atom in equation.invars]
        name = equation.primitive.name
        # Compilers inline a loop of one iteration; what it takes and stacks is as large as what its body does.
        once = name == "scan" and equation.params["length"] == 1
        called = list(inside(equation, here)) if once or name not in _REGIONS else []
        if called:
            results = _inline(called[0][0], operands, called[0][1], program)
        else:
            results = [_Variable(v.aval) for v in equation.outvars]
            program.operations.append((equation, operands, results, here))
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in inner.outvars]


def _run(program: _Program, place: Place, lent: slice = slice(0, 0)) -> _Memory:
    memory = _Memory()
    _start(program)
    for variable in program.inputs[lent]:
        variable.reads = memory.hold((_Buffer(variable.size, owned=True, lent=True),))
        variable.buffer = variable.reads[0]
        if not variable.uses:
            memory.release(variable.reads)
    for equation, operands, results, here in program.operations:
        _execute(equation, operands, results, here, memory)
    for variable in program.results:
        if variable is not None and variable.reads is not None:
            _materialise(variable, memory, place.source)
    return memory


def _start(program: _Program) -> None:
    """Sets every array to where nothing has run; inputs and constants are there, and not the program's own."""
    everything = [v for _, operands, results, _ in program.operations for v in (*operands, *results)]
    everything += [*program.inputs, *program.results]
    for variable in {id(v): v for v in everything if v is not None}.values():
        variable.left, variable.reads, variable.buffer = variable.uses, None, None
    for variable in [*program.inputs, *program.constants]:
        variable.buffer = _Buffer(variable.size, owned=False, users=1)
        variable.reads = (variable.buffer,)


def _execute(equation: Any, operands: list[Any], results: list[Any], here: Place, memory: _Memory) -> None:
    name = equation.primitive.name
    read = list({id(v): v for v in operands if v is not None and v.reads is not None}.values())
    last = [variable for variable in read if variable.left == 1]
    whole = name in _READS or name.startswith(_ATTENTION)
    if whole or name in _IN_PLACE:
        for variable in read if whole else read[:1]:
            _materialise(variable, memory, here.source)
    if name == "cond":
        _branch(equation, operands, results, here, memory, last)
    elif name in ("scan", "while", "shard_map"):
        _loop(equation, operands, results, here, memory, last)
    elif operands and operands[0] is not None and _is_view(equation):
        results[0].reads, results[0].buffer = memory.hold(operands[0].reads), operands[0].buffer
    elif name in _WRITES or whole:
        copy = _transposed_copy(equation)
        if copy:
            memory.reach(memory.now + copy + sum(v.size for v in results), here.source, memory.kept)
        for variable in results:
            if variable.uses:
                taken = _take_over(variable.size, last, memory) if name in _IN_PLACE else None
                _own(variable, taken, memory, here.source)
    else:
        buffers = tuple(dict.fromkeys(buffer for v in read for buffer in v.reads))
        for variable in results:
            variable.reads = memory.hold(buffers)
            if name in _COSTLY and variable.uses > 1:
                _materialise(variable, memory, here.source)
    for variable in read:
        variable.left -= 1
        if variable.left == 0:
            memory.release(variable.reads)
    for variable in results:
        if not variable.uses and variable.reads is not None:
            memory.release(variable.reads)


def _loop(equation: Any, operands: list, results: list, here: Place, memory: _Memory, last: list[_Variable]) -> None:
    name, params = equation.primitive.name, equation.params
    constants, carries = _counts(equation) if name == "scan" else (0, 0)
    if name == "while":
        constants, carries = params["cond_nconsts"] + params["body_nconsts"], len(results)
    for i, variable in enumerate(results):
        source = operands[constants + i] if i < carries else None
        taken = _take_over(variable.size, [source], memory) if source in last else None
        stacked = name == "scan" and i >= carries and here.phase == "forward"
        _own(variable, taken, memory, here.source, kept=stacked)
    lent = slice(constants, constants + carries) if name == "scan" else slice(0, 0)
    inner = max(
        (_run(_flatten(program, around), around, lent) for program, around in inside(equation, here)),
        key=lambda m: m.peak,
    )
    memory.reach(memory.now + inner.peak, inner.where, memory.kept + inner.kept_at_peak)
    memory.largest = max(memory.largest, inner.largest)


def _branch(equation: Any, operands: list, results: list, here: Place, memory: _Memory, last: list[_Variable]) -> None:
    """The branch that needs most, in the conditional's place: it may overwrite what nothing needs afterwards."""
    programs = [_flatten(program, around) for program, around in inside(equation, here)]
    program = max(programs, key=lambda program: _run(program, here).peak)
    _start(program)
    for variable, given in zip(program.inputs, operands[1:], strict=True):
        variable.buffer = _Buffer(variable.size, owned=False) if given is None else given.buffer
        variable.reads = memory.hold((variable.buffer,) if given is None else given.reads)
    for variable in last:
        memory.release(variable.reads)
        variable.reads = ()
    for variable in program.inputs:
        if not variable.uses:
            memory.release(variable.reads)
    for inner, operands, made, place in program.operations:
        _execute(inner, operands, made, place, memory)
    for outer, variable in zip(results, program.results, strict=True):
        if variable is None:
            _own(outer, None, memory, here.source)
            continue
        _materialise(variable, memory, here.source)
        outer.reads, outer.buffer = memory.hold(variable.reads), variable.buffer
        variable.left -= 1
        if variable.left == 0:
            memory.release(variable.reads)


def _counts(scan: Any) -> tuple[int, int]:
    """Numbers of constants and of carries: those in and out are as the body has them, all else has one dim more."""
    body = scan.params["jaxpr"].jaxpr
    same = [a.aval.shape == b.aval.shape for a, b in zip(scan.invars, body.invars, strict=True)]
    carries = sum(a.aval.shape == b.aval.shape for a, b in zip(scan.outvars, body.outvars, strict=True))
    return sum(same) - carries, carries


def _materialise(variable: _Variable, memory: _Memory, where: str) -> None:
    """Write to memory what so far was to be fused into its users: over one of its operands that nothing else needs."""
    if variable.buffer is not None:
        return
    reads = variable.reads
    assert reads is not None
    taken = next((b for b in reads if b.owned and b.size == variable.size and b.users == 1), None)
    if taken is not None:
        taken.owned = False
        variable.buffer = _Buffer(variable.size, True, kept=taken.kept, lent=taken.lent)
    else:
        variable.buffer = memory.allocate(variable.size, _shape(variable), where)
    variable.reads = memory.hold((variable.buffer,))
    memory.release(reads)


def _take_over(size: int, candidates: list[Any], memory: _Memory) -> _Buffer | None:
    for variable in candidates:
        buffer = variable.buffer
        # What else reads it may be fused into the operation, as the part that an update in place leaves as it was.
        readers = sum(buffer in other.reads for other in candidates)
        if buffer is not None and buffer.owned and buffer.size == size and buffer.users == readers:
            buffer.owned = False
            return _Buffer(size, True, kept=buffer.kept, lent=buffer.lent)
    return None


def _own(variable: _Variable, taken: _Buffer | None, memory: _Memory, where: str, kept: bool = False) -> None:
    variable.buffer = taken or memory.allocate(variable.size, _shape(variable), where, kept)
    variable.reads = memory.hold((variable.buffer,))


def _is_view(equation: Any) -> bool:
    name, given, made = equation.primitive.name, equation.invars[0].aval, equation.outvars[0].aval
    return name in _VIEWS or (name in _WHOLE_VIEWS and elements(given) == elements(made))


def _transposed_copy(equation: Any) -> int:
    dim = equation.params.get("all_gather_dimension", equation.params.get("scatter_dimension"))
    if equation.primitive.name not in _COLLECTIVES or dim is None:
        return 0
    before, after = equation.invars[0].aval, equation.outvars[0].aval
    rows = 1
    for n in after.shape[:dim]:
        rows *= n
    return max(elements(before), elements(after)) * after.dtype.itemsize if rows > 1 else 0


def _shape(variable: _Variable) -> str:
    aval = variable.aval
    return f"{aval.dtype}[{','.join(map(str, aval.shape))}]" if hasattr(aval, "shape") else str(aval)
