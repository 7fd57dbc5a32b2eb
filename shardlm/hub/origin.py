"""What a folder says of its model besides what is computed: it travels with the configuration, and goes out with it.

Of a model that was loaded and saved, config.json says again what it said: the longest sequence, which ids begin and end
a text, and all else that a `TransformerConfig` has no place for. `TransformerConfig.origin` holds it as a JSON text.
"""

import hashlib
import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardlm.hub.family import Family, canonical
from shardlm.hub.files import find
from shardlm.hub.harmless import HARMLESS
from shardlm.hub.rope import SPELLINGS
from shardlm.hub.tokenizer import HubTokenizer, token_ids
from shardlm.models.config import TransformerConfig
from shardlm.runtime.strangers import SMALL, read_small

GENERATION = "generation_config.json"
_LENGTH = "max_position_embeddings"
# Of one family and its tensors, or written anew.
_NOT_ELSEWHERE = {
    "architectures",
    "auto_map",
    "model_type",
    "attention_bias",
    "bias",
    "mlp_bias",
    "qkv_bias",
    "use_bias",
}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a folder says.

    Attributes:
        values: of config.json, all of them.
        ignored: the fields among these that were left out when it was read.
        generation: the text of generation_config.json, None where there is none.
        tokenizer: a digest of tokenizer.json, None where there is none.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    generation: str | None = None
    tokenizer: str | None = None

    @classmethod
    def of_folder(cls, folder: Path, values: Mapping[str, Any], ignored: Collection[str] = ()) -> "Origin":
        """What a folder says, whose config.json holds `values`.

        Raises:
            ValueError: a file of its text is a link to nothing, or no plain file.
        """
        generation, definition = (
            None if find(folder, name) is None else read_small(folder, name, links=True, limit=limit)
            for name, limit in ((GENERATION, 1 << 20), ("tokenizer.json", SMALL))
        )
        return cls(
            values=dict(values),
            ignored=tuple(ignored),
            generation=None if generation is None else generation.decode("utf-8", "replace"),
            tokenizer=None if definition is None else _digest(definition),
        )

    @classmethod
    def of_config(cls, config: TransformerConfig) -> "Origin":
        """What the folder said that a configuration was read from; nothing where it was not, or was damaged since."""
        try:
            told = json.loads(config.origin or "{}")
            values, ignored = told.get("values", {}), told.get("ignored", [])
            generation, tokenizer = told.get("generation"), told.get("tokenizer")
        except (ValueError, RecursionError, AttributeError):
            return cls()
        fine = isinstance(values, dict) and isinstance(ignored, list) and isinstance(generation, str | None)
        return cls(values=values, ignored=tuple(ignored), generation=generation, tokenizer=tokenizer) if fine else cls()

    def text(self) -> str:
        """The JSON text that `of_config` reads."""
        values = {"values": self.values, "ignored": self.ignored}
        return json.dumps(values | {"generation": self.generation, "tokenizer": self.tokenizer})

    def is_of(self, tokenizer: Any) -> bool:
        """Whether the ids in config.json are of this tokenizer, which they are of none too."""
        definition = tokenizer.definition.encode() if isinstance(tokenizer, HubTokenizer) else b""
        return bool(self.values) and (tokenizer is None or _digest(definition) == self.tokenizer)

    def config_values(self, config: TransformerConfig, family: Family, dtype: str) -> dict[str, Any]:
        """The config.json of a configuration: what the folder's own said, where that still is this configuration.

        Rotary positions are said in old and new spelling all the same. Where it is another configuration: what the
        family writes of it, and of the folder's own what no model computes.
        """
        told, own = dict(self.values), family.values(config)
        if told.get("model_type") == family.model_type and self._says(told, config, family):
            twice = {name: own[name] for name in SPELLINGS if name in own} | told
            made = twice if self._says(twice, config, family) else told
            made |= {"architectures": [family.architectures[0]]}
        else:
            made = {name: told[name] for name in told if name in HARMLESS and name not in _NOT_ELSEWHERE}
            length = made.pop(_LENGTH, None)
            if isinstance(length, int) and "n_positions" not in own:
                own[_LENGTH] = max(own.get(_LENGTH, 0), length)  # its own is what scaled positions were made for
            made |= own
        return made | {"dtype": dtype, "torch_dtype": dtype}

    def text_files(self, tokenizer: Any) -> dict[str, str]:
        """generation_config.json, with the ids of the tokenizer that is written beside it."""
        if self.generation is None or self.is_of(tokenizer):
            return {} if self.generation is None else {GENERATION: self.generation}
        try:
            values = json.loads(self.generation)
            return {GENERATION: json.dumps(values | token_ids(tokenizer), indent=2) + "\n"}
        except (ValueError, TypeError, RecursionError):  # it was none, and has ids of another tokenizer
            return {}

    def _says(self, values: Mapping[str, Any], config: TransformerConfig, family: Family) -> bool:
        """Whether a config.json with these values is of this configuration."""
        ignored = [name for name in self.ignored if name in values]
        try:
            with warnings.catch_warnings(action="ignore"):  # they were given when the folder was read
                return canonical(family.config(values, "origin", ignored)) == canonical(config)
        except ValueError:
            return False


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
