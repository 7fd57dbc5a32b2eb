"""What a checkpoint, a run's folder or a Hugging Face folder says of its model: configuration, tokenizer, parameters.

Commands that take a model (`generate`, `convert`, `train --init-from`) read it here, so that all of them take the same.
"""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from shardlm._dtypes import full_name
from shardlm.checkpoint import DamagedCheckpoint, read_metadata, read_texts, restore
from shardlm.checkpoint.processes import exchange
from shardlm.checkpoint.record import absolute, is_checkpoint, steps_in
from shardlm.data import BPETokenizer, ByteTokenizer, kept
from shardlm.hub.files import folder_of, read_config, read_json
from shardlm.hub.tokenizer import read_tokenizer
from shardlm.layout import Layout
from shardlm.models.config import TransformerConfig
from shardlm.runtime.paths import local_path
from shardlm.train.engine import Parameters
from shardlm.train.program import resolve
from shardlm.train.transformer import TransformerProgram


def checkpoint_of(folder: str | os.PathLike) -> Path | None:
    """The checkpoint that a path names: itself, or the newest of a run's folder; None for any other folder."""
    path = local_path(folder, "folder")
    if is_checkpoint(absolute(path)):
        return path
    steps = steps_in(absolute(path))
    return path / str(steps[-1]) if steps else None


def load_tokenizer(folder: str | os.PathLike) -> Any:
    """The tokenizer of a model: what its checkpoint keeps, or the one of a Hugging Face folder.

    In a run of several processes all call this.

    Args:
        folder: a checkpoint ("runs/a/300"), a run's folder ("runs/a", of which the newest counts), or a Hugging Face
            folder.

    Returns:
        A `sl.data.ByteTokenizer`, a `sl.data.BPETokenizer`, or that of `sl.load_hf`; None where the model has none.

    Raises:
        FileNotFoundError, ValueError: there is no model.
        DamagedCheckpoint: its files are not what was written.
        ImportError: the packages of the extra hf are not installed, and the tokenizer needs them.

    Example:
        >>> tokenizer = sl.load_tokenizer("runs/a")
        >>> data = sl.data.load("more.txt", tokenizer)
    """
    step = checkpoint_of(folder)
    if step is None:
        path = folder_of(folder)
        return read_tokenizer(path, read_config(path))
    files = read_texts(step)
    return made_of(files) if files else None


def made_of(files: dict[str, bytes]) -> Any:
    """The tokenizer that `data.files_of` has made these files of."""
    kind = kept.kind_of(files)
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "bpe":
        return BPETokenizer(files["bpe.json"].decode("utf-8"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        made, said = read_tokenizer(folder, {}), read_json(folder / kept.NAME)
    if made is None:
        raise ValueError("this tokenizer has no tokenizer.json, which alone is read; its other files are kept with it")
    made.begin, made.ends = said["begin"], tuple(said["ends"])
    made.end = made.ends[0] if made.ends else None
    return made


def tokenizer_to_resume(directory: str | os.PathLike | None) -> Any:
    """The tokenizer of the newest whole checkpoint of a run; None where there is none, or none that keeps one."""
    steps = [] if directory is None else exchange(steps_in(absolute(directory)))[0]
    for step in reversed(steps):
        try:
            return load_tokenizer(local_path(directory, "checkpoint_dir") / str(step))
        except DamagedCheckpoint:  # which fit says, and goes on from an older one
            continue
    return None


def config_of(step: str | os.PathLike) -> TransformerConfig:
    """The configuration that a checkpoint was saved with.

    Raises:
        ValueError: it does not say.
    """
    saved = read_metadata(step)
    if "config" not in saved:
        raise ValueError(
            f"the checkpoint {step} does not say what its model is: fit saves that, or sl.save with the metadata "
            '{"config": config.to_dict()}'
        )
    return TransformerConfig.from_dict(saved["config"])


def load_checkpoint(
    step: str | os.PathLike,
    layout: Layout | str | None = None,
    dtype: str | None = None,
    devices: Sequence[Any] | None = None,
) -> tuple[TransformerConfig, Parameters]:
    """The model of a checkpoint on a layout without `pipe`, its optimizer left alone.

    Args:
        step: the checkpoint.
        layout, devices: as of a `Trainer`.
        dtype: of the computation; None is the checkpoint's own. Parameters stay in theirs.
    """
    config = config_of(step)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=full_name(dtype))
    layout, found = resolve(layout, devices)
    program = TransformerProgram.of(config, layout, found, "manual")
    shapes, shardings = program.plan.shapes, program.plan.shardings("stored")
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return program.config, restore(step, {"params": target}, rows=program.padded_rows, only="params")
