"""`python -m shardlm train --init-from FOLDER --save-hf FOLDER`: from a Hugging Face model to a Hugging Face model."""

import argparse
import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shardlm.checkpoint.processes import exchange, is_first
from shardlm.checkpoint.record import absolute, steps_in
from shardlm.hub.convert import add_ignore_fields
from shardlm.hub.files import Tensors, folder_of, read_config
from shardlm.hub.load import load_hf
from shardlm.hub.match import check_sizes
from shardlm.hub.origin import Origin
from shardlm.hub.registry import family_of_config, family_of_file
from shardlm.hub.save import save_hf
from shardlm.hub.tokenizer import HubTokenizer, read_tokenizer
from shardlm.hub.write import check_target
from shardlm.models.config import TransformerConfig

if TYPE_CHECKING:
    from shardlm.train.state import TrainState
    from shardlm.train.trainer import Trainer

WIDE = "float32"  # what parameters are trained in, whatever the files have: small updates are lost in bfloat16


def add_options(add: Callable[..., Any]) -> None:
    """Add `--save-hf` and `--ignore-fields`; `--init-from` stands where a preset may."""
    add("--save-hf", metavar="FOLDER", help="write the trained model here, as transformers and load_hf read it")
    add_ignore_fields(add)


def add_init_from(add: Callable[..., Any]) -> None:
    """Add `--init-from` to what it excludes."""
    add(
        "--init-from",
        metavar="FOLDER",
        help="train all parameters of a Hugging Face model further, in float32; its tokenizer unless --tokenizer",
    )


def read(options: argparse.Namespace, sizes: tuple[str, ...]) -> tuple[TransformerConfig, Any]:
    """The configuration of `--init-from`, as the options change it, and its tokenizer; no weights are read.

    Args:
        options: of the command line.
        sizes: those that a model which is there already does not let change.

    Returns:
        The configuration; the tokenizer, None where an option names another.

    Raises:
        ValueError: an option that changes what the weights are; a tokenizer is missing; what `load_hf` raises.
    """
    if given := [f"--{name.replace('_', '-')}" for name in sizes if getattr(options, name) is not None]:
        raise ValueError(f"--init-from {options.init_from} is of its own size: leave out {', '.join(given)}")
    path = folder_of(options.init_from)
    values = read_config(path)
    where = str(path / "config.json")
    family = family_of_file(values, where)
    config = family.config(values, where, options.ignore_fields)
    with Tensors(path) as files:  # before anything is made of the sizes that config.json says
        check_sizes(config, family, files, str(path))
    config = dataclasses.replace(config, origin=Origin.of_folder(path, values, options.ignore_fields).text())
    attention = config.attention
    if options.attention is not None:
        attention = dataclasses.replace(attention, implementation=options.attention)
    config = dataclasses.replace(
        config, dtype=options.dtype or WIDE, param_dtype=WIDE, dropout=options.dropout or 0.0, attention=attention
    )
    if options.tokenizer is not None:
        return config, None
    tokenizer = read_tokenizer(path, values)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer.json: say --tokenizer bytes, or bpe:SIZE")
    if tokenizer.end is None:
        raise ValueError(f"{path} does not say which id ends a text: give eos_token_id in config.json")
    return config, tokenizer


def check_vocabulary(config: TransformerConfig, tokenizer: Any, folder: str) -> None:
    """Raise ValueError if the tokenizer has ids that the model has not."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, and {folder} a vocabulary of {config.vocab_size}"
        )


def state(trainer: "Trainer", options: argparse.Namespace) -> "TrainState | None":
    """Where training starts: the folder's parameters on the trainer's layout; None where a checkpoint is found."""
    if options.init_from is None:
        return None
    if options.checkpoint_dir is not None and steps_in(absolute(options.checkpoint_dir)):
        return None
    _, params, _ = load_hf(options.init_from, trainer.layout, WIDE, ignore_fields=options.ignore_fields)
    return trainer.init(params)


def check_save(config: TransformerConfig, folder: str) -> None:
    """Raise ValueError, before the run, where `--save-hf` could not write its model after it."""
    target, problem = check_target(folder, overwrite=False), None
    if is_first():
        parent = next(path for path in target.parents if path.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            problem = f"--save-hf {folder} cannot be made: {parent} is no folder that can be written to"
    if problem := exchange(problem)[0]:
        raise ValueError(problem)
    family_of_config(config)


def save(trainer: "Trainer", trained: "TrainState", tokenizer: Any, folder: str) -> str:
    """Write the model; returns a line that says what was written."""
    can_be_written = isinstance(tokenizer, HubTokenizer) or hasattr(tokenizer, "definition")
    save_hf(folder, trainer.config, trainer.in_order(trained.params), tokenizer if can_be_written else None)
    without = "" if can_be_written else f", without a tokenizer, as there is no file for {type(tokenizer).__name__}"
    return f"saved {folder}{without}"
