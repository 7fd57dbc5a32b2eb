"""Where two programs part: the first layer, and the branch in it, forward; the first leaf, backward."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from shardlm.parallel.zero import WEIGHTS
from shardlm.train.engine import flatten
from shardlm.train.forward import forward as run_forward
from shardlm.train.state import TrainState
from shardlm.train.trainer import Trainer
from shardlm.verification import inputs
from shardlm.verification.compare import Difference, distance, leaves, size
from shardlm.verification.copies import Copies
from shardlm.verification.diagnosis import Place
from shardlm.verification.symptoms import Suspect
from shardlm.verification.tolerance import Arithmetic

_BRANCHES = {
    "attention": ("layers/attention/output/", "layers/attention_after_norm/bias"),
    "mlp": ("layers/mlp/down/", "layers/mlp_after_norm/bias"),
}
"""The leaves that, when they are zero, make a branch add nothing to the residual stream."""

_DIMS = {
    "hidden": ("batch", "sequence", "embed"),
    "logits": ("batch", "sequence", "vocab"),
    "nll": ("batch", "sequence"),
}

# What backward meets, in this order.
_OUTER = ("head/", "final_norm/", "layers/", "positions/", "embedding/")
_INNER = (
    *("mlp_after_norm/", "mlp/down/", "mlp/gate/", "mlp/up/", "mlp_norm/", "attention_after_norm/"),
    *("attention/output/", "attention/query_norm/", "attention/key_norm/"),
    *("attention/query/", "attention/key/", "attention/value/", "attention_norm/"),
)


@dataclass(frozen=True)
class Forwards:
    """The forward of the layout and of the reference, on the same batch, from parameters of the host."""

    trainer: Trainer
    reference: Trainer
    state: TrainState
    batch: dict[str, np.ndarray]
    arithmetic: Arithmetic

    def found(self, params: dict[str, Any], layers: int) -> dict[str, Copies]:
        """What the layout's devices hold; `params` by path, minus infinity (padding of the vocabulary) as 0."""
        arrays = run_forward(self.trainer, inputs.put_params(self.trainer, self.state.step, params), self.batch, layers)
        return {name: _finite(Copies.of(x, self.trainer.mesh)) for name, x in arrays.items()}

    def expected(self, params: dict[str, Any], layers: int, **changes: Any) -> dict[str, np.ndarray]:
        """What the reference has, perhaps with another `segments`, `positions`, `tokens`, `rows` or `columns`."""
        places = {name: changes.pop(name, None) for name in ("rows", "columns")}
        state = inputs.put_params(self.reference, self.state.step, params)
        arrays = run_forward(self.reference, state, self.filled | changes, layers, **places)
        return {name: _zero_infinities(np.asarray(x)) for name, x in arrays.items()}

    def tolerance(self, layers: int) -> float:
        """Of what the forward holds after so many layers."""
        return self.arithmetic.forward(layers)

    def differs(self, params: dict[str, Any], layers: int, name: str = "hidden") -> bool:
        """`differ` for an array of the forward from these parameters."""
        return self.differ(self.expected(params, layers)[name], self.found(params, layers)[name], layers)

    def suspect(self, what: str, expected: np.ndarray, found: Copies, name: str, layers: int) -> Suspect:
        """An array of the forward, which is summed over nothing but the tensor axis."""
        summed = {"tensor": self.trainer.layout.tensor} if self.trainer.layout.tensor > 1 else {}
        return Suspect(what, expected, found, _DIMS[name], summed, self.tolerance(layers))

    @cached_property
    def params(self) -> dict[str, Any]:
        """The parameters of `state`, by path."""
        return flatten(self.state.params)

    @cached_property
    def filled(self) -> dict[str, np.ndarray]:
        """The batch with segments and positions, also where they are the ones that a batch without them has."""
        shape = self.batch["tokens"].shape
        positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        return {"segments": np.zeros(shape, np.int32), "positions": positions, **self.batch}

    def differ(self, expected: np.ndarray, found: Copies, layers: int) -> bool:
        """Whether any device's part is beyond the tolerance."""
        far = max(distance(expected[part.index], part.data) for part in found.parts)
        return not far <= self.tolerance(layers) * size(expected)


@dataclass(frozen=True)
class Found:
    """A place in the forward, the wrong array there, and what it was computed from.

    Attributes:
        place, suspect: see there.
        name: of the array, a key of what a forward holds.
        params: by path; all branches but the suspected one may be silenced in them.
        layers: how many are run.
    """

    place: Place
    suspect: Suspect
    name: str
    params: dict[str, Any]
    layers: int


def forward(runs: Forwards) -> Found | None:
    """The first place at which the forwards differ; None where even each token's loss is the same."""
    count = runs.trainer.config.num_layers
    expected, found = runs.expected(runs.params, count), runs.found(runs.params, count)
    if not runs.differ(expected["hidden"], found["hidden"], count):
        for name, part, text in (
            ("logits", "logits", f"the logits (final norm and head); the hidden states of all {count} layers agree"),
            ("nll", "loss", "each token's loss (cross-entropy); hidden states and logits agree"),
        ):
            if runs.differ(expected[name], found[name], count):
                what = {"logits": "the array of logits", "nll": "the loss of each token"}[name]
                suspect = runs.suspect(what, expected[name], found[name], name, count)
                return Found(Place("forward", part, None, text), suspect, name, runs.params, count)
        return None
    if runs.differs(runs.params, 0):
        return _embedding(runs)
    right, wrong = 0, count  # agrees after so many layers, differs after so many
    while wrong - right > 1:
        middle = (right + wrong) // 2
        right, wrong = (right, middle) if runs.differs(runs.params, middle) else (middle, wrong)
    return _layer(runs, wrong)


