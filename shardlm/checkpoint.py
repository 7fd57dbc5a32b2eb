"""Checkpoints: a training state saved from one layout and restored, bit for bit, onto any other.

A checkpoint is a folder:

    metadata.json   the caller's metadata, a digest of each array, the size of each file
    state/          the arrays, written shard by shard by Orbax

Arrays are stored under their path in the state (`params/embedding/table`). What layout they had is not used again: the
target of `restore` alone says which device gets what.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import lax

__all__ = ["Checkpoints", "read_metadata", "restore", "save"]

FORMAT = 1

Rows = Callable[[str, tuple[int, ...]], int | None]
"""`rows(path of a leaf, its shape in the target)`: how many rows (dim 0) are real and not padding; None: not padded."""


def save(path: str | os.PathLike, state: Any, metadata: dict | None = None, *, overwrite: bool = False) -> None:
    """Writes one checkpoint and returns when it is complete on disk.

    The folder gets its name once everything in it is written: a kill before that leaves nothing at `path`, or what was
    to be overwritten.

    Args:
        path: the folder to create: it must not exist, or be empty.
        state: pytree of `jax.Array`s on any layout. In a run of several processes all of them call this function.
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
    path = _absolute(path)
    args = _save_args(state, metadata)
    replaces = _is_checkpoint(path)
    if replaces and not overwrite:
        raise ValueError(f"{path} already holds a checkpoint: choose another path, or pass overwrite=True")
    if path.exists() and not replaces and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not a checkpoint{_known_steps(path)}: choose a new path")
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


