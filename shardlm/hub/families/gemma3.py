"""Gemma 3, its text model: https://huggingface.co/docs/transformers/model_doc/gemma3. Norms on queries and keys, and
rotary positions of their own in layers with a window."""

from typing import Any

from shardlm.hub.decoder import ATTENTION_BIAS, DECODER, NORMS_AROUND, fields
from shardlm.hub.families.gemma import GEMMA, embedding_scale
from shardlm.hub.families.gemma2 import LOGIT_CAP, QUERY_SCALE, WINDOW, write_windows
from shardlm.hub.family import Family
from shardlm.hub.fields import Field, Fields
from shardlm.hub.kinds import NUMBER, SIZE
from shardlm.hub.rope import FULL, SLIDING, read_layer_types, read_two_ropes, rope_of, write_two_ropes
from shardlm.models.config import TransformerConfig


def read(file: Fields, ours: dict[str, Any]) -> dict[str, Any]:
    """Both kinds of rotary positions, windows and the scale of the embeddings."""
    window, layers = file.take("sliding_window", WINDOW, SIZE, null=True), ours["num_layers"]
    pattern = file.take("sliding_window_pattern", 6, SIZE)
    if file.take("_sliding_window_pattern", pattern, SIZE) != pattern and "layer_types" not in file.values:
        file.refuse("_sliding_window_pattern", f"transformers reads sliding_window_pattern, which is {pattern}")
    types = tuple(SLIDING if (i + 1) % pattern else FULL for i in range(layers or 0))
    windows = read_layer_types(file, window, types, layers)
    rope, local = read_two_ropes(file, 1_000_000.0, 10_000.0)
    found = {"positions": rope, "local_positions": None if windows == (None,) else local}
    return found | {"attention.windows": windows} | embedding_scale(ours)


def write(config: TransformerConfig) -> dict[str, Any]:
    """Both kinds of rotary positions, and windows."""
    rope = rope_of(config)
    return write_two_ropes(rope, config.local_positions or rope) | write_windows(config.windows)


FAMILY = Family(
    model_type="gemma3_text",
    architectures=("Gemma3ForCausalLM", "Gemma3TextModel"),
    fields=fields(
        ATTENTION_BIAS,
        QUERY_SCALE,
        Field(LOGIT_CAP, "logit_soft_cap", NUMBER, None),
        tied=True,
        head_dim=256,
        kv_heads=4,
        null=False,
    ),
    fixed=GEMMA | {"norm.after": True, "attention.qk_norm": True},
    must={
        "hidden_activation": ("gelu_pytorch_tanh", None),
        "hidden_act": ("gelu_pytorch_tanh", None),
        "attn_logit_softcapping": (None,),  # transformers ignores it, so what a file with one means is unclear
    },
    read=read,
    write=write,
    rows=DECODER + NORMS_AROUND,
    even_width=True,
)
