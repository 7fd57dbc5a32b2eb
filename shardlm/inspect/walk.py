"""Goes through a traced program, equation by equation, with what surrounds each: loops, branches, phase, source line.

A jaxpr is what JAX traces before any compiler sees it: the same on a laptop and on a cluster, on CPU, GPU and TPU.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shardlm.inspect import origin

# A branch of a conditional may say in how many of the loop's iterations it is taken, by
# `jax.named_scope("taken_6_of_9")`, and what for, as in "taken_6_of_9_for_has_forward".
TAKEN = re.compile(r"taken_(\d+)_of_(\d+)(?:_for_(\w+))?")
PHASES = ("forward", "backward", "update")
ON_CHIP = "on_chip"  # a scope of that name: what is made in it may stay on the chip, as in a fused kernel
_CALLS = {
    "jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_vjp_call", "custom_jvp_call",
    "custom_vjp_call_jaxpr",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where an equation stands.

    Attributes:
        times: how often it runs in one execution of the program: the product of the lengths of the loops around it.
        branch: the branches of conditionals around it, as in "train.py:12 branch 1 of 2"; empty where there are none.
        phase: "forward", "backward" or "update".
        recomputed: whether it makes again, in backward, what was made in forward.
        taken: how often the branch around it is taken, where it says so; None elsewhere.
        purpose: what for, where that branch says so.
        on_chip: whether what it makes may stay on the chip, and its operands too: a fused kernel's inner products.
        endless: whether it is inside a `while` loop, whose length no trace knows; `times` counts it once.
        mesh: the mesh of the fully manual region around it, in which shapes are per device; None outside.
        source: "file.py:12" of the line that asked for it, the nearest one outside JAX.
    """

    times: int = 1
    branch: tuple[str, ...] = ()
    phase: str = "forward"
    recomputed: bool = False
    taken: int | None = None
    purpose: str | None = None
    on_chip: bool = False
    endless: bool = False
    mesh: Any = None
    source: str = "?"


def equations(jaxpr: Any, place: Place = Place()) -> Iterator[tuple[Any, Place]]:
    """Every equation that holds no other program, and where it stands, in the order of execution.

    Equations whose results nothing needs are left out, as compilers do.

    Args:
        jaxpr: a `jax.extend.core.ClosedJaxpr` (of `jax.make_jaxpr`) or `Jaxpr`.
        place: what surrounds it.
    """
    return _equations(jaxpr, [True] * len(getattr(jaxpr, "jaxpr", jaxpr).outvars), place)


def _equations(jaxpr: Any, results: Sequence[bool], place: Place) -> Iterator[tuple[Any, Place]]:
    for equation, used in _needed(jaxpr, results)[0]:
        here = at(equation, place)
        inner = list(inside(equation, here))
        if not inner:
            yield equation, here
        for program, around in inner:
            outs = getattr(program, "jaxpr", program).outvars
            yield from _equations(program, used if _passes_on(equation) else [True] * len(outs), around)


def _needed(jaxpr: Any, results: Sequence[bool]) -> tuple[list[tuple[Any, list[bool]]], list[bool]]:
    """The equations that some of the results need, each with which of its own are; and which inputs they need."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    needed = {id(v) for v, used in zip(inner.outvars, results, strict=True) if used}
    kept = []
    for equation in reversed(inner.eqns):
        # A collective's effect is that it names an axis; without a user it is as dead as any other operation.
        acts = any(type(effect).__name__ != "NamedAxisEffect" for effect in equation.effects)
        used = [acts or id(v) in needed for v in equation.outvars]
        if acts or any(used):
            kept.append((equation, used))
            needed.update(map(id, _reads(equation, used)))
    return kept[::-1], [id(v) in needed for v in inner.invars]


def _passes_on(equation: Any) -> bool:
    """Whether its operands and results are, one by one, those of the programs that it runs."""
    once = equation.primitive.name == "scan" and equation.params["length"] == 1  # which compilers inline
    return once or equation.primitive.name in _CALLS | {"cond", "shard_map"}


def _reads(equation: Any, used: list[bool]) -> list[Any]:
    """The operands that the used results need."""
    if not _passes_on(equation):
        return equation.invars
    programs = [_needed(program, used)[1] for program, _ in inside(equation, Place())]
    read = [any(of_each) for of_each in zip(*programs, strict=True)]
    predicate = len(equation.invars) - len(read)  # of a conditional
    return equation.invars[:predicate] + [v for v, r in zip(equation.invars[predicate:], read, strict=True) if r]


def inside(equation: Any, here: Place) -> Iterator[tuple[Any, Place]]:
    """The programs that an equation runs, and what surrounds them; none for an ordinary operation."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        yield params["jaxpr"], dataclasses.replace(here, times=here.times * params["length"])
    elif name == "while":
        yield params["cond_jaxpr"], dataclasses.replace(here, endless=True)
        yield params["body_jaxpr"], dataclasses.replace(here, endless=True)
    elif name == "cond":
        branches = params["branches"]
        for i, branch in enumerate(branches):
            label = f"{here.source} branch {i + 1} of {len(branches)}"
            yield branch, dataclasses.replace(here, branch=(*here.branch, label))
    elif name == "shard_map":
        manual = params.get("manual_axes") or frozenset(params["mesh"].axis_names)
        whole = all(axis in manual or size == 1 for axis, size in params["mesh"].shape.items())
        yield params["jaxpr"], dataclasses.replace(here, mesh=params["mesh"] if whole else here.mesh)
    elif name in _CALLS:
        yield params[next(key for key in ("call_jaxpr", "jaxpr") if key in params)], here


def at(equation: Any, place: Place) -> Place:
    """Where an equation stands, given what surrounds the program that it is in."""
    stack = str(equation.source_info.name_stack)
    phase = place.phase
    for name in PHASES:
        if name in stack.split("/"):
            phase = name
    if "transpose(" in stack:
        phase = "backward"
    recomputed = place.recomputed or "rematted_computation" in stack
    times, branch, taken, purpose = place.times, place.branch, place.taken, place.purpose
    if branch and (match := TAKEN.search(stack)):
        times, branch, taken = times * int(match[1]) // int(match[2]), branch[:-1], int(match[1])
        purpose = match[3]
    line, helper = _source(equation)
    source = line or (place.source if place.source != "?" else helper or "?")
    return dataclasses.replace(
        place,
        times=times,
        branch=branch,
        phase=phase,
        recomputed=recomputed,
        taken=taken,
        purpose=purpose,
        on_chip=place.on_chip or ON_CHIP in re.split(r"[/()]", stack),
        source=source,
    )


def _source(equation: Any) -> tuple[str | None, str | None]:
    """The nearest line that is neither JAX's nor a helper's, and the nearest helper's."""
    traceback = equation.source_info.traceback
    return (
        origin.asked_for((frame.file_name, frame.line_num) for frame in traceback.frames) if traceback else (None, None)
    )


def elements(aval: Any) -> int:
    """Number of elements of an array's abstract value."""
    return math.prod(aval.shape) if hasattr(aval, "shape") else 0
