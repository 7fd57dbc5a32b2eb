"""Llama: https://huggingface.co/docs/transformers/model_doc/llama, and what is built like it under its name."""

from typing import Any

from shardlm.hub.decoder import ATTENTION_BIAS, DECODER, NORM_BEFORE, fields
from shardlm.hub.family import Family
from shardlm.hub.fields import Field, Fields, activation
from shardlm.hub.kinds import FLAG
from shardlm.hub.rope import read_rope, rope_of, trained_length, write_rope
from shardlm.models.config import TransformerConfig


def read(file: Fields, ours: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions."""
    return {"positions": read_rope(file)}


def write(config: TransformerConfig) -> dict[str, Any]:
    """Rotary positions, and the length that their scaling was made for."""
    length = trained_length(rope_of(config))
    return write_rope(rope_of(config)) | ({} if length is None else {"max_position_embeddings": length})


FAMILY = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM", "LlamaModel", "LLaMAForCausalLM"),
    fields=fields(activation("hidden_act", default="silu"), ATTENTION_BIAS, Field("mlp_bias", "mlp.bias", FLAG, False)),
    read=read,
    write=write,
    rows=DECODER + NORM_BEFORE,
    even_width=True,
)
