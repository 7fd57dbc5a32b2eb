"""Mistral: https://huggingface.co/docs/transformers/model_doc/mistral. Llama with a sliding window in every layer."""

from typing import Any

from shardlm.hub.decoder import DECODER, NORM_BEFORE, fields
from shardlm.hub.family import Family
from shardlm.hub.fields import Fields, activation
from shardlm.hub.kinds import SIZE, TEXTS
from shardlm.hub.rope import FULL, SLIDING, one_window, read_rope, rope_of, write_rope
from shardlm.models.config import TransformerConfig


def read(file: Fields, ours: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions and the window, which is 4096 where the file does not say; null is none."""
    window = file.take("sliding_window", 4096, SIZE, null=True)
    types = file.take("layer_types", None, TEXTS, null=True)
    kind = FULL if window is None else SLIDING
    if types is not None and set(types) != {kind}:  # transformers' Mistral does not read them
        file.refuse("layer_types", f"a mistral here has layers of one kind, {kind} with sliding_window={window}")
    return {"positions": read_rope(file), "attention.windows": (window,)}


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
