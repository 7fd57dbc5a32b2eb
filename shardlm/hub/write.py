"""Writing a Hugging Face folder: tensor by tensor into safetensors files, and the folder's name last.

The format of safetensors files (https://huggingface.co/docs/safetensors): the length of a header in 8 bytes, the header
in JSON, which says where each tensor's bytes begin and end, then these. It is written here, and not by the package,
because that wants all tensors of a file at once.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shardlm.checkpoint.processes import errors_of_all, exchange, is_first
from shardlm.hub.files import DTYPES, INDEX, SINGLE
from shardlm.hub.progress import Progress
from shardlm.runtime.folders import Work, sweep
from shardlm.runtime.paths import local_path

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_KINDS = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Output:
    """A tensor to be written.

    Attributes:
        name, shape, dtype: in the file.
        value: makes it: all processes call it, in the same order; the first gets the array.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    value: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * self.dtype.itemsize


def parse_size(size: int | str) -> int:
    """A number of bytes: 5_000_000_000, "5GB", "500MB".

    Raises:
        ValueError: it is none.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    text = str(size).strip().upper()
    unit = next((unit for unit in sorted(_UNITS, key=len, reverse=True) if text.endswith(unit)), "")
    try:
        count = int(float(text.removesuffix(unit)) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        count = 0
    if count < 1:
        raise ValueError(f"max_shard_size={size!r}; it is a number of bytes, or text such as '5GB' or '500MB'")
    return count


def check_target(path: str | os.PathLike, overwrite: bool) -> Path:
    """The folder to be written; of several processes all call this, and the first one looks.

    Raises:
        ValueError: there is something that must not be replaced.
    """
    folder, problem = local_path(path, "folder"), None
    try:
        if is_first():
            with contextlib.suppress(OSError):  # what is left of killed ones; where it cannot go, writing says why
                sweep(folder.parent, lambda name: name == folder.name)
            _check_target(folder, overwrite)
    except ValueError as error:
        problem = str(error)
    if problem := exchange(problem)[0]:
        raise ValueError(problem)
    return folder


def _check_target(folder: Path, overwrite: bool) -> None:
    if folder.is_symlink():
        raise ValueError(f"{folder} is a symbolic link: give the path of the folder itself")
    if not folder.exists():
        return
    if folder.is_dir() and not any(folder.iterdir()):
        if folder.samefile(os.getcwd()):
            raise ValueError(f"{folder} is the folder that the program runs in: choose another path")
        return
    if not folder.is_dir() or not (folder / "config.json").is_file():
        raise ValueError(f"{folder} exists and is no folder of a Hugging Face model: choose another path")
    if not overwrite:
        raise ValueError(f"{folder} holds a model already: choose another path, or pass overwrite=True")


def write_folder(
    folder: Path,
    outputs: Sequence[Output],
    config: Mapping[str, Any],
    texts: Mapping[str, str | bytes],
    max_shard_size: int | str,
    verbose: bool,
    *,
    overwrite: bool = False,
) -> None:
    """Write a model's folder under another name beside it, and give it its name when all is there.

    Args:
        folder: as `check_target` returned it.
        outputs: the tensors, in the order in which they are written.
        config: of config.json, written after all tensors.
        texts: other files, by name.
        max_shard_size: bytes of tensors in a file; a larger tensor has one to itself.
        verbose: show a progress bar.
        overwrite: whether what is at `folder` is replaced at the end.

    Raises:
        OSError: it could not be written, which all processes hear; nothing of it is left.
    """
    shards = _shards(outputs, parse_size(max_shard_size))
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    work, error = None, None
    made = (output for shard in shards for output in shard)
    try:
        if is_first():
            work = Work(folder)
            new = work.new
            new.mkdir()
            with Progress(f"writing {folder.name}", sum(output.size for output in outputs), verbose) as progress:
                for name, shard in zip(names, shards, strict=True):
                    _write_file(new / name, shard, made, progress)
            if count > 1:
                index = {
                    "metadata": {"total_size": sum(output.size for output in outputs)},
                    "weight_map": {o.name: name for name, shard in zip(names, shards, strict=True) for o in shard},
                }
                (new / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
            for name, content in texts.items():
                (new / name).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
            (new / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            work.publish(replace=overwrite)
    except OSError as caught:
        error = caught
    finally:
        if work is not None:
            with contextlib.suppress(OSError):  # of what failed; nothing where it is published
                work.remove()
    if jax.process_count() > 1:  # those that do not write, or do no longer, still take part in making tensors
        for output in made:
            output.value()
    if text := errors_of_all(error):
        raise OSError(f"{folder} could not be written: {text}") from error


def _shards(outputs: Sequence[Output], limit: int) -> list[list[Output]]:
    shards: list[list[Output]] = [[]]
    held = 0
    for output in outputs:
        if shards[-1] and held + output.size > limit:
            shards.append([])
            held = 0
        shards[-1].append(output)
        held += output.size
    return shards


def _write_file(path: Path, outputs: Sequence[Output], made: Iterator[Output], progress: Progress) -> None:
    """One file of tensors, which are the next of `made`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for output in outputs:
        begin, end = end, end + output.size
        kind = _KINDS[output.dtype]
        header[output.name] = {"dtype": kind, "shape": list(output.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for output in itertools.islice(made, len(outputs)):
            value = np.ascontiguousarray(output.value())
            assert value.shape == output.shape and value.dtype == output.dtype, (output, value.shape, value.dtype)
            file.write(value.reshape(-1).view(np.uint8).data)
            progress.advance(output.size)
        file.flush()
        os.fsync(file.fileno())
