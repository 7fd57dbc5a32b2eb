"""`python -m shardlm train --init-from FOLDER --save-hf FOLDER`: from a Hugging Face model to a Hugging Face model."""

import argparse
import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from shardlm.checkpoint import restore
from shardlm.checkpoint.processes import exchange, is_first
from shardlm.checkpoint.record import absolute, steps_in
from shardlm.data import BPETokenizer, ByteTokenizer
from shardlm.hub.convert import add_ignore_fields
from shardlm.hub.files import Tensors, folder_of, read_config
from shardlm.hub.load import load_hf
from shardlm.hub.match import check_sizes
from shardlm.hub.origin import Origin
from shardlm.hub.registry import family_of_config, family_of_file
from shardlm.hub.save import save_hf
from shardlm.hub.stored import checkpoint_of, config_of, load_tokenizer, tokenizer_to_resume
from shardlm.hub.tokenizer import can_be_written, read_tokenizer, why_not
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
        help="train all parameters of a Hugging Face model or of a checkpoint (runs/a) further, in float32; its "
        "tokenizer unless --tokenizer",
    )


def read(options: argparse.Namespace, sizes: tuple[str, ...]) -> tuple[TransformerConfig, Any]:
    """The configuration of `--init-from`, as the options change it, and its tokenizer; no weights are read.

    Args:
        options: of the command line; `init_from` is a Hugging Face folder, a checkpoint, or a run's folder of them.
        sizes: those that a model which is there already does not let change.

    Returns:
        The configuration; the tokenizer, None where an option names another.

    Raises:
        ValueError: an option that changes what the weights are; a tokenizer is missing; what `load_hf` raises.
    """
    if given := [f"--{name.replace('_', '-')}" for name in sizes if getattr(options, name) is not None]:
        raise ValueError(f"--init-from {options.init_from} is of its own size: leave out {', '.join(given)}")
    step, values = checkpoint_of(options.init_from), {}
    if step is not None:
        path, config = step, config_of(step)
        if config.lora is not None:
            raise ValueError(f"{path} has adapters: merge them first (sl.merge_lora), and save that")
    else:
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
    tokenizer = read_tokenizer(path, values) if step is None else load_tokenizer(step)
    if tokenizer is None:
        raise ValueError(
            f"{path} {'has no tokenizer.json' if step is None else 'keeps no tokenizer'}: say --tokenizer bytes, or "
            "bpe:SIZE"
        )
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
    if (step := checkpoint_of(options.init_from)) is not None:
        stored = jnp.dtype(config_of(step).param_dtype)
        like = trainer.abstract_state
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, stored, sharding=x.sharding), like.params)
        target = dataclasses.replace(like, params=params)
        params = restore(step, target, only="params", rows=trainer.padded_rows)
        return trainer.init(jax.tree.map(lambda x: x.astype(WIDE), params))
    _, params, _ = load_hf(options.init_from, trainer.layout, WIDE, ignore_fields=options.ignore_fields)
    return trainer.init(params)


def tokenizer_of_run(options: argparse.Namespace, start: Any) -> Any:
    """The tokenizer to train with: that of the run's checkpoints, where there are some, whatever made it then.

    Args:
        options: of the command line.
        start: the tokenizer of `--init-from`, or None.

    Raises:
        ValueError: `--tokenizer` names another than the checkpoints'.
    """
    asked, stored = options.tokenizer, tokenizer_to_resume(options.checkpoint_dir)
    if stored is None:
        return start or asked or "bytes"
    kind, _, size = (asked or "").partition(":")
    same = {"bytes": isinstance(stored, ByteTokenizer), "bpe": isinstance(stored, BPETokenizer)}
    fits = same.get(kind, False) and (not size.isdecimal() or stored.vocab_size <= int(size))
    if asked is not None and not fits:
        raise ValueError(
            f"--tokenizer {asked}, and the checkpoints in {options.checkpoint_dir} are of {stored!r}: leave "
            "--tokenizer out to go on, or start anew in another --checkpoint-dir"
        )
    return stored


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
    written = tokenizer if can_be_written(tokenizer) else None
    save_hf(folder, trainer.config, trainer.in_order(trained.params), written)
    without = "" if written is not None else f", without a tokenizer, {why_not(tokenizer)}"
    return f"saved {folder}{without}"
