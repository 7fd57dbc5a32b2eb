"""What a difference looks like, and where to read: the vocabulary of a failed verification."""

from dataclasses import dataclass

from shardlm.layout import Axis

KINDS = {
    "rounding": "so close that rounding may explain it",
    "missing reduction": "a partial sum where the sum over an axis belongs",
    "replicas": "copies that should be the same differ between devices",
    "scale": "a constant multiple: summed twice, or averaged instead of summed",
    "sign": "the opposite sign",
    "zero": "nothing at all",
    "mean of means": "each part divided by its own weight, then averaged",
    "permutation": "the right values in another order",
    "repetition": "some parts twice, others never",
    "shift": "the right values, displaced along a dim",
    "mask": "values that should have been masked added in",
    "selection": "another part of a weight than the one that belongs here",
    "segments": "attention that crosses from one segment to another",
    "positions": "positions of another part of the sequence",
    "dropout": "dropout masks drawn from local places",
    "update": "right gradients, and a wrong optimizer state or parameter",
    "unknown": "none of these",
}
"""Every kind of diagnosis, in words."""

_FILES = {
    Axis.PIPE: "shardlm/parallel/pipeline",
    Axis.DATA: "shardlm/parallel/zero.py",
    Axis.FSDP: "shardlm/parallel/zero.py",
    Axis.EXPERT: "shardlm/parallel/expert.py",
    Axis.CONTEXT: "shardlm/parallel/context.py",
    Axis.TENSOR: "shardlm/parallel/tensor.py",
}


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong, as far as the numbers show.

    Attributes:
        kind: a key of `KINDS`.
        text: a sentence with the evidence.
        axis: the mesh axis to blame, or None.
        dim: the dim along which it happens, or None.
        read: the file to read first.
    """

    kind: str
    text: str
    axis: str | None = None
    dim: str | None = None
    read: str | None = None

    def __post_init__(self):
        assert self.kind in KINDS, self.kind


@dataclass(frozen=True)
class Place:
    """Where two programs part.

    Attributes:
        stage: "forward", "backward" or "update".
        part: "embedding", "attention", "mlp", "logits", "loss", or the path of a leaf.
        layer: counted from 0, or None.
        text: the same as a sentence, with what still agrees.
    """

    stage: str
    part: str
    layer: int | None
    text: str


def file_of(diagnosis: Diagnosis, place: Place) -> str:
    """Where to start reading."""
    if diagnosis.read is not None:
        return diagnosis.read
    if diagnosis.kind == "rounding":
        return "shardlm/verification/tolerance.py"
    if diagnosis.kind == "dropout":
        return "shardlm/train/engine.py (rows and columns) and shardlm/models/dropout.py"
    if place.stage == "update":
        return "shardlm/train/step.py and gather_updated in shardlm/parallel/zero.py"
    models = {
        "segments": "shardlm/models/attention.py (Visibility)",
        "positions": "shardlm/models/transformer.py and split_sequence in shardlm/parallel/tensor.py",
    }
    if diagnosis.kind in models:
        return models[diagnosis.kind]
    if diagnosis.axis is not None and diagnosis.axis in set(Axis):
        return _FILES[Axis(diagnosis.axis)]
    parts = {
        "embedding": "shardlm/models/embedding.py",
        "attention": "shardlm/models/attention.py",
        "mlp": "shardlm/models/mlp.py",
        "logits": "shardlm/models/embedding.py",
        "loss": "shardlm/train/loss.py",
    }
    return parts.get(place.part, "shardlm/parallel/zero.py and shardlm/train/engine.py")
