"""What one wrong array shows by itself, held against the right one: its copies, its ratio, its order.

Every test asks for agreement of the whole array to the tolerance, so that what is named has been reproduced.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np

from shardlm.verification.compare import distance, size
from shardlm.verification.copies import Copies
from shardlm.verification.diagnosis import Diagnosis

_SLACK = 8  # a wrong program adds in yet another order
_NEAR = 30  # times the tolerance: beyond that no rounding goes


@dataclass(frozen=True)
class Suspect:
    """An array that differs from the reference's.

    Attributes:
        what: its name in a sentence.
        expected: the reference's, whole.
        found: the layout's.
        dims: names of its dims.
        summed: the axes over which it is a sum, and the number of parts along each, likeliest first.
        tolerance: relative to the largest element expected.
    """

    what: str
    expected: np.ndarray
    found: Copies
    dims: tuple[str | None, ...]
    summed: dict[str, int]
    tolerance: float

    def close(self, a: np.ndarray, b: np.ndarray) -> bool:
        """Whether two arrays of this one's magnitude agree."""
        return distance(a, b) <= _SLACK * self.tolerance * size(self.expected)

    def dim(self, index: int) -> str:
        """The name of a dim, or its number."""
        return self.dims[index] or f"number {index}"


def look(s: Suspect) -> Diagnosis | None:
    """The first symptom that explains the whole array, or None."""
    for test in (_nothing, _copies, _ratio, _order, _displacement):
        diagnosis = test(s)
        if diagnosis is not None:
            return diagnosis
    return None


def statistics(s: Suspect) -> str:
    """What can be said of a difference that nothing explains."""
    found, expected = s.found.whole(), s.expected
    wrong = np.abs(found - expected) > _SLACK * s.tolerance * size(expected)
    text = f"{wrong.mean():.0%} of its elements differ"
    if not np.isfinite(found).all():
        text += f", {np.count_nonzero(~np.isfinite(found))} are not finite"
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (found / expected)[np.abs(expected) > size(expected) / 100]
    if ratios.size:
        low, middle, high = np.nanpercentile(ratios, (5, 50, 95))
        text += f"; found/expected has median {middle:.3g}, 5% below {low:.3g}, 5% above {high:.3g}"
    for index, length in enumerate(found.shape):
        others = tuple(i for i in range(found.ndim) if i != index)
        rows = np.flatnonzero(wrong.any(axis=others))
        if 0 < rows.size < length:
            shown = ", ".join(map(str, rows[:8])) + (", ..." if rows.size > 8 else "")
            text += f"; along {s.dim(index)} ({length}) only at {shown}"
    return text + scope(s)


def scope(s: Suspect) -> str:
    """Which devices are wrong, where it is not all of them: "; only on devices with fsdp=1"."""
    axis, at = _one_side(s)
    return f"; only on devices with {axis}={at}" if axis else ""


def guilty(s: Suspect) -> str | None:
    """The axis of which only one coordinate's devices are wrong, or None."""
    return _one_side(s)[0]


