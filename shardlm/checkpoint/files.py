"""One checkpoint: written whole or not at all, and compared with its target and its digests when it is read."""

import dataclasses
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from .digest import digests
from .rows import Rows, changes

FORMAT = 1


def save(path: str | os.PathLike, state: Any, metadata: dict | None = None, *, overwrite: bool = False) -> None:
    """Writes one checkpoint and returns when it is complete on disk.

    The folder gets its name once everything in it is written: a kill before that leaves nothing at `path`, or what was
    to be overwritten.

    Args:
        path: the folder to create: it must not exist, or be empty.
        state: pytree of `jax.Array`s on any layout. In a run of several processes all of them call this function. Of a
            pipeline with chunks or uneven stages give the whole `TrainState`, which says where its layers are.
        metadata: what else to keep (configuration, layout, position in the data, versions): a dict that JSON can hold,
            the same on all processes. Tuples come back as lists.
        overwrite: replace the checkpoint at `path`. Anything else there is refused all the same.

    Raises:
        ValueError: there is something at `path`; `metadata` is not JSON.
        TypeError: a leaf of `state` is not a `jax.Array`.

    Example:
        >>> save("runs/tiny", state, {"layout": "data=2,fsdp=2", "tokens_seen": 1_000_000})
        >>> state = restore("runs/tiny", trainer)
    """
    path = absolute(path)
    args = save_args(state, metadata)
    replaces = _is_checkpoint(path)
    if replaces and not overwrite:
        raise ValueError(f"{path} already holds a checkpoint: choose another path, or pass overwrite=True")
    if path.exists() and not replaces and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not a checkpoint{known_steps(path)}: choose a new path")
    written = path.parent / f"{path.name}.new" if replaces else path
    with ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(written, args=args, force=True)
    if replaces:
        if jax.process_index() == 0:
            old = path.parent / f"{path.name}.old"
            old.rmtree(missing_ok=True)
            path.rename(old)
            written.rename(path)
            old.rmtree()
        ocp.multihost.sync_global_processes("shardlm:checkpoint:overwrite")


def restore(path: str | os.PathLike, target: Any, *, rows: Rows | None = None) -> Any:
    """Loads a checkpoint onto the devices and layout of `target`; each device reads the slices it is to hold.

    Before any array is loaded, all paths, shapes and dtypes are compared with the target. After it, the arrays' digests
    are compared with those of the arrays that were saved, so that a damaged file never passes for a state.

    Args:
        path: a folder written by `save`, or one step of `Checkpoints` ("runs/a/300").
        target: the state wanted: a pytree of `jax.ShapeDtypeStruct`s with shardings (or of arrays), or an object with
            such a pytree as its attribute `abstract_state`: a `Trainer`.
        rows: says which leaves hold padding after their real rows (the vocabulary's, and the optimizer's moments of it,
            whose paths end alike). Such a leaf may be stored with another number of rows: the real ones are kept, the
            others are zero. Default: the target's method `padded_rows`, where it has one.

    Returns:
        A pytree like the target, of arrays with its shardings.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: what is there is no checkpoint, or of another model (one error lists every mismatch), or damaged.
    """
    path = absolute(path)
    padded_rows: Rows = rows or getattr(target, "padded_rows", lambda leaf_path, shape: None)
    target = getattr(target, "abstract_state", target)
    abstract, treedef = _flatten(target)
    if unplaced := [name for name, leaf in abstract.items() if getattr(leaf, "sharding", None) is None]:
        raise ValueError(f"the target must say where arrays go: no sharding is given for {', '.join(unplaced)}")
    record = _read_record(path)
    stored = _read_tree(path, record["files"])
    arranged = record.get("layer_rows"), getattr(target, "layer_rows", None)
    to_change, problems = changes(stored, abstract, padded_rows, arranged)
    if problems:
        lines = [f"the checkpoint {path} is of another model or optimizer than the target:", *problems]
        raise ValueError("\n  ".join(lines) + "\nIts configuration may be in its metadata: shardlm.read_metadata(path)")

    load = abstract | {name: change.load for name, change in to_change.items()}
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            arrays = checkpointer.restore(path / "state", args=ocp.args.StandardRestore(load, strict=False))
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise  # the device's trouble, not the checkpoint's
    except Exception as error:
        raise _damaged(path, f"its arrays cannot be read ({reason(error)})") from error
    found = digests(arrays)
    if wrong := [name for name in arrays if found[name] != record["digests"].get(name)]:
        raise _damaged(path, f"what was read is not what was saved: {', '.join(wrong)}")
    for name, change in to_change.items():
        make = jax.jit(change.make, out_shardings=abstract[name].sharding)
        arrays[name] = jax.block_until_ready(make(arrays[name]))
    return jax.tree.unflatten(treedef, [arrays[name] for name in abstract])


def read_metadata(path: str | os.PathLike) -> dict:
    """Returns the metadata saved with a checkpoint; touches no device. Raises what `restore` raises."""
    return _read_record(absolute(path))["metadata"]


