"""What a verification found: the numbers when a layout is right, and the error that explains when it is not."""

import dataclasses
import html
from dataclasses import dataclass
from typing import Any

from shardlm._text import fold, table
from shardlm.verification.compare import Difference, worst
from shardlm.verification.diagnosis import Diagnosis, Place, file_of
from shardlm.verification.tolerance import NOISE

_TITLES = ("quantity", "compared", "difference", "tolerance", "worst leaf")


@dataclass(frozen=True)
class Verification:
    """A layout's numbers held against those of one device.

    Attributes:
        layout: as text, its sizes filled in.
        engine: "manual" or "auto".
        devices: how many the layout has.
        dtype: of the computation on both sides.
        steps: updates made.
        differences: of every leaf compared, on any device, relative to the leaf's largest element.
        notes: what was changed for the comparison, and what it cannot tell.
    """

    layout: str
    engine: str
    devices: int
    dtype: str
    steps: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether no difference is beyond its tolerance."""
        return not any(difference.fails for difference in self.differences)

    def worst(self) -> dict[str, Difference]:
        """For each quantity the leaf that uses most of its tolerance."""
        quantities = dict.fromkeys(difference.quantity for difference in self.differences)
        return {name: worst([d for d in self.differences if d.quantity == name]) for name in quantities}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        return dataclasses.asdict(self) | {
            "differences": [dataclasses.asdict(d) | {"fails": d.fails} for d in self.differences],
            "notes": list(self.notes),
            "agrees": self.agrees,
        }

    def __str__(self) -> str:
        first, *numbers, last = _TITLES
        lines = table((first, *(f">{name}" for name in numbers), last), self._rows(), gap=2)
        return "\n".join([fold(self._title()), lines, *(fold(f"note: {note}") for note in self._all_notes())])

    def _repr_html_(self) -> str:
        rows = [("th", _TITLES), *(("td", row) for row in self._rows())]
        table = "".join(f"<tr>{''.join(f'<{t}>{html.escape(cell)}</{t}>' for cell in row)}</tr>" for t, row in rows)
        notes = "<br>".join(html.escape(note) for note in self._all_notes())
        return f"<p>{html.escape(self._title())}</p><table>{table}</table>{notes}"

    def _title(self) -> str:
        verb = "agrees with one device" if self.agrees else "DIFFERS from one device"
        updates = f"{self.steps} update{'s' * (self.steps != 1)}"
        return f"{self.layout} {verb}: {self.devices} devices against 1, {self.engine} engine, {self.dtype}, {updates}"

    def _rows(self) -> list[tuple[str, ...]]:
        rows = []
        for name, difference in self.worst().items():
            count = sum(d.quantity == name for d in self.differences)
            mark = " (differs)" if difference.fails else ""
            leaf = f"after update {difference.update}" if name == "loss" else difference.leaf
            rows.append((name, str(count), f"{difference.value:.2g}", f"{difference.tolerance:.2g}", leaf + mark))
        return rows

    def _all_notes(self) -> list[str]:
        noise = sorted({f"{d.quantity} {d.leaf}".strip() for d in self.differences if d.tolerance > NOISE})
        if not noise:
            return list(self.notes)
        named = ", ".join(noise[:4]) + (f" and {len(noise) - 4} more" if len(noise) > 4 else "")
        return [*self.notes, f"rounding alone decides {named}: nothing is learnt from that"]


class VerificationError(AssertionError):
    """A layout does not compute what one device computes.

    It is an AssertionError and no ValueError: nothing is wrong with the arguments, the program is; in a test it counts
    as a failure, and code that catches mistakes in the arguments lets it pass.

    Attributes:
        verification: all that was compared until then.
        worst: the leaf that is furthest from the reference, in tolerances.
        place: where the programs part.
        diagnosis: what the first wrong array there looks like.
    """

    def __init__(self, verification: Verification, place: Place, diagnosis: Diagnosis):
        self.verification, self.place, self.diagnosis = verification, place, diagnosis
        self.worst = worst(list(verification.differences))
        where = f" on {diagnosis.axis}" if diagnosis.axis else ""
        where += f", along {diagnosis.dim}" if diagnosis.dim else ""
        super().__init__(
            f"{verification.layout} does not compute what one device computes\n"
            f"  worst leaf: {self.worst.quantity} {self.worst.leaf}, off by {self.worst.value:.3g} of its largest "
            f"element (tolerance {self.worst.tolerance:.2g})\n"
            f"  first difference: {place.stage}: {place.text}\n"
            f"  diagnosis: {diagnosis.kind}{where}: {diagnosis.text}\n"
            f"  what to do: {_advice(diagnosis, place)}\n\n{verification}"
        )


def _advice(diagnosis: Diagnosis, place: Place) -> str:
    if diagnosis.kind == "rounding":
        return 'run it with dtype="float64"; if it agrees there, pass tolerance= for this dtype'
    return f"read {file_of(diagnosis, place)}"
