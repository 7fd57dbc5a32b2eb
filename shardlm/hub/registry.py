"""All families, and which of them a config.json or a `TransformerConfig` is of."""

from collections.abc import Mapping
from typing import Any

from shardlm.hub.families import gemma, gemma2, gemma3, gpt2, llama, mistral, qwen2, qwen3
from shardlm.hub.family import Family
from shardlm.models.config import TransformerConfig
from shardlm.runtime.strangers import printable

# A configuration is written as the first that can say it.
FAMILIES: tuple[Family, ...] = tuple(
    module.FAMILY for module in (llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3, gpt2)
)
NAMES = {family.model_type: family for family in FAMILIES}

_EXPERTS = "a mixture of experts, which shardlm does not have yet"
_IMAGES = "a model of images and text, of which shardlm has the text part alone"
NOT_YET = {
    "deepseek_v2": _EXPERTS,
    "deepseek_v3": _EXPERTS,
    "gpt_oss": _EXPERTS,
    "llama4": _EXPERTS,
    "mixtral": _EXPERTS,
    "olmoe": _EXPERTS,
    "phimoe": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "gemma3": f"{_IMAGES}; save that with transformers: `model.language_model` of the loaded model",
    "llava": _IMAGES,
    "mistral3": _IMAGES,
    "qwen2_vl": _IMAGES,
    "qwen2_5_vl": _IMAGES,
    "t5": "an encoder and a decoder, which shardlm does not have yet",
}


def family_of_file(values: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: none of ours; the message says whether the architecture is known.
    """
    name = values.get("model_type")
    shown, stated = printable(repr(name)), printable(repr(values.get("architectures")))
    if not isinstance(name, str):
        raise ValueError(f"{where}: model_type={shown} (architectures={stated}) is unknown; it is a text")
    if name in NAMES:
        return NAMES[name]
    legal = f"shardlm reads {', '.join(NAMES)}"
    if name in NOT_YET:
        raise ValueError(f"{where}: model_type={shown} is known and not supported: {NOT_YET[name]}. {legal}")
    raise ValueError(f"{where}: model_type={shown} (architectures={stated}) is unknown; {legal}")


def family_of_config(config: TransformerConfig, name: str | None = None, preferred: Any = None) -> Family:
    """The family that a configuration is written as: the one named, or the first that can say it.

    Args:
        config: to be written.
        name: of the one family that it is to be.
        preferred: the name of one that is asked before the others, if it is a family's.

    Raises:
        ValueError: it cannot be said; the message lists why, family by family.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"family={name!r}; it is one of {', '.join(NAMES)}")
    before = (NAMES[preferred],) if isinstance(preferred, str) and preferred in NAMES else ()
    asked = (*before, *FAMILIES) if name is None else (NAMES[name],)
    reasons = {family.model_type: family.differences(config) for family in asked}
    for family in asked:
        if not reasons[family.model_type]:
            return family
    lines = "".join(f"\n  - {name}: {'; '.join(what)}" for name, what in reasons.items())
    raise ValueError(f"no family of Hugging Face models is this configuration:{lines}")
