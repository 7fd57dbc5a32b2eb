"""Whether an optimizer takes every element for itself, so that it does not matter in which rows the layout stores it.

Decided by its arithmetic and not by its name: `update` is traced twice, on arrays as they are stored and as the model
has them, and the two programs are read side by side, operation by operation. Each pair of values is one of two kinds:

- the same: a step count, a rate, a norm, a parameter that is stored as the model has it;
- alike: the same elements at other places, perhaps with padding, whose value is then known or not.

What acts element by element keeps alike values alike. A sum over all elements of what is zero in its padding is the
same (a global norm). Everything else (means, factored moments, products of matrices, noise, another shape's rule) could
give other numbers: then the answer is no, and the optimizer is given the model's arrays. It is no too wherever the
reader does not know.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Of each, what it makes of padding whose value is known; None says that this is not followed.
_ELEMENTWISE: dict[str, Callable[..., Any] | None] = {
    "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum,
    "div": np.divide, "neg": np.negative, "abs": np.abs, "sign": np.sign, "sqrt": np.sqrt, "square": np.square,
    "real": np.real, "conj": np.conj, "is_finite": np.isfinite,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "select_n": lambda which, *cases: cases[int(which)], "convert_element_type": None,
    "copy": lambda x: x, "stop_gradient": lambda x: x, "reduce_precision": None,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    **dict.fromkeys(("exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "rsqrt", "cbrt", "pow", "integer_pow",
                     "erf", "not", "and", "or", "floor", "ceil", "round", "rem", "sin", "cos", "nextafter", "xor")),
}  # fmt: skip
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "custom_jvp_call", "custom_vjp_call")
_SAME = "same"


class _Unknown(Exception):
    """The two programs are not known to do the same."""


class _Alike(NamedTuple):
    """The same elements at other places: how those are stored (None: all elements are equal), and what padding is."""

    tag: Any
    padding: Any


@dataclass(frozen=True)
class Answer:
    """What reading the programs showed.

    Attributes:
        elementwise: whether the update of what is stored is what is stored of the update.
        keeps_zeros: whether it leaves zeros in the padding, given zeros there.
    """

    elementwise: bool
    keeps_zeros: bool


def read(
    update: Callable[..., Any], stored: Sequence[Any], model: Sequence[Any], tags: Sequence[Any], out: Sequence[Any]
) -> Answer:
    """Compare an update of stored arrays with that of the model's.

    Args:
        update: a function of arrays.
        stored, model: its arguments, flat, as `jax.ShapeDtypeStruct`s.
        tags: for each argument how its rows are stored, or None where it is stored as the model has it.
        out: the same for each result.
    """
    programs = [jax.make_jaxpr(update)(*arguments) for arguments in (stored, model)]
    try:
        kinds = _closed(*programs, [_SAME if tag is None else _Alike(tag, 0) for tag in tags])
        for kind, tag in zip(kinds, out, strict=True):
            if (kind != _SAME) if tag is None else (kind == _SAME or kind.tag not in (None, tag)):
                raise _Unknown
    except _Unknown:
        return Answer(False, False)
    return Answer(True, all(kind == _SAME or (kind.padding is not None and kind.padding == 0) for kind in kinds))


def _closed(stored: ClosedJaxpr, model: ClosedJaxpr, kinds: Sequence[Any]) -> list[Any]:
    pairs = list(zip(stored.consts, model.consts, strict=False))
    if len(stored.consts) != len(model.consts) or not all(_equal(a, b) for a, b in pairs):
        raise _Unknown
    return _walk(stored.jaxpr, model.jaxpr, [_SAME] * len(pairs), kinds)


def _walk(stored: Jaxpr, model: Jaxpr, consts: Sequence[Any], kinds: Sequence[Any]) -> list[Any]:
    """The kinds of a program's results, from those of its arguments."""
    known: dict[Any, tuple[Any, Any]] = {}

    def bind(theirs: Sequence[Any], ours: Sequence[Any], kinds: Sequence[Any]) -> None:
        if not len(theirs) == len(ours) == len(kinds):
            raise _Unknown
        known.update({a: (b, kind) for a, b, kind in zip(theirs, ours, kinds, strict=True)})

    def look(a: Any, b: Any) -> Any:
        if isinstance(a, Literal) and isinstance(b, Literal):
            if not _equal(a.val, b.val):
                raise _Unknown
            return _SAME
        if isinstance(a, Literal) or isinstance(b, Literal) or known[a][0] is not b:
            raise _Unknown
        return known[a][1]

    bind(stored.constvars, model.constvars, consts)
    bind(stored.invars, model.invars, kinds)
    if len(stored.eqns) != len(model.eqns) or len(stored.outvars) != len(model.outvars):
        raise _Unknown
    for a, b in zip(stored.eqns, model.eqns, strict=True):
        if a.primitive.name != b.primitive.name or len(a.invars) != len(b.invars):
            raise _Unknown
        bind(a.outvars, b.outvars, _results(a, b, [look(x, y) for x, y in zip(a.invars, b.invars, strict=True)]))
    return [look(a, b) for a, b in zip(stored.outvars, model.outvars, strict=True)]


