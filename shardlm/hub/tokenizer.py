"""The tokenizer of a Hugging Face folder, over the package tokenizers."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shardlm._extras import install
from shardlm.data.kept import describe
from shardlm.hub.files import find, read_json
from shardlm.runtime.strangers import printable, read_small

# What belongs to the text of a model, and is copied with it as it is.
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tokenizer.model.v3",
    "spiece.model",
    "tekken.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
)
# Tokenizers in other forms than the one that is read.
_OTHERS = ("tokenizer.model", "tokenizer.model.v3", "spiece.model", "tekken.json", "vocab.json", "vocab.txt")


class HubTokenizer:
    """A `tokenizers.Tokenizer` and the ids that begin and end a text; it serves `sl.data` as a tokenizer too.

    Args:
        definition: the JSON text of tokenizer.json.
        begin: the id that a text begins with (bos), None where there is none.
        ends: the ids that end one (eos); `end` is the first.
        settings: of tokenizer_config.json.
        files: more files that belong to it, by name, as they were in the folder that it comes from, such as the chat
            template; they are written with it.

    Attributes:
        begin, ends, settings, files: as given.
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
        files: Mapping[str, str | bytes] | None = None,
    ):
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(f"to read tokenizer.json: {install('hf')}") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"not the JSON definition of a tokenizer: {error}") from error
        # What the file was made with last is no part of a text's ids: transformers switches it off too.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.definition, self.settings, self.files = definition, dict(settings or {}), dict(files or {})
        self.begin, self.ends = begin, tuple(ends)
        self.end = self.ends[0] if self.ends else None
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """The ids of a text, int32[tokens]; `special` adds those that tokenizer.json puts around it, such as bos."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=special).ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray, *, special: bool = False) -> str:
        """The text of ids [tokens]; special tokens are left out unless `special`."""
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=not special)

    def to_files(self) -> dict[str, Any]:
        """The files that make it again, by name, a chat template too; see `shardlm.data.kept`."""
        return tokenizer_files(self) | describe("hub", begin=self.begin, ends=list(self.ends))

    def __repr__(self) -> str:
        return f"HubTokenizer(vocab_size={self.vocab_size}, begin={self.begin}, ends={self.ends})"


def text_files(folder: Path) -> dict[str, str | bytes]:
    """The files of a folder that belong to its model's text, by name, as they are; bytes of what is no text.

    Raises:
        ValueError: one is a link to nothing, no plain file, or too large to be one of these.
    """
    found: dict[str, str | bytes] = {}
    for name in TEXT_FILES:
        if find(folder, name) is not None:
            content = read_small(folder, name, links=True)
            try:
                found[name] = content.decode("utf-8")
            except UnicodeDecodeError:
                found[name] = content
    return found


def read_tokenizer(folder: Path, config: Mapping[str, Any]) -> HubTokenizer | None:
    """The tokenizer of a folder; None where it has no tokenizer.json, with a warning if it has one in another form.

    Which ids begin and end a text is said by tokenizer_config.json, generation_config.json and config.json, in this
    order; an id that ends a text there ends it here, whichever of them says so.

    Raises:
        ValueError: a file is not what its name says, or gives something for an id that is none.
    """
    texts = text_files(folder)
    definition = texts.pop("tokenizer.json", None)
    if definition is None:
        if others := [name for name in _OTHERS if name in texts]:
            warnings.warn(
                f"{folder} has {', '.join(others)} and no tokenizer.json, which alone is read: its tokenizer is None. "
                "transformers makes the file: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
                stacklevel=3,
            )
        return None
    path = folder / "tokenizer.json"
    if not isinstance(definition, str):
        raise ValueError(f"{path}: not the JSON definition of a tokenizer: it is not UTF-8")
    try:
        bare = HubTokenizer(definition)
    except ValueError as error:
        raise ValueError(f"{path}: {printable(error)}") from error
    names = ("tokenizer_config.json", "generation_config.json")
    settings, generation = (read_json(folder / name) if name in texts else {} for name in names)
    texts.pop(names[1], None)  # of the model: it is kept with its configuration

    def ids(kind: str) -> list[int]:
        token = settings.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        if not isinstance(token, str | None):
            raise ValueError(f"{folder / names[0]}: {kind}_token={printable(repr(token))}: it is a text")
        told = [bare._tokenizer.token_to_id(token) if token else None]
        for name, values in ((names[1], generation), ("config.json", config)):
            field = f"{kind}_token_id"
            value = values.get(field)
            found = value if isinstance(value, list) else [value]
            if wrong := [entry for entry in found if entry is not None and not _is_id(entry)]:
                raise ValueError(
                    f"{folder / name}: {field}={printable(repr(wrong[0]))}: it is an id, a list of ids or null"
                )
            told += found
        return list(dict.fromkeys(value for value in told if value is not None and value >= 0))  # -1 stands for none

    return HubTokenizer(definition, next(iter(ids("bos")), None), ids("eos"), settings, texts)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value < 2**31


def tokenizer_files(tokenizer: Any) -> dict[str, str | bytes]:
    """The files of a tokenizer, by name.

    Args:
        tokenizer: of `load_hf`; a `sl.data.BPETokenizer`; or a `tokenizers.Tokenizer`.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(tokenizer, HubTokenizer):
        files: dict[str, str | bytes] = {"tokenizer.json": tokenizer.definition} | tokenizer.files
        stored = files.get("tokenizer_config.json")
        if stored is None or json.loads(stored) != tokenizer.settings:
            files["tokenizer_config.json"] = _settings(tokenizer.settings)
        return files
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"to write a tokenizer: {install('hf')}") from error
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


def can_be_written(tokenizer: Any) -> bool:
    """Whether `tokenizer_files` has files for it."""
    return hasattr(tokenizer, "definition") or hasattr(tokenizer, "to_str")


def why_not(tokenizer: Any) -> str:
    """Why a Hugging Face folder gets no tokenizer."""
    if tokenizer is None:
        return "as the model's is not known"
    return f"as there is no file for {type(tokenizer).__name__}"


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
