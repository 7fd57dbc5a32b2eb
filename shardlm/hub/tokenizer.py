"""The tokenizer of a Hugging Face folder, over the package tokenizers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shardlm.hub.files import read_json

# What belongs to the text of a model, and is copied with it as it is.
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
)


class HubTokenizer:
    """A `tokenizers.Tokenizer` and the ids that begin and end a text; it serves `sl.data` as a tokenizer too.

    Args:
        definition: the JSON text of tokenizer.json.
        begin: the id that a text begins with (bos), None where there is none.
        ends: the ids that end one (eos); `end` is the first.
        settings: of tokenizer_config.json.

    Attributes:
        begin, ends, settings: as given.
        end: the first of `ends`, None where there is none.
        vocab_size: one more than the largest id.
        definition: the JSON text that makes it again.

    Raises:
        ImportError: the package tokenizers is not installed.
        ValueError: the definition is not one of a tokenizer.
    """

    def __init__(
        self,
        definition: str,
        begin: int | None = None,
        ends: Sequence[int] = (),
        settings: Mapping[str, Any] | None = None,
    ):
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError("to read tokenizer.json: pip install 'shardlm[hf]'") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"not the JSON definition of a tokenizer: {error}") from error
        # What the file was made with last is no part of a text's ids: transformers switches it off too.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.definition, self.settings = definition, dict(settings or {})
        self.begin, self.ends = begin, tuple(ends)
        self.end = self.ends[0] if self.ends else None
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """The ids of a text, int32[tokens]; `special` adds those that tokenizer.json puts around it, such as bos."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=special).ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray, *, special: bool = False) -> str:
        """The text of ids [tokens]; special tokens are left out unless `special`."""
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=not special)

    def __repr__(self) -> str:
        return f"HubTokenizer(vocab_size={self.vocab_size}, begin={self.begin}, ends={self.ends})"


def read_tokenizer(folder: Path, config: Mapping[str, Any]) -> HubTokenizer | None:
    """The tokenizer of a folder, None where it has no tokenizer.json.

    Which ids begin and end a text is said by tokenizer_config.json, generation_config.json and config.json, in this
    order; an id that ends a text there ends it here, whichever of them says so.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    extra = {name: folder / f"{name}.json" for name in ("tokenizer_config", "generation_config")}
    found = {name: read_json(file) if file.is_file() else {} for name, file in extra.items()}
    settings = found["tokenizer_config"]
    try:
        bare = HubTokenizer(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

    def ids(kind: str) -> list[int]:
        token = settings.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        told = [bare._tokenizer.token_to_id(token) if token else None]
        for values in (found["generation_config"], config):
            value = values.get(f"{kind}_token_id")
            told += value if isinstance(value, list) else [value]
        return list(dict.fromkeys(value for value in told if value is not None))

    return HubTokenizer(bare.definition, next(iter(ids("bos")), None), ids("eos"), settings)


def tokenizer_files(tokenizer: Any) -> dict[str, str]:
    """The files of a tokenizer, by name.

    Args:
        tokenizer: of `load_hf`; a `sl.data.BPETokenizer`; or a `tokenizers.Tokenizer`.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(tokenizer, HubTokenizer):
        return {"tokenizer.json": tokenizer.definition, "tokenizer_config.json": _settings(tokenizer.settings)}
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("to write a tokenizer: pip install 'shardlm[hf]'") from error
    if isinstance(tokenizer, tokenizers.Tokenizer):
        return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": _settings({})}
    if isinstance(definition := getattr(tokenizer, "definition", None), str):
        # Its boundary between documents is one id beyond its vocabulary, where the next token added goes.
        made, end = tokenizers.Tokenizer.from_str(definition), "<|endoftext|>"
        made.add_special_tokens([end])
        assert made.token_to_id(end) == tokenizer.end
        return {"tokenizer.json": made.to_str(), "tokenizer_config.json": _settings({"eos_token": end})}
    raise TypeError(
        f"{type(tokenizer).__name__} cannot be written as tokenizer.json: give what sl.load_hf returned, a "
        "sl.data.BPETokenizer or a tokenizers.Tokenizer; of bytes there is none"
    )


def token_ids(tokenizer: Any) -> dict[str, Any]:
    """The fields of config.json that say which ids begin and end a text."""
    ends = list(getattr(tokenizer, "ends", ())) or [getattr(tokenizer, "end", None)]
    # Also where there are none: transformers would take the family's own, of another vocabulary.
    return {
        "bos_token_id": getattr(tokenizer, "begin", None),
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": None,
    }


def _settings(values: Mapping[str, Any]) -> str:
    return json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | dict(values), indent=2, ensure_ascii=False)
