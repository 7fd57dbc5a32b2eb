"""The model that a benchmark runs, from the command line, and a batch for it."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

import shardlm as sl

# Option, field of TransformerConfig, help.
_SIZES = (
    ("layers", "num_layers", "number of layers"),
    ("d-model", "d_model", "width of the residual stream"),
    ("heads", "num_heads", "query heads"),
    ("kv-heads", "num_kv_heads", "key/value heads"),
    ("head-dim", "head_dim", "width of a head"),
    ("d-ff", "d_ff", "width of the feed-forward branch"),
    ("vocabulary", "vocab_size", "number of token ids"),
)


def add_sizes(parser: argparse.ArgumentParser, leave_out: tuple[str, ...] = ()) -> None:
    """Give a command the options of the model's sizes, all None by default, but those in `leave_out`."""
    for option, field, text in _SIZES:
        if option not in leave_out:
            parser.add_argument(f"--{option}", dest=field, type=int, help=text)


def given_sizes(options: argparse.Namespace) -> dict[str, Any]:
    """The sizes that the command line gives, by field of `TransformerConfig`."""
    values = {field: getattr(options, field, None) for _, field, _ in _SIZES}
    return {field: value for field, value in values.items() if value is not None}


def as_arguments(sizes: Mapping[str, int]) -> list[str]:
    """The options of a command line that gives `sizes`."""
    return [part for option, field, _ in _SIZES if field in sizes for part in (f"--{option}", str(sizes[field]))]


def describe(config: sl.TransformerConfig) -> str:
    """The model in one line."""
    c = config
    return (
        f"{c.num_layers} layers, d_model {c.d_model}, {c.num_heads} heads ({c.num_kv_heads} kv) of {c.head_dim}, "
        f"d_ff {c.d_ff}, vocabulary {c.vocab_size}, {c.dtype}, {c.attention.implementation} attention"
    )


def random_batch(config: sl.TransformerConfig, batch_size: int, sequence: int) -> dict[str, Any]:
    """Tokens and targets int32[batch, sequence], as NumPy arrays."""
    random = np.random.default_rng(0)
    shape = (batch_size, sequence)
    return {name: random.integers(0, config.vocab_size, shape, np.int32) for name in ("tokens", "targets")}


def differences_from_llama(config: sl.TransformerConfig) -> list[str]:
    """What `config` has that a plain Llama (the defaults of `TransformerConfig`) has not; sizes and dtypes left out."""
    c = config
    free = {field for _, field, _ in _SIZES} | {"dtype", "param_dtype", "vocab_multiple"}
    plain = sl.TransformerConfig(
        **{name: getattr(c, name) for name in free},
        attention=sl.Attention(implementation=c.attention.implementation),
        norm=sl.Norm(epsilon=c.norm.epsilon),
        positions=sl.Rope(theta=c.positions.theta if isinstance(c.positions, sl.Rope) else 10_000.0),
    )
    names = [field.name for field in dataclasses.fields(c)]
    return [f"{name}={getattr(c, name)}" for name in names if getattr(c, name) != getattr(plain, name)]
