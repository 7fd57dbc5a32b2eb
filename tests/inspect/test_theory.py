"""What a step sends is what the textbook says, to the byte, on every layout; and the textbook is DESIGN's formulas."""

import dataclasses
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardlm as sl
from shardlm.dims import DimTable
from shardlm.inspect import ledger, theory
from shardlm.parallel import zero
from shardlm.parallel.pipeline import Kind, Operation, make_table
from shardlm.parallel.pipeline.table import Table
from tests.train.test_same_numbers import CONFIGS, LAYOUTS, PIPELINES

BATCH, SEQUENCE = 24, 12
MORE = [
    ("llama", "data=2,fsdp=2,tensor=2,zero=1"),
    ("llama", "data=2,fsdp=2,tensor=2,zero=2,sequence_parallel,accumulate=3"),
    ("llama", "data=2,fsdp=2,tensor=2,sequence_parallel,remat=full"),
    ("llama", "data=2,tensor=2,remat=dots,accumulate=3,reduce_gradients=layer"),
    ("gpt", "fsdp=2,tensor=3,remat=full"),
    ("gpt", "data=64,fsdp=8,tensor=6,sequence_parallel,remat=full"),
]

PIPED = [
    ("llama4", "pipe=4,pipeline=gpipe:6"),
    ("llama4", "pipe=2,fsdp=2,tensor=2,zero=2,pipeline=interleaved:4:2:stored"),
    ("llama4", "pipe=4,data=2,tensor=2,pipeline=zb-h1:6:stored"),
    ("gpt4", "pipe=2,data=2,tensor=2,sequence_parallel,pipeline=1f1b:3:1:1+3:ends:stored,remat=full"),
    ("llama4", "pipe=2,fsdp=2,zero=1,pipeline=1f1b:3:ends"),
    ("llama4", "pipe=2,data=2,fsdp=2,zero=2,tensor=2,pipeline=1f1b:3,remat=dots"),
    ("gpt4", "pipe=4,data=8,fsdp=8,tensor=6,sequence_parallel,pipeline=gpipe:3,remat=full"),
    *PIPELINES,
]
CASES = [(*case, dtype) for case in LAYOUTS + MORE for dtype in ("float32", "bfloat16")]
CASES += [(*case, dtype) for case, dtype in zip(PIPED, itertools.cycle(("bfloat16", "float32")), strict=False)]


