"""Gemma 2: https://huggingface.co/docs/transformers/model_doc/gemma2. Norms after each branch too, soft caps, a window
in every other layer, and a scale of the scores of its own."""

from typing import Any

from shardlm.hub.decoder import ATTENTION_BIAS, DECODER, NORMS_AROUND, fields
from shardlm.hub.families.gemma import GEMMA, embedding_scale
from shardlm.hub.family import Family
from shardlm.hub.fields import Field, Fields
from shardlm.hub.kinds import NUMBER, SIZE
from shardlm.hub.rope import FULL, SLIDING, layer_types, one_window, read_layer_types, read_rope, rope_of, write_rope
from shardlm.models.config import TransformerConfig


def scalar(scale: float) -> int:
    """The whole number whose -1/2th power is this scale of the scores."""
    return round(scale**-2)


QUERY_SCALE = Field("query_pre_attn_scalar", "attention.scale", NUMBER, 256, lambda value: value**-0.5, scalar)
LOGIT_CAP = "final_logit_softcapping"
WINDOW = 4096  # where a file does not say


def read(file: Fields, ours: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions, windows and the scale of the embeddings."""
    window, layers = file.take("sliding_window", WINDOW, SIZE, null=True), ours["num_layers"]
    if file.take("sliding_window_size", window, SIZE, null=True) != window:  # an older name, in the files of 9B
        file.refuse("sliding_window_size", f"sliding_window={window!r} says something else")
    types = tuple(FULL if i % 2 else SLIDING for i in range(layers or 0))
    windows = read_layer_types(file, window, types, layers)
    return {"positions": read_rope(file), "attention.windows": windows} | embedding_scale(ours)


def write(config: TransformerConfig) -> dict[str, Any]:
    """Rotary positions and windows."""
    return write_rope(rope_of(config)) | write_windows(config.windows)


def write_windows(windows: tuple[int | None, ...]) -> dict[str, Any]:
    """Windows; a width also where no layer has one, without which transformers makes no mask."""
    return {"sliding_window": one_window(windows) or WINDOW, "layer_types": layer_types(windows)}


FAMILY = Family(
    model_type="gemma2",
    architectures=("Gemma2ForCausalLM", "Gemma2Model"),
    fields=fields(
        ATTENTION_BIAS,
        QUERY_SCALE,
        Field("attn_logit_softcapping", "attention.soft_cap", NUMBER, 50.0, null=True),
        Field(LOGIT_CAP, "logit_soft_cap", NUMBER, 30.0, null=True),
        tied=True,
        head_dim=256,
        kv_heads=4,
        null=False,
    ),
    fixed=GEMMA | {"norm.after": True},
    must={"hidden_activation": ("gelu_pytorch_tanh", None), "hidden_act": ("gelu_pytorch_tanh", None)},
    read=read,
    write=write,
    rows=DECODER + NORMS_AROUND,
    even_width=True,
)
