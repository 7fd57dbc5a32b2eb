"""Qwen 2 and 2.5: https://huggingface.co/docs/transformers/model_doc/qwen2. Biases on queries, keys and values; sliding
windows, where switched on, from some layer on."""

from typing import Any

from shardlm.hub.decoder import DECODER, NORM_BEFORE, fields
from shardlm.hub.family import Family
from shardlm.hub.fields import Fields, activation
from shardlm.hub.kinds import FLAG, INDEX, SIZE
from shardlm.hub.rope import FULL, SLIDING, layer_types, one_window, read_layer_types, read_rope, rope_of, write_rope
from shardlm.models.config import TransformerConfig


def read(file: Fields, ours: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions and windows."""
    window, layers = file.take("sliding_window", 4096, SIZE, null=True), ours["num_layers"]
    first = file.take("max_window_layers", 28, INDEX, null=True)
    switch = "sliding_window"
    if not file.take("use_sliding_window", False, FLAG, null=True):
        window, switch = None, "use_sliding_window"
    if window is not None and first is None and "layer_types" not in file.values:
        file.refuse("max_window_layers", "use_sliding_window needs it")
    first = layers if first is None else first
    types = tuple(SLIDING if window is not None and i >= first else FULL for i in range(layers or 0))
    return {"positions": read_rope(file), "attention.windows": read_layer_types(file, window, types, layers, switch)}


def write(config: TransformerConfig) -> dict[str, Any]:
    """Rotary positions and windows."""
    types, window = layer_types(config.windows), one_window(config.windows)
    return write_rope(rope_of(config)) | {
        "layer_types": types,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": types.index(SLIDING) if SLIDING in types else len(types),
    }


FAMILY = Family(
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM", "Qwen2Model"),
    fields=fields(activation("hidden_act", default="silu"), kv_heads=32),
    fixed={"attention.bias": True},
    read=read,
    write=write,
    rows=DECODER + NORM_BEFORE,
)
