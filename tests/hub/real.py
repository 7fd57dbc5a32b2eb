"""What config.json says of models that people use: for each, by name, the fields of its file and their values.

The tests read each, and transformers does too where it is installed.
"""

from typing import Any

_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "initializer_range": 0.02,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0",
    "use_cache": True, "pretraining_tp": 1, "rope_scaling": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LLAMA_2_7B = _LLAMA | {
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip
_LLAMA_3_8B = _LLAMA | {
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 8192, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}  # fmt: skip
_LLAMA_31_ROPE = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
_SMOLLM = _LLAMA | {
    "hidden_size": 576, "intermediate_size": 1536, "max_position_embeddings": 2048, "num_attention_heads": 9,
    "num_hidden_layers": 30, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 0, "rope_theta": 10000.0, "attention_bias": False, "attention_dropout": 0.0,
}  # fmt: skip
_MISTRAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.34.0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "transformers_version": "4.40.1", "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
    "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
_GEMMA = {
    "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "head_dim": 256, "hidden_act": "gelu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 16384, "max_position_embeddings": 8192, "num_attention_heads": 8,
    "num_hidden_layers": 18, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_scaling": None,
    "rope_theta": 10000.0, "torch_dtype": "bfloat16", "transformers_version": "4.38.0", "use_cache": True,
    "vocab_size": 256000,
}  # fmt: skip
_GEMMA2 = _GEMMA | {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "cache_implementation": "hybrid", "query_pre_attn_scalar": 256, "sliding_window": 4096, "hidden_size": 2304,
    "intermediate_size": 9216, "num_hidden_layers": 26, "num_key_value_heads": 4, "transformers_version": "4.42.4",
}  # fmt: skip
_GEMMA3 = _GEMMA | {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "cache_implementation": "hybrid",
    "eos_token_id": [1, 106], "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768,
    "num_attention_heads": 4, "num_hidden_layers": 26, "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000,
    "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
}  # fmt: skip
del _GEMMA3["hidden_act"]
_GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new", "attn_pdrop": 0.1,
    "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
}  # fmt: skip
_SPECIAL = {"n_special": 0, "predict_special_tokens": True}