def _embedding(runs: Forwards) -> Found:
    params = runs.params
    # Positions are added after the sum over the tensor axis: without them the sum stands alone.
    alone = {path: np.zeros_like(x) if path.startswith("positions/") else x for path, x in params.items()}
    params = alone if runs.differs(alone, 0) else params
    suspect = runs.suspect(
        "the embedding's output", runs.expected(params, 0)["hidden"], runs.found(params, 0)["hidden"], "hidden", 0
    )
    place = Place("forward", "embedding", None, "the embedding's output, before any layer")
    return Found(place, suspect, "hidden", params, 0)


def _layer(runs: Forwards, layers: int) -> Found:
    layer = layers - 1
    before = "the embedding agrees" if layer == 0 else f"what layer {layer - 1} returns agrees"
    for branch in _BRANCHES:
        params = _silenced(runs.params, branch, layer)
        if runs.differs(params, layers):
            # The residual stream is the same on both sides: what the branch adds to it shows the fault undiluted.
            expected = runs.expected(params, layers)["hidden"] - runs.expected(params, 0)["hidden"]
            found = runs.found(params, layers)["hidden"].minus(runs.found(params, 0)["hidden"])
            what = f"the output of {branch} in layer {layer}"
            suspect = runs.suspect(what, expected, found, "hidden", layers)
            place = Place("forward", branch, layer, f"{branch} in layer {layer}; {before}")
            return Found(place, suspect, "hidden", params, layers)
    expected, found = runs.expected(runs.params, layers)["hidden"], runs.found(runs.params, layers)["hidden"]
    suspect = runs.suspect(f"the output of layer {layer}", expected, found, "hidden", layers)
    place = Place("forward", "layer", layer, f"layer {layer}, in neither of its branches alone; {before}")
    return Found(place, suspect, "hidden", runs.params, layers)


def _silenced(params: dict[str, Any], branch: str, layer: int) -> dict[str, Any]:
    """Parameters with which every branch but one adds nothing; its own output bias, added after its sum, neither."""
    result = dict(params)
    for name, prefixes in _BRANCHES.items():
        for path, value in params.items():
            if path.startswith(prefixes):
                kept = value[layer] if name == branch and path.endswith(WEIGHTS) else 0
                result[path] = np.zeros_like(value)
                result[path][layer] = kept
    return result


def backward(
    expected: Any, found: Any, differences: list[Difference], trainer: Trainer
) -> tuple[str, int | None, Place]:
    """The first leaf, as backward meets them, whose gradient differs, and the layer of it; forwards agree."""
    wanted, got = leaves(expected), leaves(found)
    wrong: list[tuple[tuple[int, ...], str, int | None]] = []
    for difference in (d for d in differences if d.fails):
        path = difference.leaf
        outer = next((i for i, prefix in enumerate(_OUTER) if path.startswith(prefix)), len(_OUTER))
        if not path.startswith("layers/"):
            wrong.append(((outer, 0, 0), path, None))
            continue
        copies, scale = Copies.of(got[path], trainer.mesh), size(wanted[path])
        inner = next((i for i, prefix in enumerate(_INNER) if path.startswith("layers/" + prefix)), len(_INNER))
        for layer, value in enumerate(wanted[path]):
            parts = copies.layer(layer).parts
            if not max(distance(value[p.index], p.data) for p in parts) <= difference.tolerance * scale:
                wrong.append(((outer, -layer, inner), path, layer))
    if not wrong:  # only by a measure other than its own size
        first = next(d for d in differences if d.fails)
        wrong.append(((0, 0, 0), first.leaf, None))
    _, path, layer = min(wrong, key=lambda item: item[0])
    where = f"the gradient of {path}" + ("" if layer is None else f" in layer {layer}")
    text = f"{where}, the first that backward meets; the forward agrees"
    return path, layer, Place("backward", path, layer, text)


def _finite(copies: Copies) -> Copies:
    parts = tuple(type(p)(p.at, p.index, _zero_infinities(p.data)) for p in copies.parts)
    return Copies(copies.shape, parts, copies.axes, copies.sizes)


def _zero_infinities(x: np.ndarray) -> np.ndarray:
    return np.where(np.isneginf(x), 0, x).astype(x.dtype)


def dims_of(trainer: Trainer, path: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """Names of the dims of a parameter, or of optimizer state that is like one; None where they have none."""
    for name, split in trainer.plan.in_order.items():
        if (path == name or path.endswith("/" + name)) and split.shape == shape:
            return split.dims
    return (None,) * len(shape)


def summed_over(trainer: Trainer) -> dict[str, int]:
    """The axes over which gradients are sums, and microbatches."""
    layout = trainer.layout
    sizes = {str(axis): n for axis, n in layout.sizes.items() if n > 1}
    return sizes | ({"accumulate": layout.microbatches} if layout.microbatches > 1 else {})


def gradient_suspect(expected: Any, found: Any, path: str, layer: int | None, trainer: Trainer, base: float) -> Suspect:
    """One leaf of the gradients, or one layer of it."""
    value, copies = leaves(expected)[path], Copies.of(leaves(found)[path], trainer.mesh)
    dims = dims_of(trainer, path, value.shape)
    what = f"the gradient of {path}"
    if layer is not None:
        value, copies, dims, what = value[layer], copies.layer(layer), dims[1:], f"{what} in layer {layer}"
    return Suspect(what, value, copies, dims, summed_over(trainer), base)
