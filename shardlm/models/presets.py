"""Well-known models as configurations: `presets.llama3_8b()`, or, a field changed, `presets.llama3_8b(num_layers=4)`.

The numbers are those of the released checkpoint's `config.json` on the Hugging Face Hub (each function names the
repository), compared with the paper; where these differ, a comment says so. Released models store parameters in float32
and compute in bfloat16. `dropout` is 0 everywhere.
"""

import difflib
from typing import Any

from shardlm.models.config import (
    MLP,
    Attention,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    Norm,
    Rope,
    TransformerConfig,
)


def names() -> list[str]:
    """The names that `get` takes, by family."""
    return [preset.__name__ for preset in _PRESETS]


def get(name: str, **changes: Any) -> TransformerConfig:
    """The preset called `name`, with the fields in `changes` replaced.

    Raises:
        ValueError: there is no such preset; the message lists them.
    """
    presets = {preset.__name__: preset for preset in _PRESETS}
    if name not in presets:
        spelled = str(name).lower().replace("-", "_").replace(".", "_")
        close = difflib.get_close_matches(spelled, presets, n=1)
        hint = f": did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"no preset is called {name!r}{hint} The presets are {', '.join(presets)}")
    return presets[name](**changes)


def _config(changes: dict[str, Any], **fields: Any) -> TransformerConfig:
    # Changes go in before defaults are filled, so that head_dim and d_ff, where not given, follow a changed d_model.
    values: dict[str, Any] = {"dtype": "bfloat16"} | fields | changes
    return TransformerConfig(**values)


def tiny(**changes: Any) -> TransformerConfig:
    """A Llama of 0.8 million parameters for the byte tokenizer, in float32: it learns text on two CPU cores (ours)."""
    sizes = {"vocab_size": 257, "num_layers": 4, "d_model": 128, "num_heads": 4, "num_kv_heads": 2, "d_ff": 384}
    return _config({"dtype": "float32", "init_std": 0.06, "vocab_multiple": 8} | changes, **sizes)


# GPT-2: Radford et al. 2019, Language Models are Unsupervised Multitask Learners, Table 2
# Biases, tanh GELU and epsilon: github.com/openai/gpt-2, src/model.py, which has no dropout; the Hub's configs say 0.1.
# The table's 117M, 345M, 762M and 1542M are not the released models' counts, which are 124M, 355M, 774M and 1558M.


def _gpt2(changes: dict[str, Any], **sizes: int) -> TransformerConfig:
    return _config(
        changes,
        vocab_size=50_257,
        attention=Attention(bias=True, output_bias=True),
        mlp=MLP(gated=False, activation="gelu_tanh", bias=True),
        norm=Norm(kind="layer", epsilon=1e-5),
        positions=LearnedPositions(length=1024),
        tied=True,
        **sizes,
    )


def gpt2(**changes: Any) -> TransformerConfig:
    """GPT-2 small, 124M: openai-community/gpt2."""
    return _gpt2(changes, num_layers=12, d_model=768, num_heads=12)


def gpt2_medium(**changes: Any) -> TransformerConfig:
    """GPT-2 medium, 355M: openai-community/gpt2-medium."""
    return _gpt2(changes, num_layers=24, d_model=1024, num_heads=16)


def gpt2_large(**changes: Any) -> TransformerConfig:
    """GPT-2 large, 774M: openai-community/gpt2-large."""
    return _gpt2(changes, num_layers=36, d_model=1280, num_heads=20)


def gpt2_xl(**changes: Any) -> TransformerConfig:
    """GPT-2 XL, 1.56B: openai-community/gpt2-xl."""
    return _gpt2(changes, num_layers=48, d_model=1600, num_heads=25)


# Llama 2: arXiv:2307.09288, section 2.2 and Table 1 (grouped queries at 70B only)


def _llama2(changes: dict[str, Any], **fields: Any) -> TransformerConfig:
    return _config(changes, vocab_size=32_000, norm=Norm(epsilon=1e-5), positions=Rope(theta=10_000.0), **fields)


def llama2_7b(**changes: Any) -> TransformerConfig:
    """Llama 2 7B: meta-llama/Llama-2-7b-hf."""
    return _llama2(changes, num_layers=32, d_model=4096, num_heads=32, d_ff=11_008)


def llama2_13b(**changes: Any) -> TransformerConfig:
    """Llama 2 13B: meta-llama/Llama-2-13b-hf."""
    return _llama2(changes, num_layers=40, d_model=5120, num_heads=40, d_ff=13_824)


def llama2_70b(**changes: Any) -> TransformerConfig:
    """Llama 2 70B: meta-llama/Llama-2-70b-hf."""
    return _llama2(changes, num_layers=80, d_model=8192, num_heads=64, num_kv_heads=8, d_ff=28_672)


