"""What a backward takes over from its forward, as arrays that can lie in a buffer between the two.

`jax.vjp` gives a function, and with it the arrays that it holds, the residuals, as leaves of a tree. Some depend on
what streams through the pipeline, the layer's input in forward or the gradient in backward: those are kept. The others
depend on parameters, positions, segments or the dropout key alone, such as a weight in the type of the computation or a
mask: whoever needs them makes them again, so no slot of the stash holds a weight. To that end the function is traced
anew where it is applied; all that the kept residuals replace is dead code there, and no compiler runs it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from shardlm import collectives
from shardlm.layout import Axis

_FREE = ("reshape", "pcast", "pvary")  # q, k and v each reshape the one input that they share: it is kept once


@dataclass(frozen=True)
class Cut:
    """The leaves of a function that are kept, for all functions that are made alike.

    Attributes:
        kept: of each array that is kept, a leaf that is it.
        source: of each leaf that needs none of its own, or is one, which kept array; the others are made again.
        types: of every leaf.
    """

    kept: tuple[int, ...]
    source: dict[int, int]
    types: tuple[Any, ...]

    @classmethod
    def of(cls, make: Callable[[Any, Any], Any], given: Any, live: Any) -> "Cut":
        """The cut of what `make(given, live)` returns, where what depends on `live` is kept."""
        traced = jax.make_jaxpr(lambda given, live: jax.tree.leaves(make(given, live)))(given, live).jaxpr
        flags = [False] * len(jax.tree.leaves(given)) + [True] * len(jax.tree.leaves(live))
        kept, source, groups = [], {}, {}
        roots = _roots(traced)
        for leaf, (var, flag) in enumerate(zip(traced.outvars, depends(traced, flags), strict=True)):
            if flag:
                group = (roots.get(id(var), id(var)), var.aval.manual_axis_type.varying)
                if group not in groups:
                    groups[group] = len(kept)
                    kept.append(leaf)
                source[leaf] = groups[group]
        return cls(tuple(kept), source, tuple(var.aval for var in traced.outvars))

    def keep(self, function: Any) -> list[Array]:
        """The arrays to keep of a function."""
        leaves = self._leaves(function)
        return [leaves[leaf] for leaf in self.kept]

    def restore(self, function: Any, kept: Sequence[Array]) -> Any:
        """The function with kept arrays in the place of its own."""
        leaves = self._leaves(function)
        for leaf, i in self.source.items():
            leaves[leaf] = kept[i].reshape(leaves[leaf].shape)
        return jax.tree.structure(function).unflatten(leaves)

    def zeros(self) -> list[Array]:
        """Zeros like what is kept."""
        types = [self.types[leaf] for leaf in self.kept]
        varying = [tuple(Axis(name) for name in kind.manual_axis_type.varying) for kind in types]
        plain = [jnp.zeros(kind.shape, kind.dtype) for kind in types]
        return [collectives.mark_varying(x, axes) for x, axes in zip(plain, varying, strict=True)]

    def _leaves(self, function: Any) -> list[Array]:
        leaves = jax.tree.leaves(function)
        assert tuple(map(jax.typeof, leaves)) == self.types, "made otherwise than what was cut"
        return leaves


def depends(jaxpr: Any, flags: Sequence[bool]) -> list[bool]:
    """Of each result of a traced program, whether it depends on those of its arguments that are flagged.

    An equation that calls a program is not looked into: making one of its results again takes all of its arguments.
    """
    on = {id(var) for var, flag in zip(jaxpr.invars, flags, strict=True) if flag}
    for equation in jaxpr.eqns:
        if not on.isdisjoint(map(id, equation.invars)):
            on.update(map(id, equation.outvars))
    return [id(var) in on for var in jaxpr.outvars]


def needs(jaxpr: Any, results: Sequence[bool]) -> list[bool]:
    """Of each argument of a traced program, whether one of the flagged results is made from it."""
    wanted = {id(var) for var, flag in zip(jaxpr.outvars, results, strict=True) if flag}
    for equation in reversed(jaxpr.eqns):
        if not wanted.isdisjoint(map(id, equation.outvars)):
            wanted.update(map(id, equation.invars))
    return [id(var) in wanted for var in jaxpr.invars]


def _roots(jaxpr: Any) -> dict[int, int]:
    """Of each variable that only reshapes another, the first of the chain."""
    roots: dict[int, int] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name in _FREE:
            var = id(equation.invars[0])
            roots[id(equation.outvars[0])] = roots.get(var, var)
    return roots