def restore(path: str | os.PathLike, target: Any, *, rows: Rows | None = None, partial: bool = False) -> Any:
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
        partial: leave out what is stored and not in the target, such as the optimizer's state.

    Returns:
        A pytree like the target, of arrays with its shardings.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: what is there is no checkpoint, or of another model (one error lists every mismatch), or damaged.
    """
    path = _absolute(path)
    padded_rows: Rows = rows or getattr(target, "padded_rows", lambda leaf_path, shape: None)
    abstract, treedef = _flatten(getattr(target, "abstract_state", target))
    if unplaced := [name for name, leaf in abstract.items() if getattr(leaf, "sharding", None) is None]:
        raise ValueError(f"the target must say where arrays go: no sharding is given for {', '.join(unplaced)}")
    record = _read_record(path)
    stored = {n: x for n, x in _read_tree(path, record["files"]).items() if n in abstract or not partial}
    real = _compare(path, stored, abstract, padded_rows)

    # Orbax fills rows that are not stored with zeros, and drops surplus ones. A leaf that is to shrink is loaded with
    # all stored rows, rounded up to what its sharding divides, because the digest is that of them all.
    load = dict(abstract)
    for name in real:
        leaf = abstract[name]
        num_shards = leaf.shape[0] // leaf.sharding.shard_shape(leaf.shape)[0]
        num_rows = -(-max(leaf.shape[0], stored[name].shape[0]) // num_shards) * num_shards
        load[name] = jax.ShapeDtypeStruct((num_rows, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)
    how = {n: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, strict=False) for n, x in load.items()}
    args = ocp.args.PyTreeRestore(load, restore_args=how, partial_restore=partial)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            arrays = checkpointer.restore(path / "state", args=args)
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise  # the device's trouble, not the checkpoint's
    except Exception as error:
        raise _damaged(path, f"its arrays cannot be read ({_reason(error)})") from error
    if wrong := [name for name, found in _digests(arrays).items() if found != record["digests"].get(name)]:
        raise _damaged(path, f"what was read is not what was saved: {', '.join(wrong)}")
    for name, num_rows in real.items():
        keep = jax.jit(_keep_rows, static_argnums=(1, 2), out_shardings=abstract[name].sharding)
        arrays[name] = jax.block_until_ready(keep(arrays[name], num_rows, abstract[name].shape[0]))
    return jax.tree.unflatten(treedef, [arrays[name] for name in abstract])


def read_metadata(path: str | os.PathLike) -> dict:
    """Returns the metadata saved with a checkpoint; touches no device. Raises what `restore` raises."""
    return _read_record(_absolute(path))["metadata"]


class Checkpoints:
    """The checkpoints of a run: one folder per step in `directory`, of which the last `keep` stay.

    `save` returns as soon as the arrays have left the devices, and goes on in the background; every other method waits
    for it first. A program must close() before it ends, or it loses a save still running: use `with`. After a kill at
    any moment `latest` is complete, for a step gets its name last; what is half-written is removed by the next run's
    first save. One run at a time may save to a directory; any number may read.

    Args:
        directory: created by the first save.
        keep: how many of the newest checkpoints stay; None keeps all.

    Example:
        >>> with Checkpoints("runs/a", keep=3) as checkpoints:
        ...     if (step := checkpoints.latest()) is not None:
        ...         state = checkpoints.restore(step, trainer)
        ...     checkpoints.save(int(state.step), state, {"tokens_seen": 1_000_000})
    """

    def __init__(self, directory: str | os.PathLike, keep: int | None = 3):
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep}: expected how many checkpoints stay, at least 1, or None for all")
        self.directory = _absolute(directory)
        self.keep = keep
        self._manager: ocp.CheckpointManager | None = None

    def save(self, step: int, state: Any, metadata: dict | None = None) -> None:
        """Starts to save, once the previous save has ended; `state` may be donated as soon as this returns.

        Raises:
            ValueError: `step` is not beyond the latest one; `metadata` is not JSON.
            TypeError: a leaf of `state` is not a `jax.Array`.
            RuntimeError: this save cannot be started, or the previous one failed.
        """
        step = int(step)
        if step <= max(self.steps(), default=-1):
            where = f"{self.directory}{_known_steps(self.directory)}"
            raise ValueError(f"cannot save step {step} to {where}: steps only go up; after going back use another")
        args = _save_args(state, metadata)
        # Orbax's classic interface and not v1, which is still under `orbax.checkpoint.experimental`, where module paths
        # move; both stand on the same code. Opened here and not before, because it removes unfinished saves, which to a
        # mere reader may be another run's work.
        policy = ocp.checkpoint_managers.LatestN(self.keep)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True)
        self._manager = self._manager or ocp.CheckpointManager(self.directory, options=options)
        with self._errors_of_saving():
            self._manager.save(step, args=args, force=True)

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, ascending."""
        self.wait()
        return _steps(self.directory)

    def latest(self) -> int | None:
        """Returns the last step that has a checkpoint, always a complete one; None if there is none."""
        return max(self.steps(), default=None)

    def restore(self, step: int, target: Any, *, rows: Rows | None = None) -> Any:
        """Loads the checkpoint of `step`, as `shardlm.restore` does."""
        self.wait()
        return restore(self.directory / str(step), target, rows=rows)

    def metadata(self, step: int) -> dict:
        """Returns the metadata saved with `step`, as `read_metadata` does."""
        self.wait()
        return read_metadata(self.directory / str(step))

    def wait(self) -> None:
        """Returns when no save is running. Raises RuntimeError if it failed."""
        if self._manager is not None:
            with self._errors_of_saving():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for a running save and ends the threads behind it."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @contextlib.contextmanager
    def _errors_of_saving(self):
        try:
            yield
        except Exception as error:
            manager, self._manager = self._manager, None
            with contextlib.suppress(Exception):  # it may raise the same once more
                cast(ocp.CheckpointManager, manager).close()
            raise RuntimeError(f"a save to {self.directory} failed: {_reason(error)}") from error


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


def _save_args(state: Any, metadata: dict | None) -> ocp.args.Composite:
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
    record = {"format": FORMAT, "metadata": metadata, "digests": _digests(arrays)}
    return ocp.args.Composite(state=_SaveArgs(arrays, record=record))


def _flatten(state: Any) -> tuple[dict[str, Any], Any]:
    leaves, treedef = jax.tree.flatten_with_path(state)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same path: a name in it contains a slash")
    return named, treedef


def _digests(arrays: dict[str, jax.Array]) -> dict[str, str]:
    # One after another: on fake CPU devices, programs with collectives that overlap can wait for one another for ever.
    return {name: f"{int(jax.device_get(_digest(array))):08x}" for name, array in arrays.items()}