class _Handler(ocp.StandardCheckpointHandler):
    """Orbax's handler of arrays, which also writes metadata.json as the last file of a checkpoint."""

    async def async_save(self, directory, args):
        self._record = args.record
        return await super().async_save(directory, args=args)

    def finalize(self, directory):
        super().finalize(directory)
        record = self._record | {"files": _file_sizes(directory)}
        (directory.parent / "metadata.json").write_text(json.dumps(record, indent=2))


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _SaveArgs(ocp.args.StandardSave):
    record: dict[str, Any] | None = None


def save_args(state: Any, metadata: dict | None) -> ocp.args.Composite:
    """What Orbax is to save; raises what `save` raises for a state or metadata that cannot be."""
    arrays, _ = _flatten(state)
    for name, leaf in arrays.items():
        if not isinstance(leaf, jax.Array) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            kind = f"{type(leaf).__name__} {getattr(leaf, 'dtype', '')}".strip()
            raise TypeError(f"{name}: a state is made of jax.Arrays of numbers (of a key, its key_data), not {kind}")
    if empty := [name for name, leaf in arrays.items() if leaf.size == 0] or ([] if arrays else ["the whole state"]):
        raise ValueError(f"there are no elements to save in {', '.join(empty)}")
    try:
        metadata = json.loads(json.dumps(dict(metadata or {}), allow_nan=False))  # a copy: the caller's may change
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be a dict that JSON can hold: {error}") from error
    record = {"format": FORMAT, "metadata": metadata, "digests": digests(arrays)}
    if (layer_rows := getattr(state, "layer_rows", None)) is not None:
        record["layer_rows"] = layer_rows
    return ocp.args.Composite(state=_SaveArgs(arrays, record=record))


def _flatten(state: Any) -> tuple[dict[str, Any], Any]:
    leaves, treedef = jax.tree.flatten_with_path(state)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same path: a name in it contains a slash")
    return named, treedef


def _read_record(path) -> dict[str, Any]:
    steps = known_steps(path) or known_steps(path.parent)
    absent = "does not exist" if not path.exists() else "is empty" if path.is_dir() and not any(path.iterdir()) else ""
    if absent:
        raise FileNotFoundError(f"no checkpoint at {path}: it {absent}{steps}")
    if not _is_checkpoint(path):
        raise ValueError(f"{path} is not a checkpoint: it has no metadata.json{steps}")
    try:
        record = json.loads((path / "metadata.json").read_text())
        content = record["format"], *(type(record[key]) for key in ("metadata", "digests", "files"))
    except (ValueError, TypeError, LookupError) as error:
        raise _damaged(path, f"metadata.json cannot be read ({reason(error)})") from error
    if content != (FORMAT, dict, dict, dict):
        raise ValueError(f"{path} is in format {record['format']}; this version of shardlm reads format {FORMAT}")
    return record


def _read_tree(path, sizes: dict[str, int]) -> dict[str, Any]:
    """Shape and dtype of each stored array, once every file is known to have the size it was written with."""
    found = _file_sizes(path / "state")
    wrong = {name: size for name, size in sizes.items() if found.get(name) != size}
    if wrong := [f"{name} ({found.get(name, 0)} of {size} bytes)" for name, size in wrong.items()]:
        raise _damaged(path, f"files in state/ are missing or cut short: {', '.join(wrong)}")
    try:
        return ocp.StandardCheckpointHandler().metadata(path / "state").tree
    except Exception as error:
        raise _damaged(path, f"its list of arrays cannot be read ({reason(error)})") from error


def _file_sizes(directory, prefix: str = "") -> dict[str, int]:
    sizes = {}
    for entry in sorted(directory.iterdir()) if directory.is_dir() else ():
        name = f"{prefix}{entry.name}"
        sizes |= _file_sizes(entry, f"{name}/") if entry.is_dir() else {name: entry.stat().length}
    return sizes


def absolute(path: str | os.PathLike):
    """The path as Orbax takes it."""
    from etils import epath  # comes with Orbax, which takes these paths; beside local ones they can be gs://...

    return epath.Path(path).expanduser().absolute()


def _is_checkpoint(path) -> bool:
    return (path / "metadata.json").exists()


def steps_in(directory) -> list[int]:
    """The steps that have a checkpoint in a run's folder, ascending."""
    entries = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(entry.name) for entry in entries if entry.name.isdecimal() and _is_checkpoint(entry))


def known_steps(directory) -> str:
    """The same in words, for an error; empty where there are none."""
    steps = steps_in(directory)
    return f" (steps in {directory}: {', '.join(map(str, steps))})" if steps else ""


def _damaged(path, what: str) -> ValueError:
    return ValueError(f"the checkpoint {path} is damaged: {what}. Restore another one{known_steps(path.parent)}")


def reason(error: BaseException) -> str:
    """What first went wrong, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    [first_line, *_] = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first_line:.200}"
