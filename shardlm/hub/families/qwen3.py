"""Qwen 3: https://huggingface.co/docs/transformers/model_doc/qwen3. Norms on queries and keys, windows as Qwen 2."""

from shardlm.hub.decoder import ATTENTION_BIAS, DECODER, NORM_BEFORE, fields
from shardlm.hub.families import qwen2
from shardlm.hub.family import Family
from shardlm.hub.fields import activation

FAMILY = Family(
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM", "Qwen3Model"),
    fields=fields(activation("hidden_act", default="silu"), ATTENTION_BIAS, head_dim=128, kv_heads=32),
    fixed={"attention.qk_norm": True},
    read=qwen2.read,
    write=qwen2.write,
    rows=DECODER + NORM_BEFORE,
)