# Llama 3: arXiv:2407.21783, Table 3
# The table's vocabulary of 128,000 is without special tokens; the released one has 128,256. 3.2 is not in the paper.


def _llama3(changes: dict[str, Any], scaling: Llama3Scaling | None = None, **fields: Any) -> TransformerConfig:
    rope = Rope(theta=500_000.0, scaling=scaling)
    return _config(changes, vocab_size=128_256, num_kv_heads=8, norm=Norm(epsilon=1e-5), positions=rope, **fields)


def _llama3_scaling(factor: float) -> Llama3Scaling:
    return Llama3Scaling(factor=factor, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8192)


def llama3_8b(**changes: Any) -> TransformerConfig:
    """Llama 3 8B: meta-llama/Meta-Llama-3-8B."""
    return _llama3(changes, num_layers=32, d_model=4096, num_heads=32, d_ff=14_336)


def llama3_70b(**changes: Any) -> TransformerConfig:
    """Llama 3 70B: meta-llama/Meta-Llama-3-70B."""
    return _llama3(changes, num_layers=80, d_model=8192, num_heads=64, d_ff=28_672)


def llama3_1_8b(**changes: Any) -> TransformerConfig:
    """Llama 3.1 8B, Llama 3 8B with RoPE scaled for 131,072 tokens: meta-llama/Llama-3.1-8B."""
    return _llama3(changes, _llama3_scaling(8.0), num_layers=32, d_model=4096, num_heads=32, d_ff=14_336)


def llama3_1_405b(**changes: Any) -> TransformerConfig:
    """Llama 3.1 405B: meta-llama/Llama-3.1-405B."""
    return _llama3(changes, _llama3_scaling(8.0), num_layers=126, d_model=16_384, num_heads=128, d_ff=53_248)


def llama3_2_1b(**changes: Any) -> TransformerConfig:
    """Llama 3.2 1B, head dim 64: meta-llama/Llama-3.2-1B."""
    return _llama3(changes, _llama3_scaling(32.0), num_layers=16, d_model=2048, num_heads=32, d_ff=8192, tied=True)


def llama3_2_3b(**changes: Any) -> TransformerConfig:
    """Llama 3.2 3B: meta-llama/Llama-3.2-3B."""
    return _llama3(changes, _llama3_scaling(32.0), num_layers=28, d_model=3072, num_heads=24, d_ff=8192, tied=True)


# Mistral: arXiv:2310.06825, Table 1; vocabulary size, epsilon and RoPE are as in Llama 2


def mistral_7b(**changes: Any) -> TransformerConfig:
    """Mistral 7B v0.1, a window of 4096 in every layer: mistralai/Mistral-7B-v0.1."""
    window = Attention(windows=(4096,))
    return _llama2(changes, attention=window, num_layers=32, d_model=4096, num_heads=32, num_kv_heads=8, d_ff=14_336)


# Qwen 2: arXiv:2407.10671, Table 1 and section 2.2.1 (biases on queries, keys and values)
# The table's vocabulary is the tokenizer's 151,646; the released tables have more rows. Its windows are switched off.


def _qwen2(changes: dict[str, Any], **fields: Any) -> TransformerConfig:
    common = {"vocab_size": 151_936, "norm": Norm(epsilon=1e-6), "positions": Rope(theta=1_000_000.0)}
    return _config(changes, attention=Attention(bias=True), **(common | fields))


def qwen2_0_5b(**changes: Any) -> TransformerConfig:
    """Qwen 2 0.5B: Qwen/Qwen2-0.5B."""
    return _qwen2(changes, num_layers=24, d_model=896, num_heads=14, num_kv_heads=2, d_ff=4864, tied=True)


def qwen2_1_5b(**changes: Any) -> TransformerConfig:
    """Qwen 2 1.5B: Qwen/Qwen2-1.5B."""
    return _qwen2(changes, num_layers=28, d_model=1536, num_heads=12, num_kv_heads=2, d_ff=8960, tied=True)


def qwen2_7b(**changes: Any) -> TransformerConfig:
    """Qwen 2 7B: Qwen/Qwen2-7B."""
    return _qwen2(changes, vocab_size=152_064, num_layers=28, d_model=3584, num_heads=28, num_kv_heads=4, d_ff=18_944)


# Qwen 3: arXiv:2505.09388, Table 1 and section 2 (norms on queries and keys in place of the biases)


def _qwen3(changes: dict[str, Any], **fields: Any) -> TransformerConfig:
    common = {"vocab_size": 151_936, "num_kv_heads": 8, "head_dim": 128, "norm": Norm(epsilon=1e-6)}
    return _config(changes, attention=Attention(qk_norm=True), positions=Rope(theta=1_000_000.0), **common, **fields)


