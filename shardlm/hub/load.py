"""Parameters from a Hugging Face folder onto any layout: a device gets its part from the files, and no more is read."""

import dataclasses
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from shardlm._dtypes import full_name
from shardlm.hub.files import Tensors, folder_of, read_config
from shardlm.hub.finite import all_finite, warn_of
from shardlm.hub.match import Names, match, one_dtype
from shardlm.hub.origin import Origin
from shardlm.hub.progress import Progress
from shardlm.hub.registry import family_of_file
from shardlm.hub.table import Placed, place
from shardlm.hub.tokenizer import HubTokenizer, read_tokenizer
from shardlm.layout import Layout
from shardlm.models.config import TransformerConfig
from shardlm.train import room
from shardlm.train.engine import Parameters, flatten, unflatten
from shardlm.train.program import require_devices, resolve
from shardlm.train.transformer import TransformerProgram

Index = tuple[slice, ...]


def load_hf(
    folder: str | os.PathLike,
    layout: Layout | str | None = None,
    dtype: str | None = None,
    devices: Sequence[Any] | None = None,
    *,
    ignore_fields: Collection[str] = (),
    verbose: bool = True,
) -> tuple[TransformerConfig, Parameters, HubTokenizer | None]:
    """Read a model that transformers saved: Llama, Mistral, Qwen 2 and 3, Gemma 1, 2 and 3 (text), GPT-2.

    Each device's part of each parameter is read from the files by itself; the host holds one part at a time. In a run
    of several processes all call this, and each reads what its devices hold.

    Args:
        folder: with config.json and the weights as safetensors, in one file or several; nothing is downloaded.
        layout: where the parameters go, as a `Trainer`'s; default one device.
        dtype: of the parameters: "float32", "bfloat16", "float16" or "float64", or short ("bf16"); None
            is that of the files.
        devices: as of a `Trainer`: default all of `jax.devices()`, or the first one without a layout.
        ignore_fields: names of fields of config.json that are left out, as if the file did not have them: of one that
            shardlm does not know and that changes nothing. If the field does change something, the model read is
            another one.
        verbose: show a progress bar, where the output is a terminal.

    Returns:
        The configuration, which computes and stores in the parameters' dtype (`dataclasses.replace` it to compute in
        another), without dropout; what the folder says besides is in its `origin`, and `save_hf` writes it again. The
        parameters, as `TrainState.params` on that layout. The tokenizer, or None where the folder has no
        tokenizer.json.

    Warns:
        UserWarning: weights are NaN or infinite; the folder's tokenizer is in another form than tokenizer.json; the
            file says something that versions of transformers read differently.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no such model, a setting of config.json that a `TransformerConfig` has not, tensors that
            are missing, too many, of a wrong shape, or damaged; the message lists all of a kind. Or the parameters do
            not fit in memory.
        LayoutError: the layout does not fit the model or the devices.
        ImportError: the packages of the extra hf are not installed.

    Example:
        >>> config, params, tokenizer = sl.load_hf("Qwen3-0.6B", sl.Layout(fsdp=8), dtype="float32")
        >>> trainer = sl.Trainer(config, sl.Layout(fsdp=8))
        >>> state = trainer.init(params)
    """
    path = folder_of(folder)
    values = read_config(path)
    family = family_of_file(values, str(path / "config.json"))
    config = family.config(values, str(path / "config.json"), ignore_fields)
    config = dataclasses.replace(config, origin=Origin.of_folder(path, values, ignore_fields).text())
    layout, devices = resolve(layout, devices)
    with Tensors(path) as files:
        names = match(config, family, files, str(path))
        stored = str(one_dtype(files, names, str(path))) if dtype is None else full_name(dtype)
        config = dataclasses.replace(config, dtype=stored, param_dtype=stored)
        plan = TransformerProgram.of(config, layout, devices, "manual").plan
        require_devices(plan.mesh)
        shapes, shardings = flatten(plan.shapes), flatten(plan.shardings("stored"))
        held = sum(math.prod(shardings[n].shard_shape(x.shape)) * x.dtype.itemsize for n, x in shapes.items())
        hint = " Give more devices (layout), or fewer bytes to a number (dtype='bfloat16')"
        room.require({"parameters": held}, list(plan.mesh.devices.flat), f"the model of {path}", lambda _: hint)
        # Once more, with the padding of the vocabulary that this layout needs.
        parameters = {name: (split.shape, split.dims) for name, split in plan.in_order.items()}
        names = dataclasses.replace(names, placed=place(family.rows, parameters, config.vocab_size))
        broken: set[str] = set()
        params = _read(path, _Reader(files, names, broken), shapes, shardings, plan.stages.rows, verbose)
    warn_of(broken, str(path), config.param_dtype, "was read")
    return plan.config, params, read_tokenizer(path, values)


@dataclass(frozen=True)
class _Reader:
    """Parts of parameters from files.

    Attributes:
        files, names: see there.
        broken: the tensors that were found to hold NaN or infinity.
    """

    files: Tensors
    names: Names
    broken: set[str]

    def part(self, name: str, leaf: jax.ShapeDtypeStruct, index: Index, rows: np.ndarray) -> np.ndarray:
        """Part of a parameter, from the tensors of its layers; `rows` as of `pipeline.stages`, which layer each is."""
        where = self.names.placed[name]
        if not where.row.stacked:
            return self._layer(self.names.found[where.row.name], where, index, leaf.dtype)
        layers, inner = rows[index[: rows.ndim]], index[rows.ndim :]
        lengths = (len(range(*part.indices(n))) for part, n in zip(inner, leaf.shape[rows.ndim :], strict=True))
        result = np.zeros((*layers.shape, *lengths), leaf.dtype)
        for at, layer in np.ndenumerate(layers):
            if layer >= 0:  # else padding of a stage that has fewer layers than another
                tensor = self.names.found[where.row.name.format(layer=layer)]
                result[at] = self._layer(tensor, where, inner, leaf.dtype)
        return result

    def _layer(self, tensor: str, where: Placed, index: Index, dtype: Any) -> np.ndarray:
        part = where.read(self.files.reader(tensor), index, dtype)
        if not all_finite(part):
            if np.dtype(dtype) == np.float16 and self.files.dtypes[tensor] != np.float16:
                raise ValueError(
                    f"{tensor} has values beyond the 65504 of float16, or is not finite: use dtype='bfloat16'"
                )
            self.broken.add(tensor)
        return part


def _read(
    path: Path,
    reader: _Reader,
    shapes: dict[str, jax.ShapeDtypeStruct],
    shardings: dict[str, NamedSharding],
    rows: np.ndarray,
    verbose: bool,
) -> Parameters:
    params = {}
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in shapes.values())
    with Progress(f"reading {path.name}", total, verbose) as progress:
        for name, leaf in shapes.items():
            sharding = shardings[name]
            # Devices that hold the same part get it from one reading; no two parts are on the host at once.
            holders: dict[tuple[Any, ...], list[Any]] = {}
            indices: dict[tuple[Any, ...], Index] = {}
            for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
                key = tuple((part.start, part.stop) for part in index or ())
                holders.setdefault(key, []).append(device)
                indices[key] = index or ()
            arrays = []
            for key, held_by in holders.items():
                part = reader.part(name, leaf, indices[key], rows)
                # A copy, as a step writes its result in the place of its parameters.
                arrays += [jax.device_put(part, device, may_alias=False) for device in held_by]
                jax.block_until_ready(arrays)
                progress.advance(leaf.size * leaf.dtype.itemsize / len(holders))
            params[name] = jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)
    return unflatten(params)
