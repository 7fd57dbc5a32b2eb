"""Each symptom of a wrong array is recognised by itself, and one that has none is described."""

import numpy as np
import pytest

from shardlm.verification.copies import Copies, Part
from shardlm.verification.symptoms import Suspect, look, rounding, scope, statistics

RANDOM = np.random.default_rng(0)
EXPECTED = RANDOM.normal(size=(4, 6))


def suspect(*copies: np.ndarray, axis: str = "data", **changes) -> Suspect:
    """An array held whole by the devices along `axis`; given once, by two."""
    held = copies * 2 if len(copies) == 1 else copies
    whole = (slice(0, 4, 1), slice(0, 6, 1))
    parts = tuple(Part({axis: i}, whole, x) for i, x in enumerate(held))
    found = Copies((4, 6), parts, ((), ()), {axis: len(held)})
    fields = {"dims": ("embed", "mlp"), "summed": {"data": 2, "fsdp": 4}, "tolerance": 1e-13} | changes
    return Suspect("x", EXPECTED, found, **fields)


def swapped(dim: int, order: list[int]) -> np.ndarray:
    return np.take(EXPECTED, order, dim)


@pytest.mark.parametrize(
    ("found", "kind", "axis", "dim"),
    [
        (suspect(np.zeros((4, 6))), "zero", None, None),
        (suspect(-EXPECTED), "sign", None, None),
        (suspect(2 * EXPECTED), "scale", "data", None),
        (suspect(EXPECTED / 4), "scale", "fsdp", None),
        (suspect(EXPECTED * 8), "scale", "data", None),  # both
        (suspect(EXPECTED * 3), "scale", None, None),
        (suspect(EXPECTED * 0.25, EXPECTED * 0.75), "missing reduction", "data", None),
        (suspect(EXPECTED, EXPECTED * 1.5, axis="tensor"), "replicas", "tensor", None),
        (suspect(swapped(0, [2, 3, 0, 1])), "permutation", "data", "embed"),
        (suspect(swapped(1, [1, 0, 3, 2, 5, 4])), "permutation", None, "mlp"),
        (suspect(swapped(1, [0, 1, 2, 0, 1, 2])), "repetition", "data", "mlp"),
        (suspect(np.concatenate([np.zeros((4, 1)), EXPECTED[:, :-1]], 1)), "shift", None, "mlp"),
    ],
)
def test_a_symptom_is_recognised(found: Suspect, kind: str, axis: str | None, dim: str | None):
    diagnosis = look(found)
    assert diagnosis is not None
    assert (diagnosis.kind, diagnosis.axis, diagnosis.dim) == (kind, axis, dim), diagnosis.text


def test_two_sizes_that_fit_are_both_named():
    diagnosis = look(suspect(2 * EXPECTED, summed={"data": 2, "tensor": 2}))
    assert diagnosis is not None and "over data (or over tensor)" in diagnosis.text


def test_what_nothing_explains_is_described():
    found = EXPECTED.copy()
    found[:, 2] += 0.5
    s = suspect(EXPECTED, found)
    assert look(suspect(found)) is None and rounding(suspect(found)) is None
    assert "17% of its elements differ" in statistics(suspect(found))
    assert "along mlp (6) only at 2" in statistics(suspect(found))
    assert scope(s) == "; only on devices with data=1"


def test_small_differences_may_be_rounding():
    noise = 1 + 1e-12 * RANDOM.choice((-1, 1), EXPECTED.shape)
    diagnosis = rounding(suspect(EXPECTED * noise))
    assert diagnosis is not None and diagnosis.kind == "rounding"
    assert rounding(suspect(EXPECTED * (1 + 1e-3))) is None


def test_the_right_array_has_no_symptom():
    assert look(suspect(EXPECTED)) is None
