"""What a step sends is what the textbook says, to the byte, on every layout; and the textbook is DESIGN's formulas."""

import dataclasses
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

import shardlm as sl
from shardlm.inspect import ledger, theory
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
    arrays = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    batch = {k: jax.ShapeDtypeStruct((rows, SEQUENCE), d, sharding=trainer.batch_sharding) for k, d in arrays.items()}
    found, expected = Counter(), Counter()
    for entry in ledger(trainer.step_function, trainer.abstract_state, batch):
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
