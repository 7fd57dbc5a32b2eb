"""One program for every table: a scan over its ticks, inside the fully manual region; shapes are per device.

Each device holds the layers of its stage. The embedding and the head belong to no stage: their vocabulary is split over
the stages, and all compute them together (arXiv:2411.05288); or they are on the first and the last stage, and what the
others compute is masked. What a tick does, in which order, is in `table.py`; here each step of it is one function of
the carry.

Whether a tick has a forward, a backward, a head is the same for all devices, so those are branches; what a stage
without work computes in such a tick is masked. Receive buffers and the stash of inputs have as many slots as the table
says, whatever the number of microbatches. What lies in the stash, and how backward gets by with it, is in
`backward.py`. Gradients are summed in float32 over the microbatches, and over devices by whoever called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from shardlm import collectives
from shardlm.layout import Axis
from shardlm.parallel.pipeline.backward import Recompute, Split, Stack, Stored
from shardlm.parallel.pipeline.table import PER_STAGE, Table

Tree = Any


@dataclass(frozen=True)
class Model:
    """The model as the executor needs it; `microbatch` and `chunk` are int32 scalars, their numbers.

    Attributes:
        embed: (outer, microbatch) -> x, the residual stream before the first layer; all stages together, or by itself.
        layers: (x, microbatch, chunk) -> the layers of this stage's chunk, for what is like x.
        head: (outer, x, microbatch) -> sum of losses; all stages together, on the same x, or by itself.
        outer: parameters of the embedding and the head that are differentiated; there may be none.
        inner: of this stage's layers [chunks, layers, ...], those.
        like: what x looks like: its shape, dtype and the axes over which it varies, `pipe` among them.
        ends: the first stage embeds and the last has the head, each by itself; `outer` varies over `pipe`.
    """

    embed: Callable[[Tree, Array], Array]
    layers: Callable[[Array, Array, Array], Stack]
    head: Callable[[Tree, Array, Array], Array]
    outer: Tree
    inner: Tree
    like: Array
    ends: bool = False


class _Carry(NamedTuple):
    """What goes from tick to tick.

    Attributes:
        activations, gradients: receive buffers [slots, *x].
        stash: what forward keeps for backward, a tree of [slots, ...].
        left: what a backward leaves for the gradients of the weights, likewise.
        loss: the sum so far.
        outer, inner: sums of gradients.
    """

    activations: Array
    gradients: Array
    stash: Tree
    left: Tree
    loss: Array
    outer: Tree
    inner: Tree


def execute(model: Model, table: Table, loss: Array, recompute: bool = True) -> tuple[Array, Tree, Tree]:
    """Sum of losses over all microbatches, and its gradients in at least float32.

    Args:
        model: see there.
        table: a validated table of as many stages as the pipe axis has.
        loss: zero, of the dtype of the sum, varying as losses do.
        recompute: backward makes the stage's forward again; not with split backwards.

    Returns:
        The sum, the same on all stages, and gradients of `outer` and `inner`. With `model.ends` the sum and the
        gradients of `outer` are parts, to be added over the stages.
    """
    assert table.stages == collectives.size(Axis.PIPE) and not (table.split and recompute)
    stage = collectives.index(Axis.PIPE)
    way = _way(model, table.split, recompute)

    def slots(count: int, like: Tree = model.like) -> Tree:
        return jax.tree.map(lambda x: jnp.stack([jnp.zeros_like(x)] * max(count, 1)), like)

    wide = partial(jax.tree.map, lambda x: collectives.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)))
    start = _Carry(
        activations=slots(table.activation_slots),
        gradients=slots(table.gradient_slots),
        stash=slots(table.stash_slots, way.stash()),
        left=slots(table.weight_slots, way.left()) if isinstance(way, Split) else None,
        loss=loss,
        outer=wide(model.outer),
        inner=wide(model.inner),
    )

    def tick(carry: _Carry, row: dict[str, Array]) -> tuple[_Carry, None]:
        row = row | {name: row[name][stage] for name in PER_STAGE}
        return _Tick(model, way, row, counts, table.stages).run(carry), None

    arrays = table.rows()
    counts = {name: (int((a if a.dtype == bool else a >= 0).sum()), table.ticks) for name, a in arrays.items()}
    rows = {name: jnp.asarray(array) for name, array in arrays.items()}
    end, _ = lax.scan(tick, start, rows)
    return end.loss, end.outer, end.inner


def _way(model: Model, split: bool, recompute: bool) -> Recompute | Stored | Split:
    if recompute:
        return Recompute(model.like)
    first = collectives.mark_varying(jnp.zeros((), jnp.int32), Axis.PIPE)  # as in a tick: the types decide what is kept
    of = Split.of if split else Stored.of
    return of(model.layers(model.like, first, first), part(model.inner, first), model.like)


def forward(model: Model, stages: int, chunks: int, microbatches: int) -> Array:
    """What the last chunk gives for each microbatch, on all stages: [microbatches, *x]; for use without gradients.

    All microbatches go through one chunk of all stages before the next. Microbatch i is at stage s in tick i + s of
    each, so there are chunks * (microbatches + stages - 1) ticks.
    """
    stage, numbers = collectives.index(Axis.PIPE), jnp.arange(microbatches)

    def tick(x: Array, chunk: Array, received: Array, now: Array) -> tuple[Array, Array]:
        first = lax.dynamic_index_in_dim(x, jnp.minimum(now, microbatches - 1), keepdims=False)
        given = jnp.where(stage == 0, first, received)
        number = jnp.clip(now - stage, 0, microbatches - 1)
        out = model.layers(given, number, chunk).run(part(model.inner, chunk), given)
        last = collectives.all_reduce(_mask(stage == stages - 1, out), Axis.PIPE)
        out = jnp.where(stage > stages, last, out)  # never; all devices communicate in one order, as in a step
        return collectives.shift(out, Axis.PIPE, 1), collectives.mark_varying(last, Axis.PIPE)

    def through(x: Array, chunk: Array) -> tuple[Array, None]:
        _, results = lax.scan(partial(tick, x, chunk), model.like, jnp.arange(microbatches + stages - 1))
        return results[stages - 1 :], None

    embedded = lax.map(lambda number: model.embed(model.outer, number), numbers)
    end, _ = lax.scan(through, collectives.mark_varying(embedded, Axis.PIPE), jnp.arange(chunks))
    return collectives.all_reduce(_mask(stage == 0, end), Axis.PIPE)


@dataclass(frozen=True)
class _Tick:
    """One tick of one stage.

    Attributes:
        way: from forward to backward.
        row: the table's, of this stage where it has one for each.
        counts: for what may be in a tick, in how many of them it is, and of how many.
    """

    model: Model
    way: Recompute | Stored | Split
    row: dict[str, Array]
    counts: dict[str, tuple[int, int]]
    stages: int

    def run(self, carry: _Carry) -> _Carry:
        """All of a tick, in the order of `table.py`."""
        nothing = jnp.zeros_like(self.model.like)
        # One after another, so that all devices communicate in one order: where few threads play many devices, as on a
        # CPU, two collectives at once can wait for each other's threads for ever.
        # A branch gives what it changes, and only that: what went through unchanged would be copied.
        changed = carry.inner, carry.left, nothing
        inner, left, back = self._if("has_backward", partial(self._backward, carry), changed)
        carry = carry._replace(inner=inner, left=left)
        if isinstance(self.way, Split):
            inner = self._if("has_weight", partial(self._weights, self.way, carry), inner)
            carry, back = carry._replace(inner=inner), self._after(inner, back)
        outer, seen = carry.outer, back
        if jax.tree.leaves(outer):  # else nothing that embeds is differentiated
            outer, seen = self._if("embed_gradient_microbatch", partial(self._embed_backward, back), (outer, back))
        embedded = self._if("embed_microbatch", self._embed, self._after((outer, seen), nothing))
        carry = carry._replace(outer=outer, activations=self._after(embedded, carry.activations))
        changed = carry.stash, nothing
        stash, out = self._if("has_forward", partial(self._forward, embedded, carry.activations), changed)
        changed = carry.loss, carry.outer, carry.gradients
        loss, outer, gradients = self._if("head_microbatch", partial(self._head, out), changed)
        carry = carry._replace(stash=stash, loss=loss, outer=outer, gradients=gradients)
        out = self._after((carry.outer, carry.gradients), out)
        arrived = self._if("sends_activation", partial(self._send, out, 1), nothing)
        back = self._after(arrived, back)
        returned = self._if("sends_gradient", partial(self._send, back, -1), nothing)
        return carry._replace(
            activations=_write(carry.activations, self.row["activation_arrival"], arrived),
            gradients=_write(carry.gradients, self.row["gradient_arrival"], returned),
        )

    def _after(self, done: Tree, x: Array) -> Array:
        """`x`, which is there once everything in `done` is, and no compiler knows that it could be earlier."""
        axes = tuple(Axis(name) for name in collectives.varying(x))
        leaves = [leaf for leaf in jax.tree.leaves(done) if collectives.varying(leaf) <= collectives.varying(x)]
        marks = [collectives.mark_varying(leaf.ravel()[0], axes).astype(x.dtype) for leaf in leaves]
        never = collectives.index(Axis.PIPE) > self.stages
        return jnp.where(never, sum(marks), x)

    def _if(self, what: str, function: Callable[[Any], Any], otherwise: Any) -> Any:
        """`function(otherwise)` in ticks that have `what`; a branch that all devices take together."""
        flag, (taken, ticks) = self.row[what], self.counts[what]

        def branch(given: Any) -> Any:
            with jax.named_scope(f"taken_{taken}_of_{ticks}_for_{what}"):  # for whoever counts what a step does
                return function(given)

        return lax.cond(flag if flag.dtype == jnp.bool_ else flag >= 0, branch, lambda same: same, otherwise)

    def _layers(self, name: str) -> tuple[Array, Array, Stack, Tree]:
        """Of an operation the microbatch, -1 where there is none, the chunk, its layers and their parameters."""
        number, chunk = self.row[f"{name}_microbatch"], jnp.maximum(self.row[f"{name}_chunk"], 0)
        stack = self.model.layers(self.model.like, jnp.maximum(number, 0), chunk)
        return number, chunk, stack, part(self.model.inner, chunk)

    def _backward(self, carry: _Carry, given: tuple[Tree, Tree, Array]) -> tuple[Tree, Tree, Array]:
        sums, slots, _ = given
        kept = _read(carry.stash, self.row["backward_stash"])
        gradient = _read(carry.gradients, self.row["backward_read"])
        with jax.named_scope("backward"):
            number, chunk, stack, parameters = self._layers("backward")
            inner, back, left = self.way.backward(stack, parameters, kept, gradient)
        slots = _write(slots, self.row["backward_write"], left)
        return _add_part(sums, inner, chunk, number >= 0), slots, _mask(number >= 0, back)

    def _weights(self, way: Split, carry: _Carry, sums: Tree) -> Tree:
        kept, left = _read(carry.stash, self.row["weight_stash"]), _read(carry.left, self.row["weight_read"])
        with jax.named_scope("backward"):
            number, chunk, stack, parameters = self._layers("weight")
            inner = way.weights(stack, parameters, kept, left)
        return _add_part(sums, inner, chunk, number >= 0)

    def _embed_backward(self, back: Array, given: tuple[Tree, Array]) -> tuple[Tree, Array]:
        sums, _ = given
        number = self.row["embed_gradient_microbatch"]
        gradient = self._of(0, back)
        embed = lambda outer: self.model.embed(outer, number)  # noqa: E731
        with jax.named_scope("backward"):
            _, transpose = jax.vjp(embed, self.model.outer)
            (outer,) = transpose(gradient)
        return _add(sums, outer), collectives.mark_varying(gradient, Axis.PIPE)

    def _embed(self, nothing: Array) -> Array:
        x = self.model.embed(self.model.outer, self.row["embed_microbatch"])
        return collectives.mark_varying(x, Axis.PIPE)

    def _forward(self, embedded: Array, activations: Array, given: tuple[Tree, Array]) -> tuple[Tree, Array]:
        slots, _ = given
        read = self.row["forward_read"]
        x = jnp.where(read >= 0, _read(activations, read), embedded)
        _, _, stack, parameters = self._layers("forward")
        y, kept = self.way.forward(stack, parameters, x)
        return _write(slots, self.row["forward_stash"], kept), y

    def _head(self, out: Array, given: tuple[Array, Tree, Array]) -> tuple[Array, Tree, Array]:
        total, sums, slots = given
        number = self.row["head_microbatch"]
        last = self.stages - 1
        x = self._of(last, out)

        def head(outer: Tree, x: Array) -> Array:
            loss = self.model.head(outer, x, number)
            return _mask(collectives.index(Axis.PIPE) == last, loss) if self.model.ends else loss

        loss, transpose = jax.vjp(head, self.model.outer, x)
        outer, gradient = transpose(jnp.ones_like(loss))
        slot = jnp.where(collectives.index(Axis.PIPE) == last, self.row["head_write"], -1)
        gradient = collectives.mark_varying(gradient, Axis.PIPE)
        return total + loss, _add(sums, outer), _write(slots, slot, gradient)

    def _send(self, x: Array, step: int, nothing: Array) -> Array:
        return collectives.shift(x, Axis.PIPE, step)

    def _of(self, stage: int, x: Array) -> Array:
        """What one stage has, on all of them; or, where each end is by itself, on that one, and zero on the others."""
        own = _mask(collectives.index(Axis.PIPE) == stage, x)
        return own if self.model.ends else collectives.all_reduce(own, Axis.PIPE)


def _read(buffer: Tree, slot: Array) -> Tree:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, jnp.maximum(slot, 0), keepdims=False), buffer)


def _write(buffer: Tree, slot: Array, value: Tree) -> Tree:
    """The buffer with `value` in `slot`; -1 writes nothing."""

    def write(x: Array, old: Array, value: Array) -> Array:
        return lax.dynamic_update_index_in_dim(x, jnp.where(slot >= 0, value, old), jnp.maximum(slot, 0), 0)

    return jax.tree.map(write, buffer, _read(buffer, slot), value)


def part(chunks: Tree, chunk: Array) -> Tree:
    """One chunk of what a stage holds; without an operation where it holds one."""
    return jax.tree.map(
        lambda x: x[0] if x.shape[0] == 1 else lax.dynamic_index_in_dim(x, chunk, keepdims=False), chunks
    )


def _add_part(sums: Tree, more: Tree, chunk: Array, flag: Array) -> Tree:
    """Sums over chunks, `more` added to those of one of them."""
    added = _add(part(sums, chunk), more, flag)
    return jax.tree.map(
        lambda x, y: y[None] if x.shape[0] == 1 else lax.dynamic_update_index_in_dim(x, y, chunk, 0), sums, added
    )


def _mask(flag: Array | bool, x: Array) -> Array:
    return jnp.where(flag, x, jnp.zeros_like(x))


def _add(sums: Tree, more: Tree, flag: Array | None = None) -> Tree:
    """The sums and `more`, where that is not None."""

    def add(total: Array, x: Array | None) -> Array:
        if x is None:
            return total
        return total + (x if flag is None else _mask(flag, x)).astype(total.dtype)

    leaves, tree = jax.tree.flatten(sums)
    return tree.unflatten(map(add, leaves, tree.flatten_up_to(more)))
