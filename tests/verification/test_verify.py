"""`sl.verify` passes right layouts, says so in a table, and refuses what it cannot compare."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import shardlm as sl
from shardlm.parallel import zero
from shardlm.verification import compare, run, tolerance
from shardlm.verification.diagnosis import KINDS, Diagnosis, Place
from shardlm.verification.inputs import random_batch
from shardlm.verification.result import Verification, VerificationError
from tests.verification.models import CONFIGS, LLAMA, OPTIMIZER

RIGHT = [
    ("llama", "data=2,fsdp=2,tensor=2,sequence_parallel", "float64", "manual"),
    ("llama", "tensor=4,accumulate=2", "float32", "manual"),  # 2 key/value heads on 4 devices
    ("gpt", "fsdp=2,tensor=2,zero=1,sequence_parallel,accumulate=2,remat=full", "float64", "manual"),
    ("llama", "data=2,tensor=2", "float32", "auto"),
    ("gpt", "pipe=2,fsdp=2,pipeline=1f1b:2:1:1+1", "float32", "manual"),
]


@pytest.mark.parametrize(("name", "layout", "dtype", "engine"), RIGHT)
def test_a_right_layout_passes(verify, name, layout, dtype, engine):
    result = verify(name, layout, dtype, engine=engine)
    assert result.agrees
    assert (result.layout, result.dtype, result.engine, result.steps) == (layout, dtype, engine, 2)
    # Tolerances are of the order of the arithmetic's: 4 digits short of the dtype's own are nowhere granted.
    assert max(d.tolerance for d in result.differences) < 1e4 * np.finfo(dtype).eps
    leaves = len(jax.tree.leaves(sl.Trainer(CONFIGS[name], devices=jax.devices()[:1]).abstract_state.params))
    counts = {q: sum(d.quantity == q for d in result.differences) for q in result.worst()}
    assert counts["loss"] == 2
    assert counts["gradients"] == counts["parameters"] == leaves
    assert counts["optimizer state"] >= 2 * leaves


def test_a_trainer_is_verified_as_it_is(verify):
    trainer = sl.Trainer(LLAMA, sl.Layout(data=2), OPTIMIZER, devices=jax.devices()[:2])
    result = sl.verify(trainer, batch=random_batch(LLAMA, sl.Layout(), seed=1), steps=1)
    assert result.agrees and result.dtype == "float32" and result.devices == 2
    with pytest.raises(ValueError, match="the trainer has its own layout and dtype: leave out layout, dtype="):
        sl.verify(trainer, sl.Layout(), dtype="float64")


def test_a_gradient_off_by_a_thousandth_is_seen_in_float32(verify, monkeypatch):
    finish = zero.finish
    monkeypatch.setattr(zero, "finish", lambda g, plan: finish(g, plan) * (1.001 if plan.axes else 1))
    with pytest.raises(
        sl.VerificationError, match="is 1.001 times what it should be, everywhere; no axis has that size"
    ):
        verify("llama", "data=2", "float32", steps=1)


def test_a_tolerance_below_rounding_is_called_rounding(verify):
    with pytest.raises(sl.VerificationError, match='run it with dtype="float64"') as caught:
        verify("llama", "data=2", "float32", steps=1, tolerance=1e-8)
    assert caught.value.diagnosis.kind == "rounding"
    assert not caught.value.verification.agrees


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((LLAMA,), {}, ValueError, "with a configuration goes a layout"),
        ((LLAMA, sl.Layout(data=2)), {"steps": 0}, ValueError, "steps=0; it is a positive integer"),
        ((LLAMA, sl.Layout(data=2)), {"dtype": "bfloat16"}, ValueError, "dtype='bfloat16'; it is one of 'float32', "),
        ((LLAMA, sl.Layout(data=2)), {"tolerance": 0.0}, ValueError, "tolerance=0.0; it is positive"),
        ((LLAMA, sl.Layout(tensor=3)), {}, sl.LayoutError, "num_heads=4"),
        ((LLAMA, sl.Layout(data=64)), {}, sl.LayoutError, "data=64 = 64 devices, but there are 8"),
        ((LLAMA, sl.Layout(data=2), {"tokens": np.zeros((2, 4), np.int32)}), {}, ValueError, "'targets' is missing"),
        (("tiny", sl.Layout(data=2)), {}, TypeError, "a TransformerConfig or a Trainer, not a str"),
    ],
)
def test_mistakes_are_errors_of_their_own(arguments, options, error, message):
    with pytest.raises(error, match=message):
        sl.verify(*arguments, **options)


def difference(quantity: str = "gradients", value: float = 1e-7, **changes) -> compare.Difference:
    fields = {"leaf": "head/table", "update": 0, "tolerance": 1e-5} | changes
    return compare.Difference(quantity=quantity, value=value, **fields)


def test_the_result_prints_as_a_table_and_as_html():
    differences = (difference("loss"), difference(), difference(leaf="a<b", value=2e-7), difference(tolerance=0.5))
    result = Verification("data=2", "manual", 2, "float32", 1, differences, ("compared in float32",))
    assert str(result).splitlines() == [
        "data=2 agrees with one device: 2 devices against 1, manual engine, float32, 1 update",
        "quantity   compared  difference  tolerance  worst leaf",
        "loss              1       1e-07      1e-05  after update 0",
        "gradients         3       2e-07      1e-05  a<b",
        "note: compared in float32",
        "note: rounding alone decides gradients head/table: nothing is learnt from that",
    ]
    assert "<td>a&lt;b</td>" in result._repr_html_()
    assert json.loads(json.dumps(result.to_dict()))["differences"][0]["fails"] is False


def test_the_error_says_what_where_why_and_what_to_do():
    result = Verification("data=2", "manual", 2, "float32", 0, (difference("loss"), difference(value=0.5)))
    place = Place("backward", "head/table", None, "the gradient of head/table, the first that backward meets")
    error = VerificationError(result, place, Diagnosis("missing reduction", "the sum over data is missing", "data"))
    assert isinstance(error, AssertionError) and not isinstance(error, ValueError)
    assert str(error).splitlines()[:5] == [
        "data=2 does not compute what one device computes",
        "  worst leaf: gradients head/table, off by 0.5 of its largest element (tolerance 1e-05)",
        "  first difference: backward: the gradient of head/table, the first that backward meets",
        "  diagnosis: missing reduction on data: the sum over data is missing",
        "  what to do: read shardlm/parallel/zero.py",
    ]
    assert "gradients         1         0.5      1e-05  head/table (differs)" in str(error)


def test_a_number_that_is_not_finite_fails():
    assert compare.distance(np.array([1.0, np.nan]), np.array([1.0, np.nan])) == 0
    assert compare.distance(np.array([1.0, -np.inf]), np.array([1.0, -np.inf])) == 0
    assert difference(value=compare.distance(np.ones(2), np.array([1.0, np.nan]))).fails
    assert difference(value=float("nan")).fails


def test_the_tolerance_follows_the_dtype_and_the_size():
    params = {"kernel": np.zeros((8, 8))}
    small = tolerance.Arithmetic(LLAMA, params, 96, "float64").step()
    assert tolerance.Arithmetic(LLAMA, params, 96 * 4, "float64").step() == pytest.approx(2 * small)
    ratio = tolerance.Arithmetic(LLAMA, params, 96, "float32").step() / small
    assert ratio == pytest.approx(np.finfo(np.float32).eps / np.finfo(np.float64).eps)
    assert tolerance.Arithmetic(LLAMA, params, 96, "bfloat16").step() > 1e-2
    assert tolerance.Arithmetic(None, params, 96, "float64").step() < small


def test_integers_are_equal_or_wrong():
    mesh, arithmetic = sl.Layout().mesh(jax.devices()[:1]), tolerance.Arithmetic(LLAMA, np.zeros(3), 96, "float32")
    tree = {"count": np.int32(1000)}
    found = jax.device_put({"count": np.int32(1001)}, jax.devices()[0])
    names = frozenset({"kernel"})
    for got, fails in ((found, True), (jax.device_put(tree, jax.devices()[0]), False)):
        [result] = compare.compare("optimizer state", tree, got, tree, mesh, arithmetic, 0.1, names)
        assert result.fails is fails and result.tolerance == 0


def test_the_function_is_public_and_its_folder_importable():
    assert sl.verify is run.verify and callable(sl.verify)
    assert sl.VerificationError is VerificationError and KINDS and OPTIMIZER
    assert dataclasses.is_dataclass(sl.Verification)
