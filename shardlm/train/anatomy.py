"""A Flax NNX module taken apart into arrays by path, and put together again under `jax.jit`.

What a module holds must be seen to go somewhere: what is neither a parameter, nor carried, nor drawn anew is an error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from shardlm.rules import annotation_of


@dataclass(frozen=True)
class Part:
    """The arrays of one kind: parameters, random streams or variables.

    Attributes:
        treedef: of their `nnx.State`.
        shapes: by path, in the tree's order of leaves, as `jax.ShapeDtypeStruct`s.
        annotations: by path, the specs that they carry.
    """

    treedef: Any
    shapes: dict[str, jax.ShapeDtypeStruct]
    annotations: dict[str, PartitionSpec]

    @classmethod
    def of(cls, state: nnx.State) -> "Part":
        """The part that an abstract state is."""
        leaves, treedef = jax.tree.flatten(state)
        order: dict[int, tuple[str, Any]] = {}
        for _, path, variable, index in _leaves(jax.tree.unflatten(treedef, list(range(len(leaves))))):
            order[index] = path, variable
        assert sorted(order) == list(range(len(leaves)))
        shapes = {order[i][0]: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)}
        specs = {path: annotation_of(variable) for path, variable in order.values()}
        return cls(treedef, shapes, {path: spec for path, spec in specs.items() if spec is not None})

    def state(self, arrays: dict[str, Array]) -> nnx.State:
        """The state that holds these arrays."""
        return jax.tree.unflatten(self.treedef, [arrays[path] for path in self.shapes])


@dataclass(frozen=True)
class Anatomy:
    """What a module is made of.

    Attributes:
        make_module: as given.
        name: of its class.
        training, evaluating: its graph under `module.train()` and under `module.eval()`.
        wrt: as given.
        parameters, streams, variables: its arrays; parameters are every `nnx.Param`, and what `wrt` takes besides.
        trained: the paths of the parameters that `wrt` takes; the others are frozen.
        dims: by path, the logical dims of the parameters that are of shardlm's own layers.
    """

    make_module: Callable[[nnx.Rngs], nnx.Module]
    wrt: Any
    name: str
    training: Any
    evaluating: Any
    parameters: Part
    streams: Part
    variables: Part
    trained: frozenset[str]
    dims: dict[str, tuple[str | None, ...]]

    @classmethod
    def of(cls, make_module: Callable[[nnx.Rngs], nnx.Module], wrt: Any = nnx.Param) -> "Anatomy":
        """Take apart what `make_module` makes; nothing is allocated.

        Args:
            make_module: from `nnx.Rngs`, the module.
            wrt: a filter of Flax: what of the module is trained.

        Raises:
            TypeError: it makes no module, or cannot be called; `wrt` is no filter.
            ValueError: something in it can be neither trained nor carried; `wrt` takes nothing.
        """
        if not callable(make_module):
            raise TypeError(
                f"make_module is a {type(make_module).__name__}; it is a function from nnx.Rngs to an nnx.Module, as "
                "lambda rngs: MLP(64, rngs=rngs)"
            )
        taken = _predicate(wrt)
        found: dict[str, Any] = {}

        def build() -> tuple[nnx.State, nnx.State, nnx.State]:
            module = _make(make_module, 0)
            found["name"] = type(module).__name__
            module.eval()
            found["evaluating"] = nnx.graphdef(module)
            module.train()
            found["training"], *states = _split(module, wrt)
            found["ours"] = _own_variables(module)
            return tuple(states)

        params, streams, variables = jax.eval_shape(build)
        parts = [Part.of(state) for state in (params, streams, variables)]
        leaves = [(path, keys, variable) for keys, path, variable, _ in _leaves(params)]
        trained = frozenset(path for path, keys, variable in leaves if taken(keys, variable))
        dims = {path: tuple(annotation_of(variable) or ()) for path, _, variable in leaves if path in found["ours"]}
        _check_trained(found["name"], wrt, trained, {path: type(variable) for path, _, variable in leaves})
        _check_arrays(found["name"], trained, *parts)
        graphs = found["training"], found["evaluating"]
        return cls(make_module, wrt, found["name"], *graphs, *parts, trained, dims)

    def initialize(self, seed: int) -> tuple[dict[str, Array], dict[str, Array]]:
        """Initial parameters and variables, by path."""
        module = _make(self.make_module, seed)
        module.train()
        _, params, _, variables = _split(module, self.wrt)
        return by_path(params), by_path(variables)

    def assemble(
        self, params: dict[str, Array], variables: dict[str, Array], key: Array, *, training: bool
    ) -> nnx.Module:
        """The module of these arrays, whose n-th random stream starts from `fold_in(key, n)`."""
        streams, count = {}, 0
        for path, leaf in self.streams.shapes.items():
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                start = jax.random.fold_in(key, count)
                streams[path] = jax.random.split(start, leaf.shape) if leaf.shape else start
                count += 1
            else:  # how often it was drawn from
                streams[path] = jnp.zeros(leaf.shape, leaf.dtype)
        graph = self.training if training else self.evaluating
        states = self.parameters.state(params), self.streams.state(streams), self.variables.state(variables)
        return nnx.merge(graph, *states)

    def after(self, module: nnx.Module) -> tuple[dict[str, Array], dict[str, Array]]:
        """The variables and the parameters of a module that has been called.

        Raises:
            ValueError: the call made or removed arrays, changed their shape or dtype, or changed an attribute that is
                no array.
        """
        graph, params, _, variables = _split(module, self.wrt)
        found, problems = by_path(variables, strip=False) | by_path(params, strip=False), []
        expected = self.variables.shapes | self.parameters.shapes
        for path in found.keys() - expected.keys():
            problems.append(f"{path} is new: take it out with nnx.pop in loss_fn, or make it in make_module")
        for path, leaf in expected.items():
            new = found.get(path)
            if new is None:
                problems.append(f"{path} is gone")
            elif (jnp.shape(new), jnp.result_type(new)) != (leaf.shape, leaf.dtype):
                problems.append(
                    f"{path} was {leaf.dtype}{list(leaf.shape)}, is {jnp.result_type(new)}{list(jnp.shape(new))}"
                )
        if not problems and graph != self.training:
            problems.append("an attribute that is no array changed: keep what changes in an nnx.Variable")
        if problems:
            raise ValueError(
                f"a step of {self.name} does what cannot be carried to the next:"
                + "".join(f"\n  - {problem}" for problem in sorted(problems))
            )
        kept = {path: jnp.asarray(found[path], leaf.dtype) for path, leaf in self.variables.shapes.items()}
        return kept, {path: found[path] for path in self.parameters.shapes}


def by_path(state: nnx.State, *, strip: bool = True) -> dict[str, Any]:
    """The arrays of a state by path, their dtypes made definite where `strip`."""
    arrays = {path: leaf for _, path, _, leaf in _leaves(state)}
    return {path: jnp.asarray(x, jnp.result_type(x)) for path, x in arrays.items()} if strip else arrays


def _split(module: nnx.Module, wrt: Any) -> tuple[Any, nnx.State, nnx.State, nnx.State]:
    """The graph, parameters, random streams and variables of a module."""
    graph, streams, params, variables = nnx.split(module, nnx.RngState, nnx.Any(nnx.Param, wrt), ...)
    return graph, params, streams, variables


def _predicate(wrt: Any) -> Callable[[Any, Any], bool]:
    try:
        return nnx.filterlib.to_predicate(wrt)
    except (TypeError, ValueError):  # the second by an error in Flax's own message
        raise TypeError(
            f"wrt={wrt!r} is a {type(wrt).__name__}; it is a filter of Flax for what is trained: a type as "
            "nnx.LoRAParam, nnx.PathContains('head'), or several of them in nnx.Any(...)"
        ) from None


def _own_variables(module: nnx.Module) -> set[str]:
    """Paths of the variables that layers of `shardlm.models` hold, whose annotations name logical dims."""
    found = set()
    for keys, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module) and type(node).__module__.startswith(f"{__name__.partition('.')[0]}.models."):
            held = {name for name, value in vars(node).items() if isinstance(value, nnx.Variable)}
            found |= {"/".join(map(str, (*keys, name))) for name in held}
    return found


def _leaves(state: nnx.State) -> list[tuple[tuple[Any, ...], str, Any, Any]]:
    """(keys, path, variable or array, leaf) of every leaf."""
    found = []
    for keys, variable in nnx.to_flat_state(state):
        value = variable.get_value() if isinstance(variable, nnx.Variable) else variable
        for inner, leaf in jax.tree_util.tree_leaves_with_path(value):
            names = [*map(str, keys), *filter(None, [jax.tree_util.keystr(inner, simple=True, separator="/")])]
            found.append((keys, "/".join(names), variable, leaf))
    return found


def _make(make_module: Callable[[nnx.Rngs], nnx.Module], seed: int) -> nnx.Module:
    """Call `make_module` without moving what it annotates, and see every array that it holds."""
    with nnx.use_eager_sharding(False):
        module = make_module(nnx.Rngs(seed))
    if not isinstance(module, nnx.Module):
        raise TypeError(f"make_module returned a {type(module).__name__}; it returns an nnx.Module")
    containers = []
    for keys, node in list(nnx.iter_graph(module)):
        if not isinstance(node, nnx.Pytree):
            continue
        for name, value in list(vars(node).items()):
            # Traced, a bare array is taken for a constant of the graph: say that it is data.
            if isinstance(value, jax.Array):
                setattr(node, name, nnx.data(value))
            elif type(value) in (list, tuple, dict, set):
                containers.append(("/".join(map(str, (*keys, name))), value))
    seen = {id(leaf) for *_, leaf in _leaves(nnx.state(module))}
    hidden = [f"{path} ({type(value).__name__})" for path, value in containers if _holds_others(value, seen)]
    if hidden:
        raise ValueError(
            f"{type(module).__name__} holds arrays in plain containers, where Flax does not find them: "
            f"{', '.join(hidden)}: wrap these in nnx.data or nnx.List, or the arrays in nnx.Variable"
        )
    return module


def _holds_others(container: Any, seen: set[int]) -> bool:
    """Whether a plain container holds an array, itself or in a variable, that is not among those that Flax has seen."""
    leaves = jax.tree.leaves(container, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    arrays = jax.tree.leaves([leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf for leaf in leaves])
    return any(isinstance(array, jax.Array) and id(array) not in seen for array in arrays)


def _check_trained(name: str, wrt: Any, trained: frozenset[str], kinds: dict[str, type]) -> None:
    if trained or not kinds:
        return
    counts: dict[type, list[str]] = {}
    for path, kind in kinds.items():
        counts.setdefault(kind, []).append(path)
    named = ", ".join(f"{len(paths)} nnx.{kind.__name__} (as {paths[0]})" for kind, paths in counts.items())
    raise ValueError(f"wrt={getattr(wrt, '__name__', wrt)} takes nothing of {name}, whose parameters are {named}")


def _check_arrays(name: str, trained: frozenset[str], parameters: Part, streams: Part, variables: Part) -> None:
    problems = [
        f"{path} is an nnx.Param of dtype {leaf.dtype}, which has no gradient: make it an nnx.Variable, or leave it "
        "out by wrt="
        for path, leaf in parameters.shapes.items()
        if path in trained and not jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    problems += [
        f"{path} is a random key outside of nnx.Rngs, which cannot be saved: keep an nnx.Rngs or one of its streams"
        for path, leaf in variables.shapes.items()
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    ]
    problems += [
        f"{path} has no elements: shape {leaf.shape}"
        for path, leaf in (parameters.shapes | variables.shapes).items()
        if not leaf.size
    ]
    if problems:
        raise ValueError(f"{name} cannot be trained:" + "".join(f"\n  - {problem}" for problem in problems))
