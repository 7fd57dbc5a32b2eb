"""As if: a wrong forward explained by a mistake that, made on one device, gives the very same numbers.

The reference is run again with its parameters in another order, with other positions, without segments, and so on. What
reproduces the wrong array to rounding is what the layout does, whatever line of it is to blame.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from shardlm.layout import Axis, Layout
from shardlm.models.config import Rope
from shardlm.train.forward import forward
from shardlm.train.trainer import Trainer
from shardlm.verification import inputs, lookup
from shardlm.verification.diagnosis import Diagnosis
from shardlm.verification.locate import Forwards, Found
from shardlm.verification.symptoms import numbers, orders

_LEAVES = {
    "embedding": ("embedding/", "positions/"),
    "attention": ("layers/attention/", "layers/attention_norm/"),
    "mlp": ("layers/mlp/", "layers/mlp_norm/"),
    "logits": ("final_norm/", "head/", "embedding/"),
}
_SMALL = 8  # heads up to so many are tried one by one


def explain(runs: Forwards, found: Found) -> Diagnosis | None:
    """The first mistake that reproduces what was found, or None."""
    part, target = found.place.part, runs.found(found.params, found.layers)[found.name].whole()
    if part == "loss":
        return lookup.target(runs, found)
    for diagnosis, params, changes in _mistakes(runs, found):
        again = runs.expected(found.params | params, found.layers, **changes)[found.name]
        if found.suspect.close(again, target):
            return diagnosis
    if part == "embedding":
        return lookup.embedding(runs, found)
    return _kv_heads(runs, found, target) if part == "attention" else None


def _mistakes(runs: Forwards, found: Found) -> Iterator[tuple[Diagnosis, dict[str, Any], dict[str, Any]]]:
    """A diagnosis, and the parameters and the inputs that it would mean."""
    part, config = found.place.part, runs.trainer.config
    if part == "attention" and np.ptp(runs.filled["segments"], axis=1).any():
        text = "attention sees other segments: without any segments one device computes the same"
        zeros = np.zeros_like(runs.filled["segments"])
        yield Diagnosis("segments", text, dim="sequence"), {}, {"segments": zeros}
    if part == ("attention" if isinstance(config.positions, Rope) else "embedding"):
        for diagnosis, positions in _positions(runs):
            yield diagnosis, {}, {"positions": positions}
    if config.dropout:
        yield from ((diagnosis, {}, changes) for diagnosis, changes in _dropout(runs))
    yield from ((diagnosis, params, {}) for diagnosis, params in _reordered(runs, found))


def _positions(runs: Forwards) -> Iterator[tuple[Diagnosis, np.ndarray]]:
    right, layout = runs.filled["positions"], runs.trainer.layout
    length = right.shape[1]
    for axis, count in ((Axis.TENSOR, layout.tensor), (Axis.CONTEXT, layout.context)):
        if count == 1 or length % count:
            continue
        part = length // count
        place = np.arange(length) // part * part
        for text, positions in (
            ("every device uses the positions of the first part of the sequence", np.tile(right[:, :part], count)),
            ("every device starts from position 0", right - right[:, place]),
            ("every device counts from 0", np.broadcast_to(np.arange(length) % part, right.shape)),
            ("the parts' positions are in reverse", np.concatenate(np.split(right, count, 1)[::-1], 1)),
        ):
            if runs.trainer.config.max_sequence is None:  # to RoPE only differences matter, and a batch's begin at 0
                positions = positions - min(positions.min(), 0)
            if positions.min() >= 0:
                text = f"the sequence is in {count} parts over {axis}, and {text}"
                yield Diagnosis("positions", text, str(axis), "sequence"), positions.astype(np.int32)
    plain = np.broadcast_to(np.arange(length, dtype=np.int32), right.shape)
    yield Diagnosis("positions", "positions are 0, 1, 2, ... whatever the batch says", dim="sequence"), plain


def _dropout(runs: Forwards) -> Iterator[tuple[Diagnosis, dict[str, np.ndarray]]]:
    rows, columns = runs.batch["tokens"].shape
    layout = runs.trainer.layout
    axes = [(axis, layout.sizes[Axis(axis)], "rows", rows) for axis in layout.batch_axes]
    axes.append((" x ".join(layout.batch_axes), layout.batch_shards, "rows", rows))
    axes += [(str(axis), layout.sizes[axis], "columns", columns) for axis in (Axis.TENSOR, Axis.CONTEXT)]
    for axis, count, name, length in axes:
        if count > 1 and length % count == 0:
            dim = "batch" if name == "rows" else "sequence"
            text = f"every device along {axis} counts its {name} from 0, so its dropout masks are the first device's"
            yield Diagnosis("dropout", text, axis.split()[0], dim), {name: np.arange(length) % (length // count)}


def _reordered(runs: Forwards, found: Found) -> Iterator[tuple[Diagnosis, dict[str, Any]]]:
    """One leaf of the place, one of its dims cut into chunks, the chunks in a wrong order."""
    sizes, stacked = runs.trainer.layout.sizes, found.place.layer is not None
    for path in (p for p in found.params if p.startswith(_LEAVES.get(found.place.part, ()))):
        split, value = runs.trainer.plan.in_order[path], found.params[path]
        spec = tuple(split.sharded) + (None,) * (value.ndim - len(split.sharded))
        for dim in range(stacked, value.ndim):
            names = () if spec[dim] is None else (spec[dim],) if isinstance(spec[dim], str) else spec[dim]
            counts: dict[int, str | None] = {sizes[Axis(name)]: name for name in reversed(names)}
            if split.dims[dim] in ("head", "kv_head") and value.shape[dim] <= _SMALL:
                counts.setdefault(value.shape[dim], None)
            for count, axis in counts.items():
                unit = f"{count} chunks" if axis else "slices"
                for order in orders(count) if count > 1 else ():
                    chunks = np.split(value, count, dim)
                    text = (
                        f"one device computes the same with the {unit} of {path} along {split.dims[dim]} in the order "
                        f"{numbers(order)} instead of 0, 1, ..."
                    )
                    axis = axis or next(iter(names), None)
                    params = {path: np.concatenate([chunks[i] for i in order], dim)}
                    yield Diagnosis("permutation", text, axis, split.dims[dim]), params


def _kv_heads(runs: Forwards, found: Found, target: np.ndarray) -> Diagnosis | None:
    """Query heads that attend to another key/value head than their own: on a model with one for each query head."""
    config, count = runs.trainer.config, runs.trainer.layout.tensor
    heads, kv = config.num_heads, config.num_kv_heads
    if kv == 1 or count == 1:
        return None
    group, head = heads // kv, np.arange(heads)
    device = head // (heads // count)
    wide = dataclasses.replace(config, num_kv_heads=heads)
    plain = runs.reference
    devices = list(plain.mesh.devices.flat)
    reference = Trainer(wide, Layout(), plain.optimizer, seed=plain.seed, devices=devices, engine=plain.engine)
    right = head // group
    for used in (right * 0, device % kv, kv - 1 - right, (right + 1) % kv, (right - 1) % kv, head % kv):
        if (used == right).all():
            continue
        params = dict(found.params)
        for path, value in found.params.items():
            dims = runs.trainer.plan.in_order[path].dims
            if "kv_head" in dims:
                params[path] = np.take(value, used, axis=dims.index("kv_head"))
        state = inputs.put_params(reference, runs.state.step, params)
        again = np.asarray(forward(reference, state, runs.filled, found.layers)[found.name])
        if found.suspect.close(again, target):
            text = (
                f"query heads 0, 1, ... attend to key/value heads {numbers(used)} instead of {numbers(right)}: "
                "a device takes the wrong ones of those it holds"
            )
            return Diagnosis("selection", text, str(Axis.TENSOR), "kv_head")
    return None