def qwen3_0_6b(**changes: Any) -> TransformerConfig:
    """Qwen 3 0.6B: Qwen/Qwen3-0.6B."""
    return _qwen3(changes, num_layers=28, d_model=1024, num_heads=16, d_ff=3072, tied=True)


def qwen3_8b(**changes: Any) -> TransformerConfig:
    """Qwen 3 8B: Qwen/Qwen3-8B."""
    return _qwen3(changes, num_layers=36, d_model=4096, num_heads=32, d_ff=12_288)


# Gemma: arXiv:2403.08295, Tables 1 and 2
# The papers' feed-forward widths count gate and up together, twice the d_ff here. Their vocabulary is padded to
# 256,128; the released one has 256,000 rows.


def _gemma(changes: dict[str, Any], after: bool = False, **fields: Any) -> TransformerConfig:
    """What the three generations share: (1 + w) norms, tanh GELU gates, a tied table scaled by sqrt(d_model)."""
    norm = Norm(epsilon=1e-6, one_plus_scale=True, after=after)
    scale = changes.get("d_model", fields["d_model"]) ** 0.5
    common = {"head_dim": 256, "mlp": MLP(activation="gelu_tanh"), "norm": norm, "embedding_scale": scale, "tied": True}
    return _config(changes, **(common | fields))


def gemma_2b(**changes: Any) -> TransformerConfig:
    """Gemma 2B: google/gemma-2b."""
    return _gemma(changes, vocab_size=256_000, num_layers=18, d_model=2048, num_heads=8, num_kv_heads=1, d_ff=16_384)


def gemma_7b(**changes: Any) -> TransformerConfig:
    """Gemma 7B: google/gemma-7b."""
    return _gemma(changes, vocab_size=256_000, num_layers=28, d_model=3072, num_heads=16, num_kv_heads=16, d_ff=24_576)


# Gemma 2: arXiv:2408.00118, Tables 1 and 2 and section 2 (local layers first, norms after, soft caps)
# The 256 in the scale is query_pre_attn_scalar. The first config.json of 9B said 224; it was corrected to 256, as was
# gemma_pytorch: github.com/huggingface/transformers/issues/31891.


def _gemma2(changes: dict[str, Any], **sizes: int) -> TransformerConfig:
    attention = Attention(scale=256**-0.5, soft_cap=50.0, windows=(4096, None))
    return _gemma(changes, vocab_size=256_000, attention=attention, logit_soft_cap=30.0, after=True, **sizes)


def gemma2_2b(**changes: Any) -> TransformerConfig:
    """Gemma 2 2B: google/gemma-2-2b."""
    return _gemma2(changes, num_layers=26, d_model=2304, num_heads=8, num_kv_heads=4, d_ff=9216)


def gemma2_9b(**changes: Any) -> TransformerConfig:
    """Gemma 2 9B: google/gemma-2-9b."""
    return _gemma2(changes, num_layers=42, d_model=3584, num_heads=16, num_kv_heads=8, d_ff=14_336)


# Gemma 3: arXiv:2503.19786, Table 1 and section 2 (five local layers to a global one, norms on q and k, no caps)


def _gemma3(
    changes: dict[str, Any], window: int, scaling: LinearScaling | None = None, **sizes: int
) -> TransformerConfig:
    return _gemma(
        changes,
        attention=Attention(qk_norm=True, scale=256**-0.5, windows=(window,) * 5 + (None,)),
        positions=Rope(theta=1_000_000.0, scaling=scaling),
        local_positions=Rope(theta=10_000.0),
        after=True,
        **sizes,
    )


def gemma3_1b(**changes: Any) -> TransformerConfig:
    """Gemma 3 1B: google/gemma-3-1b-pt."""
    return _gemma3(
        changes, 512, vocab_size=262_144, num_layers=26, d_model=1152, num_heads=4, num_kv_heads=1, d_ff=6912
    )


def gemma3_4b(**changes: Any) -> TransformerConfig:
    """Gemma 3 4B, its language model without the image encoder: google/gemma-3-4b-pt, text_config."""
    scaling = LinearScaling(factor=8.0)
    return _gemma3(
        changes,
        1024,
        scaling,
        vocab_size=262_208,
        num_layers=34,
        d_model=2560,
        num_heads=8,
        num_kv_heads=4,
        d_ff=10_240,
    )


# fmt: off
_PRESETS = (
    tiny,
    gpt2, gpt2_medium, gpt2_large, gpt2_xl,
    llama2_7b, llama2_13b, llama2_70b,
    llama3_8b, llama3_70b, llama3_1_8b, llama3_1_405b, llama3_2_1b, llama3_2_3b,
    mistral_7b,
    qwen2_0_5b, qwen2_1_5b, qwen2_7b,
    qwen3_0_6b, qwen3_8b,
    gemma_2b, gemma_7b,
    gemma2_2b, gemma2_9b,
    gemma3_1b, gemma3_4b,
)
# fmt: on
