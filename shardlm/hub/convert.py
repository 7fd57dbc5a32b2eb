"""`python -m shardlm convert`: a Hugging Face folder or a checkpoint to a Hugging Face folder, with no accelerator."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shardlm._dtypes import full_name
from shardlm.hub.files import DTYPES, Tensors, folder_of, read_config
from shardlm.hub.finite import all_finite, warn_of
from shardlm.hub.match import match, one_dtype
from shardlm.hub.registry import family_of_file
from shardlm.hub.save import save_hf
from shardlm.hub.stored import checkpoint_of, load_checkpoint, load_tokenizer
from shardlm.hub.tokenizer import can_be_written, text_files, why_not
from shardlm.hub.write import Output, check_target, parse_size, write_folder
from shardlm.models.transformer import count_parameters
from shardlm.runtime.paths import local_path


def add_command(commands: Any) -> None:
    """Add `convert` to the command line's parsers."""
    command = commands.add_parser(
        "convert",
        help="write a model as a Hugging Face folder",
        description="Write a checkpoint that training saved, or a Hugging Face folder, as a Hugging Face folder: to "
        "hand a trained model on, to store one in another dtype, or in files of another size.",
    )
    command.set_defaults(run=convert)
    add = command.add_argument
    add(
        "source",
        metavar="SRC",
        help="a Hugging Face folder, or a checkpoint (runs/a/300) of a sl.Transformer, or a "
        "run's folder (runs/a), of which the newest counts",
    )
    add("target", metavar="DST", help="the folder to make")
    add(
        "--dtype", help="of the parameters: bfloat16, float16 or float32, or short: bf16, f16, f32 (default: as in SRC)"
    )
    add("--max-shard-size", default="5GB", help="bytes of tensors in a file (default: 5GB)")
    add("--overwrite", action="store_true", help="replace the model at DST")
    add(
        "--like",
        metavar="FOLDER",
        help="the Hugging Face folder that a checkpoint's model came from: its tokenizer, chat template and the rest "
        "of its config.json go to DST too",
    )
    add_ignore_fields(add)


def add_ignore_fields(add: Callable[..., Any]) -> None:
    """Add `--ignore-fields` to a command that reads a Hugging Face folder."""
    add(
        "--ignore-fields",
        metavar="NAMES",
        type=lambda text: tuple(filter(None, (name.strip() for name in text.split(",")))),
        default=(),
        help="fields of its config.json, with commas between them, that shardlm does not know and that change nothing",
    )


def convert(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    dtype = full_name(options.dtype)
    legal = {str(known): known for known in DTYPES.values()}
    if dtype is not None and dtype not in legal:
        raise ValueError(f"--dtype {options.dtype}; it is one of bf16, f16, f32, {', '.join(legal)}")
    parse_size(options.max_shard_size)
    check_target(options.target, options.overwrite)
    source = local_path(options.source, "SRC")
    step = checkpoint_of(source)
    if step is not None or not source.is_dir():
        if options.ignore_fields:
            raise ValueError(f"--ignore-fields is of a Hugging Face folder, and {source} is a checkpoint")
        what, without = _checkpoint(step or source, options, dtype)
    else:
        if options.like is not None:
            raise ValueError(f"--like is for a checkpoint, and {source} is a Hugging Face folder: its own files go out")
        what, without = _folder(source, options, None if dtype is None else legal[dtype]), ""
    print(f"{what} from {options.source} to {options.target}{without}")
    return 0


def _folder(source: Path, options: argparse.Namespace, dtype: np.dtype | None) -> str:
    """Tensor by tensor, and all that belongs to the model's text as it is."""
    path = folder_of(source)
    values = read_config(path)
    where = str(path / "config.json")
    family = family_of_file(values, where)
    config = family.config(values, where, options.ignore_fields)
    target = check_target(options.target, options.overwrite)
    if target == path:
        raise ValueError(f"{target} is what is read: give another folder")
    with Tensors(path) as files:
        names = match(config, family, files, str(path))
        wanted = one_dtype(files, names, str(path)) if dtype is None else dtype
        broken: set[str] = set()
        outputs = [
            Output(tensor.name, tensor.shape, wanted, _cast(files, names.found[tensor.name], wanted, broken))
            for tensor in names.tensors
        ]
        texts = text_files(path)
        # The file's own fields, whose meaning is known, and not ours: the length of training's context is in none.
        stated = values | {"architectures": [family.architectures[0]], "dtype": str(wanted), "torch_dtype": str(wanted)}
        write_folder(target, outputs, stated, texts, options.max_shard_size, verbose=True, overwrite=options.overwrite)
    warn_of(broken, str(target), str(wanted), "was written")
    return f"{len(outputs)} tensors of a {family.model_type} in {wanted}"


def _cast(files: Tensors, name: str, dtype: np.dtype, broken: set[str]) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        value = files.read(name)
        with np.errstate(over="ignore"):  # it is looked for
            cast = value.astype(dtype)
        if not all_finite(cast):
            if dtype == np.float16 and value.dtype != np.float16:
                raise ValueError(f"{name} has values beyond the 65504 of float16, or is not finite: use --dtype bf16")
            broken.add(name)
        return cast

    return make


def _checkpoint(source: Path, options: argparse.Namespace, dtype: str | None) -> tuple[str, str]:
    """By way of the parameters, without the optimizer's state, on the CPU."""
    config, params = load_checkpoint(source, devices=jax.devices("cpu")[:1])
    tokenizer = load_tokenizer(source)
    if dtype is not None:
        params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)
        config = dataclasses.replace(config, param_dtype=dtype)
    written = tokenizer if can_be_written(tokenizer) else None
    overwrite, like = options.overwrite, options.like
    save_hf(options.target, config, params, written, options.max_shard_size, overwrite=overwrite, like=like)
    without = "" if written is not None else f", without a tokenizer, {why_not(tokenizer)}"
    return f"{count_parameters(config):,} parameters in {config.param_dtype}", without
