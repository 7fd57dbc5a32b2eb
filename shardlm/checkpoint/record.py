"""metadata.json: what a checkpoint holds, in words that people and programs read, sealed by a digest of itself."""

import json
import os
from pathlib import Path
from typing import Any

from shardlm.runtime.paths import local_path
from shardlm.runtime.strangers import printable, read_small

from .fields import problem
from .hashes import digest_bytes, sync
from .processes import reason

NAME = "metadata.json"
FORMAT = 2
STATE = "state"  # the folder of the arrays
LARGEST = 1 << 28  # bytes of metadata.json


class DamagedCheckpoint(ValueError):
    """What is read is not what was written: a file is truncated, missing or changed. The message names it."""


def absolute(path: str | os.PathLike, what: str = "path") -> Path:
    """The local path that the user names; raises what `local_path` raises."""
    return local_path(path, what)


def for_orbax(path: Path) -> Any:
    """The path as Orbax takes it."""
    from etils import epath  # comes with Orbax

    return epath.Path(path)


def write_record(directory: Any, record: dict[str, Any]) -> None:
    """Write metadata.json, its last line a digest of all before it."""
    content = _sealed(json.dumps(record, indent=1).removesuffix("\n}").encode())
    if len(content) > LARGEST:
        raise OSError(f"{NAME} would have {len(content):,} bytes; at most {LARGEST:,} are read")
    with (directory / NAME).open("wb") as file:
        file.write(content)
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
        if path.is_symlink():
            raise damaged(path, f"it is a link to {os.readlink(path)}, which is missing")
        raise FileNotFoundError(f"no checkpoint at {path}: it does not exist{steps}")
    if not is_checkpoint(path):
        if path.name.isdecimal() or (path / STATE).exists():  # a folder gets its name, or a state, with this file
            raise damaged(path, f"{NAME} is missing")
        if path.is_dir() and not any(path.iterdir()):
            raise FileNotFoundError(f"no checkpoint at {path}: it is empty{steps}")
        raise ValueError(f"{path} is not a checkpoint: it has no {NAME}{steps}")
    try:
        content = read_small(path, NAME, limit=LARGEST)
    except PermissionError:
        raise
    except ValueError as error:  # a link, a pipe, or too large
        raise damaged(path, str(error).removeprefix(f"{path}/")) from error
    except OSError as error:
        raise damaged(path, f"{NAME} cannot be read ({reason(error)})") from error
    record = _load(content)
    sealed = content == _sealed(content[: content.rfind(b',\n "digest"')])
    if record is not None and record.get("format") != FORMAT and (sealed or "digest" not in record):
        found = printable(record.get("format"), 40)
        raise ValueError(f"{path} is in format {found}; this version of shardlm reads format {FORMAT}")
    if not sealed:
        raise damaged(path, f"{NAME} was truncated or changed: its digest is another")
    if record is None or (text := problem(record)):
        raise damaged(path, f"{NAME} {'is no JSON object' if record is None else text}")
    return record


def is_checkpoint(path: Any) -> bool:
    """Whether there is something called metadata.json."""
    return os.path.lexists(path / NAME) if path.is_dir() else False


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
    text = printable(what, 2000)  # it may hold what the files say
    return DamagedCheckpoint(f"the checkpoint {path} is damaged: {text}. Restore another one{where}")


def _sealed(body: bytes) -> bytes:
    return body + f',\n "digest": "{digest_bytes(body)}"\n}}\n'.encode()


def _load(content: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):  # lists in lists, without end
        return None
    return record if isinstance(record, dict) else None


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdecimal() and name == str(int(name))
