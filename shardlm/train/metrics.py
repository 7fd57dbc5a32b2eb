"""Model FLOPs, and what fraction of the hardware's peak a step reaches."""

from dataclasses import replace
from typing import Any

from shardlm.inspect.hardware import PEAK_BF16
from shardlm.models.config import LearnedPositions, TransformerConfig
from shardlm.models.transformer import count_parameters


def model_flops_per_token(config: TransformerConfig, sequence: int) -> float:
    """FLOPs of one training token, forward and backward, recomputation not counted: 6 N + 12 L H D S.

    With adapters 6 of their parameters and 4 N of the rest, which backward passes through and does not differentiate.

    N are the parameters that multiply (not the embedding's lookup nor learned positions), L layers, H heads, D
    head_dim, S the sequence, full though attention is causal: the convention of arXiv:2204.02311, appendix B.
    """
    frozen = replace(config, lora=None)
    multiplied = count_parameters(frozen)
    adapters = count_parameters(config) - multiplied
    if not config.tied:
        multiplied -= config.vocab_size * config.d_model
    if isinstance(config.positions, LearnedPositions):
        multiplied -= config.positions.length * config.d_model
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * sequence
    return (6.0 if config.lora is None else 4.0) * multiplied + 6.0 * adapters + attention


def peak_flops(device: Any, dtype: str) -> float | None:
    """The device's peak FLOP/s when computing in `dtype`; None where it is not known (CPUs, other dtypes)."""
    if dtype != "bfloat16":
        return None
    kinds = [kind for kind in PEAK_BF16 if device.device_kind.startswith(kind)]
    return PEAK_BF16[max(kinds, key=len)] if kinds else None
