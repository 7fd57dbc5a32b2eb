"""`python -m shardlm.bench checkpoint`: how long a save keeps a run from its next step."""

import argparse
import tempfile
import time
from typing import Any

import jax
import optax

import shardlm as sl
from shardlm._text import size
from shardlm.bench.timing import Sample, machine
from shardlm.checkpoint import Checkpoints

_HELP = """
Save a training state to a folder that is removed afterwards, and load it again.

synchronous   time of sl.save: the checkpoint is complete, flushed to the disk and hashed when it returns.
blocked       time until Checkpoints.save returns, as in Trainer.fit: the arrays have been copied off the device and may
              be overwritten. No save is running when it is called.
ratio         blocked over synchronous, round by round. Bar: below 0.1.
in all        time until the save in the background is complete.
restore       time of sl.restore: every file hashed, the arrays loaded, their digests compared.

Each number is a median, with the lower and upper quartile behind it.
"""


def add(commands: Any) -> None:
    """Add the command to an argparse object of subcommands."""
    parser = commands.add_parser(
        "checkpoint",
        help="how long a save in the background blocks the run, against one that is waited for",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--megabytes", type=int, default=100, help="of parameters and moments (default 100)")
    parser.add_argument("--layout", default="fsdp=1", help="default: one device")
    parser.add_argument("--repeats", type=int, default=7, help="values per time (default 7)")
    parser.add_argument("--directory", help="on the disk to measure (default: the system's temporary folder)")


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    layout = sl.Layout.parse(options.layout)
    if layout.num_devices > 1:
        sl.fake_devices(layout.num_devices)
    devices = jax.devices()[: layout.num_devices]
    print(machine(devices[0]), flush=True)
    trainer = sl.Trainer(_config(options.megabytes), layout, optax.adam(1e-3), devices=devices)
    state = trainer.init()
    # Moments of an untrained model are zeros, which compress to nothing.
    state = jax.block_until_ready(jax.jit(lambda s: s.__class__(s.step, s.params, _filled(s), s.variables))(state))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(f"{size(total)} in {len(jax.tree.leaves(state))} arrays; layout {layout}", flush=True)
    times = measure(trainer, state, options.repeats, options.directory)
    for name, sample in times.items():
        print(f"{name:12} {sample.show('ms', 1e3)}")
    print(f"{'ratio':12} {(times['blocked'] / times['synchronous']).show()}")
    print(machine(devices[0]))
    return 0


def measure(trainer: sl.Trainer, state: sl.TrainState, repeats: int, directory: str | None) -> dict[str, Sample]:
    """Seconds by name."""
    seconds: dict[str, list[float]] = {"synchronous": [], "blocked": [], "in all": [], "restore": []}
    with (
        tempfile.TemporaryDirectory(prefix="shardlm-bench-", dir=directory) as folder,
        Checkpoints(f"{folder}/run", keep=1) as checkpoints,
    ):
        for i in range(repeats + 1):
            clock = [time.perf_counter()]
            sl.save(f"{folder}/one", state, overwrite=True)
            clock.append(time.perf_counter())
            checkpoints.save(i, state)
            clock.append(time.perf_counter())
            checkpoints.wait()
            clock.append(time.perf_counter())
            jax.block_until_ready(sl.restore(f"{folder}/one", trainer))
            clock.append(time.perf_counter())
            if i > 0:  # the first round compiles
                values = clock[1] - clock[0], clock[2] - clock[1], clock[3] - clock[1], clock[4] - clock[3]
                for name, value in zip(seconds, values, strict=True):
                    seconds[name].append(value)
    return {name: Sample(tuple(values)) for name, values in seconds.items()}


def _config(megabytes: int) -> sl.TransformerConfig:
    """A model whose parameters and two moments take about so much, in float32."""
    layers, vocabulary = 4, 2048
    width = 32
    while 12 * (layers * 8 * (width + 32) ** 2 + 2 * vocabulary * (width + 32)) <= megabytes * 1e6:
        width += 32
    return sl.TransformerConfig(
        num_layers=layers, d_model=width, num_heads=width // 32, num_kv_heads=width // 32, head_dim=32,
        d_ff=(width * 4 // 3) // 8 * 8, vocab_size=vocabulary,
    )  # fmt: skip


def _filled(state: sl.TrainState) -> Any:
    """The optimizer's state with every moment the parameter it belongs to."""
    adam, *rest = state.opt_state
    return (adam._replace(mu=state.params, nu=state.params), *rest)
