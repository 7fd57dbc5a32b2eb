"""States whose arrays a training step has taken: said in words, as nothing can be read from them any more."""

from typing import Any

import jax

USED_UP = (
    "this state was used up by a step, which writes the new state in its place: go on with what the step returned, as "
    "in `state, metrics = trainer.step(state, batch)`"
)


def check_usable(tree: Any) -> None:
    """Raise ValueError if an array of the tree has been donated to a step."""
    leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)]
    if any(leaf.is_deleted() for leaf in leaves):
        raise ValueError(USED_UP)
