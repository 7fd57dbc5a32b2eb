"""Fields of config.json that change no logits, and why: whatever their value, or at some values alone.

They are those of transformers' own classes and of files that people use. A field is here if transformers' model of the
family does not read it, or reads it and computes the same.
"""

from collections.abc import Callable, Mapping
from typing import Any

# Whatever their value.
_HARMLESS = {
    "decides the family, or is checked with what does": "architectures auto_map model_type",
    "the files themselves say": "dtype torch_dtype use_bfloat16",
    "the tensors say; one that is missing or too many is an error": "attention_bias bias mlp_bias qkv_bias use_bias",
    "the longest sequence of training; rotary positions know none": """max_position_embeddings max_seq_len
        max_sequence_length model_max_length seq_length tokenizer_model_max_length""",
    "says where the file came from": """_attn_implementation_autoset _class_name _commit_hash _name_or_path base_model
        finetuning_task is_llama_config language license name_or_path transformers_version unsloth_fixed
        unsloth_version""",
    "in training alone; the configuration read has no dropout, as sl.presets have none": """attention_dropout
        attention_probs_dropout_prob attn_pdrop classifier_dropout embd_pdrop gradient_checkpointing
        gradient_checkpointing_kwargs hidden_dropout hidden_dropout_prob neftune_noise_alpha resid_pdrop""",
    "how products were split in the original training; their sums are the same": "pretraining_tp",
    "which program computes attention; the result is the same": """_attn_implementation _attn_implementation_internal
        _experts_implementation _experts_implementation_internal _flash_attn_2_enabled attn_implementation
        experts_implementation flash_attn flash_attention use_flash_attention use_flash_attention_2 use_flash_attn""",
    "read by other programs than transformers": "dual_chunk_attention_config onnx transformers.js_config xla_device",
    "of generation's cache, which is shardlm's own": """cache_config cache_implementation output_past use_cache
        use_cache_kernel use_cache_quantization""",
    "of text and its generation": """additional_special_tokens bad_words_ids begin_suppress_tokens bos_token
        bos_token_id chat_template cls_token_id decoder_start_token_id diversity_penalty do_sample early_stopping
        encoder_no_repeat_ngram_size eos_token eos_token_id exponential_decay_length_penalty forced_bos_token_id
        forced_eos_token_id generation_config guidance_scale length_penalty mask_token_id max_length max_new_tokens
        max_time min_length min_new_tokens min_p no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
        pad_token pad_token_id penalty_alpha prefix remove_invalid_values renormalize_logits repetition_penalty
        sep_token_id suppress_tokens task_specific_params temperature tokenizer_class tokenizer_type top_k top_p
        typical_p unk_token unk_token_id""",
    "of heads for other tasks than language modelling": """_num_labels id2label label2id num_labels
        predict_special_tokens problem_type summary_activation summary_first_dropout summary_last_dropout
        summary_proj_to_labels summary_type summary_use_proj""",
    "what a call in Python returns": """keys_to_ignore_at_inference output_attentions output_hidden_states output_logits
        output_router_logits output_scores return_dict return_dict_in_generate tf_legacy_loss tie_last_hidden_states
        torchscript use_return_dict""",
}
HARMLESS = {name: why for why, names in _HARMLESS.items() for name in names.split()}


def _all_full(value: Any) -> bool:
    return isinstance(value, list) and all(kind == "full_attention" for kind in value)


# At these values, or where the function says so; and what they would mean at others.
NOTHING_AT: Mapping[str, tuple[tuple[Any, ...] | Callable[[Any], bool], str]] = {
    "activation": (("silu", "swiglu", "swish", None), "another activation of the feed-forward branch"),
    "add_cross_attention": ((False, None), "a decoder that attends to an encoder"),
    "alibi": ((False, None), "attention scores that fall with the distance"),
    "attn_logit_softcapping": ((None,), "attention scores with a cap"),
    "causal": ((True, None), "attention to tokens that come later"),
    "chunk_size_feed_forward": ((0, None), "a feed-forward branch in chunks"),
    "clip_qkv": ((None,), "queries, keys and values that are clipped"),
    "embedding_multiplier": ((1, None), "embeddings that are multiplied"),
    "final_logit_softcapping": ((None,), "logits with a cap"),
    "fusion_config": ((None, {}), "layers that are fused"),
    "is_causal": ((True, None), "attention to tokens that come later"),
    "is_decoder": ((True, False, None), ""),
    "is_encoder_decoder": ((False, None), "an encoder and a decoder"),
    "layer_types": (_all_full, "layers of several kinds"),
    "logit_scale": ((1, None), "logits that are multiplied"),
    "logits_scaling": ((1, None), "logits that are divided"),
    "max_window_layers": (lambda value: True, ""),  # nothing without use_sliding_window and sliding_window
    "n_routed_experts": ((0, None), "a mixture of experts"),
    "n_special": ((0, None), "token ids beyond the vocabulary"),
    "num_experts": ((0, None), "a mixture of experts"),
    "num_local_experts": ((0, None), "a mixture of experts"),
    "num_nextn_predict_layers": ((0, None), "layers that predict more than one token"),
    "parallel_attn": ((False, None), "attention and feed-forward side by side"),
    "partial_rotary_factor": ((1, None), "rotary positions on a part of each head"),
    "per_layer_config": ((None, {}), "layers that differ"),
    "pruned_heads": ((None, {}), "heads left out"),
    "qk_layernorm": ((False, None), "norms on queries and keys"),
    "quantization": ((None,), "weights stored in fewer bits"),
    "quantization_config": ((None,), "weights stored in fewer bits"),
    "reorder_and_upcast_attn": ((False, None), "attention scores scaled and widened in another order"),
    "residual_multiplier": ((1, None), "branches that are multiplied"),
    "rope_interleaved": ((False, None), "rotary positions on neighbouring pairs"),
    "rope_ratio": ((1, None), "rotary positions of another base"),
    "rotary_interleaved": ((False, None), "rotary positions on neighbouring pairs"),
    "rotary_pct": ((1, None), "rotary positions on a part of each head"),
    "scale_attn_by_inverse_layer_idx": ((False, None), "attention scores divided by the number of the layer"),
    "scale_attn_weights": ((True, None), "attention scores that are not scaled"),
    "sliding_window": ((None,), "a sliding window"),
    "tie_encoder_decoder": ((False, None), "an encoder and a decoder"),
    "use_alibi": ((False, None), "attention scores that fall with the distance"),
    "use_bidirectional_attention": ((False, None), "attention to tokens that come later"),
    "use_mrope": ((False, None), "rotary positions in several dims"),
    "use_parallel_residual": ((False, None), "attention and feed-forward side by side"),
    "use_qk_norm": ((False, None), "norms on queries and keys"),
    "use_sliding_window": ((False, None), "a sliding window"),
}


def is_nothing(value: Any, legal: tuple[Any, ...] | Callable[[Any], bool]) -> bool:
    """Whether a field changes nothing at this value; `legal` as in `NOTHING_AT`."""
    if callable(legal):
        return bool(legal(value))
    # True is not 1 here, though Python says they are equal.
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in legal)
