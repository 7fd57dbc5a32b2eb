"""One checkpoint: written whole or not at all, and compared with its target and its digests when it is read."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from shardlm._arguments import check_usable
from shardlm.runtime.folders import recover, sweep
from shardlm.runtime.strangers import printable

from .digest import digests
from .fields import parse_array
from .hashes import damage
from .keys import as_numbers, from_numbers, is_key, problem
from .mapping import rounds, sources
from .processes import errors_of_all, exchange, is_first
from .record import STATE, absolute, damaged, for_orbax, is_checkpoint, known_steps, read_record
from .rows import Rows, changes
from .texts import as_texts
from .write import Write, checked, flatten


def save(
    path: str | os.PathLike,
    state: Any,
    metadata: dict | None = None,
    *,
    overwrite: bool = False,
    tokenizer: Any = None,
) -> None:
    """Writes one checkpoint and returns when it is complete on disk.

    The folder gets its name once everything in it is written, flushed and hashed: a kill before that leaves nothing at
    `path`, or what was to be overwritten.

    Args:
        path: the folder to create: it must not exist, or be empty.
        state: pytree of `jax.Array`s on any layout, random keys among them. In a run of several processes all of them
            call this function. Of a pipeline with chunks or uneven stages give the whole `TrainState`, which says where
            its layers are.
        metadata: what else to keep (configuration, layout, position in the data, versions): a dict that JSON can hold,
            the same on all processes. Tuples come back as lists.
        overwrite: replace the checkpoint at `path`. Anything else there is refused all the same.
        tokenizer: of the model, to be kept with it (`sl.load_tokenizer(path)` reads it): one of `sl.data` or
            `sl.load_hf`, or its files by name, as `sl.data.files_of` makes them of others.

    Raises:
        ValueError: there is something at `path`; `metadata` is not JSON.
        TypeError: a leaf of `state` is not a `jax.Array`.
        SaveError: it could not be written; what was at `path` still is.

    Example:
        >>> save("runs/tiny", state, {"layout": "data=2,fsdp=2", "tokens_seen": 1_000_000})
        >>> state = restore("runs/tiny", trainer)
    """
    path = absolute(path)
    arrays, record = checked(state, metadata)
    problem = ""
    if is_first():
        with contextlib.suppress(OSError):  # what is left of killed saves; where it cannot go, the save says why
            sweep(path.parent, lambda name: name == path.name)
        problem = _cannot_replace(path, overwrite)
    if problem := exchange(problem)[0]:
        raise ValueError(problem)
    Write(path, arrays, record, replace=overwrite, texts=as_texts(tokenizer)).wait()


def _cannot_replace(path: Path, overwrite: bool) -> str:
    """Why no checkpoint may get this name; empty if it may."""
    if path.is_symlink():
        return f"{path} is a symbolic link: give the path of the folder itself"
    if is_checkpoint(path):
        return "" if overwrite else f"{path} already holds a checkpoint: choose another path, or pass overwrite=True"
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        return f"{path} exists and is not a checkpoint{known_steps(path)}: choose a new path"
    if path.is_dir() and path.samefile(os.getcwd()):
        return f"{path} is the folder that the program runs in: choose a new path"
    return ""


def restore(
    path: str | os.PathLike,
    target: Any,
    *,
    only: str | None = None,
    mapping: Mapping[str, str | None] | None = None,
    ignore: Sequence[str] = (),
    rows: Rows | None = None,
) -> Any:
    """Loads a checkpoint onto the devices and layout of `target`; each device reads the slices it is to hold.

    First every file is compared with the hash that was taken when it was written, and all paths, shapes and dtypes with
    the target. Then the arrays are loaded, and their digests compared with those of the arrays that were saved.

    Args:
        path: a folder written by `save`, or one step of `Checkpoints` ("runs/a/300").
        target: the state wanted: a pytree of `jax.ShapeDtypeStruct`s with shardings (or of arrays), or an object with
            such a pytree as its attribute `abstract_state`: a `Trainer`.
        only: the field of the state to load, and to return. With "params" the optimizer that saved them does not
            matter.
        mapping: what differs from the stored model, by paths in the target, of arrays or of all below: a path in the
            checkpoint to load from, or None to keep the target's value, which then is to be an array.
        ignore: paths in the checkpoint, of arrays or of all below, that are not to be loaded; those outside of `only`
            need not be named.
        rows: says which leaves hold padding after their real rows (the vocabulary's, and the optimizer's moments of it,
            whose paths end alike). Such a leaf may be stored with another number of rows: the real ones are kept, the
            others are zero. Default: the target's method `padded_rows`, where it has one.

    Returns:
        A pytree like the target, or the field `only` of it, of arrays with its shardings.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: what is there is no checkpoint, or of another model (one error lists every mismatch).
        DamagedCheckpoint: a ValueError too: files, named, are not what was written.
        PermissionError: a file may not be read.

    Example:
        >>> params = restore("runs/a/300", trainer, only="params")  # to go on with another optimizer
        >>> state = trainer.init(params)
        >>> untied = {"params/head": "params/embedding"}  # the head starts as a copy of the tied table
        >>> params = restore("runs/tied/300", trainer, only="params", mapping=untied)
    """
    path = absolute(path)
    padded_rows: Rows = rows or getattr(target, "padded_rows", lambda leaf_path, shape: None)
    target = getattr(target, "abstract_state", target)
    if not any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(target)):
        raise TypeError(
            f"target is {type(target).__name__} {str(target)[:40]!r}; it is a sl.Trainer, or a pytree of "
            "jax.ShapeDtypeStructs with shardings: it says where the arrays go"
        )
    abstract, treedef = flatten(target if only is None else _field(target, only))
    if only is not None:
        abstract = {f"{only}/{name}" if name else only: leaf for name, leaf in abstract.items()}
    if unplaced := [name for name, leaf in abstract.items() if getattr(leaf, "sharding", None) is None]:
        raise ValueError(f"the target must say where arrays go: no sharding is given for {', '.join(unplaced)}")
    if is_first():
        recover(path)
    exchange(None)  # no process looks before that is done
    record = read_record(path)
    stored = {name: parse_array(text)[0] for name, text in record["arrays"].items()}
    pairs, kept, problems = sources(stored, abstract, mapping or {}, ignore, only)
    keys, wanted = dict(record.get("keys") or {}), abstract
    abstract = {name: leaf if name in kept else as_numbers(leaf) for name, leaf in wanted.items()}
    found_keys = {name: problem(wanted[name], keys.get(source)) for name, source in pairs.items() if source in stored}
    arranged = record.get("layer_rows"), getattr(target, "layer_rows", None)
    to_change, different = changes(
        {name: stored[source] for name, source in pairs.items() if source in stored},
        {name: abstract[name] for name in pairs},
        padded_rows,
        arranged,
    )
    check_usable([abstract[name] for name in kept])
    different += [f"{name}: {text}" for name, text in found_keys.items() if text is not None]
    if problems := sorted([*problems, *(_with_source(line, pairs) for line in different)]):
        lines = [f"the checkpoint {path} is of another model or optimizer than the target:"]
        lines += [printable(line, 1000) for line in problems]
        raise ValueError(
            "\n  ".join(lines) + "\nIts configuration may be in its metadata: shardlm.read_metadata(path). Differences "
            'that are meant are named by mapping= and ignore=; only="params" leaves the optimizer out'
        )
    if wrong := damage(path, record["files"]):
        raise damaged(path, "; ".join(wrong))

    arrays = {name: abstract[name] for name in kept}
    for group in rounds(pairs):
        load = {source: to_change[name].load if name in to_change else abstract[name] for name, source in group.items()}
        loaded = _load(path, load)
        found = digests(loaded)
        if wrong := [source for source in loaded if found[source] != parse_array(record["arrays"][source])[1]]:
            raise damaged(path, f"what was read is not what was saved: {', '.join(wrong)}")
        for name, source in group.items():
            arrays[name] = loaded[source]
            if name in to_change:
                make = jax.jit(to_change[name].make, out_shardings=abstract[name].sharding)
                arrays[name] = jax.block_until_ready(make(loaded[source]))
            if is_key(wanted[name]):
                arrays[name] = jax.block_until_ready(from_numbers(arrays[name], keys[source], wanted[name].sharding))
    return jax.tree.unflatten(treedef, [arrays[name] for name in abstract])


def read_metadata(path: str | os.PathLike) -> dict:
    """Returns the metadata saved with a checkpoint; touches no device. Raises what `restore` raises."""
    path = absolute(path)
    recover(path)
    return read_record(path)["metadata"]


def _load(path: Any, wanted: dict[str, Any]) -> dict[str, jax.Array]:
    """The stored arrays of these paths; raises the same kind of error on all processes."""
    how = {
        name: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=tuple(x.shape), dtype=x.dtype, strict=False)
        for name, x in wanted.items()
    }
    plain = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in wanted.items()}
    args = ocp.args.PyTreeRestore(item=plain, restore_args=how, partial_restore=True)
    handler, arrays = ocp.PyTreeCheckpointHandler(), {}
    error: Exception | None = None
    try:
        arrays = handler.restore(for_orbax(path / STATE), args=args)
    except Exception as caught:
        error = caught
    finally:
        handler.close()
    if text := errors_of_all(error):
        if error is not None and isinstance(error, jax.errors.JaxRuntimeError | MemoryError):
            raise error  # the device's trouble, not the checkpoint's
        raise damaged(path, f"its arrays cannot be read ({text})") from error
    return arrays


def _field(target: Any, only: str) -> Any:
    if isinstance(target, Mapping):
        names, value = list(target), target.get(only)
    else:
        names, value = list(getattr(target, "__dataclass_fields__", ())), getattr(target, only, None)
    if only not in names:
        raise ValueError(f"only={only!r}: the target's fields are {', '.join(map(str, names)) or 'not named'}")
    return value


def _with_source(line: str, pairs: Mapping[str, str]) -> str:
    """A mismatch, with the path in the checkpoint where that is another."""
    name, rest = line.split(": ", 1)
    source = pairs.get(name, name)
    return line if source == name else f"{name} (mapped to {source}): {rest}"
