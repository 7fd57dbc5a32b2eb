"""The tiny models that verification is tested on."""

import optax

import shardlm as sl

OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, eps=1e-4))
LLAMA = sl.TransformerConfig(
    vocab_size=67, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, d_ff=24, vocab_multiple=8
)
GPT = sl.TransformerConfig(
    vocab_size=67, num_layers=2, d_model=16, num_heads=4, d_ff=24, vocab_multiple=8, tied=True, dropout=0.2,
    attention=sl.Attention(bias=True, output_bias=True), mlp=sl.MLP(gated=False, activation="gelu_tanh", bias=True),
    norm=sl.Norm(kind="layer"), positions=sl.LearnedPositions(length=12),
)  # fmt: skip
CONFIGS = {"llama": LLAMA, "gpt": GPT}