@jax.jit
def _digest(x: jax.Array) -> jax.Array:
    """A checksum of values and their places: sum over i of mix(bits_i ^ mix(i)) - mix(mix(i)), modulo 2^32.

    As a sum it is the same on every layout, and computed where the shards are. Zeros add nothing, so padding with zeros
    does not change it. One wrong element is always seen, because `mix` is a bijection; several pass with odds of 2^-32.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    elif jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], axis=-1)
    word = jnp.dtype(f"uint{min(8 * x.dtype.itemsize, 32)}")  # 64 bits become two words in a trailing dim
    bits = lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for dim, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
    key = _mix(place + jnp.uint32(0x9E3779B9))
    return jnp.sum(_mix(bits ^ key) - _mix(key), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _keep_rows(x: jax.Array, num_rows: int, num_rows_padded: int) -> jax.Array:
    real = lax.broadcasted_iota(jnp.int32, x.shape, 0) < num_rows
    return jnp.where(real, x, jnp.zeros((), x.dtype))[:num_rows_padded]


def _compare(path, stored: dict[str, Any], abstract: dict[str, Any], rows: Rows) -> dict[str, int]:
    """Raises ValueError unless `stored` fits; returns the number of real rows of each leaf to be padded anew."""
    real, problems = {}, []
    for name in sorted(stored.keys() | abstract.keys()):
        if name not in stored or name not in abstract:
            what, array = ("missing, expected", abstract[name]) if name in abstract else ("not expected", stored[name])
            problems.append(f"{name}: {what} {array.dtype} {tuple(array.shape)}")
            continue
        leaf, found = abstract[name], stored[name]
        if leaf.shape != found.shape:
            only_rows = len(leaf.shape) == len(found.shape) > 0 and leaf.shape[1:] == found.shape[1:]
            num_rows = rows(name, leaf.shape) if only_rows else None
            if num_rows is not None and num_rows <= min(leaf.shape[0], found.shape[0]):
                real[name] = num_rows
            else:
                of_which = "" if num_rows is None else f" with {num_rows} real rows"
                problems.append(f"{name}: shape expected {leaf.shape}{of_which}, found {tuple(found.shape)}")
        if jnp.dtype(leaf.dtype) != jnp.dtype(found.dtype):
            problems.append(f"{name}: dtype expected {leaf.dtype}, found {found.dtype}")
    if problems:
        lines = [f"the checkpoint {path} is of another model or optimizer than the target:", *problems]
        raise ValueError("\n  ".join(lines) + "\nIts configuration may be in its metadata: shardlm.read_metadata(path)")
    return real


def _read_record(path) -> dict[str, Any]:
    steps = _known_steps(path) or _known_steps(path.parent)
    absent = "does not exist" if not path.exists() else "is empty" if path.is_dir() and not any(path.iterdir()) else ""
    if absent:
        raise FileNotFoundError(f"no checkpoint at {path}: it {absent}{steps}")
    if not _is_checkpoint(path):
        raise ValueError(f"{path} is not a checkpoint: it has no metadata.json{steps}")
    try:
        record = json.loads((path / "metadata.json").read_text())
        content = record["format"], *(type(record[key]) for key in ("metadata", "digests", "files"))
    except (ValueError, TypeError, LookupError) as error:
        raise _damaged(path, f"metadata.json cannot be read ({_reason(error)})") from error
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
        raise _damaged(path, f"its list of arrays cannot be read ({_reason(error)})") from error


def _file_sizes(directory, prefix: str = "") -> dict[str, int]:
    sizes = {}
    for entry in sorted(directory.iterdir()) if directory.is_dir() else ():
        name = f"{prefix}{entry.name}"
        sizes |= _file_sizes(entry, f"{name}/") if entry.is_dir() else {name: entry.stat().length}
    return sizes


def _absolute(path: str | os.PathLike):
    from etils import epath  # comes with Orbax, which takes these paths; beside local ones they can be gs://...

    return epath.Path(path).expanduser().absolute()


def _is_checkpoint(path) -> bool:
    return (path / "metadata.json").exists()


def _steps(directory) -> list[int]:
    entries = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(entry.name) for entry in entries if entry.name.isdecimal() and _is_checkpoint(entry))


def _known_steps(directory) -> str:
    steps = _steps(directory)
    return f" (steps in {directory}: {', '.join(map(str, steps))})" if steps else ""


def _damaged(path, what: str) -> ValueError:
    return ValueError(f"the checkpoint {path} is damaged: {what}. Restore another one{_known_steps(path.parent)}")


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    [first_line, *_] = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first_line:.200}"