CONFIGS: dict[str, dict[str, Any]] = {
    # the first conversion of Llama had another class's name, and a pad id that is none
    "llama-7b-hf": _LLAMA_2_7B | {
        "architectures": ["LLaMAForCausalLM"], "max_position_embeddings": 2048, "max_sequence_length": 2048,
        "pad_token_id": -1, "rms_norm_eps": 1e-6, "bos_token_id": 0, "eos_token_id": 1,
    },
    "Llama-2-7b-hf": _LLAMA_2_7B | {"_name_or_path": "meta-llama/Llama-2-7b-hf"},
    "Llama-2-70b-chat-hf": _LLAMA_2_7B | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80,
        "num_key_value_heads": 8,
    },
    "vicuna-7b-v1.5": _LLAMA_2_7B | {"max_sequence_length": 4096, "pad_token_id": 0},
    "CodeLlama-7b-hf": _LLAMA_2_7B | {
        "max_position_embeddings": 16384, "rope_theta": 1000000, "vocab_size": 32016, "torch_dtype": "bfloat16",
    },
    "Yi-6B": _LLAMA_2_7B | {
        "attention_bias": False, "num_key_value_heads": 4, "pad_token_id": 0, "rope_theta": 5000000.0,
        "vocab_size": 64000,
    },
    "deepseek-llm-7b-base": _LLAMA_2_7B | {"num_hidden_layers": 30, "vocab_size": 102400, "rms_norm_eps": 1e-6},
    "deepseek-coder-1.3b-base": _LLAMA_2_7B | {
        "hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16, "num_hidden_layers": 24,
        "num_key_value_heads": 16, "vocab_size": 32256, "max_position_embeddings": 16384, "rope_theta": 100000,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
    },
    "TinyLlama-1.1B-Chat-v1.0": _LLAMA_2_7B | {
        "attention_bias": False, "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 2048,
        "num_hidden_layers": 22, "num_key_value_heads": 4, "rope_theta": 10000.0,
    },
    "Meta-Llama-3-8B": _LLAMA_3_8B,
    "Meta-Llama-3.1-8B-Instruct": _LLAMA_3_8B | {
        "eos_token_id": [128001, 128008, 128009], "max_position_embeddings": 131072, "mlp_bias": False,
        "rope_scaling": _LLAMA_31_ROPE,
    },
    "Llama-3.2-1B": _LLAMA_3_8B | {
        "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "mlp_bias": False,
        "max_position_embeddings": 131072, "tie_word_embeddings": True,
        "rope_scaling": _LLAMA_31_ROPE | {"factor": 32.0},
    },
    "unsloth/Llama-3.2-1B": _LLAMA_3_8B | {
        "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "mlp_bias": False,
        "max_position_embeddings": 131072, "tie_word_embeddings": True, "unsloth_fixed": True, "pad_token_id": 128004,
        "rope_scaling": _LLAMA_31_ROPE | {"factor": 32.0},
    },
    "DeepSeek-R1-Distill-Llama-8B": _LLAMA_3_8B | {
        "max_position_embeddings": 131072, "mlp_bias": False, "rope_scaling": _LLAMA_31_ROPE,
    },
    "Falcon3-1B-Base": _LLAMA_3_8B | {
        "activation": "swiglu", "head_dim": 256, "hidden_size": 2048, "intermediate_size": 8192, "mlp_bias": False,
        "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 4, "rope_theta": 1000042,
        "vocab_size": 131072, "bos_token_id": None, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
    },
    "SmolLM-135M": _SMOLLM,
    "SmolLM2-135M": _SMOLLM | {
        "is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000, "max_position_embeddings": 8192,
        "initializer_range": 0.041666666666666664,
    },
    "SmolLM2-135M-Instruct": _SMOLLM | {
        "is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000, "max_position_embeddings": 8192,
        "pad_token_id": 2, "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    },
    "Mistral-7B-v0.1": _MISTRAL,
    "Mistral-7B-Instruct-v0.2": _MISTRAL | {"attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None},
    "Mistral-7B-v0.3": _MISTRAL | {
        "attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768,
    },
    "Mistral-Nemo-Base-2407": _MISTRAL | {
        "attention_dropout": 0.0, "head_dim": 128, "hidden_size": 5120, "num_hidden_layers": 40, "sliding_window": None,
        "max_position_embeddings": 128000, "rope_theta": 1000000.0, "vocab_size": 131072,
    },
    "Ministral-8B-Instruct-2410": _MISTRAL | {
        "attention_dropout": 0.0, "head_dim": 128, "intermediate_size": 12288, "num_hidden_layers": 36,
        "rope_theta": 100000000.0, "sliding_window": 32768, "vocab_size": 131072,
    },
    "zephyr-7b-beta": _MISTRAL | {"_name_or_path": "mistralai/Mistral-7B-v0.1", "pad_token_id": 2},
    "mistral with the biases it has not": _MISTRAL | {"attention_bias": False, "mlp_bias": False},
    "Qwen2-0.5B": _QWEN2,
    "Qwen1.5-0.5B": _QWEN2 | {
        "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16,
        "max_window_layers": 21,
    },
    "Qwen2.5-0.5B-Instruct": _QWEN2 | {"eos_token_id": 151645, "max_window_layers": 21},
    "Qwen2 that says it has no bias": _QWEN2 | {"attention_bias": False, "layer_types": ["full_attention"] * 24},
    "Qwen2.5-7B-Instruct-1M": _QWEN2 | {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28,
        "num_key_value_heads": 4, "tie_word_embeddings": False, "vocab_size": 152064, "rope_theta": 10000000.0,
        "max_position_embeddings": 1010000, "max_window_layers": 28,
        "dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192, "extra": 1},
    },
    "DeepSeek-R1-Distill-Qwen-1.5B": _QWEN2 | {
        "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_hidden_layers": 28,
        "rope_theta": 10000, "max_window_layers": 21, "sliding_window": 4096, "max_position_embeddings": 131072,
    },
    "Qwen3-0.6B": _QWEN3,
    "Qwen3-Embedding-0.6B": _QWEN3 | {"eos_token_id": 151643, "max_position_embeddings": 32768, "vocab_size": 151669},
    "Qwen3-4B-Instruct-2507": _QWEN3 | {
        "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_hidden_layers": 36,
        "max_position_embeddings": 262144, "max_window_layers": 36, "rope_theta": 5000000,
    },
    "gemma-2b": _GEMMA,
    "gemma-1.1-7b-it": _GEMMA | {
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3072, "intermediate_size": 24576,
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 16,
    },
    "gemma-2-2b": _GEMMA2,
    "gemma-2-9b": _GEMMA2 | {
        "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16, "num_hidden_layers": 42,
        "num_key_value_heads": 8, "sliding_window_size": 4096,
    },
    "gemma-2-27b": _GEMMA2 | {
        "hidden_size": 4608, "intermediate_size": 36864, "head_dim": 128, "num_attention_heads": 32,
        "num_hidden_layers": 46, "num_key_value_heads": 16, "query_pre_attn_scalar": 144, "sliding_window_size": 4096,
        "_attn_implementation": "eager",
    },
    "gemma-3-1b-it": _GEMMA3,
    "gemma-3-270m": _GEMMA3 | {
        "_sliding_window_pattern": 6, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3, "use_bidirectional_attention": False,
    },
    "the text model of gemma-3-4b-it": _GEMMA3 | {
        "hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8, "num_hidden_layers": 34,
        "num_key_value_heads": 4, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        "max_position_embeddings": 131072, "vocab_size": 262208,
    },
    "gpt2": _GPT2,
    "gpt2-medium": _GPT2 | _SPECIAL | {"n_embd": 1024, "n_head": 16, "n_layer": 24},
    "gpt2-large": _GPT2 | {"n_embd": 1280, "n_head": 20, "n_layer": 36},
    "gpt2-xl": _GPT2 | {"n_embd": 1600, "n_head": 25, "n_layer": 48, "output_past": True},
    "distilgpt2": _GPT2 | {
        "_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "n_layer": 6,
    },
    "DialoGPT-medium": _GPT2 | {
        "n_embd": 1024, "n_head": 16, "n_layer": 24, "task_specific_params": {"conversational": {"max_length": 1000}},
    },
    "gpt2 with transformers' general names": _GPT2 | {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 1024,
    },
    # as transformers 5 writes it
    "llama of transformers 5": {name: value for name, value in _LLAMA_3_8B.items() if not name.startswith("rope")} | {
        "dtype": "bfloat16", "torch_dtype": None, "head_dim": 128, "rope_parameters": {"rope_theta": 500000.0,
        "rope_type": "default"}, "output_hidden_states": False, "return_dict": True, "chunk_size_feed_forward": 0,
        "is_encoder_decoder": False, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "problem_type": None,
        "pad_token_id": None, "transformers_version": "5.0.0",
    },
}  # fmt: skip
