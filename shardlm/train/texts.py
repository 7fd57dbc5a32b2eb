"""The tokenizer of a run, which belongs to its checkpoints: kept with each, and held to when the run goes on."""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shardlm.checkpoint import read_texts
from shardlm.data import kept

if TYPE_CHECKING:
    from shardlm.checkpoint import Checkpoints


def of_run(given: Any, batches: Any) -> tuple[dict[str, bytes], str | None]:
    """The files of the tokenizer that made a run's tokens, and what to say where there is one without files.

    Args:
        given: the tokenizer that was named, or None.
        batches: of the run; those of `shardlm.data` know theirs.
    """
    tokenizer = getattr(batches, "tokenizer", None) if given is None else given
    if tokenizer is None:
        return {}, None
    files = kept.files_of(tokenizer)
    if files is None:
        name = type(getattr(tokenizer, "tokenizer", tokenizer)).__name__
        return {}, (
            f"checkpoints do not keep the tokenizer: a {name} does not say of which files it is made (a method "
            "to_files(), see shardlm/data/kept.py)"
        )
    return files, None


def resumed(checkpoints: "Checkpoints", step: int, files: dict[str, bytes]) -> dict[str, bytes]:
    """The files to keep from `step` on: those of its checkpoint, which this run's are to be equal to.

    Raises:
        ValueError: this run's tokenizer is another.
    """
    path = checkpoints.directory / str(step)
    stored = read_texts(path)
    if stored and files and not kept.same(stored, files):
        raise ValueError(
            f"the checkpoint {path} is of another tokenizer: {words(stored)} there, {words(files)} here. Its ids mean "
            f"other texts. Go on with sl.load_tokenizer({str(path)!r}), or start anew in another checkpoint_dir"
        )
    return stored or files


def digest(files: Mapping[str, bytes]) -> str:
    """What tells two tokenizers apart, for processes to compare."""
    parts = (f"{name} {len(content)} ".encode() + content for name, content in sorted(files.items()))
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16] if files else "none"


def words(files: Mapping[str, bytes]) -> str:
    """A tokenizer in a few words."""
    return f"{kept.kind_of(files)} {digest(files)}"
