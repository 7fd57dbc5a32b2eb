"""The fields of a config.json: each is read once, and one that nobody read is an error unless known to be harmless."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

REQUIRED = object()  # the default of a field that must be there

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}

# Fields that do not change the logits of a language model, and why.
_HARMLESS = {
    "decides the family, or is checked with what does": "architectures auto_map model_type",
    "the files themselves say": "dtype torch_dtype use_bfloat16",
    "the longest sequence of training; rotary positions know none": "max_position_embeddings",
    "says where the file came from": """_attn_implementation_autoset _commit_hash _name_or_path finetuning_task
        transformers_version unsloth_fixed unsloth_version""",
    "in training alone; the configuration read has no dropout, as sl.presets have none": """attention_dropout attn_pdrop
        embd_pdrop gradient_checkpointing resid_pdrop""",
    "how products were split in the original training; their sums are the same": "pretraining_tp",
    "of generation's cache, which is shardlm's own": "cache_implementation use_cache",
    "of text and its generation": """bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id
        diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size eos_token_id
        exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length
        max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences pad_token_id
        prefix remove_invalid_values repetition_penalty sep_token_id suppress_tokens task_specific_params temperature
        tokenizer_class top_k top_p typical_p""",
    "of heads for other tasks than language modelling": """id2label label2id num_labels problem_type summary_activation
        summary_first_dropout summary_proj_to_labels summary_type summary_use_proj""",
    "what a call in Python returns": """keys_to_ignore_at_inference output_attentions output_hidden_states output_scores
        return_dict return_dict_in_generate tf_legacy_loss torchscript""",
}
HARMLESS = {name: why for why, names in _HARMLESS.items() for name in names.split()}

# Fields whose meaning is nothing at these values, in whatever family, and what they would mean at others.
NOTHING_AT = {
    "add_cross_attention": ((False, None), "a decoder that attends to an encoder"),
    "chunk_size_feed_forward": ((0, None), "a feed-forward branch in chunks"),
    "is_decoder": ((True, False, None), ""),
    "is_encoder_decoder": ((False, None), "an encoder and a decoder"),
    "partial_rotary_factor": ((1, None), "rotary positions on a part of each head"),
    "per_layer_config": ((None, {}), "layers that differ"),
    "pruned_heads": ((None, {}), "heads left out"),
    "quantization_config": ((None,), "weights stored in fewer bits"),
    "reorder_and_upcast_attn": ((False, None), "attention scores scaled and widened in another order"),
    "scale_attn_by_inverse_layer_idx": ((False, None), "attention scores divided by the number of the layer"),
    "scale_attn_weights": ((True, None), "attention scores that are not scaled"),
    "tie_encoder_decoder": ((False, None), "an encoder and a decoder"),
    "use_bidirectional_attention": ((False, None), "attention to tokens that come later"),
    "use_mrope": ((False, None), "rotary positions in several dims"),
}


class Fields:
    """The fields of one config.json, or of another such file, of which every one is to be read.

    Args:
        values: what the file holds.
        where: what errors call it.
        harmless: names of fields that change nothing.
        nothing_at: fields that change nothing at these values, and what they mean at others.
        what: what of ours has no such thing, in errors.

    Attributes:
        problems: what was found wrong so far; `finish` raises it all at once.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        harmless: Collection[str] = HARMLESS,
        nothing_at: Mapping[str, tuple[tuple[Any, ...], str]] = NOTHING_AT,
        what: str = "shardlm's Transformer has",
    ):
        self.values, self.where = dict(values), where
        self._harmless, self._nothing_at, self._what = harmless, nothing_at, what
        self.problems: list[str] = []
        self._read: set[str] = set()

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """The value of a field, or the default where there is none; None and a problem where it must be there."""
        self._read.add(name)
        if name not in self.values and default is REQUIRED:
            self.problems.append(f"{name} is missing")
            return None
        return self.values.get(name, default)

    def refuse(self, name: str, what: str) -> None:
        """Note a problem with a field, whose value the message shows."""
        self.problems.append(f"{name}={self.values.get(name)!r}: {what}")

    def finish(self) -> None:
        """Raise ValueError for all that was found wrong, and for every field that nobody read."""
        for name, (legal, meaning) in self._nothing_at.items():
            if name in self.values and name not in self._read and self.values[name] not in legal:
                self.refuse(name, f"{meaning}, which {self._what} not; it may be {_listed(legal)}")
        for name in sorted(set(self.values) - self._read - set(self._harmless) - set(self._nothing_at)):
            self.refuse(
                name, "shardlm does not know this field, which may change what the model computes. If it does not, "
                "remove it from the file"
            )  # fmt: skip
        raise_problems(f"{self.where} cannot be read", self.problems)


@dataclass(frozen=True)
class Field:
    """A field of config.json that is one of ours, or several alike.

    Attributes:
        name: in config.json.
        ours: in `TransformerConfig`, with dots into its parts: "norm.epsilon". Several: all of them have the value.
        default: what transformers takes where the field is absent; None also stands for null.
        read, write: from the file's value to ours, and back.
    """

    name: str
    ours: str | tuple[str, ...]
    default: Any = REQUIRED
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value

    @property
    def all_ours(self) -> tuple[str, ...]:
        """The names in `TransformerConfig`."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


def activation(name: str, default: str, tanh: str = "gelu_pytorch_tanh") -> Field:
    """A field that names the activation of the feed-forward branch; `tanh` is what GELU's approximation is written."""
    back = {"silu": "silu", "gelu": "gelu", "relu": "relu", "gelu_tanh": tanh}
    return Field(name, "mlp.activation", default, ACTIVATIONS.__getitem__, back.__getitem__)


def read_fields(table: tuple[Field, ...], fields: Fields) -> dict[str, Any]:
    """Our values by dotted name, of the fields in the table; what is wrong is noted."""
    ours: dict[str, Any] = {}
    for field in table:
        value = fields.take(field.name, field.default)
        try:
            value = None if value is None else field.read(value)
        except (KeyError, TypeError, ValueError, ArithmeticError):
            legal = f"; legal are {', '.join(ACTIVATIONS)}" if field.all_ours == ("mlp.activation",) else ""
            fields.refuse(field.name, f"not a value that shardlm knows{legal}")
            continue
        ours |= dict.fromkeys(field.all_ours, value)
    return ours


def raise_problems(title: str, problems: list[str]) -> None:
    """Raise one ValueError that lists the problems, if there are any."""
    if problems:
        raise ValueError(f"{title}:" + "".join(f"\n  - {problem}" for problem in problems))


def _listed(legal: tuple[Any, ...]) -> str:
    return " or ".join(map(repr, legal)) + " (or absent)"
