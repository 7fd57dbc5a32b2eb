"""A configuration fills its defaults, refuses what it cannot be, and survives being written down."""

import dataclasses
import json

import pytest

from shardlm import (
    MLP,
    Attention,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    Lora,
    Norm,
    Rope,
    TransformerConfig,
)

SIZES = {"vocab_size": 67, "num_layers": 3, "d_model": 12, "num_heads": 6}
EVERYTHING = TransformerConfig(
    num_kv_heads=2, head_dim=4, d_ff=20, tied=True, logit_soft_cap=30.0, embedding_scale=3.5, dropout=0.1, init_std=0.1,
    attention=Attention(bias=True, output_bias=True, qk_norm=True, scale=0.5, soft_cap=50.0, windows=(5, None)),
    mlp=MLP(gated=False, activation="gelu_tanh", bias=True),
    norm=Norm(kind="layer", epsilon=1e-5, one_plus_scale=True, after=True),
    positions=Rope(theta=5e5, scaling=Llama3Scaling(factor=32.0)),
    local_positions=Rope(theta=2e4, scaling=LinearScaling(factor=8.0)),
    lora=Lora(rank=3, alpha=7.0, targets=("up", "key")), dtype="bfloat16", param_dtype="float64", vocab_multiple=16,
    origin="{}",
    **SIZES,
)  # fmt: skip


def config(**changes):
    return TransformerConfig(**(SIZES | changes))


def test_the_defaults_are_those_of_llama():
    c = config()
    assert (c.num_kv_heads, c.head_dim, c.d_ff) == (6, 2, 48)
    assert c.attention == Attention(
        bias=False, output_bias=False, qk_norm=False, scale=None, soft_cap=None, windows=(None,), implementation="xla"
    )
    assert c.mlp == MLP(gated=True, activation="silu", bias=False)
    assert c.norm == Norm(kind="rms", epsilon=1e-6, one_plus_scale=False, after=False)
    assert c.positions == Rope(theta=10_000.0, scaling=None)
    assert c.local_positions is c.embedding_scale is c.logit_soft_cap is None
    assert (c.tied, c.dropout, c.init_std) == (False, 0.0, 0.02)
    assert (c.dtype, c.param_dtype, c.vocab_multiple) == ("float32", "float32", 128)


def test_what_is_given_is_kept():
    c = config(num_kv_heads=3, head_dim=10, d_ff=31)
    assert (c.num_kv_heads, c.head_dim, c.d_ff) == (3, 10, 31)
    assert config(d_model=13, head_dim=10).head_dim == 10  # need not divide once it is given
    assert config(head_dim=3, positions=LearnedPositions(length=5)).head_dim == 3  # only RoPE needs pairs


@pytest.mark.parametrize(("vocab", "multiple", "rows"), [(67, 128, 128), (128, 128, 128), (129, 128, 256), (67, 1, 67)])
def test_the_vocabulary_is_padded_up_to_a_multiple(vocab, multiple, rows):
    assert config(vocab_size=vocab, vocab_multiple=multiple).padded_vocab_size == rows


def test_the_pattern_of_windows_repeats_over_the_layers():
    assert config().windows == (None,) * 3
    assert config(attention=Attention(windows=(5, None))).windows == (5, None, 5)
    assert config(attention=Attention(windows=(5, 5, 5, None))).windows == (5, 5, 5)


