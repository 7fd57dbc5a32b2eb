"""Mistral: https://huggingface.co/docs/transformers/model_doc/mistral. Llama with a sliding window in every layer."""

from typing import Any

from shardlm.hub.decoder import DECODER, NORM_BEFORE, fields
from shardlm.hub.family import Family
from shardlm.hub.fields import Fields, activation
from shardlm.hub.rope import one_window, read_rope, rope_of, write_rope
from shardlm.models.config import TransformerConfig


def read(file: Fields, ours: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions and the window, which is 4096 where the file does not say; null is none."""
    return {"positions": read_rope(file), "attention.windows": (file.take("sliding_window", 4096),)}


def write(config: TransformerConfig) -> dict[str, Any]:
    """Rotary positions and the window."""
    return write_rope(rope_of(config)) | {"sliding_window": one_window(config.windows)}


FAMILY = Family(
    model_type="mistral",
    architectures=("MistralForCausalLM", "MistralModel"),
    fields=fields(activation("hidden_act", default="silu"), kv_heads=8),
    read=read,
    write=write,
    rows=DECODER + NORM_BEFORE,
)
