"""Model FLOPs are those of the products, counted by hand; a device's peak is found by its name."""

from types import SimpleNamespace

import jax
import pytest

import shardlm as sl
from shardlm.train.metrics import model_flops_per_token, peak_flops

LAYERS, EMBED, HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCABULARY, SEQUENCE = 3, 16, 4, 2, 6, 24, 67, 10


def make_config(**changes) -> sl.TransformerConfig:
    sizes = {
        "vocab_size": VOCABULARY, "num_layers": LAYERS, "d_model": EMBED, "num_heads": HEADS, "num_kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM, "d_ff": WIDTH, "vocab_multiple": 8,
    }  # fmt: skip
    return sl.TransformerConfig(**(sizes | changes))


def multiply_adds_of_attention() -> int:
    """Per token of a row that is not masked: scores q k^T and their product with v."""
    return LAYERS * HEADS * 2 * HEAD_DIM * SEQUENCE


def multiply_adds_of_weights(matrices_of_mlp: int) -> int:
    """Per token: q, k, v, output, the MLP's matrices, the head without its padding."""
    attention = EMBED * (HEADS + 2 * KV_HEADS) * HEAD_DIM + HEADS * HEAD_DIM * EMBED
    return LAYERS * (attention + matrices_of_mlp * EMBED * WIDTH) + EMBED * VOCABULARY


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_of_the_products_three_times(tied):
    """A multiply-add is two FLOPs; backward has two products for each of the forward's. Norm scales multiply, too."""
    scales = EMBED * (2 * LAYERS + 1)
    expected = 3 * 2 * (multiply_adds_of_weights(3) + scales + multiply_adds_of_attention())
    assert model_flops_per_token(make_config(tied=tied), SEQUENCE) == expected


def test_learned_positions_are_looked_up_and_not_multiplied():
    plain = {"norm": sl.Norm(kind="layer"), "mlp": sl.MLP(gated=False), "tied": True}
    learned = make_config(positions=sl.LearnedPositions(length=50), **plain)
    assert model_flops_per_token(learned, SEQUENCE) == model_flops_per_token(make_config(**plain), SEQUENCE)
    vectors = 2 * EMBED * (2 * LAYERS + 1)  # scale and bias
    expected = 6 * (multiply_adds_of_weights(2) + vectors + multiply_adds_of_attention())
    assert model_flops_per_token(learned, SEQUENCE) == expected


def test_padding_and_recomputation_are_not_counted():
    assert model_flops_per_token(make_config(vocab_multiple=128), 7) == model_flops_per_token(make_config(), 7)


def test_llama_3_8b_has_six_flops_for_each_parameter_and_more_for_attention():
    """8.03e9 parameters, 0.53e9 of them the embedding; 12 x 32 x 32 x 128 x 8192 for attention."""
    flops = model_flops_per_token(sl.presets.llama3_8b(), 8192)
    assert flops == pytest.approx(6 * (8.0303e9 - 0.5253e9) + 12.885e9, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA B200", 2250e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_the_peak_is_that_of_the_longest_name_that_fits(kind, expected):
    assert peak_flops(SimpleNamespace(device_kind=kind), "bfloat16") == expected


def test_the_peak_is_not_known_for_cpus_and_other_dtypes():
    assert peak_flops(jax.devices()[0], "bfloat16") is None
    for dtype in ("float32", "float64", "float16"):
        assert peak_flops(SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3"), dtype) is None


def test_frozen_weights_have_no_gradient_to_compute():
    """Forward and the gradient of their input, two of three products; adapters have all three."""
    config, adapters = make_config(), LAYERS * 5 * (EMBED + HEADS * HEAD_DIM + EMBED + WIDTH)
    lora = sl.Lora(rank=5, targets=("query", "up"))
    scales = EMBED * (2 * LAYERS + 1)
    expected = 4 * (multiply_adds_of_weights(3) + scales) + 6 * multiply_adds_of_attention() + 6 * adapters
    assert model_flops_per_token(make_config(lora=lora), SEQUENCE) == expected
    assert model_flops_per_token(make_config(lora=lora), SEQUENCE) < model_flops_per_token(config, SEQUENCE)