def test_learned_positions_alone_bound_the_sequence():
    assert config().max_sequence is None
    assert config(positions=LearnedPositions(length=5)).max_sequence == 5


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        (Norm, {"kind": "batch"}, r"Norm: kind='batch'; it is one of 'rms', 'layer'"),
        (MLP, {"activation": "swish"}, r"MLP: activation='swish'; it is one of silu, gelu, gelu_tanh, relu"),
        (
            Attention,
            {"implementation": "flash"},
            r"Attention: implementation='flash'; it is one of 'xla', 'chunked', 'cudnn'",
        ),
        (Attention, {"implementation": "cudnn", "soft_cap": 5.0}, r"Attention: the cudnn kernel has no soft cap: use"),
        (
            Attention,
            {"windows": ()},
            r"Attention: windows=\(\); it is a non-empty tuple of positive token counts or None",
        ),
        (Attention, {"windows": (5, 0)}, r"Attention: windows=\(5, 0\); it is a non-empty tuple"),
        (Attention, {"windows": [5, None]}, r"Attention: windows=\[5, None\]; it is a non-empty tuple"),
        (Attention, {"windows": 5}, r"Attention: windows=5; it is a non-empty tuple"),
        (Attention, {"soft_cap": 0.0}, r"Attention: soft_cap=0.0; it is positive, or None"),
        (Attention, {"scale": -1.0}, r"Attention: scale=-1.0; it is positive, or None"),
        (Norm, {"epsilon": -1e-6}, r"Norm: epsilon=-1e-06; it is positive$"),
        (Rope, {"theta": 0.0}, r"Rope: theta=0.0; it is positive$"),
        (LinearScaling, {"factor": 0.0}, r"LinearScaling: factor=0.0; it is positive$"),
        (
            Llama3Scaling,
            {"low_frequency_factor": 4.0},
            r"Llama3Scaling: low_frequency_factor=4.0 is not below high_frequency_factor=4.0$",
        ),
        (LearnedPositions, {"length": 0}, r"LearnedPositions: length=0; it is a positive integer$"),
    ],
)
def test_a_part_names_what_is_wrong_and_what_is_legal(part, fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        part(**fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: 0}, f"{name}=0; it is a positive integer$") for name in (*SIZES, "vocab_multiple")),
        ({"num_layers": True}, "num_layers=True; it is a positive integer$"),
        ({"d_model": 12.0}, "d_model=12.0; it is a positive integer$"),
        ({"num_kv_heads": 0}, "num_kv_heads=0; it is a positive integer, or None for 6$"),
        ({"head_dim": -2}, "head_dim=-2; it is a positive integer, or None for 2$"),
        ({"d_ff": 1.5}, "d_ff=1.5; it is a positive integer, or None for 48$"),
        (
            {"d_model": 19},
            "head_dim is not given and d_model=19 does not divide by num_heads=6: give head_dim, or .* them$",
        ),
        ({"num_kv_heads": 4}, r"num_kv_heads=4 does not divide num_heads=6: use \[1, 2, 3, 6\]$"),
        ({"num_kv_heads": 12}, r"num_kv_heads=12 does not divide num_heads=6: use \[1, 2, 3, 6\]$"),
        ({"head_dim": 3}, "head_dim=3 is odd, and RoPE rotates pairs: make it even$"),
        (
            {"local_positions": Rope(), "positions": LearnedPositions(length=5), "attention": Attention(windows=(3,))},
            "local_positions needs RoPE in positions too$",
        ),
        (
            {"local_positions": Rope()},
            "local_positions is for layers with a sliding window, and attention.windows has none$",
        ),
        ({"dropout": 1.0}, "dropout=1.0; it is at least 0 and below 1$"),
        ({"dropout": -0.1}, "dropout=-0.1; it is at least 0 and below 1$"),
        ({"dropout": float("nan")}, "dropout=nan; it is at least 0 and below 1$"),
        ({"logit_soft_cap": 0.0}, "logit_soft_cap=0.0; it is positive, or None$"),
        ({"embedding_scale": -1.0}, "embedding_scale=-1.0; it is positive, or None$"),
        ({"dtype": "int8"}, "dtype='int8'; it is one of float32, bfloat16, float16, float64$"),
        ({"param_dtype": "fp8"}, "param_dtype='fp8'; it is one of float32, bfloat16, float16, float64$"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_a_configuration_names_what_is_wrong_and_what_is_legal(changes, message):
    with pytest.raises(ValueError, match=f"^TransformerConfig: {message}"):
        config(**changes)


def test_one_error_lists_everything_that_is_wrong():
    with pytest.raises(ValueError, match="vocab_size=0; .*; num_layers=-1; "):
        config(vocab_size=0, num_layers=-1)
    with pytest.raises(
        ValueError, match="num_kv_heads=4 does not divide .*; head_dim=3 is odd.*; dropout=2; .*; dtype='x'; "
    ):
        config(num_kv_heads=4, head_dim=3, dropout=2, dtype="x")
    with pytest.raises(ValueError, match=r"implementation='flash'; .*; windows=\(\); .*; soft_cap=-1; "):
        Attention(implementation="flash", windows=(), soft_cap=-1)


def test_a_configuration_cannot_be_changed_and_is_checked_when_varied():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().num_layers = 4
    assert dataclasses.replace(config(), num_layers=4).num_layers == 4
    with pytest.raises(ValueError, match="num_layers=0"):
        dataclasses.replace(config(), num_layers=0)
    with pytest.raises(TypeError, match="positional"):
        TransformerConfig(67, 3, 12, 6)


@pytest.mark.parametrize(
    "c", [config(), EVERYTHING, config(positions=LearnedPositions(length=5))], ids=["llama", "all", "gpt-2"]
)
def test_a_configuration_survives_json(c):
    read = TransformerConfig.from_dict(json.loads(json.dumps(c.to_dict())))
    assert read == c and hash(read) == hash(c) and read.origin == c.origin
    assert read.attention.windows == c.attention.windows and isinstance(read.attention.windows, tuple)
    assert read != dataclasses.replace(c, num_layers=4)


def test_every_field_is_among_what_was_written():
    """The configuration above leaves no default standing, so a field lost on the way would have shown."""

    def check(part, plain):
        for field in dataclasses.fields(part):
            value, default = getattr(part, field.name), getattr(plain, field.name)
            if dataclasses.is_dataclass(value) and type(value) is type(default):
                check(value, default)
            elif field.name not in {*SIZES, "implementation"}:  # no default; and the other one has no soft cap
                assert value != default, field.name

    check(EVERYTHING, config(attention=Attention(windows=(3,)), local_positions=Rope()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d | {"colour": 1}, r"written by another version: unknown \['colour'\]"),
        (lambda d: d | {"norm": d["norm"] | {"colour": 1}}, r"written by another version: unknown \['colour'\]"),
        (
            lambda d: d | {"norm": d["norm"] | {"type": "BatchNorm"}},
            r"written by another version: unknown \['BatchNorm'\]",
        ),
        (lambda d: {k: v for k, v in d.items() if k != "type"}, r"written by another version: unknown \['None'\]"),
        (lambda d: d["norm"], "these values describe a Norm, not a TransformerConfig"),
        (lambda d: d | {"dropout": 1.0}, "dropout=1.0; it is at least 0 and below 1"),
    ],
)
def test_values_that_are_no_configuration(change, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_dict(change(config().to_dict()))


def test_reading_leaves_the_values_as_they_were():
    values = EVERYTHING.to_dict()
    TransformerConfig.from_dict(values)
    assert values == EVERYTHING.to_dict()
