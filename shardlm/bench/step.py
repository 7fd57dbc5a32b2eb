"""`python -m shardlm.bench step`: a training step on one device against the same one written by hand, and dispatch."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

import shardlm as sl
from shardlm.bench import model, reference
from shardlm.bench.timing import Sample, interleaved, machine
from shardlm.train.metrics import model_flops_per_token, peak_flops

_HELP = """
Time Trainer.step on one device against the same step written by hand in plain JAX (shardlm/bench/reference.py).

step, reference   time from the call until the new state and the loss are there, per step. The two take turns.
ratio             of the two, round by round: 1.03 means that ours takes 3 % longer.
tokens/s          tokens of the batch over the step's median time.
of peak           model FLOPs (6 per multiplying parameter and token, 12 L H D S for attention, recomputation not
                  counted) over the device's peak in this dtype, where that is known.
dispatch          time until the call returns, with the device idle before it and a model of 1 layer of width 8 that
                  computes next to nothing: the Python and JAX time that every step costs the host. "placed" is a batch
                  that Trainer.place returned, "host" one of NumPy arrays, which is checked value by value and copied.

Each number is a median, with the lower and upper quartile behind it.
"""

# Sizes by platform: enough work that a step takes a good part of a second there.
_CPU: dict[str, Any] = {
    "num_layers": 4,
    "d_model": 256,
    "num_heads": 8,
    "num_kv_heads": 4,
    "d_ff": 768,
    "vocab_size": 2048,
}
_ACCELERATOR: dict[str, Any] = {
    "num_layers": 8,
    "d_model": 2048,
    "num_heads": 16,
    "num_kv_heads": 8,
    "d_ff": 5632,
    "vocab_size": 32_768,
}
_TINY: dict[str, Any] = {"num_layers": 1, "d_model": 8, "num_heads": 2, "num_kv_heads": 1, "d_ff": 16, "vocab_size": 32}


def add(commands: Any) -> None:
    """Add the command to an argparse object of subcommands."""
    parser = commands.add_parser(
        "step",
        help="step time against a hand-written step, tokens/s, utilisation, and dispatch time, on one device",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--preset", help="a name in sl.presets of a plain Llama (default: sizes by platform)")
    model.add_sizes(parser)
    parser.add_argument("--batch-size", type=int, help="rows (default 8)", default=8)
    parser.add_argument("--sequence", type=int, help="tokens per row (default: 2048 on an accelerator, 128 on a CPU)")
    parser.add_argument("--dtype", help="of the computation (default: bfloat16 on an accelerator, float32 on a CPU)")
    parser.add_argument("--attention", choices=("xla", "cudnn"), help="default: cudnn on an NVIDIA GPU, else xla")
    parser.add_argument("--repeats", type=int, default=20, help="values per step time (default 20)")
    parser.add_argument("--burst", type=int, help="steps per value, the last one waited for (default: 5, on a CPU 1)")
    parser.add_argument("--calls", type=int, default=300, help="values per dispatch time (default 300)")


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    device = jax.devices()[0]
    accelerator = device.platform != "cpu"
    config = configure(options, device)
    sequence = options.sequence or (2048 if accelerator else 128)
    burst = options.burst or (5 if accelerator else 1)
    print(f"{machine(device)}\n{model.describe(config)}; batch {options.batch_size} x {sequence}", flush=True)

    pair = Pair(config, options.batch_size, sequence, device)
    seconds = {
        name: Sample(tuple(value / burst for value in sample.values))
        for name, sample in interleaved(pair.bursts(burst), options.repeats).items()
    }
    tokens, peak = options.batch_size * sequence, peak_flops(device, config.dtype)
    for name, sample in seconds.items():
        rate = tokens / sample.median
        line = f"{name:10} {sample.show('ms', 1e3, 4)}, {rate:,.0f} tokens/s"
        print(line + (f", {rate * model_flops_per_token(config, sequence) / peak:.1%} of peak" if peak else ""))
    print(f"ratio      {(seconds['step'] / seconds['reference']).show(digits=4)}")

    config = sl.TransformerConfig(**_TINY)
    for name, sample in dispatch(config, device, options.calls).items():
        print(f"dispatch   {sample.show('ms', 1e3)}: {name}")
    print(machine(device))
    return 0


def configure(options: argparse.Namespace, device: Any) -> sl.TransformerConfig:
    """The model to run on `device`.

    Raises:
        ValueError: it is not one that the reference computes.
    """
    accelerator = device.platform != "cpu"
    sizes = model.given_sizes(options)
    if options.preset is not None:
        config = sl.presets.get(options.preset, **sizes)
    else:
        config = sl.TransformerConfig(**((_ACCELERATOR if accelerator else _CPU) | sizes))
    attention = options.attention or ("cudnn" if device.device_kind.startswith("NVIDIA") else "xla")
    config = dataclasses.replace(
        config,
        dtype=options.dtype or ("bfloat16" if accelerator else "float32"),
        attention=dataclasses.replace(config.attention, implementation=attention),
    )
    if different := model.differences_from_llama(config):
        raise ValueError(f"the reference computes a plain Llama, and this model has {', '.join(different)}")
    return config


class Pair:
    """Trainer.step and the hand-written step: same device, model, batch and optimizer, each with a state of its own.

    Both are compiled, and have made one update whose losses agree, when it is built.
    """

    def __init__(self, config: sl.TransformerConfig, batch_size: int, sequence: int, device: Any):
        optimizer = sl.adamw(3e-4, steps=1000)
        self.trainer = sl.Trainer(config, optimizer=optimizer, devices=[device])
        self.host = model.random_batch(config, batch_size, sequence)
        self.batch = self.trainer.place(self.host)
        self.state = self.trainer.init()
        self.reference_step = reference.make_step(reference_model(config), optimizer)
        # Copies, as each side donates its own; on the device itself, as arrays of someone who knows of no mesh.
        self.params = jax.device_put(self.state.params, device, may_alias=False)
        self.opt_state = jax.device_put(optimizer.init(self.params), device)
        self.reference_batch = jax.device_put(self.batch, device, may_alias=False)
        check_agreement(float(self.step()[1]["loss"]), float(self.reference()[2]), config.dtype)

    def step(self) -> Any:
        """One update by the trainer."""
        self.state, metrics = self.trainer.step(self.state, self.batch)
        return self.state, metrics

    def step_from_host(self) -> Any:
        """One update by the trainer, from a batch of NumPy arrays."""
        self.state, metrics = self.trainer.step(self.state, self.host)
        return self.state, metrics

    def reference(self) -> Any:
        """One update by hand."""
        self.params, self.opt_state, loss = self.reference_step(self.params, self.opt_state, self.reference_batch)
        return self.params, self.opt_state, loss

    def bursts(self, length: int) -> dict[str, Callable[[], Any]]:
        """Calls that make `length` updates."""
        return {
            "step": lambda: [self.step() for _ in range(length)][-1],
            "reference": lambda: [self.reference() for _ in range(length)][-1],
        }


def check_agreement(ours: float, by_hand: float, dtype: str) -> None:
    """Raise ArithmeticError unless the two losses are the same, to the rounding of `dtype`."""
    tolerance = 1e-5 if dtype in ("float32", "float64") else 1e-2
    if not abs(ours - by_hand) <= tolerance * abs(by_hand):
        raise ArithmeticError(
            f"the two steps compute different losses, {ours} and {by_hand}: there is no ratio to give"
        )


def reference_model(config: sl.TransformerConfig) -> reference.Model:
    """`config` as the reference takes it."""
    assert isinstance(config.positions, sl.Rope), config.positions
    return reference.Model(
        vocab_size=config.vocab_size,
        theta=config.positions.theta,
        epsilon=config.norm.epsilon,
        dtype=config.dtype,
        cudnn=config.attention.implementation == "cudnn",
    )


def dispatch(config: sl.TransformerConfig, device: Any, calls: int) -> dict[str, Sample]:
    """Seconds until a call returns, the device idle before it, for a model that computes next to nothing."""
    pair = Pair(config, 1, 8, device)
    kinds = {
        "Trainer.step, placed batch": pair.step,
        "Trainer.step, host batch": pair.step_from_host,
        "reference": pair.reference,
    }
    interleaved(kinds, 3)  # warm
    return interleaved(kinds, calls, until_done=False)