@pytest.mark.parametrize(("name", "layout", "dtype"), CASES)
def test_the_ledger_is_the_textbook(name: str, layout: str, dtype: str):
    config, parsed = dataclasses.replace(CONFIGS[name], dtype=dtype, param_dtype="float32"), sl.Layout.parse(layout)
    trainer = sl.Trainer(config, parsed, devices=parsed.num_devices)
    rows = BATCH * max(1, parsed.batch_shards // 8)
    found, expected = Counter(), Counter()
    for entry in ledger(trainer.step_function, trainer.abstract_state, abstract_batch(trainer, rows)):
        found[entry.kind, entry.axes, entry.dtype] += entry.elements * entry.count
    for line in theory.expected(trainer.config, trainer.layout, rows, SEQUENCE):
        expected[line.kind, line.axes, line.dtype] += line.elements
    assert found == expected


def test_the_report_sets_bytes_beside_bytes():
    trainer = sl.Trainer(PLAIN, sl.Layout(data=2, fsdp=2, tensor=2), devices=8)
    report = trainer.explain(batch_size=BATCH, sequence=SEQUENCE)
    assert set(report.against_theory()) == {("data",), ("fsdp",), ("tensor",), ("data", "fsdp")}
    for sent, says in report.against_theory().values():
        assert sent == pytest.approx(says, rel=1e-12)


def lines(config: sl.TransformerConfig, layout: str, batch_size: int = BATCH) -> Counter:
    trainer = sl.Trainer(config, sl.Layout.parse(layout), devices=sl.Layout.parse(layout).num_devices)
    found = theory.expected(trainer.config, trainer.layout, batch_size, SEQUENCE)
    counts: Counter = Counter()
    for line in found:
        counts[line.what, line.kind, line.axes] += line.elements
    return counts


# Every parameter is a matrix, a table, or a norm's scale; nothing is padded.
PLAIN = sl.TransformerConfig(vocab_size=72, num_layers=3, d_model=16, num_heads=4, d_ff=40, vocab_multiple=8)
P = sl.Trainer(PLAIN).num_parameters
TABLES, SCALES = 2 * 72 * 16, 7 * 16
STREAM = BATCH * SEQUENCE * 16


def total(counts: Counter, kind: str, axis: str) -> int:
    return sum(n for (what, k, axes), n in counts.items() if k == kind and axes == (axis,) and "sums" not in what)


def test_data_parallelism_and_zero_are_2p_and_3p():
    """arXiv:1910.02054 section 7, each collective's ring factor left out: an all-reduce counts as two."""
    assert 2 * total(lines(PLAIN, "data=4"), "all-reduce", "data") == 2 * P
    for level in (1, 2):
        counts = lines(PLAIN, f"fsdp=4,zero={level}")
        assert total(counts, "reduce-scatter", "fsdp") + total(counts, "all-gather", "fsdp") == 2 * P
    counts = lines(PLAIN, "fsdp=4,zero=3")
    # Tables and scales are gathered once per step and kept.
    assert total(counts, "reduce-scatter", "fsdp") + total(counts, "all-gather", "fsdp") == 3 * P - TABLES - SCALES


def test_tensor_parallelism_is_four_all_reduces_a_layer_and_three_for_the_vocabulary():
    counts = lines(PLAIN, "tensor=4")
    assert counts["layers", "all-reduce", ("tensor",)] == PLAIN.num_layers * 4 * STREAM
    assert counts["cross-entropy", "all-reduce", ("tensor",)] == 3 * BATCH * SEQUENCE


def test_sequence_parallelism_has_the_same_volume():
    counts = lines(PLAIN, "tensor=4,sequence_parallel")
    gathered, scattered = counts["layers", "all-gather", ("tensor",)], counts["layers", "reduce-scatter", ("tensor",)]
    assert gathered + scattered == 2 * PLAIN.num_layers * 4 * STREAM


def ratios(layout: str | sl.Layout, config: sl.TransformerConfig = PLAIN) -> dict:
    """By axes, the ledger's bytes over the textbook's; nothing is compiled."""
    layout = sl.Layout.parse(layout) if isinstance(layout, str) else layout
    trainer = sl.Trainer(config, layout, devices=layout.num_devices)
    found = ledger(trainer.step_function, trainer.abstract_state, abstract_batch(trainer)).by_axes()
    expected: dict = {}
    for line in theory.expected(trainer.config, trainer.layout, BATCH, SEQUENCE):
        expected[line.axes] = None if line.bytes is None else expected.get(line.axes, 0.0) + line.bytes
    return {axes: sum(e.bytes for e in found[axes]) / n if n else n for axes, n in expected.items()}


def abstract_batch(trainer: sl.Trainer, rows: int = BATCH) -> dict:
    arrays = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    return {k: jax.ShapeDtypeStruct((rows, SEQUENCE), d, sharding=trainer.batch_sharding) for k, d in arrays.items()}


def once_per_step(decide):
    return lambda *arguments: dataclasses.replace(decide(*arguments), per_use=False, late=())


def never_split(decide):
    return lambda self, *arguments: None


def in_every_tick(decide):
    return property(lambda table: np.ones(table.ticks, bool))


WRONG = [  # what is decided wrongly, where, and on which layout and axis it shows
    (zero, "plan", once_per_step, "fsdp=4,accumulate=2", ("fsdp",)),
    (zero, "plan", once_per_step, "data=2,fsdp=2,zero=2,accumulate=3", ("fsdp",)),
    (DimTable, "_zero_dim", never_split, "fsdp=4", ("fsdp",)),
    (Table, "sends_activation", in_every_tick, "pipe=2,pipeline=1f1b:3", ("pipe",)),
    (Table, "sends_gradient", in_every_tick, "pipe=2,pipeline=gpipe:3", ("pipe",)),
]


@pytest.mark.parametrize(("owner", "name", "wrong", "layout", "axes"), WRONG)
def test_a_wrong_decision_is_not_the_textbook(monkeypatch, owner, name, wrong, layout, axes):
    """The textbook asks nobody who decides, so that what they decide shows in the ratio."""
    assert ratios(layout)[axes] == pytest.approx(1, rel=1e-12)
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    assert abs(ratios(layout)[axes] - 1) > 0.01


def test_the_textbook_knows_the_ticks_of_every_schedule_by_a_formula():
    sizes = [(name, p, m, 1) for name in ("gpipe", "1f1b", "zb-h1") for p in (2, 3, 5) for m in (1, 2, 4, 7, 12)]
    sizes += [("interleaved", p, p * turns, v) for p in (2, 3, 4) for turns in (1, 2, 3) for v in (1, 2, 3)]
    for name, stages, microbatches, chunks in sizes:
        table = make_table(name, stages, microbatches, chunks)
        pipeline = sl.Pipeline(schedule=name, microbatches=microbatches, chunks=chunks, recompute=name != "zb-h1")
        count = theory.ticks(sl.Layout(pipe=stages, pipeline=pipeline))
        found = [int(getattr(table, each).sum()) for each in ("has_forward", "has_backward")]
        found += [1 + int(sends.sum()) for sends in (table.sends_activation, table.sends_gradient)]
        assert found == [count] * 4, (name, stages, microbatches, chunks)


def test_of_a_schedule_of_ones_own_it_says_nothing():
    def in_turn(stages, microbatches, chunks):
        return [[Operation(k, i) for i in range(microbatches) for k in (Kind.FORWARD, Kind.BACKWARD)]] * stages

    layout = sl.Layout(pipe=2, data=2, tensor=2, pipeline=sl.Pipeline(schedule=in_turn, microbatches=3))
    says = {(line.what, line.axes): line.bytes for line in theory.expected(PLAIN, layout, BATCH, SEQUENCE)}
    silent = {(what, axes) for (what, axes), count in says.items() if count is None}
    assert silent == {
        ("layers", ("tensor",)),
        ("activations to the next stage", ("pipe",)),
        ("gradients to the one before", ("pipe",)),
    }
    assert all(count for key, count in says.items() if key not in silent)
