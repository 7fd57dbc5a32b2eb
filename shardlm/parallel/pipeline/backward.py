"""Three ways for a stage to come from a microbatch's forward to its gradients; shapes are per device.

|             | the stash holds, per microbatch       | a backward                                     |
|-------------|---------------------------------------|------------------------------------------------|
| `Recompute` | the stage's input                     | makes the stage's forward again                |
| `Stored`    | each layer's residuals                | computes gradients only                        |
| `Split`     | the same; and what `inputs` found     | is cut in two: `inputs`, and later `weights`   |

What residuals are is for the layer to say: all but weights, or with rematerialisation what it keeps of itself, down to
its input alone. Splitting follows arXiv:2401.10241: only the gradient of the input is waited for by another stage.

A weight's gradient is a product of what it multiplied, x, and of the gradient of what came out, dy: dW = x^T dy. No
gradient of an input contains such an x. So `Split` sees the gradients of the parameters as a linear function of those
residuals that no gradient of an input needs, and `jax.linearize` gives that function, whose own residuals are the dy.
What does not contain such a residual, as the gradient of a bias does not, is left to `inputs`.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .residuals import Cut, depends, needs

Tree = Any


class Stack(NamedTuple):
    """The layers of a chunk on one microbatch, the parameters apart.

    Attributes:
        layer: (one layer's parameters, x, its slice of `inputs`) -> x of the same shape.
        inputs: a tree of arrays with a leading layer dim.
    """

    layer: Callable[[Tree, Array, Tree], Array]
    inputs: Tree

    def run(self, parameters: Tree, x: Array) -> Array:
        """What the last layer returns."""
        return lax.scan(lambda x, one: (self.layer(one[0], x, one[1]), None), x, (parameters, self.inputs))[0]

    def vjp(self, parameters: Tree, x: Array, inputs: Tree) -> tuple[Array, Any]:
        """`jax.vjp` of one layer."""
        return jax.vjp(lambda parameters, x: self.layer(parameters, x, inputs), parameters, x)


@dataclass(frozen=True)
class Recompute:
    """Keeps the stage's input.

    Attributes:
        like: what it looks like.
    """

    like: Array

    def stash(self) -> Tree:
        """Zeros like what `forward` keeps."""
        return jnp.zeros_like(self.like)

    def forward(self, stack: Stack, parameters: Tree, x: Array) -> tuple[Array, Tree]:
        """The stage's output, and what is kept."""
        return stack.run(parameters, x), x

    def backward(self, stack: Stack, parameters: Tree, kept: Tree, gradient: Array) -> tuple[Tree, Array, Tree]:
        """Gradients of the parameters, None where they come later; that of the input; and what the later ones need."""
        with jax.named_scope("rematted_computation"):
            _, transpose = jax.vjp(stack.run, parameters, kept)
        return *transpose(gradient), None


@dataclass(frozen=True)
class Stored:
    """Keeps the layers' residuals.

    Attributes:
        like: what a layer's input looks like.
        layers: how many a chunk has.
        cut: which residuals.
    """

    like: Array
    layers: int
    cut: Cut

    @classmethod
    def of(cls, stack: Stack, parameters: Tree, like: Array) -> "Stored":
        """As `stack` keeps them; parameters of a chunk."""
        one = lambda given, x: stack.vjp(given[0], x, given[1])[1]  # noqa: E731
        first = jax.tree.map(lambda x: x[0], (parameters, stack.inputs))
        return cls(like, len(jax.tree.leaves(parameters)[0]), Cut.of(one, first, like))

    def stash(self) -> Tree:
        """As of `Recompute`."""
        return _stacked(self.cut, self.layers)

    def forward(self, stack: Stack, parameters: Tree, x: Array) -> tuple[Array, Tree]:
        """As of `Recompute`."""

        def layer(x: Array, one: tuple[Tree, Tree]) -> tuple[Array, list[Array]]:
            y, transpose = stack.vjp(one[0], x, one[1])
            return y, self.cut.keep(transpose)

        return lax.scan(layer, x, (parameters, stack.inputs))

    def backward(self, stack: Stack, parameters: Tree, kept: Tree, gradient: Array) -> tuple[Tree, Array, Tree]:
        """As of `Recompute`."""

        def layer(gradient: Array, one: _Layer) -> tuple[Array, Tree]:
            weights, back = self.transpose(stack, one)(gradient)
            return back, weights

        back, weights = lax.scan(layer, gradient, (parameters, stack.inputs, kept), reverse=True)
        return weights, back, None

    def transpose(self, stack: Stack, one: "_Layer") -> Any:
        """The function from the gradient of one layer's output to those of its parameters and input."""
        parameters, inputs, kept = one
        _, transpose = stack.vjp(parameters, jnp.zeros_like(self.like), inputs)
        return self.cut.restore(transpose, kept)


@dataclass(frozen=True)
class Split:
    """Keeps the layers' residuals, and computes the weights' gradients apart.

    Attributes:
        stored: how residuals are kept.
        multiplied: the leaves of a layer's transposed function that no gradient of its input needs.
        late: of each parameter, whether its gradient comes of those.
        cut: what the late gradients need besides.
    """

    stored: Stored
    multiplied: tuple[int, ...]
    late: tuple[bool, ...]
    cut: Cut

    @classmethod
    def of(cls, stack: Stack, parameters: Tree, like: Array) -> "Split":
        """As `stack` keeps them; parameters of a chunk."""
        stored = Stored.of(stack, parameters, like)
        kept = [x[0] for x in stored.stash()]
        first = (*jax.tree.map(lambda x: x[0], (parameters, stack.inputs)), kept)
        leaves, tree = jax.tree.flatten(stored.transpose(stack, first))
        traced = jax.make_jaxpr(lambda leaves, dy: jax.tree.unflatten(tree, leaves)(dy))(leaves, like).jaxpr
        needed = needs(traced, [False] * (len(traced.outvars) - 1) + [True])
        real = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
        multiplied = [i in stored.cut.source and real[i] and not needed[i] for i in range(len(leaves))]
        late = depends(traced, [*multiplied, *[False] * (len(traced.invars) - len(leaves))])
        at = tuple(i for i, flag in enumerate(multiplied) if flag)
        half = cls(stored, at, tuple(late[:-1]), Cut((), {}, ()))
        return dataclasses.replace(half, cut=Cut.of(lambda one, dy: half._halves(stack, one, dy).later, first, like))

    def stash(self) -> Tree:
        """As of `Recompute`."""
        return self.stored.stash()

    def left(self) -> Tree:
        """Zeros like what `backward` leaves for `weights`."""
        return _stacked(self.cut, self.stored.layers)

    def forward(self, stack: Stack, parameters: Tree, x: Array) -> tuple[Array, Tree]:
        """As of `Recompute`."""
        return self.stored.forward(stack, parameters, x)

    def backward(self, stack: Stack, parameters: Tree, kept: Tree, gradient: Array) -> tuple[Tree, Array, Tree]:
        """As of `Recompute`."""

        def layer(gradient: Array, one: _Layer) -> tuple[Array, tuple[list[Array], list[Array]]]:
            halves = self._halves(stack, one, gradient)
            return halves.back, (halves.early, self.cut.keep(halves.later))

        back, (early, left) = lax.scan(layer, gradient, (parameters, stack.inputs, kept), reverse=True)
        return self._tree(parameters, early, late=False), back, left

    def weights(self, stack: Stack, parameters: Tree, kept: Tree, left: Tree) -> Tree:
        """The gradients that come late, None for the others."""

        def layer(nothing: None, given: tuple[_Layer, list[Array]]) -> tuple[None, list[Array]]:
            one, left = given
            halves = self._halves(stack, one, jnp.zeros_like(self.stored.like))
            return nothing, self.cut.restore(halves.later, left)(halves.multiplied)

        _, late = lax.scan(layer, None, ((parameters, stack.inputs, kept), left))
        return self._tree(parameters, late, late=True)

    def _halves(self, stack: Stack, one: "_Layer", gradient: Array) -> "_Halves":
        leaves, tree = jax.tree.flatten(self.stored.transpose(stack, one))

        def gradients(multiplied: list[Array]) -> tuple[list[Array], tuple[list[Array], Array]]:
            replaced = dict(zip(self.multiplied, multiplied, strict=True))
            transpose = jax.tree.unflatten(tree, [replaced.get(i, leaf) for i, leaf in enumerate(leaves)])
            weights, back = transpose(gradient)
            late, early = [], []
            for x, flag in zip(jax.tree.leaves(weights), self.late, strict=True):
                (late if flag else early).append(x)
            return late, (early, back)

        multiplied = [leaves[i] for i in self.multiplied]
        _, later, (early, back) = jax.linearize(gradients, multiplied, has_aux=True)
        return _Halves(early, back, multiplied, later)

    def _tree(self, parameters: Tree, gradients: list[Array], late: bool) -> Tree:
        """Gradients in the places of the parameters, None in those of the others."""
        given = iter(gradients)
        return jax.tree.unflatten(
            jax.tree.structure(parameters), [next(given) if flag == late else None for flag in self.late]
        )


_Layer = tuple[Tree, Tree, list[Array]]
"""Of one layer the parameters, the inputs, and what is kept."""


class _Halves(NamedTuple):
    """One layer's backward.

    Attributes:
        early: gradients of parameters, of those that do not come late.
        back: the gradient of the layer's input.
        multiplied: what `later` is to be called with.
        later: the linear function that gives the late gradients.
    """

    early: list[Array]
    back: Array
    multiplied: list[Array]
    later: Any


def _stacked(cut: Cut, layers: int) -> list[Array]:
    return [jnp.stack([x] * layers) for x in cut.zeros()]
