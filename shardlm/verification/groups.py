"""What each part of a batch contributes, by the reference: a device's rows, or a microbatch's.

A gradient that lacks its sum over an axis is one group's contribution; one that is normalised too early is the average
of the groups' own means. Both are computed and compared.
"""

from functools import cached_property
from typing import Any

import numpy as np

from shardlm.train.trainer import Trainer
from shardlm.verification import inputs
from shardlm.verification.compare import leaves
from shardlm.verification.copies import coordinates
from shardlm.verification.diagnosis import Diagnosis
from shardlm.verification.symptoms import Suspect, subsets


class Groups:
    """Mean losses and gradients of parts of a batch that has weights.

    Args:
        trainer: the layout's, which says how the batch is split.
        reference: computes them.
        state: before the update, on the host.
        batch: on the host, with "weights".
    """

    def __init__(self, trainer: Trainer, reference: Trainer, state: Any, batch: dict[str, np.ndarray]):
        self.trainer, self.reference, self.batch = trainer, reference, batch
        self._state = inputs.put(reference, state)
        self._means: dict[bytes, tuple[float, dict[str, np.ndarray]]] = {}

    def splits(self) -> list[tuple[str, tuple[str, ...], dict[tuple[int, ...], np.ndarray]]]:
        """Each way in which the batch is split: its name, its axes, and a mask of tokens for each part."""
        found = []
        for axes in subsets(self._axes):
            masks: dict[tuple[int, ...], np.ndarray] = {}
            for at, index in self._held:
                mask = masks.setdefault(tuple(at[axis] for axis in axes), np.zeros(self._shape, bool))
                mask[index] = True
            found.append((" x ".join(axes), axes, masks))
        count = self.trainer.layout.microbatches
        if count > 1:
            held = self._shape[0] // self.trainer.layout.batch_shards
            of_row = np.arange(self._shape[0]) % held % count
            columns = np.ones(self._shape[1:], bool)
            masks = {(k,): (of_row == k)[:, None] & columns for k in range(count)}
            found.append(("microbatches (accumulate)", ("accumulate",), masks))
        return found

    def mean(self, mask: np.ndarray, leaf: str | None) -> np.ndarray:
        """The mean loss of these tokens, or its gradient with respect to a leaf; zero where they have no weight."""
        key = mask.tobytes()
        if key not in self._means:
            weights = np.where(mask, self.batch["weights"], 0)
            if not weights.any():
                return np.zeros(self._shape_of(leaf))
            loss, grads = self.reference.loss_and_grads(self._state, self.batch | {"weights": weights})
            self._means[key] = float(loss), {path: np.asarray(x) for path, x in leaves(grads).items()}
        loss, grads = self._means[key]
        return np.asarray(loss) if leaf is None else grads[leaf]

    def share(self, mask: np.ndarray) -> float:
        """Of the weight of the whole batch, what these tokens have."""
        weights = self.batch["weights"].astype(np.float64)
        return float(weights[mask].sum() / weights.sum())

    def explain(self, s: Suspect, leaf: str | None, layer: int | None) -> Diagnosis | None:
        """Whether `s`, the loss or a gradient's leaf (of one layer), is a group's share or an average of means."""

        def mean(mask: np.ndarray) -> np.ndarray:
            found = self.mean(mask, leaf)
            return found if layer is None else found[layer]

        for name, axes, masks in self.splits():
            shares = {at: mean(m) * self.share(m) for at, m in masks.items()}
            if axes == ("accumulate",):
                partial = any(s.close(share, s.found.whole()) for share in shares.values())
            else:
                partial = all(
                    s.close(shares[tuple(part.at[axis] for axis in axes)][part.index], part.data)
                    for part in s.found.parts
                )
            if partial:
                text = f"{s.what} is the share of one part of the batch: the sum over {name} is missing"
                return Diagnosis("missing reduction", text, axes[0])
        for name, axes, masks in self.splits():
            average = np.mean([mean(mask) for mask in masks.values()], axis=0)
            if s.close(average, s.found.whole()):
                text = (
                    f"{s.what} is the average over {name} of {len(masks)} means, each divided by its own weight; "
                    "it should be one sum divided by the weight of the whole batch"
                )
                return Diagnosis("mean of means", text, axes[0])
        return None

    def _shape_of(self, leaf: str | None) -> tuple[int, ...]:
        return () if leaf is None else leaves(self.reference.abstract_state.params)[leaf].shape

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        return self.batch["weights"].shape

    @cached_property
    def _held(self) -> list[tuple[dict[str, int], tuple[slice, ...]]]:
        places = coordinates(self.trainer.mesh)
        indices = self.trainer.batch_sharding.devices_indices_map(self._shape)
        return [(places[device.id], index) for device, index in indices.items()]

    @cached_property
    def _axes(self) -> tuple[str, ...]:
        spec = [names for names in self.trainer.batch_sharding.spec if names is not None]
        return tuple(name for names in spec for name in ((names,) if isinstance(names, str) else names))
