"""Reading the tensors of a folder, by name and by part, from one safetensors file or several with an index."""

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from shardlm._extras import install
from shardlm.runtime.folders import recover
from shardlm.runtime.paths import local_path
from shardlm.runtime.strangers import SMALL, inside, printable, read_small

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

# safetensors' names of dtypes and NumPy's; the others are of quantised models.
DTYPES = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


def folder_of(path: str | os.PathLike) -> Path:
    """The folder at `path`.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = local_path(path, "folder")
    recover(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder at {folder}: shardlm downloads nothing; `hf download NAME --local-dir FOLDER` of the package "
            "huggingface_hub does"
        )
    return folder


def find(folder: Path, name: str) -> Path | None:
    """The plain file of this name, which may be a link, as in caches of Hugging Face; None where there is none.

    Raises:
        ValueError: there is a link that leads to nothing, or something that is no plain file.
    """
    if not os.path.lexists(folder / name):
        return None
    try:
        return inside(folder, name, links=True)
    except FileNotFoundError as error:
        raise ValueError(f"{error}: fetch the model again") from error


def read_json(path: Path, limit: int = SMALL) -> dict[str, Any]:
    """A file, of at most `limit` bytes, that holds a JSON object.

    Raises:
        ValueError: it does not.
    """
    try:
        values = json.loads(read_small(path.parent, path.name, links=True, limit=limit).decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is not JSON of a model: it is nested too deep") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not an object of names and values")
    return values


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
        ValueError: there is none.
    """
    path = find(folder, "config.json")
    if path is None:
        held = ", ".join(sorted(printable(entry.name) for entry in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"{folder} is no folder of a Hugging Face model: it has no config.json, but {held}")
    return read_json(path, 1 << 24)  # it travels with the configuration, into each checkpoint


class Tensors:
    """The tensors of a folder; use it in a `with` statement. Nothing is read before it is asked for.

    Attributes:
        shapes: of each tensor by name.
        dtypes: of each by name.

    Raises:
        ValueError: there are none, a file is missing or damaged, the index says something else than the files.
        ImportError: the package safetensors is not installed.
    """

    def __init__(self, folder: Path):
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        kinds: dict[str, str] = {}
        try:
            for name, told in _file_names(folder).items():
                file = self._open.enter_context(_opened(folder, name))
                held = set(file.keys())
                if told is not None and told != held:
                    examples = sorted(told ^ held)
                    raise ValueError(
                        f"{folder / name} and {INDEX} disagree on {len(examples)} tensors: "
                        f"{printable(', '.join(examples[:5]))}"
                    )
                for tensor in held:
                    part = file.get_slice(tensor)
                    self._files[tensor] = file
                    self.shapes[tensor], kinds[tensor] = tuple(part.get_shape()), part.get_dtype()
        except BaseException:
            self._open.close()
            raise
        if unknown := sorted(set(kinds.values()) - set(DTYPES)):
            examples = [next(tensor for tensor, kind in kinds.items() if kind == name) for name in unknown]
            raise ValueError(
                f"{folder}: tensors of dtype {', '.join(unknown)} (such as {printable(', '.join(examples))}); shardlm "
                f"reads {', '.join(DTYPES)}, no quantised weights"
            )
        self.dtypes = {tensor: DTYPES[kind] for tensor, kind in kinds.items()}

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.close()

    def reader(self, name: str) -> Callable[[tuple[slice, ...]], np.ndarray]:
        """A function that reads part of the tensor, given as slices, from the file."""
        return self._files[name].get_slice(name).__getitem__

    def read(self, name: str) -> np.ndarray:
        """The whole tensor."""
        return self._files[name].get_tensor(name)


def import_safetensors() -> Any:
    """The package safetensors, which an extra brings."""
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(f"to read safetensors files: {install('hf')}") from error
    return safetensors


def _opened(folder: Path, name: str) -> Any:
    safetensors = import_safetensors()
    try:
        path = inside(folder, name, links=True)
    except FileNotFoundError as error:
        if (folder / name).is_symlink():
            raise ValueError(f"{error}: fetch the model again") from error
        raise ValueError(f"{folder / name} is missing, which {INDEX} beside it names") from error
    except ValueError as error:
        raise ValueError(f"{folder / INDEX} names a file that is not read: {error}") from error
    try:
        return safetensors.safe_open(path, "np")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short: {printable(error)}. Fetch it again") from error


def _file_names(folder: Path) -> dict[str, set[str] | None]:
    """The files that hold the tensors, and which the index says they hold; None: there is no index.

    With both an index and a file of all, that file is read, as transformers does.
    """
    if find(folder, SINGLE) is not None:
        return {SINGLE: None}
    index = find(folder, INDEX)
    if index is None:
        others = sorted(
            printable(p.name) for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".safetensors", ".gguf")
        )
        advice = (
            "; load them with transformers once, and save_pretrained(..., safe_serialization=True)"
            if any(name.endswith(".bin") for name in others)
            else ""
        )
        raise ValueError(
            f"{folder} holds neither {SINGLE} nor {INDEX}, but {', '.join(others) or 'no weights at all'}{advice}"
        )
    told = read_json(index).get("weight_map")
    if not isinstance(told, dict) or not told:
        raise ValueError(f"{index} has no weight_map, which says what file holds which tensor")
    if wrong := next((name for name, file in told.items() if not isinstance(file, str)), None):
        raise ValueError(
            f"{index}: weight_map gives {printable(repr(told[wrong]))} for {printable(wrong)}, no file's name"
        )
    held: dict[str, set[str]] = {}
    for name, file in told.items():
        held.setdefault(file, set()).add(name)
    return dict(sorted(held.items()))
