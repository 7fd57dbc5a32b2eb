"""How a layout says what its pipeline does; `shardlm/parallel/pipeline` does it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from shardlm._errors import LayoutError, is_int, raise_all

NAMES = ("1f1b", "gpipe", "interleaved", "zb-h1")
_WORDS = {"ends": ("vocabulary", "ends"), "stored": ("recompute", False)}  # what a text may end in


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How the stages of a pipeline take turns, and which layers they hold.

    Attributes:
        schedule: "1f1b", "gpipe", "interleaved", "zb-h1", or a function (stages, microbatches, chunks) -> each stage's
            list of operations (`shardlm.parallel.pipeline`). "zb-h1", and functions that split backwards, need
            `recompute=False` and a layout with remat="none": there is less to split off where work is done twice.
        microbatches: into how many parts the rows of a step are cut; "interleaved" takes a multiple of the stages.
        chunks: pieces of the model per stage, dealt out in turn: piece g is on stage g mod p. Several need
            "interleaved", or a function. Their layers are stored with a leading dim of chunks.
        layers: how many layers each of the stages * chunks pieces has, in the model's order; None is as even as can be.
            Pieces of fewer layers than the largest are padded to it with layers that compute the identity, so each
            costs the memory and the time of the largest. `parallel.pipeline.layers_by_cost` makes a list.
        vocabulary: where embedding and head are. "split": their vocabulary is split over the stages, as over `tensor`,
            and all compute them together. "ends": the first stage embeds and the last has the head; all stages hold
            both tables and compute them in each tick, as one program does, but nothing of them is sent until gradients
            are summed once per step. That pays for a small vocabulary on a slow network.
        recompute: a stage keeps its input for each microbatch under way, and backward makes its forward again. If
            False it keeps what its layers keep, which the layout's `remat` says: with "none" everything that depends on
            the input, so nothing is made again; with "full" each layer's input, so each layer is.

    Raises:
        LayoutError: a setting out of range, or settings that contradict each other.
    """

    schedule: str | Callable[..., Any] = "1f1b"
    microbatches: int = 8
    chunks: int = 1
    layers: Sequence[int] | None = None
    vocabulary: str = "split"
    recompute: bool = True

    def __post_init__(self):
        problems = []
        if self.schedule not in NAMES and not callable(self.schedule):
            problems.append(f"schedule={self.schedule!r} is not one of {_legal()}, nor a function")
        for name in ("microbatches", "chunks"):
            if not is_int(value := getattr(self, name)) or value < 1:
                problems.append(f"{name}={value!r} is not a positive integer")
        if not isinstance(self.recompute, bool):
            problems.append(f"recompute={self.recompute!r} is not True or False")
        elif self.schedule == "zb-h1" and self.recompute:
            problems.append(
                "schedule='zb-h1' with recompute=True: it splits gradients of weights from those of inputs, and each "
                "half would make the forward again, which costs what the split saves; set recompute=False, or take "
                "'1f1b'"
            )
        if not problems and self.schedule in ("1f1b", "gpipe", "zb-h1") and self.chunks != 1:
            problems.append(
                f"chunks={self.chunks}: schedule {self.schedule!r} has one chunk per stage; 'interleaved' has several"
            )
        if self.vocabulary not in ("split", "ends"):
            problems.append(f"vocabulary={self.vocabulary!r} is not one of 'split', 'ends'")
        problems += self._listed_problems()
        raise_all("this pipeline cannot be", problems)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(int(n) for n in self.layers))  # hashable, as a layout is

    def _listed_problems(self) -> list[str]:
        if self.layers is None:
            return []
        listed = isinstance(self.layers, Sequence) and not isinstance(self.layers, str)
        if not listed or not all(is_int(n) and n >= 0 for n in self.layers) or not any(self.layers):
            return [
                f"layers={self.layers!r} is not a list of how many layers each piece has, as in layers=(3, 4, 4, 3)"
            ]
        return []

    def counts(self, num_layers: int, stages: int) -> tuple[int, ...]:
        """Layers of each of the stages * chunks pieces of a model, in its order."""
        return even(num_layers, stages * self.chunks) if self.layers is None else tuple(self.layers)

    def layers_problems(self, num_layers: int, stages: int) -> list[str]:
        """What is wrong with `layers` for a model of so many."""
        pieces, given = stages * self.chunks, self.layers
        if given is None or (len(given) == pieces and sum(given) == num_layers):
            return []
        return [
            f"pipeline layers={given} are {sum(given)} layers in {len(given)} pieces, but there are "
            f"num_layers={num_layers} and pipe={stages} x chunks={self.chunks} = {pieces} pieces: the default is "
            f"layers={even(num_layers, pieces)}"
        ]

    @classmethod
    def parse(cls, text: str) -> Self:
        """The pipeline that a text describes: "schedule:microbatches:chunks:layers", as "1f1b:8" or "1f1b:8:1:3+4+4+3".

        What follows the schedule may be left out from the right. A last ":ends" is `vocabulary="ends"`, a last
        ":stored" `recompute=False`.
        """
        schedule, *rest = text.split(":")
        settings: dict[str, Any] = {}
        while rest and rest[-1] in _WORDS:
            name, value = _WORDS[rest[-1]]
            settings[name] = value
            rest.pop()
        numbers = [part for item in rest for part in item.split("+")]
        if len(rest) > 3 or not all(part.isdecimal() for part in numbers) or any("+" in item for item in rest[:2]):
            raise LayoutError(
                f"pipeline={text!r}: after the schedule go the numbers of microbatches, of chunks, and of layers of "
                "each piece, separated by colons, as in 1f1b:8, interleaved:8:2 or 1f1b:8:1:3+4+4+3; "
                "a last :ends is vocabulary='ends', a last :stored recompute=False"
            )
        settings |= dict(zip(("microbatches", "chunks"), map(int, rest[:2]), strict=False))
        if len(rest) == 3:
            settings["layers"] = tuple(map(int, rest[2].split("+")))
        return cls(schedule=schedule, **settings)

    def __str__(self) -> str:
        name = self.schedule if isinstance(self.schedule, str) else getattr(self.schedule, "__name__", "own")
        parts = [name, str(self.microbatches)]
        if self.chunks > 1 or self.layers is not None:
            parts.append(str(self.chunks))
        if self.layers is not None:
            parts.append("+".join(map(str, self.layers)))
        parts += [word for word, (name, value) in _WORDS.items() if getattr(self, name) == value]
        return ":".join(parts)


def even(num_layers: int, pieces: int) -> tuple[int, ...]:
    """Layers of each piece, as even as can be; the last pieces get one more, as the first stages stash most."""
    least, more = divmod(num_layers, pieces)
    return tuple(least + (piece >= pieces - more) for piece in range(pieces))


def _legal() -> str:
    return ", ".join(map(repr, NAMES))
