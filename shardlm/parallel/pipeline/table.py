"""The packed table: what every stage does in every tick, and where it reads and writes. Plain numpy.

One tick of the executor, in this order (p stages; the last virtual stage is chunk v - 1 of stage p - 1):

1. *Backward*, where `has_backward[t]`: the stage's input from stash slot `backward_stash[t, s]`, the gradient of its
   output from gradient slot `backward_read[t, s]`; both are free afterwards. If backwards are split, this is the
   input's gradient alone: the stash slot stays taken, and what the gradient of the weights needs goes to weight slot
   `backward_write[t, s]`.
2. *Weight gradients*, where `has_weight[t]` (split only): from stash slot `weight_stash[t, s]` and weight slot
   `weight_read[t, s]`, which backward may have written in this tick; both are free afterwards.
3. *Backward of the embedding* of microbatch `embed_gradient_microbatch[t]`, with the gradient that stage 0's backward
   just gave.
4. *Embedding* of microbatch `embed_microbatch[t]`, by all stages together; stage 0's forward in this tick reads it.
5. *Forward*, where `has_forward[t]`: the input from activation slot `forward_read[t, s]` (-1: the embedding), which is
   free afterwards; the input is written to stash slot `forward_stash[t, s]`.
6. *Head and loss* of microbatch `head_microbatch[t]`, by all stages together, on what the last virtual stage's forward
   just gave. Its gradient goes to gradient slot `head_write[t]` of stage p - 1, and is there for tick t + 1.
7. *Sends*: outputs of forwards to the next stage, s to s + 1 mod p, where `sends_activation[t]`; gradients of inputs to
   the previous one, s to s - 1 mod p, where `sends_gradient[t]`. Receiver s writes what arrives to activation slot
   `activation_arrival[t, s]` and gradient slot `gradient_arrival[t, s]`, where it is there for tick t + 1.

So forward and backward of one tick do not depend on each other, and may overlap; what backward frees, forward may take.
An executor that runs forward first has to hold back its writes until backward has read.

-1 says: nothing to do, nothing to write, no slot. Of idle stages chunk and slots are -1 as well as the microbatch.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

# What a stage does in a tick: fields of each kind of operation, then the two arrivals.
FIELDS = {
    "forward": ("microbatch", "chunk", "read", "stash"),
    "backward": ("microbatch", "chunk", "stash", "read", "write"),
    "weight": ("microbatch", "chunk", "stash", "read"),
}
PER_STAGE = (
    *(f"{name}_{field}" for name, fields in FIELDS.items() for field in fields),
    "activation_arrival",
    "gradient_arrival",
)
PER_TICK = ("embed_microbatch", "head_microbatch", "head_write", "embed_gradient_microbatch")
PREDICATES = ("has_forward", "has_backward", "has_weight")


class Segment(NamedTuple):
    """Ticks `start` to `stop` (exclusive), which all hold the same kinds of operation."""

    start: int
    stop: int
    has_forward: bool
    has_backward: bool
    has_weight: bool


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """A schedule as synchronous ticks; the file's docstring says what each array means.

    Arrays named in `PER_STAGE` are int32[tick, stage], in `PER_TICK` int32[tick], in `PREDICATES` bool[tick].

    Attributes:
        split: backwards are split: `backward_*` is the gradient of the input, `weight_*` that of the weights.
        activation_slots, gradient_slots: size of each stage's receive buffers.
        stash_slots: size of each stage's stash of inputs.
        weight_slots: size of each stage's buffer from the first to the second half of split backwards.
    """

    stages: int
    microbatches: int
    chunks: int
    split: bool
    activation_slots: int
    gradient_slots: int
    stash_slots: int
    weight_slots: int
    forward_microbatch: np.ndarray
    forward_chunk: np.ndarray
    forward_read: np.ndarray
    forward_stash: np.ndarray
    backward_microbatch: np.ndarray
    backward_chunk: np.ndarray
    backward_stash: np.ndarray
    backward_read: np.ndarray
    backward_write: np.ndarray
    weight_microbatch: np.ndarray
    weight_chunk: np.ndarray
    weight_stash: np.ndarray
    weight_read: np.ndarray
    activation_arrival: np.ndarray
    gradient_arrival: np.ndarray
    embed_microbatch: np.ndarray
    head_microbatch: np.ndarray
    head_write: np.ndarray
    embed_gradient_microbatch: np.ndarray
    has_forward: np.ndarray
    has_backward: np.ndarray
    has_weight: np.ndarray

    @property
    def ticks(self) -> int:
        """Number of ticks."""
        return len(self.has_forward)

    @property
    def sends_activation(self) -> np.ndarray:
        """bool[tick]: some stage's forward has a next virtual stage."""
        return np.any(self.activation_arrival >= 0, axis=1)

    @property
    def sends_gradient(self) -> np.ndarray:
        """bool[tick]: some stage's backward has a previous virtual stage."""
        return np.any(self.gradient_arrival >= 0, axis=1)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Runs of ticks of one kind: forwards only, both, backwards only for the usual schedules."""
        kinds = np.stack([self.has_forward, self.has_backward, self.has_weight], axis=1)
        starts = [t for t in range(self.ticks) if t == 0 or (kinds[t] != kinds[t - 1]).any()]
        ends = [*starts[1:], self.ticks]
        return tuple(Segment(a, b, *map(bool, kinds[a])) for a, b in zip(starts, ends, strict=True))

    def rows(self) -> dict[str, np.ndarray]:
        """Every array by name, each with a leading dim of ticks: what a scan over ticks takes."""
        derived = ("sends_activation", "sends_gradient")
        return {name: getattr(self, name) for name in (*PER_STAGE, *PER_TICK, *PREDICATES, *derived)}

    def __str__(self) -> str:
        letters = {"forward": "F", "backward": "I" if self.split else "B", "weight": "W"}
        kinds = [
            "".join(letter for name, letter in letters.items() if getattr(self, f"has_{name}")[t])
            for t in range(self.ticks)
        ]
        lines = [("tick", [str(t) for t in range(self.ticks)]), ("kind", kinds)]
        for name in ("embed", "head", "embed_gradient"):
            lines.append((name, [_label(i) for i in getattr(self, f"{name}_microbatch")]))
        for stage in range(self.stages):
            for name, letter in letters.items():
                if name != "weight" or self.split:
                    microbatch, chunk = (getattr(self, f"{name}_{what}")[:, stage] for what in ("microbatch", "chunk"))
                    lines.append((f"stage {stage} {letter}", list(map(_label, microbatch, chunk))))
        wide = max(len(cell) for _, cells in lines for cell in cells)
        head = max(len(title) for title, _ in lines)
        rows = [f"{title:<{head}} {' '.join(f'{cell:>{wide}}' for cell in cells)}" for title, cells in lines]
        return "\n".join([self.summary, *(row.rstrip() for row in rows)])

    @property
    def summary(self) -> str:
        """Ticks, what they hold, and slots, in one line."""
        slots = [f"{self.activation_slots} activation", f"{self.gradient_slots} gradient", f"{self.stash_slots} stash"]
        if self.split:
            slots.append(f"{self.weight_slots} weight")
        backward = "input-gradient" if self.split else "backward"
        counts = [f"{self.has_forward.sum()} with forwards", f"{self.has_backward.sum()} with {backward}s"]
        if self.split:
            counts.append(f"{self.has_weight.sum()} with weight-gradients")
        return (
            f"{self.stages} stages, {self.microbatches} microbatches, chunks: {self.chunks}; {self.ticks} ticks: "
            f"{', '.join(counts)}; slots per stage: {', '.join(slots)}"
        )


def _label(microbatch: int, chunk: int = 0) -> str:
    """A cell of the printed table; microbatches of chunk c > 0 carry .c, a dot is an idle stage."""
    return "." if microbatch < 0 else f"{microbatch}" + (f".{chunk}" if chunk > 0 else "")
