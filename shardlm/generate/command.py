"""`python -m shardlm generate`: text from a model in a folder, to the terminal as it is made."""

import argparse
import os
import sys
import time
from typing import Any

import jax
import numpy as np

from shardlm._text import width
from shardlm.data import ByteTokenizer
from shardlm.generate.api import generate
from shardlm.hub.convert import add_ignore_fields
from shardlm.hub.stored import checkpoint_of, load_checkpoint, load_tokenizer
from shardlm.layout import Layout
from shardlm.models.config import TransformerConfig
from shardlm.runtime import fake_devices
from shardlm.runtime.paths import local_path


def add(commands: Any, formatter: Any) -> None:
    """Add the command to an argparse object of subcommands, with a class that formats its help."""
    command = commands.add_parser(
        "generate",
        help="continue text with a model",
        description="Continue text with a model of a Hugging Face folder, or with one that `python -m shardlm train "
        "--checkpoint-dir` saved, with the tokenizer that is kept with it. One prompt is shown as it "
        "is made, several are at the end.",
        formatter_class=formatter,
    )
    command.set_defaults(run=run)
    option = command.add_argument
    option("--model", required=True, help="a folder with config.json and safetensors, or a checkpoint folder")
    option("--prompt", action="append", required=True, help="text to continue; may be given several times")
    option("--layout", help='"data=2,tensor=4", without pipe (default: one device)')
    option("--max-new-tokens", type=int, default=128, help="tokens to make at most")
    option("--temperature", type=float, default=0.7, help="0 takes the likeliest token")
    option("--top-k", type=int, help="only the k likeliest tokens")
    option("--top-p", type=float, help="only the likeliest tokens of so much probability together")
    option("--min-p", type=float, help="only tokens at least so many times as likely as the likeliest")
    option("--repetition-penalty", type=float, help="divides the logits of tokens that were there before")
    option("--num-beams", type=int, default=1, help="search with so many beams; with --temperature 0")
    option("--seed", type=int, default=0, help="of the first prompt's draws; the next one's is one more")
    option("--stop", action="append", help="a string that ends the text; may be given several times")
    option("--dtype", help="of the computation: float32 or bfloat16 (default: the model's)")
    option("--batch-size", type=int, help="prompts at a time (default: all, at most 64)")
    add_ignore_fields(option)


def run(options: argparse.Namespace) -> int:
    """Generate and print; the exit status is 0."""
    layout = _layout(options.layout)
    config, params, tokenizer, prompts = _load(options, layout)
    settings: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams",
                     "stop", "batch_size")
    }  # fmt: skip
    settings |= {"tokenizer": tokenizer, "seeds": options.seed}
    if len(prompts) > 1 or options.num_beams > 1:
        result = generate(config, params, prompts, layout, **settings)
        for prompt, text in zip(options.prompt, result.texts, strict=True):
            print(f"{prompt}{text}\n{'-' * min(80, width() or 80)}")
        print(result, file=sys.stderr)
        return 0
    print(options.prompt[0], end="", flush=True)
    began, counts, times = time.perf_counter(), [], []
    for piece in generate(config, params, prompts, layout, stream=True, **settings):
        print(piece.text, end="", flush=True)
        counts.append(len(piece.tokens))
        times.append(time.perf_counter() - began)
    said = f"{sum(counts)} tokens; the first after {times[0]:.2f} s, compilation included"
    if len(times) > 2:  # the second piece waits for the other program to be compiled
        said += f"; {sum(counts[2:]) / (times[-1] - times[1]):,.0f} tokens/s from token {sum(counts[:2]) + 1} on"
    print(f"\n{said}", file=sys.stderr)
    return 0


def _layout(text: str | None) -> Layout | None:
    if text is None:
        return None
    layout = Layout.parse(text)
    unfilled = -1 in layout.sizes.values()
    try:
        fake_devices(8 if unfilled else layout.num_devices)
    except RuntimeError as error:  # it came too late; this is no command line of its own
        raise ValueError(str(error)) from error
    return layout.resolve(len(jax.devices()))


def _load(options: argparse.Namespace, layout: Layout | None) -> tuple[TransformerConfig, Any, Any, list[Any]]:
    """The model, its tokenizer, and the prompts as this kind of model takes them."""
    folder = local_path(options.model, "--model")
    if os.path.lexists(folder / "config.json"):
        from shardlm.hub import load_hf  # pyright: ignore[reportMissingImports]  needs packages of an extra

        config, params, tokenizer = load_hf(folder, layout, options.dtype, ignore_fields=options.ignore_fields)
        if tokenizer is None:
            raise ValueError(f"{folder} has no tokenizer: call sl.generate in Python, with token ids")
        return config, params, tokenizer, options.prompt
    if options.ignore_fields:
        raise ValueError(f"--ignore-fields is of a Hugging Face folder, and {folder} has no config.json")
    step = checkpoint_of(folder)
    if step is None:
        raise ValueError(f"{folder} holds no model: no config.json of Hugging Face, and no checkpoint of shardlm")
    tokenizer = load_tokenizer(step)
    config, params = load_checkpoint(step, layout, options.dtype)
    if tokenizer is None:
        tokenizer = ByteTokenizer()
        if config.vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"{step} keeps no tokenizer, and its model has {config.vocab_size} token ids, the byte tokenizer "
                f"{tokenizer.vocab_size}: call sl.generate(..., tokenizer=...) in Python, or save the checkpoint "
                "with its tokenizer, by fit(..., tokenizer=) or sl.save(..., tokenizer=)"
            )
    return config, params, tokenizer, [prompt_ids(tokenizer, prompt) for prompt in options.prompt]


def prompt_ids(tokenizer: Any, text: str) -> np.ndarray:
    """The ids of a prompt, int32[n], for a model trained by shardlm: it begins as the texts of training did."""
    first = getattr(tokenizer, "begin", tokenizer.end)
    return np.concatenate([[] if first is None else [first], tokenizer.encode(text)]).astype(np.int32)
