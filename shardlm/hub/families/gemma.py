"""Gemma: https://huggingface.co/docs/transformers/model_doc/gemma. Norms that multiply by 1 + w, scaled embeddings."""

from typing import Any

from shardlm.hub.decoder import ATTENTION_BIAS, DECODER, NORM_BEFORE, fields
from shardlm.hub.families import llama
from shardlm.hub.family import Family
from shardlm.hub.fields import Fields
from shardlm.hub.rope import read_rope

GEMMA = {"norm.one_plus_scale": True, "mlp.activation": "gelu_tanh"}


def embedding_scale(ours: dict[str, Any]) -> dict[str, Any]:
    """Every Gemma multiplies embeddings by the square root of their width."""
    return {"embedding_scale": None if ours["d_model"] is None else ours["d_model"] ** 0.5}


def read(file: Fields, ours: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions and the scale of the embeddings."""
    return {"positions": read_rope(file)} | embedding_scale(ours)


FAMILY = Family(
    model_type="gemma",
    architectures=("GemmaForCausalLM", "GemmaModel"),
    fields=fields(ATTENTION_BIAS, tied=True, head_dim=256, kv_heads=16, null=False),
    fixed=GEMMA,
    # The released files say gelu, and mean the tanh approximation, as transformers knows; hidden_activation came later.
    must={"hidden_act": ("gelu_pytorch_tanh", "gelu"), "hidden_activation": ("gelu_pytorch_tanh", None)},
    read=read,
    write=llama.write,
    rows=DECODER + NORM_BEFORE,
)
