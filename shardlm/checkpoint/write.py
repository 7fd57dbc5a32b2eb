"""Writing a checkpoint: the copy off the devices first, and then, in a thread, everything else."""

import contextlib
import datetime
import json
import logging
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from shardlm._arguments import check_usable
from shardlm.runtime.folders import NEW, Work

from .digest import as_text, start
from .fields import describe_array
from .hashes import digest_files, names_in
from .keys import as_numbers, generators, is_key
from .processes import CheckpointWarning, SaveError, barrier, errors_of_all, exchange, is_first, reason
from .record import FORMAT, LARGEST, STATE, for_orbax, write_record
from .texts import TEXTS


class Write:
    """One checkpoint on its way to the disk, in steps that a failure on any process leads through to the end.

    1. The first process makes a folder of our own beside `path`. All processes hear its name, or why it could not.
    2. Each copies its shards to the host's memory: `Write(...)` returns, and the arrays may be donated.
    3. In a thread, each writes its files and their hashes. All wait for one another, whether it went well or not.
    4. If all went well, the first process merges the lists of arrays, hashes the other files, writes metadata.json and
       gives the folder its name: until then there is no checkpoint.
    5. `wait` ends the thread, and tells all processes whether there is one now.

    The errors of Orbax's own managers are raised between barriers: one process with a full disk would leave the others
    waiting for ten minutes. So only its handler of arrays is used here.

    Args:
        path: the folder to make.
        arrays: by path in the state.
        record: what metadata.json is to say beside the arrays and files.
        after: called in the first process's thread when the checkpoint is there. An error of it is a warning.
        replace: whether the checkpoint that is at `path` is to go.
        after: called in the first process's thread when the checkpoint is there.
        texts: files of the tokenizer, by name.

    Raises:
        SaveError: the folder cannot be made.
    """

    def __init__(
        self,
        path: Path,
        arrays: dict[str, jax.Array],
        record: dict[str, Any],
        after: Callable[[], None] = lambda: None,
        *,
        replace: bool = False,
        texts: Mapping[str, bytes] | None = None,
    ):
        self.path, self._replace = path, replace
        self._work: Work | None = None  # of the first process alone
        self._unpruned: BaseException | None = None
        self._record, self._digests = record, start(arrays)
        self._shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
        self._after = after
        self._texts = dict(texts or {})
        self._error: BaseException | None = None
        try:
            if is_first():
                self._work = Work(path)
                (self._work.new / STATE).mkdir(parents=True)
        except OSError as error:
            self._error = error
        self._raise_together()
        self.unfinished = path.parent / exchange(None if self._work is None else self._work.folder.name)[0] / NEW
        self._handler = _Arrays()
        logging.getLogger("absl").addFilter(_raised_here)
        try:
            self._handler.save(for_orbax(self.unfinished / STATE), args=ocp.args.StandardSave(arrays))
        except Exception as error:
            self._error = error
        self._thread = threading.Thread(target=self._finish, name="shardlm checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when the checkpoint has its name. Raises SaveError if it never will."""
        self.join()
        self._raise_together()
        if self._unpruned is not None:
            text = f"{self.path} is saved, and older ones could not be removed: {reason(self._unpruned)}"
            warnings.warn(text, CheckpointWarning, stacklevel=3)

    def join(self) -> None:
        """Return when this process has done its part, and the others theirs; whether all went well is not asked."""
        self._thread.join()
        if self._error is not None:
            self._clear()
        self._handler.close()
        logging.getLogger("absl").removeFilter(_raised_here)

    def _raise_together(self) -> None:
        if text := errors_of_all(self._error):
            self._clear()
            raise SaveError(f"{self.path} could not be saved: {text}") from self._error

    def _finish(self) -> None:
        try:
            self._write_own()
        except BaseException as error:
            self._error = error
        try:
            barrier()
            if is_first() and self._error is None:
                self._commit()
        except BaseException as error:
            self._error = error
            return
        try:
            if is_first() and self._error is None:
                self._after()
        except BaseException as error:  # the checkpoint is there all the same
            self._unpruned = error

    def _write_own(self) -> None:
        errors = []
        for future in self._handler.commits:  # all of them, as one that goes on would write to a folder that is removed
            try:
                future.result()
            except BaseException as error:
                errors.append(error)
        if self._error is not None:
            return
        if errors:
            raise errors[0]
        if is_first() and self._texts:
            (self.unfinished / TEXTS).mkdir()
            for name, content in self._texts.items():
                (self.unfinished / TEXTS / name).write_bytes(content)
        index = jax.process_index()
        folders = f"{STATE}/ocdbt.process_{index}/", f"{STATE}/array_metadatas/process_{index}"
        names = [name for name in names_in(self.unfinished) if name.startswith(folders[0]) or name == folders[1]]
        hashes = digest_files(self.unfinished, names)
        (self.unfinished / f"process_{index}.json").write_text(json.dumps(hashes))

    def _commit(self) -> None:
        files = {}
        for index in range(jax.process_count()):
            part = self.unfinished / f"process_{index}.json"
            if not part.exists():
                raise OSError(f"process {index} has not written its part")
            files |= json.loads(part.read_text())
            part.unlink()
        self._handler.finalize(for_orbax(self.unfinished / STATE))
        files |= digest_files(self.unfinished, [name for name in names_in(self.unfinished) if name not in files])
        found = as_text(self._digests)
        arrays = {name: describe_array(x, found[name]) for name, x in self._shapes.items()}
        write_record(self.unfinished, self._record | {"arrays": arrays, "files": dict(sorted(files.items()))})
        assert self._work is not None
        self._work.publish(replace=self._replace)

    def _clear(self) -> None:
        """Remove what a failed save has left, until it stays away.

        The file system's own threads go on with the writes that were queued when one failed, and make the folder again.
        """
        work, self._work = self._work, None
        if work is None:
            return
        absent, deadline = 0, time.monotonic() + 3
        while absent < 3 and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                absent = 0 if work.new.exists() else absent + 1
                shutil.rmtree(work.new)
            if absent < 3:
                time.sleep(0.1)
        with contextlib.suppress(OSError):
            work.remove()


class _Arrays(ocp.StandardCheckpointHandler):
    """Orbax's handler of arrays, whose `save` returns once they are copied; `commits` are the writes that follow."""

    commits: list[Any] = []

    async def async_save(self, directory, *arguments, **options):
        self.commits = await super().async_save(directory, *arguments, **options) or []
        return []


def _raised_here(record: logging.LogRecord) -> bool:
    """Whether to log it: not the traces of Orbax's threads, hundreds of lines for an error that is raised as well."""
    return "_SignalingThread.run() raised" not in record.getMessage()


def flatten(state: Any) -> tuple[dict[str, Any], Any]:
    """Leaves by path, and the structure."""
    leaves, treedef = jax.tree.flatten_with_path(state)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same path: a name in it contains a slash")
    return named, treedef


def checked(state: Any, metadata: dict | None) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The arrays to save and what to say of them; raises what `save` raises for a state or metadata that cannot be."""
    arrays, _ = flatten(state)
    check_usable(state)
    for name, leaf in arrays.items():
        if not isinstance(leaf, jax.Array) or (jnp.issubdtype(leaf.dtype, jax.dtypes.extended) and not is_key(leaf)):
            kind = f"{type(leaf).__name__} {getattr(leaf, 'dtype', '')}".strip()
            raise TypeError(f"{name or 'state'}: a state is made of jax.Arrays of numbers or random keys, not {kind}")
    if empty := [name for name, leaf in arrays.items() if leaf.size == 0] or ([] if arrays else ["the whole state"]):
        raise ValueError(f"there are no elements to save in {', '.join(empty)}")
    try:
        metadata = json.loads(json.dumps(dict(metadata or {}), allow_nan=False))  # a copy: the caller's may change
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"metadata must be a dict that JSON can hold: {error}") from error
    if (size := len(json.dumps(metadata))) > LARGEST // 2:
        raise ValueError(f"metadata takes {size:,} bytes as JSON; at most {LARGEST // 2:,} are kept with a checkpoint")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"format": FORMAT, "saved": now, "processes": jax.process_count(), "metadata": metadata}
    if (layer_rows := getattr(state, "layer_rows", None)) is not None:
        record["layer_rows"] = layer_rows
    if found := generators(arrays):
        record["keys"] = found
    return {name: as_numbers(leaf) for name, leaf in arrays.items()}, record
