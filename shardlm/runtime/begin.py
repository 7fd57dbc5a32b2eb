"""The first call of a program by several processes: compared, compiled, and only then run."""

import weakref
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax

from shardlm.runtime.agreement import AGAIN, FIRST, PROGRAM, agree, words

_begun: "weakref.WeakKeyDictionary[Any, set[Any]]" = weakref.WeakKeyDictionary()


@lru_cache(maxsize=64)
def spans_processes(mesh: Any) -> bool:
    """Whether this is a run of several processes, all of which have devices in the mesh."""
    return jax.process_count() > 1 and len({d.process_index for d in mesh.devices.flat}) == jax.process_count()


def begin(what: str, function: Any, arguments: tuple[Any, ...], facts: Callable[[], Mapping[str, Any]]) -> None:
    """Return when all processes have compiled this function for these arguments; at once where they have before.

    They first compare what each of them is about to run. Then each compiles it, however long that takes, and they wait
    for one another once more before its first collective, in which XLA gives CPUs 30 s to come together.

    Args:
        what: its name, for messages.
        function: of `jax.jit`.
        arguments: what it is about to be called with. The first, a state or parameters, is not listed in messages.
        facts: gives what else is to be the same, by name; JSON can hold it.

    Raises:
        ValueError: on every process, naming what differs; or on those that came, naming who did not.
    """
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments))
    if shapes in _begun.get(function, ()):
        return
    first = function not in _begun
    given = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        or f"argument {number}": f"{leaf.dtype}{list(leaf.shape)}"
        for number, argument in enumerate(arguments[1:], 1)
        for path, leaf in jax.tree_util.tree_leaves_with_path(argument)
    }
    detail = "" if first else f"with shapes that it has not had before: {_listed(given)}"
    traced = function.trace(*arguments)
    compared = {**facts(), **{f"shape of {name}": text for name, text in given.items()}}
    agree(what, compared | {PROGRAM: words(traced.jaxpr)}, detail=detail, limit=FIRST if first else AGAIN)
    compiled(traced)
    agree(what, {}, detail="it has been compiled here", limit=FIRST)
    _begun.setdefault(function, set()).add(shapes)


def compiled(traced: Any) -> None:
    """Compile a traced function; the call that follows finds it."""
    traced.lower().compile()


def _listed(given: Mapping[str, str]) -> str:
    shown = [f"{name} {text}" for name, text in given.items()]
    return ", ".join(shown[:6]) + (" ..." if len(shown) > 6 else "")
