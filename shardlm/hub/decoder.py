"""What Llama and all that are named after it have in common: fields of config.json, and names of tensors."""

from shardlm.hub.fields import Field
from shardlm.hub.kinds import FLAG, LAYERS, NUMBER, SIZE, SPREAD
from shardlm.hub.table import Row

_ATTENTION = "model.layers.{layer}.self_attn."
_MLP = "model.layers.{layer}.mlp."

# Linear layers are stored (out, in), ours are [in, out].
DECODER = (
    Row("embedding/table", "model.embed_tokens.weight", "vocab embed"),
    Row("layers/attention_norm/scale", "model.layers.{layer}.input_layernorm.weight", "embed"),
    Row("layers/attention/query/kernel", f"{_ATTENTION}q_proj.weight", "(head head_dim) embed"),
    Row("layers/attention/query/bias", f"{_ATTENTION}q_proj.bias", "(head head_dim)"),
    Row("layers/attention/key/kernel", f"{_ATTENTION}k_proj.weight", "(kv_head head_dim) embed"),
    Row("layers/attention/key/bias", f"{_ATTENTION}k_proj.bias", "(kv_head head_dim)"),
    Row("layers/attention/value/kernel", f"{_ATTENTION}v_proj.weight", "(kv_head head_dim) embed"),
    Row("layers/attention/value/bias", f"{_ATTENTION}v_proj.bias", "(kv_head head_dim)"),
    Row("layers/attention/query_norm/scale", f"{_ATTENTION}q_norm.weight", "head_dim"),
    Row("layers/attention/key_norm/scale", f"{_ATTENTION}k_norm.weight", "head_dim"),
    Row("layers/attention/output/kernel", f"{_ATTENTION}o_proj.weight", "embed (head head_dim)"),
    Row("layers/attention/output/bias", f"{_ATTENTION}o_proj.bias", "embed"),
    Row("layers/mlp/gate/kernel", f"{_MLP}gate_proj.weight", "mlp embed"),
    Row("layers/mlp/gate/bias", f"{_MLP}gate_proj.bias", "mlp"),
    Row("layers/mlp/up/kernel", f"{_MLP}up_proj.weight", "mlp embed"),
    Row("layers/mlp/up/bias", f"{_MLP}up_proj.bias", "mlp"),
    Row("layers/mlp/down/kernel", f"{_MLP}down_proj.weight", "embed mlp"),
    Row("layers/mlp/down/bias", f"{_MLP}down_proj.bias", "embed"),
    Row("final_norm/scale", "model.norm.weight", "embed"),
    Row("head/table", "lm_head.weight", "vocab embed"),
)

# One norm in front of each branch; or, Gemma 2 and 3, one after each too, and then the same name means another norm.
NORM_BEFORE = (Row("layers/mlp_norm/scale", "model.layers.{layer}.post_attention_layernorm.weight", "embed"),)
NORMS_AROUND = (
    Row("layers/attention_after_norm/scale", "model.layers.{layer}.post_attention_layernorm.weight", "embed"),
    Row("layers/mlp_norm/scale", "model.layers.{layer}.pre_feedforward_layernorm.weight", "embed"),
    Row("layers/mlp_after_norm/scale", "model.layers.{layer}.post_feedforward_layernorm.weight", "embed"),
)

ATTENTION_BIAS = Field("attention_bias", ("attention.bias", "attention.output_bias"), FLAG, False)
SIZES = (
    Field("vocab_size", "vocab_size", SIZE),
    Field("hidden_size", "d_model", SIZE),
    Field("intermediate_size", "d_ff", SIZE),
    Field("num_hidden_layers", "num_layers", LAYERS),
    Field("num_attention_heads", "num_heads", SIZE),
    Field("initializer_range", "init_std", SPREAD, 0.02),
    Field("rms_norm_eps", "norm.epsilon", NUMBER, 1e-6),
)


def fields(
    *more: Field, tied: bool = False, head_dim: int | None = None, kv_heads: int | None = None, null: bool = True
) -> tuple[Field, ...]:
    """`SIZES`, those whose value where absent differs from family to family, and `more`.

    Args:
        more: of this family.
        tied: whether the head is the embedding table where the file does not say.
        head_dim: where the file does not say; None is `hidden_size // num_attention_heads`.
        kv_heads: where the file does not say; None is `num_attention_heads`.
        null: whether a file may have null for `kv_heads`, which is `num_attention_heads` then.
    """
    return (
        *SIZES,
        Field("num_key_value_heads", "num_kv_heads", SIZE, kv_heads, null=null),
        Field("head_dim", "head_dim", SIZE, head_dim),
        Field("tie_word_embeddings", "tied", FLAG, tied),
        *more,
    )
