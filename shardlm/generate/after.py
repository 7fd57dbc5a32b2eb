"""What to do with a model that was just trained: the lines that `python -m shardlm train` ends in."""

import argparse
import os
import shlex
from collections.abc import Sequence
from typing import Any

from shardlm._command_line import program
from shardlm.hub.registry import family_of_config
from shardlm.hub.tokenizer import can_be_written
from shardlm.models.config import TransformerConfig


def what_next(options: argparse.Namespace, config: TransformerConfig, tokenizer: Any, given: Sequence[str]) -> str:
    """Where the model is, and the commands that use it; or that it is gone, and the command that keeps the next one.

    Args:
        options: of `train`.
        config: of the model.
        tokenizer: of the run.
        given: the arguments that were given, for a command to repeat.
    """
    run, prompt = program(), shlex.quote(options.prompt)
    lines: list[tuple[str, str]] = []
    if options.checkpoint_dir is not None:
        where = shlex.quote(os.fspath(options.checkpoint_dir))
        head = f"the model and its tokenizer are in {options.checkpoint_dir}:"
        lines.append((f"{run} generate --model {where} --prompt {prompt}", "text of it"))
        if options.save_hf is None and _has_family(config):
            lines.append((f"{run} convert {where} my-model", "a Hugging Face folder of it"))
        lines.append((f"{run} checkpoints {where}", "what is kept"))
        lines.append((_changed(given, "--steps", str(2 * options.steps)), "go on"))
    elif options.save_hf is not None:
        head = f"the model is in {options.save_hf}:"
        if can_be_written(tokenizer):
            lines.append((f"{run} generate --model {shlex.quote(options.save_hf)} --prompt {prompt}", "text of it"))
        lines.append((f"{run} train --init-from {shlex.quote(options.save_hf)}"
                      + (" --tokenizer bytes" * (not can_be_written(tokenizer))), "train it further"))  # fmt: skip
    else:
        head = "this model was not kept. To keep it, train with --checkpoint-dir, and then ask it for text:"
        lines.append((_changed(given, "--checkpoint-dir", "runs/mine"), ""))
        lines.append((f"{run} generate --model runs/mine --prompt {prompt}", ""))
    width = max(len(command) for command, _ in lines)
    shown = (f"  {command:{width}}  # {why}" if why else f"  {command}" for command, why in lines)
    return "\n".join([head, *shown])


def _changed(given: Sequence[str], option: str, value: str) -> str:
    """The command again with one option set."""
    words: list[str] = []
    rest = iter(given)
    for word in rest:
        if word == option:
            next(rest, None)
        elif not word.startswith(f"{option}="):
            words.append(word)
    return f"{program()} {shlex.join([*words, option, value])}"


def _has_family(config: TransformerConfig) -> bool:
    """Whether a Hugging Face folder can be made of it."""
    try:
        family_of_config(config)
    except ValueError:
        return False
    return True
