"""A tokenizer as files: what a checkpoint keeps of it, so that the model can be asked for text wherever it goes.

The file shardlm.json says what the others are:

    {"kind": "bytes"}                                    nothing else is needed
    {"kind": "bpe"}                                      bpe.json, the definition of a `BPETokenizer`
    {"kind": "hub", "begin": 1, "ends": [2, 7]}          tokenizer.json and the files beside it, a chat template too
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardlm.data.encoder import Encoder

NAME = "shardlm.json"


def files_of(tokenizer: Any) -> dict[str, bytes] | None:
    """The files that make the tokenizer again, by name; None for a kind that has none.

    Args:
      tokenizer: of this package or of `shardlm.hub`, which have a method `to_files`; a `tokenizers.Tokenizer`; one of
        `transformers`; or the `Encoder` over any of these, whose ids that begin and end a text are then kept.
    """
    if isinstance(tokenizer, Encoder):
        files = files_of(tokenizer.tokenizer)
        if files is None or kind_of(files) != "hub":
            return files
        said = json.loads(files[NAME])
        ends = [tokenizer.end, *(i for i in said.get("ends", ()) if i != tokenizer.end)]
        return files | describe("hub", begin=tokenizer.begin, ends=ends)
    if callable(to_files := getattr(tokenizer, "to_files", None)):
        found = to_files()
    elif callable(getattr(tokenizer, "save_pretrained", None)):
        found = _saved(tokenizer)
    elif callable(getattr(tokenizer, "to_str", None)) and hasattr(tokenizer, "get_vocab_size"):
        found = {"tokenizer.json": tokenizer.to_str()} | describe("hub", begin=None, ends=[])
    else:
        return None
    if not isinstance(found, Mapping) or NAME not in found:
        return None
    made = {name: text if isinstance(text, bytes) else text.encode("utf-8") for name, text in found.items()}
    return dict(sorted(made.items()))


def describe(kind: str, **facts: Any) -> dict[str, bytes]:
    """The file shardlm.json."""
    return {NAME: json.dumps({"kind": kind} | facts).encode()}


def kind_of(files: Mapping[str, bytes]) -> str:
    """What kind the files of a tokenizer are of: "bytes", "bpe" or "hub".

    Raises:
      ValueError: they are none, or of a kind of another version.
    """
    try:
        said = json.loads(files[NAME])["kind"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"these are no files of a tokenizer: {NAME} is missing or does not say a kind") from error
    if said not in ("bytes", "bpe", "hub"):
        raise ValueError(f"a tokenizer of the kind {said!r}, which this version of shardlm does not know")
    return said


def same(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> bool:
    """Whether two tokenizers' files make the same ids: settings of the text around them may differ."""
    compared = (NAME, "bpe.json", "tokenizer.json")
    read = [{name: json.loads(files[name]) for name in compared if name in files} for files in (one, other)]
    return read[0] == read[1]


def _saved(tokenizer: Any) -> dict[str, bytes]:
    """What `transformers` writes of one of its tokenizers, the small files of one folder."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
    end = getattr(tokenizer, "eos_token_id", None)
    ends = [] if end is None else [end]
    return files | describe("hub", begin=getattr(tokenizer, "bos_token_id", None), ends=ends)
