"""Goes through a traced program, equation by equation, with what surrounds each: loops, branches, phase, source line.

A jaxpr is what JAX traces before any compiler sees it: the same on a laptop and on a cluster, on CPU, GPU and TPU.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PHASES = ("forward", "backward", "update")
_CALLS = {"custom_vjp_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr", "custom_lin": "call_jaxpr"}
_LIBRARY = ("collectives.py",)  # its lines say how one communicates; what is asked for is who calls it


@dataclass(frozen=True)
class Place:
    """Where an equation stands.

    Attributes:
        times: how often it runs in one execution of the program: the product of the lengths of the loops around it.
        branch: the branches of conditionals around it, as in "train.py:12 branch 1 of 2"; empty where there are none.
        phase: "forward", "backward" or "update".
        recomputed: whether it makes again, in backward, what was made in forward.
        endless: whether it is inside a `while` loop, whose length no trace knows; `times` counts it once.
        mesh: the mesh of the fully manual region around it, in which shapes are per device; None outside.
        source: "file.py:12" of the line that asked for it, the nearest one outside JAX.
    """

    times: int = 1
    branch: tuple[str, ...] = ()
    phase: str = "forward"
    recomputed: bool = False
    endless: bool = False
    mesh: Any = None
    source: str = "?"


def equations(jaxpr: Any, place: Place = Place()) -> Iterator[tuple[Any, Place]]:
    """Every equation that holds no other program, and where it stands, in the order of execution.

    Args:
        jaxpr: a `jax.extend.core.ClosedJaxpr` (of `jax.make_jaxpr`) or `Jaxpr`.
        place: what surrounds it.
    """
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        here = at(equation, place)
        inner = list(inside(equation, here))
        if not inner:
            yield equation, here
        for program, around in inner:
            yield from equations(program, around)


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
        yield params[_CALLS[name]], here
    elif name in ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "remat"):
        yield params["jaxpr"], here


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
    source = _source(equation) or place.source
    return dataclasses.replace(place, phase=phase, recomputed=recomputed, source=source)


def _source(equation: Any) -> str | None:
    """The nearest line that is neither JAX's nor `collectives`'; of a few layers of helpers the outermost is no help."""
    traceback = equation.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        parts = frame.file_name.replace("\\", "/").split("/")
        if "site-packages" in parts or parts[-1] in _LIBRARY or parts[-1].startswith("<"):
            continue
        where = "/".join(parts[-2:]) if "shardlm" in parts else parts[-1]
        return f"{where}:{frame.line_num}"
    return None


def elements(aval: Any) -> int:
    """Number of elements of an array's abstract value."""
    return math.prod(aval.shape) if hasattr(aval, "shape") else 0
