"""Which results of a traced function are its arguments, handed through as they came, and which it has computed.

`nnx.remat`, `nnx.jit`, `nnx.scan` and their like take a module apart, run a program on its arrays, and assign to the
module what that program returns. So every parameter is assigned to, mostly its own value. Whether it is the same value
cannot be seen from the arrays of a trace; it can be read in the program.
"""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import Literal

# Operations whose n-th result is their n-th operand, or where that operand's shape and dtype are the result's as well.
_SAME = frozenset({"copy", "copy_p", "optimization_barrier", "pcast", "pvary", "sharding_constraint", "name"})
_SAME_IF_ALIKE = frozenset({"broadcast_in_dim", "convert_element_type", "reshape", "squeeze"})


def handed_through(jaxpr: Any) -> list[int | None]:
    """For each result of a program, the number of the argument that it is; None where it is computed.

    An answer of None may be wrong, a number never is: what cannot be followed counts as computed.

    Args:
        jaxpr: a `jax.extend.core.ClosedJaxpr`, as `jax.make_jaxpr` gives it, or a `Jaxpr`.
    """
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    origin: dict[Any, int] = {variable: number for number, variable in enumerate(inner.invars)}

    def of(atom: Any) -> int | None:
        return None if isinstance(atom, Literal) else origin.get(atom)

    for equation in inner.eqns:
        for variable, source in zip(equation.outvars, _operands(equation), strict=True):
            number = None if source is None else of(equation.invars[source])
            if number is not None:
                origin[variable] = number
    return [of(atom) for atom in inner.outvars]


def _operands(equation: Any) -> Sequence[int | None]:
    """For each result of an operation, the number of the operand that it is."""
    name, params, count = equation.primitive.name, equation.params, len(equation.outvars)
    unknown: list[int | None] = [None] * count
    if name in _SAME and count <= len(equation.invars):
        return range(count)
    if name in _SAME_IF_ALIKE:
        given, result = equation.invars[0].aval, equation.outvars[0].aval
        return [0] if (given.shape, given.dtype) == (result.shape, result.dtype) else unknown
    if name == "transpose":
        return [0] if tuple(params["permutation"]) == tuple(range(len(params["permutation"]))) else unknown
    if name == "scan":
        return _of_scan(handed_through(params["jaxpr"]), params["num_consts"], params["num_carry"])
    if name == "while":
        first = params["cond_nconsts"] + params["body_nconsts"]
        found = handed_through(params["body_jaxpr"])
        return [first + i if source == params["body_nconsts"] + i else None for i, source in enumerate(found)]
    if name == "cond":
        branches = [handed_through(branch) for branch in params["branches"]]
        return [1 + of[0] if of[0] is not None and len(set(of)) == 1 else None for of in zip(*branches, strict=True)]
    program = next((params[key] for key in ("call_jaxpr", "jaxpr", "fun_jaxpr") if key in params), None)
    if program is None or len(getattr(program, "jaxpr", program).invars) != len(equation.invars):
        return unknown
    found = handed_through(program)
    return found if len(found) == count else unknown


def _of_scan(found: list[int | None], constants: int, carried: int) -> list[int | None]:
    """A carried value that each iteration hands on is the first one; a row handed out is the row that came in."""
    carry = [constants + i if source == constants + i else None for i, source in enumerate(found[:carried])]
    rows = [source if source is not None and source >= constants + carried else None for source in found[carried:]]
    return carry + rows
