"""`python -m shardlm.bench cold`: how long until the first step is done, and how long the following steps take."""

import argparse
import os
import subprocess
import sys
import time
from typing import Any

import jax

import shardlm as sl
from shardlm.bench import model
from shardlm.bench.timing import interleaved, machine

_HELP = """
Start a fresh process that trains a small decoder on fake CPU devices, and time it.

first step   seconds from the start of the command to the end of its first step: starting Python, importing, planning,
             making the parameters, compiling and running the step, each with its share
step         time from the call of Trainer.step, with a batch of NumPy arrays, until the new state is there; median over
             the steps after the first, with the lower and upper quartile behind it

Fake devices share this machine's cores, so a step's time is the work of all devices together.
"""

_SIZES: dict[str, Any] = {"num_layers": 4, "d_model": 128, "num_heads": 4, "d_ff": 512, "vocab_size": 512}


def add(commands: Any) -> None:
    """Add the command to an argparse object of subcommands."""
    parser = commands.add_parser(
        "cold",
        help="seconds from a command's start to the end of its first step on 8 fake CPU devices, and the step time",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    model.add_sizes(parser)
    parser.add_argument("--layout", default="data=2,fsdp=2,tensor=2", help="default data=2,fsdp=2,tensor=2")
    parser.add_argument("--batch-size", type=int, default=8, help="rows over all devices (default 8)")
    parser.add_argument("--sequence", type=int, default=128, help="tokens per row (default 128)")
    parser.add_argument("--steps", type=int, default=30, help="steps timed after the first (default 30)")
    parser.add_argument("--repeats", type=int, default=1, help="fresh processes, one after another (default 1)")
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)  # given to the process that trains


def run(options: argparse.Namespace) -> int:
    """Start the processes; as such a process, train and print."""
    if options.began is not None:
        return _train(options)
    command = [sys.executable, "-m", "shardlm.bench", "cold", "--layout", options.layout, "--steps", str(options.steps)]
    command += ["--batch-size", str(options.batch_size), "--sequence", str(options.sequence)]
    command += model.as_arguments(model.given_sizes(options))
    for _ in range(options.repeats):
        began = ["--began", repr(time.time())]
        subprocess.run(command + began, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True)
    return 0


def _train(options: argparse.Namespace) -> int:
    marks = {"start": options.began, "import": time.time()}
    layout = sl.Layout.parse(options.layout)
    sl.fake_devices(layout.num_devices)
    jax.config.update("jax_enable_compilation_cache", False)  # a result from disk would be no cold start
    config = sl.TransformerConfig(**(_SIZES | model.given_sizes(options)))
    trainer = sl.Trainer(config, layout, devices=jax.devices()[: layout.num_devices])
    marks["plan"] = time.time()
    state = jax.block_until_ready(trainer.init())
    marks["parameters"] = time.time()
    batch = model.random_batch(config, options.batch_size, options.sequence)
    state = jax.block_until_ready(trainer.step(state, batch)[0])
    marks["step"] = time.time()

    def step() -> Any:
        nonlocal state
        state, metrics = trainer.step(state, batch)
        return state, metrics

    [steps] = interleaved({"step": step}, options.steps).values()
    names = list(marks)
    shares = ", ".join(
        f"{name} {marks[name] - marks[before]:.1f}" for before, name in zip(names[:-1], names[1:], strict=True)
    )
    print(f"{machine(jax.devices()[0])}; layout {layout} on {layout.num_devices} fake devices")
    print(f"{model.describe(config)}; batch {options.batch_size} x {options.sequence}")
    print(f"first step {marks['step'] - marks['start']:.1f} s after the start ({shares})")
    print(f"step       {steps.show('ms', 1e3)}, {options.steps} steps", flush=True)
    return 0