def subsets(axes: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Each axis by itself, then two together, and so on."""
    for count in range(1, len(axes) + 1):
        yield from combinations(axes, count)


def orders(count: int) -> Iterable[tuple[int, ...]]:
    """Orders in which `count` parts may be put together by mistake, the right one left out."""
    straight = tuple(range(count))
    if count <= 4:
        return [order for order in permutations(straight) if order != straight]
    swapped = tuple(i ^ 1 if i ^ 1 < count else i for i in straight)
    return [straight[::-1], straight[1:] + straight[:1], straight[-1:] + straight[:-1], swapped]


def numbers(order: Iterable[int]) -> str:
    """An order in words, cut short where it is long."""
    items = list(map(str, order))
    return ", ".join(items[:12]) + (", ..." if len(items) > 12 else "")


def _one_side(s: Suspect) -> tuple[str | None, int]:
    wrong = [part.at for part in s.found.parts if not s.close(s.expected[part.index], part.data)]
    for axis, count in s.found.sizes.items():
        there = {at[axis] for at in wrong}
        if len(there) == 1 and len(wrong) * count == len(s.found.parts):
            return axis, there.pop()
    return None, 0


def _nothing(s: Suspect) -> Diagnosis | None:
    if not s.found.whole().any():
        return Diagnosis("zero", f"{s.what} is zero everywhere: nothing arrives")
    return None


def _copies(s: Suspect) -> Diagnosis | None:
    axes = s.found.disagree(s.close)
    if not axes:
        return None
    for some in subsets(axes):
        sums = ((group, np.sum([part.data for part in group], axis=0)) for group in s.found.groups(some))
        if all(s.close(s.expected[group[0].index], total) for group, total in sums):
            name = " x ".join(some)
            return Diagnosis(
                "missing reduction",
                f"the copies of {s.what} along {name} differ, and their sum is what one device has: "
                f"the sum over {name} is missing",
                some[0],
            )
    name = " and ".join(axes)
    return Diagnosis(
        "replicas",
        f"{s.what} should be the same on all devices along {name}, and is not; neither one copy nor their sum is right",
        axes[0],
    )


def _ratio(s: Suspect) -> Diagnosis | None:
    expected, found = s.expected.astype(np.float64), s.found.whole().astype(np.float64)
    finite = np.isfinite(expected) & np.isfinite(found)
    if not finite.all() or not expected.any():
        return None
    ratio = float((expected * found).sum() / (expected * expected).sum())
    if abs(ratio - 1) <= _SLACK * s.tolerance or not s.close(found, ratio * expected):
        return None
    if abs(ratio + 1) <= _SLACK * s.tolerance:
        return Diagnosis("sign", f"{s.what} has the opposite sign everywhere")
    for factor, how in ((1, "summed once too often"), (-1, "averaged, or left unsummed, instead of summed")):
        fits = [
            axes
            for axes in subsets(tuple(s.summed))
            if abs(ratio / float(np.prod([s.summed[axis] for axis in axes])) ** factor - 1) <= 1e-3
        ]
        if fits:
            name = " x ".join(fits[0])
            others = f" (or over {' or '.join(' x '.join(axes) for axes in fits[1:])})" if fits[1:] else ""
            text = f"{s.what} is {ratio:.6g} times what it should be, everywhere: {how} over {name}{others}"
            return Diagnosis("scale", text, fits[0][0])
    if expected.ndim == 0:  # of a single number that says nothing
        return None
    return Diagnosis("scale", f"{s.what} is {ratio:.6g} times what it should be, everywhere; no axis has that size")


def _order(s: Suspect) -> Diagnosis | None:
    expected, found = s.expected, s.found.whole()
    repeated = None
    for dim, length in enumerate(expected.shape):
        for count, axis in chunks(s, dim):
            a, b = np.split(expected, count, dim), np.split(found, count, dim)
            fits = [[j for j in range(count) if s.close(a[j], b[i])] for i in range(count)]
            if not all(fits) or all(i in options for i, options in enumerate(fits)):
                continue
            order = []
            for i, options in enumerate(fits):
                unused = [j for j in options if j not in order]
                order.append(i if i in unused else (unused or options)[0])
            unit = "slices" if count == length else f"{count} chunks"
            over = f", one for each device along {axis}" if axis else ""
            text = (
                f"{s.what} has, along {s.dim(dim)}, its {unit}{over} in the order {numbers(order)} instead of 0, 1, ..."
            )
            if len(set(order)) == count:
                return Diagnosis("permutation", text, axis, s.dim(dim))
            repeated = repeated or Diagnosis("repetition", text, axis, s.dim(dim))
    return repeated


def chunks(s: Suspect, dim: int) -> Iterator[tuple[int, str | None]]:
    """Into how many parts a dim may be cut, coarsest first, and the axis that has as many devices."""
    length = s.expected.shape[dim]
    axes = {**{axis: s.found.sizes[axis] for axis in s.found.axes[dim]}, **s.found.sizes}
    whole = int(np.prod([s.found.sizes[axis] for axis in s.found.axes[dim]]))
    counts: dict[int, str | None] = {}
    for axis, count in axes.items():
        counts.setdefault(count, axis)
    counts.setdefault(whole, s.found.axes[dim][0] if s.found.axes[dim] else None)
    if length <= 256:
        counts.setdefault(length, None)
    yield from ((count, axis) for count, axis in sorted(counts.items()) if count > 1 and length % count == 0)


def _displacement(s: Suspect) -> Diagnosis | None:
    expected, found = s.expected, s.found.whole()
    for dim, length in enumerate(expected.shape):
        a, b = np.moveaxis(expected, dim, 0), np.moveaxis(found, dim, 0)
        for by in range(1, min(8, length // 2) + 1):
            for sign, (x, y) in ((1, (a[:-by], b[by:])), (-1, (a[by:], b[:-by]))):
                if x.any() and s.close(x, y):
                    text = f"{s.what} is displaced by {sign * by} along {s.dim(dim)}"
                    return Diagnosis("shift", text, None, s.dim(dim))
    return None


def rounding(s: Suspect) -> Diagnosis | None:
    """Whether the difference is small enough to be rounding: for where nothing else explains it."""
    gap = s.found.whole().astype(np.float64) - s.expected
    if not distance(s.found.whole(), s.expected) <= _NEAR * s.tolerance * size(s.expected):
        return None
    up = float((gap[gap != 0] > 0).mean()) if gap.any() else 0.5
    text = f"{s.what} is within {_NEAR} tolerances, {up:.0%} of its differences upwards: "
    return Diagnosis("rounding", text + "this may be rounding, which float64 would make 1e9 times smaller")
