"""The compiled program of the manual engine communicates what the textbooks say, and nothing else.

Elements per device and step: P parameters, of which K in the layers' matrices, L layers; b rows, s tokens, h = d_model
per device. Ring wire factors are applied at the end, once, to show the volumes in their usual form.
"""

from collections import Counter

import jax
import numpy as np
import optax
import pytest

import shardlm as sl
from shardlm.inspect.hlo import Collective, collectives
from shardlm.train.engine import flatten

LAYERS, ROWS, SEQUENCE, WIDTH = 3, 8, 12, 16
# Multi-head attention, no biases, no padding: every parameter is a matrix, a table, or a norm scale.
CONFIG = sl.TransformerConfig(
    vocab_size=72, num_layers=LAYERS, d_model=WIDTH, num_heads=4, d_ff=40, vocab_multiple=8, init_std=0.1
)
BATCH = {name: np.ones((ROWS, SEQUENCE), np.int32) for name in ("tokens", "targets")}


def program(layout: str, what: str = "grads", config: sl.TransformerConfig = CONFIG) -> Counter[Collective]:
    """Collectives of `loss_and_grads`, or of the whole `step`; the optimizer's own (scalars of a norm) left out."""
    parsed = sl.Layout.parse(layout)
    trainer = sl.Trainer(config, parsed, optax.adam(1e-3), devices=jax.devices()[: parsed.num_devices])
    function = trainer._loss_and_grads if what == "grads" else trainer._step
    batch = trainer.place(BATCH)
    text = function.lower(trainer.abstract_state, batch).compile().as_text()
    found = collectives(text, trainer.mesh)
    return Counter({key: n for key, n in found.items() if key.elements > 1})


def sizes(config: sl.TransformerConfig = CONFIG) -> dict[str, int]:
    """Elements of each parameter by path; a layer's own for the matrices of the layers."""
    shapes = sl.Trainer(config).abstract_state.params
    return {
        path: leaf.size // (LAYERS if path.startswith("layers/") and path.endswith("kernel") else 1)
        for path, leaf in flatten(shapes).items()
    }


def total(found: Counter[Collective], kind: str, *axes: str) -> int:
    return sum(key.elements * n for key, n in found.items() if key.kind == kind and key.axes == axes)


def parameters() -> tuple[int, int]:
    """(P, K)."""
    matrices = LAYERS * sum(n for path, n in sizes().items() if path.endswith("kernel"))
    return matrices + sum(n for path, n in sizes().items() if not path.endswith("kernel")), matrices


def only(found: Counter[Collective], *allowed: tuple[str, tuple[str, ...]]) -> None:
    assert {(key.kind, key.axes) for key in found} == set(allowed)


@pytest.mark.parametrize("reduction", ["layer", "step"])
def test_data_parallelism_all_reduces_each_gradient_once(reduction: str):
    found = program(f"data=4,reduce_gradients={reduction}")
    only(found, ("all-reduce", ("data",)))
    # Layer by layer inside the backward loop, or stacked after it; every other parameter once.
    expected: Counter[Collective] = Counter()
    for path, n in sizes().items():
        stacked = path.endswith("kernel") and reduction == "step"
        times = LAYERS if path.endswith("kernel") and reduction == "layer" else 1
        expected[Collective("all-reduce", ("data",), n * LAYERS if stacked else n)] += times
    assert found == expected
    p, _ = parameters()
    assert 2 * total(found, "all-reduce", "data") == 2 * p


@pytest.mark.parametrize("zero", [1, 2])
def test_zero_1_and_2_reduce_scatter_gradients_and_gather_parameters(zero: int):
    found = program(f"fsdp=4,zero={zero}", "step")
    only(found, ("reduce-scatter", ("fsdp",)), ("all-gather", ("fsdp",)))
    p, _ = parameters()
    assert total(found, "reduce-scatter", "fsdp") == p
    assert total(found, "all-gather", "fsdp") == p  # 2P in all


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_zero_3_gathers_matrices_in_forward_and_backward(remat: str):
    found = program(f"fsdp=4,zero=3,remat={remat}", "step")
    only(found, ("reduce-scatter", ("fsdp",)), ("all-gather", ("fsdp",)))
    p, k = parameters()
    assert total(found, "reduce-scatter", "fsdp") == p
    # 3K of the layers' matrices; tables and vectors are gathered once per step and kept, so 2 of each and not 3.
    assert total(found, "all-gather", "fsdp") == 2 * k + (p - k)
    per_layer = Counter(n for path, n in sizes().items() if path.endswith("kernel"))
    for n, matrices in per_layer.items():
        assert found[Collective("all-gather", ("fsdp",), n)] == 2 * LAYERS * matrices
        assert found[Collective("reduce-scatter", ("fsdp",), n)] == LAYERS * matrices


def test_hybrid_sharding_all_reduces_shards_and_not_whole_gradients():
    found = program("data=2,fsdp=4,zero=3")
    p, _ = parameters()
    assert total(found, "reduce-scatter", "fsdp") == p
    assert total(found, "all-reduce", "data") == p // 4


