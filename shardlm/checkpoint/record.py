"""metadata.json: what a checkpoint holds, in words that people and programs read, sealed by a digest of itself."""

import json
import os
import re
from typing import Any

import jax
import jax.numpy as jnp

from .hashes import digest_bytes, sync
from .processes import reason

NAME = "metadata.json"
FORMAT = 2
STATE = "state"  # the folder of the arrays
_KINDS = {"saved": str, "metadata": dict, "arrays": dict, "files": dict}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\] ([0-9a-f]{8})")
_FILE = re.compile(r"\d+ [0-9a-f]{32}")


class DamagedCheckpoint(ValueError):
    """What is read is not what was written: a file is truncated, missing or changed. The message names it."""


def absolute(path: str | os.PathLike):
    """The path as Orbax takes it."""
    from etils import epath  # comes with Orbax, which takes these paths; beside local ones they can be gs://...

    return epath.Path(path).expanduser().absolute()


def describe_array(array: Any, digest: str) -> str:
    """An array as metadata.json has it: `float32[18,64] 5ab71cc6`."""
    return f"{array.dtype}[{','.join(map(str, array.shape))}] {digest}"


def parse_array(text: str) -> tuple[jax.ShapeDtypeStruct, str]:
    """Shape and dtype, and the digest, of what `describe_array` wrote."""
    match = _ARRAY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} describes no array")
    dtype, shape, digest = match.groups()
    return jax.ShapeDtypeStruct([int(size) for size in shape.split(",") if size], jnp.dtype(dtype)), digest


def write_record(directory: Any, record: dict[str, Any]) -> None:
    """Write metadata.json, its last line a digest of all before it."""
    with (directory / NAME).open("wb") as file:
        file.write(_sealed(json.dumps(record, indent=1).removesuffix("\n}").encode()))
        file.flush()
        sync(file)


def read_record(path: Any) -> dict[str, Any]:
    """What `write_record` wrote, once it is known to be that.

    Raises:
        FileNotFoundError, ValueError: there is no checkpoint, or one of another format.
        DamagedCheckpoint: metadata.json is missing, truncated or changed.
        PermissionError: it may not be read.
    """
    steps = known_steps(path) or known_steps(path.parent)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: it does not exist{steps}")
    if not is_checkpoint(path):
        if path.name.isdecimal() or (path / STATE).exists():  # a folder gets its name, or a state, with this file
            raise damaged(path, f"{NAME} is missing")
        if path.is_dir() and not any(path.iterdir()):
            raise FileNotFoundError(f"no checkpoint at {path}: it is empty{steps}")
        raise ValueError(f"{path} is not a checkpoint: it has no {NAME}{steps}")
    try:
        content = (path / NAME).read_bytes()
    except PermissionError:
        raise
    except OSError as error:
        raise damaged(path, f"{NAME} cannot be read ({reason(error)})") from error
    record = _load(content)
    sealed = content == _sealed(content[: content.rfind(b',\n "digest"')])
    if record is not None and record.get("format") != FORMAT and (sealed or "digest" not in record):
        raise ValueError(f"{path} is in format {record.get('format')}; this version of shardlm reads format {FORMAT}")
    if not sealed:
        raise damaged(path, f"{NAME} was truncated or changed: its digest is another")
    if record is None or any(type(record.get(key)) is not kind for key, kind in _KINDS.items()):
        raise damaged(path, f"{NAME} does not hold {', '.join(_KINDS)}")
    wrong = [key for key, text in record["arrays"].items() if not _ARRAY.fullmatch(str(text))]
    wrong += [key for key, text in record["files"].items() if not _FILE.fullmatch(str(text))]
    if wrong:
        raise damaged(path, f"{NAME} does not say what {', '.join(wrong[:5])} is")
    return record


def is_checkpoint(path: Any) -> bool:
    """Whether there is a metadata.json."""
    return (path / NAME).exists() if path.is_dir() else False


def steps_in(directory: Any) -> list[int]:
    """The steps of a run's folder, ascending, those included that turn out to be damaged."""
    entries = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(entry.name) for entry in entries if _is_step(entry.name))


def known_steps(directory: Any) -> str:
    """The same in words, for an error; empty where there are none."""
    steps = steps_in(directory)
    return f" (steps in {directory}: {', '.join(map(str, steps))})" if steps else ""


def damaged(path: Any, what: str) -> DamagedCheckpoint:
    """The error, which names other checkpoints of the run."""
    others = [step for step in steps_in(path.parent) if str(step) != path.name]
    where = f" (steps in {path.parent}: {', '.join(map(str, others))})" if others else ""
    return DamagedCheckpoint(f"the checkpoint {path} is damaged: {what}. Restore another one{where}")


def _sealed(body: bytes) -> bytes:
    return body + f',\n "digest": "{digest_bytes(body)}"\n}}\n'.encode()


def _load(content: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(content)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _is_step(name: str) -> bool:
    return name.isdecimal() and name == str(int(name))
