"""GPT-2: https://huggingface.co/docs/transformers/model_doc/gpt2. Its layers are stored (in, out), as ours are, with
queries, keys and values side by side in one."""

from typing import Any

from shardlm.hub.family import Family
from shardlm.hub.fields import Field, Fields, activation
from shardlm.hub.kinds import FLAG, LAYERS, NUMBER, SIZE, SPREAD
from shardlm.hub.table import Row
from shardlm.models.config import LearnedPositions, TransformerConfig

_LAYER = "transformer.h.{layer}."
_QKV = f"{_LAYER}attn.c_attn."

ROWS = (
    Row("embedding/table", "transformer.wte.weight", "vocab embed"),
    Row("positions/table", "transformer.wpe.weight", "position embed"),
    Row("layers/attention_norm/scale", f"{_LAYER}ln_1.weight", "embed"),
    Row("layers/attention_norm/bias", f"{_LAYER}ln_1.bias", "embed"),
    Row("layers/attention/query/kernel", f"{_QKV}weight", "embed (head head_dim)", part=(0, 3)),
    Row("layers/attention/key/kernel", f"{_QKV}weight", "embed (kv_head head_dim)", part=(1, 3)),
    Row("layers/attention/value/kernel", f"{_QKV}weight", "embed (kv_head head_dim)", part=(2, 3)),
    Row("layers/attention/query/bias", f"{_QKV}bias", "(head head_dim)", part=(0, 3)),
    Row("layers/attention/key/bias", f"{_QKV}bias", "(kv_head head_dim)", part=(1, 3)),
    Row("layers/attention/value/bias", f"{_QKV}bias", "(kv_head head_dim)", part=(2, 3)),
    Row("layers/attention/output/kernel", f"{_LAYER}attn.c_proj.weight", "(head head_dim) embed"),
    Row("layers/attention/output/bias", f"{_LAYER}attn.c_proj.bias", "embed"),
    Row("layers/mlp_norm/scale", f"{_LAYER}ln_2.weight", "embed"),
    Row("layers/mlp_norm/bias", f"{_LAYER}ln_2.bias", "embed"),
    Row("layers/mlp/up/kernel", f"{_LAYER}mlp.c_fc.weight", "embed mlp"),
    Row("layers/mlp/up/bias", f"{_LAYER}mlp.c_fc.bias", "mlp"),
    Row("layers/mlp/down/kernel", f"{_LAYER}mlp.c_proj.weight", "mlp embed"),
    Row("layers/mlp/down/bias", f"{_LAYER}mlp.c_proj.bias", "embed"),
    Row("final_norm/scale", "transformer.ln_f.weight", "embed"),
    Row("final_norm/bias", "transformer.ln_f.bias", "embed"),
    Row("head/table", "lm_head.weight", "vocab embed"),
)


def read(file: Fields, ours: dict[str, Any]) -> dict[str, Any]:
    """Learned positions, of which n_ctx is an older name, and max_position_embeddings transformers' general one."""
    length = file.take("n_positions", file.take("max_position_embeddings", 1024, SIZE), SIZE)
    for name in ("n_ctx", "max_position_embeddings"):
        if file.take(name, length, SIZE) != length:
            file.refuse(name, f"n_positions={length} says something else")
    return {"positions": LearnedPositions(length=length)}


def write(config: TransformerConfig) -> dict[str, Any]:
    """Learned positions."""
    assert isinstance(config.positions, LearnedPositions)
    return {"n_positions": config.positions.length}


FAMILY = Family(
    model_type="gpt2",
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    fields=(
        Field("vocab_size", "vocab_size", SIZE),
        Field("n_embd", "d_model", SIZE, alias="hidden_size"),
        Field("n_inner", "d_ff", SIZE, None),
        Field("n_layer", "num_layers", LAYERS, alias="num_hidden_layers"),
        Field("n_head", "num_heads", SIZE, alias="num_attention_heads"),
        Field("initializer_range", "init_std", SPREAD, 0.02),
        Field("layer_norm_epsilon", "norm.epsilon", NUMBER, 1e-5),
        Field("tie_word_embeddings", "tied", FLAG, True),
        activation("activation_function", default="gelu_new", tanh="gelu_new"),
    ),
    fixed={
        "attention.bias": True,
        "attention.output_bias": True,
        "mlp.gated": False,
        "mlp.bias": True,
        "norm.kind": "layer",
    },
    positions=LearnedPositions,
    read=read,
    write=write,
    rows=ROWS,
    prefix="transformer.",
    buffers=(r"(^|\.)h\.\d+\.attn\.(masked_)?bias$",),
)
