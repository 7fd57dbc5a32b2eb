"""Faults planted in the library's own functions: each is found, at the right place, and called by its name."""

import functools

import jax
import jax.numpy as jnp
import pytest

import shardlm as sl
from shardlm import collectives
from shardlm.layout import Axis
from shardlm.models.attention import Visibility
from shardlm.models.dropout import Dropout
from shardlm.models.kernel import Kernel
from shardlm.models.transformer import Block
from shardlm.parallel import tensor, zero
from shardlm.train import engine
from shardlm.train import trainer as trainers


def unchecked(monkeypatch):
    """Let JAX compile what its types of varying arrays would refuse."""
    monkeypatch.setattr(jax, "shard_map", functools.partial(jax.shard_map, check_vma=False))


def backwards(x, count: int, dim: int):
    return jnp.concatenate(jnp.split(x, count, dim)[::-1], dim)


def no_sum_over_data(monkeypatch):
    reduce = zero._reduce
    without = lambda g, plan, dim, axes: reduce(g, plan, dim, tuple(a for a in axes if a != "data"))  # noqa: E731
    monkeypatch.setattr(zero, "_reduce", without)
    unchecked(monkeypatch)


def no_sum_over_fsdp(monkeypatch):
    """Each device keeps its shard of its own gradient."""

    def reduce(gradient, plan, dim, axes):
        if dim is not None:
            gradient = collectives.split(gradient, Axis.FSDP, dim)
        return collectives.all_reduce(gradient, zero._axes(axes))

    monkeypatch.setattr(zero, "_reduce", reduce)


def data_summed_twice(monkeypatch):
    finish = zero.finish
    monkeypatch.setattr(zero, "finish", lambda g, plan: collectives.all_reduce(finish(g, plan), Axis.DATA))


def leave_summed_twice(monkeypatch):
    monkeypatch.setattr(tensor, "leave", lambda y, like: tensor.all_reduce(tensor.all_reduce(y)))


def no_sum_in_leave(monkeypatch):
    monkeypatch.setattr(tensor, "leave", lambda y, like: y)
    unchecked(monkeypatch)


def mean_of_means(monkeypatch):
    loss_sum = engine.loss_sum

    def normalised(model, batch, *rest):
        own = batch["weights"].sum()
        count = collectives.size(Axis.DATA)
        return loss_sum(model, batch, *rest) / own * collectives.all_reduce(own, Axis.DATA) / count

    monkeypatch.setattr(engine, "loss_sum", normalised)


def swapped_heads(monkeypatch):
    product = Kernel.product

    def swapped(self, x, own=None):
        return product(self, x[:, :, ::-1] if self.inward == 2 and collectives.active(Axis.TENSOR) else x, own)

    monkeypatch.setattr(Kernel, "product", swapped)


