"""A warning where an optimizer's mask or labels go by the number of dims, and so take stacked vectors for matrices.

A norm scale of all layers is one array [layer, embed]: `ndim > 1` decays it, and Muon's default rule takes it for a
matrix, while `final_norm/scale` [embed] is left alone. Two things show it without a step: what the state leaves out
(`optax.MaskedNode`), and of which parameters the updates depend on the parameters (weight decay).
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optax
from jax.extend.core import Literal

from shardlm.parallel.zero import VECTORS
from shardlm.train.paths import flatten
from shardlm.train.view import owner


def warn(update: Callable[..., Any], arguments: tuple[Any, Any, Any, Any], splits: Mapping[str, Any]) -> None:
    """Warn once if a group of parameters that the optimizer treats apart was made by the number of dims.

    Args:
        update: the optimizer's, a function of the arguments.
        arguments: gradients, state, parameters and loss, as shapes.
        splits: of the parameters, by path.
    """
    shapes = {path: x.shape for path, x in flatten(arguments[2]).items()}
    vectors = [path for path in shapes if path.rsplit("/", 1)[-1] in VECTORS]
    stacked = [path for path in vectors if getattr(splits[path], "stacked", 0)]
    single = [path for path in vectors if path not in stacked and len(shapes[path]) == 1]
    if not stacked or not single:
        return
    for group in (*_masked(arguments[1], shapes), _decayed(update, arguments, shapes)):
        by_dims = {len(shapes[path]): taken for path, taken in group.items()}
        if set(group) != set(shapes) or any(by_dims[len(shapes[path])] != taken for path, taken in group.items()):
            continue  # it goes by something else
        odd = [path for path in stacked if group[path] != group[single[0]]]
        if odd:
            named = ", ".join(f"{path} {list(shapes[path])}" for path in odd[:3])
            warnings.warn(
                f"optimizer: it treats {len(odd)} norm scales and biases of layers ({named}{', ...' * (len(odd) > 3)}) "
                f"otherwise than {single[0]} {list(shapes[single[0]])}, by their number of dims: layers are stacked "
                "here, so ndim does not tell vectors from matrices. Go by names: mask=sl.decayed for weight decay; for "
                "Muon sl.muon(...), or muon_weight_dimension_numbers=sl.matrix_dims(config)",
                stacklevel=5,
            )
            return


def _masked(state: Any, shapes: Mapping[str, Any]) -> Iterator[dict[str, bool]]:
    """For each part of the state that is like the parameters, which of them it has."""
    groups: dict[str, dict[str, bool]] = {}
    leaves, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    for keys, leaf in leaves:
        path = owner(keys, shapes)
        if path is not None:
            part = jax.tree_util.keystr(keys[: len(keys) - path.count("/") - 1])
            groups.setdefault(part, {})[path] = not isinstance(leaf, optax.MaskedNode)
    yield from groups.values()


def _decayed(update: Callable[..., Any], arguments: tuple[Any, ...], shapes: Mapping[str, Any]) -> dict[str, bool]:
    """Of each parameter, whether its update depends on it."""
    counts = [len(jax.tree.leaves(x)) for x in arguments]
    program = jax.make_jaxpr(update)(*arguments).jaxpr
    first = sum(counts[:2])
    reached = {
        variable: frozenset((i - first,)) for i, variable in enumerate(program.invars) if 0 <= i - first < counts[2]
    }
    for equation in program.eqns:
        sources = [reached.get(x, frozenset()) for x in equation.invars if not isinstance(x, Literal)]
        found = frozenset().union(*sources)
        reached |= dict.fromkeys(equation.outvars, found) if found else {}
    outputs = program.outvars[: counts[0]]
    named = [owner(keys, shapes) for keys, _ in jax.tree_util.tree_leaves_with_path(arguments[2])]
    return {
        path: not isinstance(x, Literal) and i in reached.get(x, frozenset())
        for i, (path, x) in enumerate(zip(named, outputs, strict=True))
        if path is not None
    }