def test_accumulation_reduces_once_per_step():
    found = program("data=2,accumulate=4")
    p, _ = parameters()
    assert total(found, "all-reduce", "data") == p
    assert found == program("data=2,reduce_gradients=step")


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_tensor_parallelism_is_four_all_reduces_per_layer(remat: str):
    found = program(f"tensor=4,remat={remat}")
    stream, tokens = ROWS * SEQUENCE * WIDTH, ROWS * SEQUENCE
    assert found == {
        # 2 forward and 2 backward in a layer; one more for the embedding's sum, and one for the head's input gradient.
        Collective("all-reduce", ("tensor",), stream): 4 * LAYERS + 2,
        # The vocabulary's maximum, its sum of exponentials, and the target's logit.
        Collective("all-reduce", ("tensor",), tokens): 3,
    }


def test_full_recomputation_repeats_the_forward_of_a_layer():
    found = program("tensor=4,remat=full")
    stream = Collective("all-reduce", ("tensor",), ROWS * SEQUENCE * WIDTH)
    # The second forward all-reduce of a layer is the layer's result, which its backward does not need.
    assert found[stream] == 5 * LAYERS + 2


@pytest.mark.parametrize("layout", ["tensor=4,sequence_parallel", "data=2,tensor=4,sequence_parallel"])
def test_sequence_parallelism_is_all_gather_and_reduce_scatter_of_the_same_volume(layout: str):
    data = 2 if "data" in layout else 1
    found = program(layout)
    stream = ROWS * SEQUENCE * WIDTH // data
    tensor = Counter({key: n for key, n in found.items() if key.axes == ("tensor",)})
    scales = (2 * LAYERS + 1) * WIDTH
    assert tensor[Collective("all-gather", ("tensor",), stream)] == 4 * LAYERS + 2
    assert tensor[Collective("reduce-scatter", ("tensor",), stream)] == 4 * LAYERS + 2
    assert tensor[Collective("all-reduce", ("tensor",), ROWS * SEQUENCE // data)] == 3
    # What is new: each device normalises its own tokens, so the norm scales' gradients are summed, once per step.
    reduced = sum(key.elements * n for key, n in found.items() if key.kind == "all-reduce" and "tensor" in key.axes)
    assert reduced == 3 * ROWS * SEQUENCE // data + scales


def test_everything_together_adds_up():
    """data 2 x fsdp 2 x tensor 2 with sequence parallelism: each axis carries its own share and no more."""
    found = program("data=2,fsdp=2,tensor=2,sequence_parallel")
    p, k = parameters()
    scales = (2 * LAYERS + 1) * WIDTH
    split = (p - scales) // 2  # all but the norm scales is split over tensor
    stream = ROWS // 4 * SEQUENCE * WIDTH
    assert total(found, "all-gather", "fsdp") == k // 2 * 2 + (split - k // 2) + scales
    assert total(found, "reduce-scatter", "fsdp") == split + scales
    assert total(found, "all-gather", "tensor") == (4 * LAYERS + 2) * stream
    assert total(found, "reduce-scatter", "tensor") == (4 * LAYERS + 2) * stream
    assert total(found, "all-reduce", "data") == split // 2
    assert total(found, "all-reduce", "data", "tensor") == scales // 2
    only(
        found,
        ("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",)),
        ("all-gather", ("tensor",)), ("reduce-scatter", ("tensor",)),
        ("all-reduce", ("tensor",)), ("all-reduce", ("data",)), ("all-reduce", ("data", "tensor")),
    )  # fmt: skip


def test_the_reader_sees_loops_groups_and_tuples():
    mesh = sl.Layout(data=2, tensor=4).mesh()
    text = """
%c (p: (s32[], f32[4,3])) -> pred[] {
  ROOT %lt = pred[] fusion(%p), kind=kLoop
}
%body.1 (p: (s32[], f32[4,3])) -> (s32[], f32[4,3]) {
  %a = (f32[4,3]{1,0}, f32[5]{0}) all-reduce(%x, %y), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%sum
}
ENTRY %main.2 (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4,3]) while(%t), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"7"}}
  %g = f32[8]{0} reduce-scatter(%w), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%sum
}"""
    assert collectives(text, mesh) == {
        Collective("all-reduce", ("data",), 12): 7,
        Collective("all-reduce", ("data",), 5): 7,
        Collective("reduce-scatter", ("tensor",), 32): 1,
    }
    named = text.replace("{{0,1,2,3},{4,5,6,7}}", "mesh['a'=2,'b'=4] {'b'}")
    assert collectives(named, mesh) == collectives(text, mesh)
    with pytest.raises(AssertionError, match="unknown syntax"):
        collectives(text.replace("{{0,1,2,3},{4,5,6,7}}", "@mesh[2]"), mesh)
    with pytest.raises(AssertionError, match="unknown length"):
        collectives(text.replace("known_trip_count", "other"), mesh)
