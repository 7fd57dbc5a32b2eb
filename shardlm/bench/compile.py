"""`python -m shardlm.bench compile`: how long the step takes to trace and compile, and how that grows with depth."""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

import shardlm as sl
from shardlm.bench import model
from shardlm.bench.timing import Sample, machine

_HELP = """
Time tracing and compiling the training step at several depths. Nothing is run, and no array is made.

build     Trainer(...): shapes and shardings of the parameters and of the optimizer's state
trace     from Python to JAX's jaxpr
lower     from the jaxpr to StableHLO, which XLA reads
compile   by XLA
total     trace + lower + compile
ratio     total at each depth over total at the first, round by round

Each value comes from a fresh process; depths take turns. Medians, with the lower and upper quartile behind them.
"""

_STAGES = ("build", "trace", "lower", "compile")
_SIZES: dict[str, Any] = {"d_model": 256, "num_heads": 8, "num_kv_heads": 4, "d_ff": 768, "vocab_size": 2048}


def add(commands: Any) -> None:
    """Add the command to an argparse object of subcommands."""
    parser = commands.add_parser(
        "compile",
        help="time to trace and compile the step at several depths, and their ratio",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 48], help="depths (default 4 48)")
    model.add_sizes(parser, leave_out=("layers",))
    parser.add_argument(
        "--layout", default="data=1", help="fake CPU devices are made where it needs several (default: one)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="rows (default 8)")
    parser.add_argument("--sequence", type=int, default=128, help="tokens per row (default 128)")
    parser.add_argument("--repeats", type=int, default=3, help="processes per depth (default 3)")
    parser.add_argument("--same-process", action="store_true", help="no fresh processes: clear JAX's caches in between")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Measure and print; as a child, measure the one depth given and print JSON."""
    if options.child:
        print(json.dumps(measure(options, options.layers[0])))
        return 0
    rounds: list[dict[int, dict[str, float]]] = []
    for _ in range(options.repeats):
        rounds.append({layers: _measure_apart(options, layers) for layers in options.layers})
    print(f"{machine(_devices(options)[0])}; layout {options.layout}")
    totals = {}
    for layers in options.layers:
        for stage in _STAGES:
            print(f"{layers:4} layers  {stage:8} {Sample(tuple(r[layers][stage] for r in rounds)).show('s')}")
        totals[layers] = Sample(tuple(sum(r[layers][stage] for stage in _STAGES[1:]) for r in rounds))
        print(f"{layers:4} layers  {'total':8} {totals[layers].show('s')}")
    first = options.layers[0]
    for layers in options.layers[1:]:
        print(f"ratio of {layers} to {first} layers: {(totals[layers] / totals[first]).show()}")
    return 0


def measure(options: argparse.Namespace, layers: int) -> dict[str, float]:
    """Seconds of each stage at one depth, in this process."""
    devices = _devices(options)
    config = sl.TransformerConfig(num_layers=layers, **(_SIZES | model.given_sizes(options)))
    jax.config.update("jax_enable_compilation_cache", False)  # a result from disk would be no compile time
    times = [time.perf_counter()]
    trainer = sl.Trainer(config, sl.Layout.parse(options.layout), devices=devices)
    times.append(time.perf_counter())
    shape, sharding = (options.batch_size, options.sequence), trainer.batch_sharding
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}
    traced = trainer._step.trace(trainer.abstract_state, batch)  # the very function that Trainer.step calls
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    lowered.compile()
    times.append(time.perf_counter())
    return {stage: end - start for stage, start, end in zip(_STAGES, times[:-1], times[1:], strict=True)}


def _measure_apart(options: argparse.Namespace, layers: int) -> dict[str, float]:
    if options.same_process:
        jax.clear_caches()
        return measure(options, layers)
    command = [sys.executable, "-m", "shardlm.bench", "compile", "--child", "--layers", str(layers)]
    command += [
        "--layout",
        options.layout,
        "--batch-size",
        str(options.batch_size),
        "--sequence",
        str(options.sequence),
    ]
    command += model.as_arguments(model.given_sizes(options))
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(child.stdout.splitlines()[-1])


def _devices(options: argparse.Namespace) -> list[Any]:
    count = sl.Layout.parse(options.layout).num_devices
    if count > 1:
        sl.fake_devices(count)
    return jax.devices()[:count]