def _results(a: Any, b: Any, kinds: list[Any]) -> list[Any]:
    """The kinds of an operation's results."""
    name = a.primitive.name
    if all(kind == _SAME for kind in kinds):
        shapes = [(x.aval.shape, x.aval.dtype) for x in a.outvars], [(x.aval.shape, x.aval.dtype) for x in b.outvars]
        if shapes[0] == shapes[1] and _text(a.params) == _text(b.params):
            return [_SAME] * len(a.outvars)
        if name == "broadcast_in_dim" and not a.invars[0].aval.shape:
            return [_Alike(None, _value(a.invars[0]))]
    if name == "cond":
        return _branches(a, b, kinds)
    if name in _CALLS:
        inner = [e.params.get("jaxpr") or e.params.get("call_jaxpr") for e in (a, b)]
        if all(isinstance(x, ClosedJaxpr) for x in inner):
            return _closed(*inner, kinds)
        if all(isinstance(x, Jaxpr) for x in inner):
            return _walk(*inner, [], kinds)
        raise _Unknown
    if name in ("reduce_sum", "reduce_and", "reduce_or"):
        whole = tuple(a.params["axes"]) == tuple(range(a.invars[0].aval.ndim))
        neutral = name == "reduce_and"
        if whole and kinds[0].tag is not None and kinds[0].padding is not None and kinds[0].padding == neutral:
            return [_SAME]
        raise _Unknown
    if name not in _ELEMENTWISE or _text(a.params) != _text(b.params):
        raise _Unknown
    if any(kind == _SAME and x.aval.shape for kind, x in zip(kinds, a.invars, strict=True)):
        raise _Unknown
    tags = {kind.tag for kind in kinds if kind != _SAME} - {None}
    if len(tags) > 1:
        raise _Unknown
    return [_Alike(next(iter(tags), None), _padding(name, a, kinds))]


def _branches(a: Any, b: Any, kinds: list[Any]) -> list[Any]:
    """A conditional's results: alike where every branch says so."""
    if kinds[0] != _SAME or len(a.params["branches"]) != len(b.params["branches"]):
        raise _Unknown
    each = [_closed(x, y, kinds[1:]) for x, y in zip(a.params["branches"], b.params["branches"], strict=True)]
    joined = []
    for found in zip(*each, strict=True):
        same = [kind == _SAME for kind in found]
        if all(same):
            joined.append(_SAME)
            continue
        tags = set() if any(same) else {kind.tag for kind in found} - {None}
        if any(same) or len(tags) > 1:
            raise _Unknown
        paddings = [kind.padding for kind in found]
        equal = None not in paddings and all(p == paddings[0] for p in paddings)
        joined.append(_Alike(next(iter(tags), None), paddings[0] if equal else None))
    return joined


def _padding(name: str, equation: Any, kinds: list[Any]) -> Any:
    """What an elementwise operation makes of padding, or None."""
    values = [_value(x) if kind == _SAME else kind.padding for x, kind in zip(equation.invars, kinds, strict=True)]
    zero = [value is not None and value == 0 for value in values]
    scalars = [kind == _SAME or kind.tag is None for kind in kinds]
    # A scalar of which nothing is known leaves zeros: were it not finite, nothing else would be either.
    if name == "mul" and ((zero[0] and (zero[1] or scalars[1])) or (zero[1] and scalars[0])):
        return 0
    if name == "div" and zero[0] and scalars[1] and values[1] is None:
        return 0
    if name == "integer_pow" and zero[0] and equation.params["y"] > 0:
        return 0
    if name in ("convert_element_type", "reduce_precision"):
        return values[0] if values[0] is not None and values[0] in (0, 1) else None
    if name in ("not", "and", "or") and all(isinstance(value, bool | np.bool_) for value in values):
        return {"not": np.logical_not, "and": np.logical_and, "or": np.logical_or}[name](*values)
    if name == "select_n" and values[0] is None and all(zero[1:]):
        return 0
    function = _ELEMENTWISE[name]
    if function is None or any(value is None for value in values):
        return None
    with np.errstate(all="ignore"):
        found = function(*values)
    return found if np.isfinite(found) else None


def _value(x: Any) -> Any:
    """The number that a literal is, or None."""
    return x.val if isinstance(x, Literal) and not np.shape(x.val) else None


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    try:
        return np.shape(a) == np.shape(b) and bool(np.array_equal(np.asarray(a), np.asarray(b)))
    except TypeError:  # keys
        return False


def _text(params: Any) -> str:
    """An operation's settings, without the addresses of functions."""
    return re.sub(r"0x[0-9a-f]+", "", str(sorted(params.items(), key=lambda item: item[0])))