def wrong_kv_head(monkeypatch):
    def own(x, dim, query_heads, queries_per_kv):
        needed = max(1, query_heads // queries_per_kv)
        if x.shape[dim] == needed:
            return x
        first = collectives.index(Axis.TENSOR) % x.shape[dim]
        return jax.lax.dynamic_slice_in_dim(collectives.vary(x, Axis.TENSOR), first, needed, dim)

    monkeypatch.setattr(tensor, "own_kv_heads", own)


def offset_by_one_in_embed(monkeypatch):
    embed = tensor.embed
    monkeypatch.setattr(
        tensor, "embed", lambda table, ids, *axes: embed(table, ids - collectives.index(Axis.TENSOR), *axes)
    )


def no_offset_in_embed(monkeypatch):
    embed = tensor.embed
    held = lambda table: collectives.index(Axis.TENSOR) * table.shape[0]  # noqa: E731
    monkeypatch.setattr(tensor, "embed", lambda table, ids, *axes: embed(table, ids + held(table), *axes))


def no_mask_in_embed(monkeypatch):
    def embed(table, ids, axes):
        local = ids - collectives.index(Axis.TENSOR) * table.shape[0]
        return jnp.take(table, jnp.where((local >= 0) & (local < table.shape[0]), local, 0), axis=0)

    monkeypatch.setattr(tensor, "embed", embed)


def offset_by_one_in_loss(monkeypatch):
    entropy = tensor.cross_entropy
    shifted = lambda z, targets, *axes: entropy(z, targets - collectives.index(Axis.TENSOR), *axes)  # noqa: E731
    monkeypatch.setattr(tensor, "cross_entropy", shifted)


def positions_of_the_first_part(monkeypatch):
    split = tensor.split_sequence

    def first(x):
        if x.shape[0] == 1:  # the columns of dropout
            return split(x)
        part = x.shape[1] // collectives.size(Axis.TENSOR)
        return collectives.vary(x, Axis.TENSOR)[:, :part]

    monkeypatch.setattr(tensor, "split_sequence", first)


def positions_from_the_start(monkeypatch):
    """Every part of the sequence counts its positions from its own first token."""
    hidden = engine.Transformer.hidden

    def restarted(self, tokens, *, positions=None, **rest):
        if collectives.active(Axis.TENSOR) and positions is not None:
            part = positions.shape[1] // collectives.size(Axis.TENSOR)
            positions = positions - jnp.repeat(positions[:, ::part], part, axis=1)
        return hidden(self, tokens, positions=positions, **rest)

    monkeypatch.setattr(engine.Transformer, "hidden", restarted)


def scattered_backwards(monkeypatch):
    leave = tensor.leave
    turned = lambda y, like: leave(backwards(y, collectives.size(Axis.TENSOR), 1), like)  # noqa: E731
    monkeypatch.setattr(tensor, "leave", turned)


def dropout_from_local_rows(monkeypatch):
    def local(rate, key, rows, columns):
        return Dropout(rate, key, jnp.arange(len(rows)) if collectives.active(Axis.DATA) else rows, columns)

    monkeypatch.setattr(engine, "Dropout", local)


def across_segments(monkeypatch):
    mask = Visibility.mask

    def everywhere(self, rows=None):
        split = bool(collectives.active((Axis.DATA, Axis.TENSOR)))
        return mask(Visibility(self.index, None, self.window) if split else self, rows)

    monkeypatch.setattr(Visibility, "mask", everywhere)


def second_mlp_doubled(monkeypatch):
    branch = Block._branch

    def doubled(self, y, norm, dropout, layer, site):
        wrong = jnp.where(layer == 1, 2, 1) if site == 1 and collectives.active((Axis.DATA, Axis.PIPE)) else 1
        return wrong * branch(self, y, norm, dropout, layer, site)

    monkeypatch.setattr(Block, "_branch", doubled)


def first_query_negated(monkeypatch):
    finish = zero.finish

    def negated(gradient, plan):
        wrong = plan.split.path == "layers/attention/query/kernel"
        return finish(gradient.at[0].multiply(-1) if wrong else gradient, plan)  # a layer, or a chunk of every stage

    monkeypatch.setattr(zero, "finish", negated)


def gathered_backwards(monkeypatch):
    gather = zero._gather

    def turned(x, plan, dim):
        whole = gather(x, plan, dim)
        return backwards(whole, 4, dim) if plan.split.path == "layers/mlp/up/kernel" else whole

    monkeypatch.setattr(zero, "_gather", turned)


def reduced_backwards(monkeypatch):
    reduce = zero._reduce

    def turned(gradient, plan, dim, axes):
        return reduce(gradient if dim is None else backwards(gradient, 4, dim), plan, dim, axes)

    monkeypatch.setattr(zero, "_reduce", turned)


def updated_gathered_backwards(monkeypatch):
    gather = zero.gather_updated

    def turned(shards, splits):
        whole = gather(shards, splits)
        return {path: backwards(x, 4, splits[path].zero_dim) for path, x in whole.items()}

    monkeypatch.setattr(zero, "gather_updated", turned)


def moments_kept_on_one_device(monkeypatch):
    """On the devices of fsdp=1 the optimizer state stays what it was."""
    make_step = trainers.make_step

    def make(program, *rest):
        step = make_step(program, *rest)
        plan = program.plan

        def wrong(state, batch):
            new, metrics = step(state, batch)
            if plan.layout.fsdp == 1:
                return new, metrics

            def keep(old, new):
                return jnp.where(collectives.index(Axis.FSDP) == 1, old, new)

            path = "layers/mlp/up/kernel"
            spec = plan.splits[path].sharded
            old_mu, new_mu = (engine.flatten(s.opt_state[1][0].mu) for s in (state, new))
            mapped = jax.shard_map(keep, mesh=plan.mesh, in_specs=(spec, spec), out_specs=spec)
            new_mu[path] = mapped(old_mu[path], new_mu[path])
            adam = new.opt_state[1][0]._replace(mu=engine.unflatten(new_mu))
            rest = (adam, *new.opt_state[1][1:])
            return sl.TrainState(new.step, new.params, (new.opt_state[0], rest)), metrics

        return wrong

    monkeypatch.setattr(trainers, "make_step", make)


HEAD, UP, QUERY = "head/table", "layers/mlp/up/kernel", "layers/attention/query/kernel"
# Fault, model, layout; then kind, axis, dim; then stage, part and layer.
FAULTS = [
    (no_sum_over_data, "llama", "data=2,reduce_gradients=step",
     ("missing reduction", "data", None), ("backward", HEAD, None)),
    (no_sum_over_fsdp, "llama", "fsdp=4", ("missing reduction", "fsdp", None), ("backward", HEAD, None)),
    (data_summed_twice, "llama", "data=4", ("scale", "data", None), ("backward", HEAD, None)),
    (leave_summed_twice, "llama", "data=2,tensor=4", ("scale", "tensor", None), ("forward", "attention", 0)),
    (no_sum_in_leave, "llama", "tensor=2", ("missing reduction", "tensor", None), ("forward", "attention", 0)),
    (mean_of_means, "llama", "data=4", ("mean of means", "data", None), ("forward", "loss", None)),
    (swapped_heads, "llama", "tensor=2", ("permutation", "tensor", "head"), ("forward", "attention", 0)),
    (wrong_kv_head, "llama", "tensor=4", ("selection", "tensor", "kv_head"), ("forward", "attention", 0)),
    (offset_by_one_in_embed, "llama", "tensor=2", ("shift", "tensor", "vocab"), ("forward", "embedding", None)),
    (no_offset_in_embed, "llama", "tensor=4", ("shift", "tensor", "vocab"), ("forward", "embedding", None)),
    (no_mask_in_embed, "llama", "tensor=2", ("mask", "tensor", "vocab"), ("forward", "embedding", None)),
    (offset_by_one_in_loss, "llama", "tensor=2", ("shift", "tensor", "vocab"), ("forward", "loss", None)),
    (positions_of_the_first_part, "gpt", "tensor=2,sequence_parallel",
     ("positions", "tensor", "sequence"), ("forward", "embedding", None)),
    (positions_from_the_start, "llama", "tensor=2,sequence_parallel",
     ("positions", "tensor", "sequence"), ("forward", "attention", 0)),
    (scattered_backwards, "llama", "tensor=2,sequence_parallel",
     ("permutation", "tensor", "sequence"), ("forward", "attention", 0)),
    (dropout_from_local_rows, "gpt", "data=2", ("dropout", "data", "batch"), ("forward", "embedding", None)),
    (across_segments, "llama", "data=2", ("segments", None, "sequence"), ("forward", "attention", 0)),
    (gathered_backwards, "llama", "fsdp=4", ("permutation", "fsdp", "embed"), ("forward", "mlp", 0)),
    (second_mlp_doubled, "llama", "data=2", ("scale", None, None), ("forward", "mlp", 1)),
    (first_query_negated, "llama", "data=2,reduce_gradients=step", ("sign", None, None), ("backward", QUERY, 0)),
    (second_mlp_doubled, "llama", "pipe=2,pipeline=interleaved:2:2:0+1+1+0",
     ("scale", None, None), ("forward", "mlp", 1)),
    (first_query_negated, "llama", "pipe=2,pipeline=interleaved:2:2:0+1+1+0",
     ("sign", None, None), ("backward", QUERY, 0)),
    (reduced_backwards, "llama", "fsdp=4,zero=2", ("permutation", "fsdp", "embed"), ("backward", HEAD, None)),
    (updated_gathered_backwards, "llama", "fsdp=4,zero=1",
     ("permutation", "fsdp", "embed"), ("update", "embedding/table", None)),
    (moments_kept_on_one_device, "llama", "fsdp=2", ("update", "fsdp", None), ("update", f"1/0/mu/{UP}", None)),
]  # fmt: skip


@pytest.mark.parametrize(("plant", "name", "layout", "what", "where"), FAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_fault_is_found_and_named(monkeypatch, verify, plant, name, layout, what, where):
    plant(monkeypatch)
    with pytest.raises(sl.VerificationError) as caught:
        verify(name, layout, steps=1)
    diagnosis, place = caught.value.diagnosis, caught.value.place
    assert (diagnosis.kind, diagnosis.axis, diagnosis.dim) == what, str(caught.value)
    assert (place.stage, place.part, place.layer) == where, str(caught.value)
