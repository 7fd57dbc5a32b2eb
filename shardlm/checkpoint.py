"""Checkpoints: a training state saved from one layout and restored, bit for bit, onto any other.

A checkpoint is a folder:

    metadata/metadata.json   the caller's metadata and a digest of each array, to read without loading one
    state/                   the arrays, written shard by shard by Orbax; files.json lists the sizes of its files

Arrays are stored under their path in the state (`params/embedding/table`). What layout they had is not used again: the
target of `restore` alone says which device gets what.
"""

import contextlib
import functools
import json
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

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

    The folder gets its name once everything in it is written: a process killed before that leaves nothing at `path`, or
    the checkpoint that was to be overwritten.

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
        raise ValueError(
            f"{path} exists and is not a checkpoint{_known_steps(path)}: choose a path that does not exist"
        )
    written = path.parent / f"{path.name}.new" if replaces else path
    with ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**_handlers())) as checkpointer:
        checkpointer.save(written, args=args, force=True)
    if replaces:
        if jax.process_index() == 0:
            old = path.rename(path.parent / f"{path.name}.old")
            written.rename(path)
            old.rmtree()
        ocp.multihost.sync_global_processes("shardlm:checkpoint:overwrite")


def restore(path: str | os.PathLike, target: Any, *, rows: Rows | None = None) -> Any:
    """Loads a checkpoint onto the devices and layout of `target`, each device reading the slices it is to hold.

    Paths, shapes and dtypes are compared with the target before an array is loaded, and after that each array's digest
    with that of the array that was saved, so a damaged file cannot pass for a state.

    Args:
        path: a folder written by `save`, or one step of `Checkpoints` ("runs/a/300").
        target: the state wanted: a pytree of `jax.ShapeDtypeStruct`s with shardings (or of arrays), or an object with
            such a pytree as its attribute `abstract_state`: a `Trainer`.
        rows: names the leaves that hold padding after their real rows, the vocabulary's, and the optimizer's moments of
            it, whose paths end alike. Such a leaf may be stored with another number of rows: the real ones are kept,
            the others are zero. Default: the target's method `padded_rows`, where it has one.

    Returns:
        A pytree like the target, of arrays with its shardings.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: what is there is no checkpoint, or of another model (one error lists every mismatch), or damaged.
    """
    path = _absolute(path)
    rows = rows or getattr(target, "padded_rows", None) or (lambda leaf_path, shape: None)
    abstract, treedef = _flatten(getattr(target, "abstract_state", target))
    if unplaced := [name for name, leaf in abstract.items() if getattr(leaf, "sharding", None) is None]:
        raise ValueError(f"the target must say where arrays go: no sharding is given for {', '.join(unplaced)}")
    digests = _read_record(path)["digests"]
    stored = _read_tree(path)
    real = _compare(path, stored, abstract, rows)

    # Orbax fills rows that are not stored with zeros, and drops surplus ones. A leaf that is to shrink is loaded with all
    # stored rows, rounded up to what its sharding divides, for the digest is that of them all.
    load = dict(abstract)
    for name in real:
        leaf = abstract[name]
        num_shards = leaf.shape[0] // leaf.sharding.shard_shape(leaf.shape)[0]
        num_rows = -(-max(leaf.shape[0], stored[name].shape[0]) // num_shards) * num_shards
        load[name] = jax.ShapeDtypeStruct((num_rows, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            arrays = checkpointer.restore(path / "state", args=ocp.args.StandardRestore(load, strict=False))
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise  # the device's trouble, not the checkpoint's
    except Exception as error:
        raise _damaged(path, f"its arrays cannot be read ({_reason(error)})") from error
    found = _digests(arrays)
    if wrong := [name for name in arrays if found[name] != digests.get(name)]:
        raise _damaged(path, f"what was read is not what was saved: {', '.join(wrong)}")
    for name, num_rows in real.items():
        arrays[name] = _keep_rows(arrays.pop(name), num_rows, abstract[name])
    return jax.tree.unflatten(treedef, [arrays[name] for name in abstract])


def read_metadata(path: str | os.PathLike) -> dict:
    """Returns the metadata that was saved with a checkpoint; loads no array and touches no device.

    Raises FileNotFoundError and ValueError as `restore` does.
    """
    return _read_record(_absolute(path))["metadata"]


class Checkpoints:
    """The checkpoints of a run: one folder per step in `directory`, of which the last `keep` stay.

    `save` returns as soon as the arrays have left the devices, and goes on in the background. Every other method waits
    for it first, so a step that is listed is complete. After a kill at any moment the last complete step is the latest;
    what was left half-written is removed by the first save of the next run. Only one run may save to a directory at a
    time; any number may read.

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
            raise ValueError(f"keep={keep}: expected the number of checkpoints that stay, at least 1, or None for all")
        self.directory = _absolute(directory)
        self.keep = keep
        self._manager: ocp.CheckpointManager | None = None
        self._last_saved: int | None = None

    def save(self, step: int, state: Any, metadata: dict | None = None) -> None:
        """Starts to save, once the previous save has ended; `state` may be donated as soon as this returns.

        Raises:
            ValueError: `step` is not beyond the latest one; `metadata` is not JSON.
            TypeError: a leaf of `state` is not a `jax.Array`.
            RuntimeError: this save cannot be started, or the previous one failed.
        """
        step, latest = int(step), self.latest()
        if step < 0 or (latest is not None and step <= latest):
            raise ValueError(
                f"cannot save step {step} to {self.directory}{_known_steps(self.directory)}: steps only go up. "
                "A run that went back to an earlier step saves to a directory of its own"
            )
        args = _save_args(state, metadata)
        self._manager = self._manager or self._open()
        self._last_saved = step
        with self._errors_of_saving():
            self._manager.save(step, args=args, force=True)

    def steps(self) -> list[int]:
        """Returns the steps that have a complete checkpoint, ascending."""
        self.wait()
        return _steps(self.directory)

    def latest(self) -> int | None:
        """Returns the last step that has a complete checkpoint; None if there is none."""
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

    def _open(self) -> ocp.CheckpointManager:
        # Orbax's classic interface rather than v1: both write the same files and ran on every JAX we support, but v1 is
        # still under `orbax.checkpoint.experimental`, whose module paths may move. It is opened by the first save because
        # it removes unfinished saves, which to a mere reader may be another run's work.
        options = ocp.CheckpointManagerOptions(max_to_keep=self.keep, cleanup_tmp_directories=True)
        manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=_handlers())
        # A script that ends without close() would lose a running save: Python shuts the thread pools that Orbax needs
        # before it joins threads and long before `atexit`, and has no public hook that early.
        if at_exit := getattr(threading, "_register_atexit", None):
            this = weakref.ref(self)
            at_exit(lambda: this() and this().close())
        return manager

    @contextlib.contextmanager
    def _errors_of_saving(self):
        try:
            yield
        except Exception as error:
            manager, self._manager = self._manager, None
            with contextlib.suppress(Exception):  # it may raise the same once more
                manager.close()
            raise RuntimeError(
                f"saving step {self._last_saved} in {self.directory} failed: {_reason(error)}"
            ) from error


class _ArraysHandler(ocp.StandardCheckpointHandler):
    """Adds a list of file sizes, so that a file cut short is named before any is read."""

    def finalize(self, directory):
        super().finalize(directory)
        (directory / "files.json").write_text(json.dumps(_file_sizes(directory), indent=1))


class _RecordHandler(ocp.JsonCheckpointHandler):
    """Lays the JSON out for people."""

    def finalize(self, directory):
        file = directory / "metadata.json"
        file.write_text(json.dumps(json.loads(file.read_text()), indent=2))


def _handlers() -> dict[str, ocp.CheckpointHandler]:
    return {"state": _ArraysHandler(), "metadata": _RecordHandler("metadata.json")}


def _save_args(state: Any, metadata: dict | None) -> ocp.args.Composite:
    arrays, _ = _flatten(state)
    for name, leaf in arrays.items():
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"{name}: the leaves of a state are jax.Arrays, this one is of type {type(leaf).__name__}")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(
                f"{name}: cannot store {leaf.dtype}; in place of a random key keep jax.random.key_data(key)"
            )
    if empty := [name for name, leaf in arrays.items() if leaf.size == 0] or not arrays:
        raise ValueError("the state has no arrays" if empty is True else f"arrays without elements: {', '.join(empty)}")
    try:
        record = {"format": FORMAT, "metadata": dict(metadata or {}), "digests": _digests(arrays)}
        record = json.loads(json.dumps(record, allow_nan=False))  # a copy: the caller's may change before it is written
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be a dict that JSON can hold: {error}") from error
    return ocp.args.Composite(state=ocp.args.StandardSave(arrays), metadata=ocp.args.JsonSave(record))


def _flatten(state: Any) -> tuple[dict[str, Any], Any]:
    leaves, treedef = jax.tree.flatten_with_path(state)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same path: a name in it contains a slash")
    return named, treedef


def _digests(arrays: dict[str, jax.Array]) -> dict[str, str]:
    digests = {name: _digest(array) for name, array in arrays.items()}  # all started before one is fetched
    return {name: f"{int(digest):08x}" for name, digest in jax.device_get(digests).items()}


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


def _keep_rows(array: jax.Array, num_rows: int, leaf: Any) -> jax.Array:
    @functools.partial(jax.jit, out_shardings=leaf.sharding)
    def keep(x):
        real = lax.broadcasted_iota(jnp.int32, x.shape, 0) < num_rows
        return jnp.where(real, x, jnp.zeros((), x.dtype))[: leaf.shape[0]]

    return keep(array)


def _compare(path, stored: dict[str, Any], abstract: dict[str, Any], rows: Rows) -> dict[str, int]:
    """Raises ValueError unless `stored` fits; returns the number of real rows of each leaf to be padded anew."""
    real, problems = {}, []
    for name in sorted(stored.keys() | abstract.keys()):
        leaf, found = abstract.get(name), stored.get(name)
        if found is None:
            problems.append(f"{name}: missing, expected {leaf.dtype}{list(leaf.shape)}")
        elif leaf is None:
            problems.append(f"{name}: not in the target, found {found.dtype}{list(found.shape)}")
        else:
            if leaf.shape != found.shape:
                same_otherwise = leaf.shape and found.shape and leaf.shape[1:] == found.shape[1:]
                num_rows = rows(name, leaf.shape) if same_otherwise else None
                if num_rows is not None and num_rows <= min(leaf.shape[0], found.shape[0]):
                    real[name] = num_rows
                else:
                    of_which = "" if num_rows is None else f" ({num_rows} real rows)"
                    problems.append(f"{name}: shape expected {leaf.shape}{of_which}, found {tuple(found.shape)}")
            if jnp.dtype(leaf.dtype) != jnp.dtype(found.dtype):
                problems.append(f"{name}: dtype expected {leaf.dtype}, found {found.dtype}")
    if problems:
        raise ValueError(
            f"the checkpoint {path} is of another model or optimizer than the target:\n  "
            + "\n  ".join(problems)
            + "\n"
            "Restore it with the configuration it was saved with; shardlm.read_metadata(path) shows what was kept of it"
        )
    return real


def _read_record(path) -> dict[str, Any]:
    steps = _known_steps(path) or _known_steps(path.parent)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        raise FileNotFoundError(
            f"no checkpoint at {path}: it {'is empty' if path.exists() else 'does not exist'}{steps}"
        )
    if not _is_checkpoint(path):
        raise ValueError(f"{path} is not a checkpoint: it has no metadata/metadata.json{steps}")
    try:
        record = json.loads((path / "metadata" / "metadata.json").read_text())
        content = record["format"], type(record["metadata"]), type(record["digests"])
    except (ValueError, TypeError, LookupError) as error:
        raise _damaged(path, f"metadata/metadata.json cannot be read ({_reason(error)})") from error
    if content != (FORMAT, dict, dict):
        raise ValueError(f"{path} is in format {record['format']}; this version of shardlm reads format {FORMAT}")
    return record


def _read_tree(path) -> dict[str, Any]:
    """Shape and dtype of each stored array, once every file is known to have the size it was written with."""
    try:
        expected, found = json.loads((path / "state" / "files.json").read_text()), _file_sizes(path / "state")
        wrong = [
            f"{name} ({found.get(name, 0)} of {size} bytes)"
            for name, size in expected.items()
            if found.get(name) != size
        ]
        tree = {} if wrong else ocp.StandardCheckpointHandler().metadata(path / "state").tree
    except Exception as error:
        raise _damaged(path, f"its list of arrays cannot be read ({_reason(error)})") from error
    if wrong:
        raise _damaged(path, f"files in state/ are cut short or missing: {', '.join(wrong)}")
    return tree


def _file_sizes(directory, prefix: str = "") -> dict[str, int]:
    sizes = {}
    for entry in sorted(directory.iterdir()):
        name = f"{prefix}{entry.name}"
        sizes |= _file_sizes(entry, f"{name}/") if entry.is_dir() else {name: entry.stat().length}
    return sizes


def _absolute(path: str | os.PathLike):
    from etils import epath  # comes with Orbax, which takes these paths; beside local ones they can be gs://...

    return epath.Path(path).expanduser().absolute()


def _is_checkpoint(path) -> bool:
    return (path / "metadata" / "metadata.json").exists()


def _steps(directory) -> list[int]:
    return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(directory))


def _known_steps(directory) -> str:
    steps = (
        [str(step) for step in _steps(directory) if _is_checkpoint(directory / str(step))] if directory.is_dir() else []
    )
    return f" (steps in {directory}: {', '.join(steps)})" if steps else ""


def _damaged(path, what: str) -> ValueError:
    return ValueError(f"the checkpoint {path} is damaged: {what}. Restore another one{_known_steps(path.parent)}")


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).split(chr(10))[0]:.200}"
