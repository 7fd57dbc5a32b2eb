"""The bench of generation: tokens/s of prefill and decode, the fraction of the memory's limit, and dispatch."""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import shardlm as sl
from shardlm._text import size
from shardlm.bench import model
from shardlm.bench.step import _ACCELERATOR, _CPU, _TINY
from shardlm.bench.timing import Sample, interleaved, machine
from shardlm.generate.loop import STEPS, Programs, fresh, programs
from shardlm.generate.model import ShardedModel
from shardlm.inspect import hardware
from shardlm.models.transformer import count_parameters

_HELP = """
Time the two programs of sl.generate on one device, with random parameters.

prefill    prompts of --prompt tokens in all rows, taken in --chunk tokens at a time: tokens of prompts over the time.
decode     a token of every row per step, in loops of up to 64 steps on the device: tokens made over the time.
limit      the bytes that a step has to read at least, over the memory's bandwidth: all parameters but the embedding
           table's other rows (the whole of it where it is the head too), and keys and values of the tokens that the
           rows have. The bandwidth is the maker's peak where the device is known, else the best of ten copies, measured
           here, bytes read and written together. A model that fits the processor's caches is faster.
of limit   that time over the decode step's median.
dispatch   time until the call of a one-step decode returns, with the device idle before it and a model that computes
           next to nothing: what each call costs the host. sl.generate makes up to 64 tokens of a row per call.

Each number is a median, with the lower and upper quartile behind it.
"""
_COPIED = 1 << 28  # bytes of the array whose copy is timed


def add(commands: Any) -> None:
    """Add the command to an argparse object of subcommands."""
    parser = commands.add_parser(
        "generate",
        help="tokens/s of prefill and decode, against the memory's bandwidth, and dispatch time, on one device",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--preset", help="a name in sl.presets (default: sizes by platform)")
    model.add_sizes(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="rows (default 8)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt (default 256)")
    parser.add_argument("--new", type=int, default=128, help="tokens made after it (default 128)")
    parser.add_argument("--chunk", type=int, default=64, help="prompt tokens in one pass (default 64)")
    parser.add_argument("--dtype", help="of computation and parameters (default: bfloat16, on a CPU float32)")
    parser.add_argument("--repeats", type=int, default=10, help="values per time (default 10)")
    parser.add_argument("--calls", type=int, default=300, help="values per dispatch time (default 300)")


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    device = jax.devices()[0]
    config = configure(options, device)
    length = options.prompt + options.new
    print(f"{machine(device)}\n{model.describe(config)}; {options.batch_size} rows of {length} tokens", flush=True)
    bench = Bench(config, options.batch_size, length, options.chunk, device)
    print(bench.programs.model.describe(options.batch_size, length, bench.programs.chunk))
    prefill, decode = bench.measure(options.prompt, options.new, options.repeats)
    rate = options.batch_size * options.prompt / prefill.median
    print(f"prefill    {prefill.show('ms', 1e3)}, {rate:,.0f} tokens/s")
    step = Sample(tuple(seconds / options.new for seconds in decode.values))
    print(f"decode     {step.show('ms', 1e3)} a step, {options.batch_size / step.median:,.0f} tokens/s")

    known = hardware.of_device(device)
    bandwidth = known.memory_bandwidth if known else copy_bandwidth()
    weights = bytes_of_parameters(config, options.batch_size)
    cache = options.batch_size * bytes_of_row(config, options.prompt + options.new // 2)
    limit = (weights + cache) / bandwidth
    source = f"{known.name}'s" if known else "a copy's"
    print(
        f"limit      {limit * 1e3:.3g} ms a step: {size(weights)} of parameters and {size(cache)} of cache at "
        f"{size(bandwidth)}/s ({source}); {limit / step.median:.1%} of limit"
    )
    print(f"dispatch   {dispatch(device, options.calls).show('ms', 1e3)} a call of decode")
    print(machine(device))
    return 0


def configure(options: argparse.Namespace, device: Any) -> sl.TransformerConfig:
    """The model to run on `device`."""
    accelerator, sizes = device.platform != "cpu", model.given_sizes(options)
    if options.preset is not None:
        config = sl.presets.get(options.preset, **sizes)
    else:
        config = sl.TransformerConfig(**((_ACCELERATOR if accelerator else _CPU) | sizes))
    dtype = options.dtype or ("bfloat16" if accelerator else "float32")
    return dataclasses.replace(config, dtype=dtype, param_dtype=dtype)


class Bench:
    """The programs of one model on one device, compiled and run once when it is built."""

    def __init__(self, config: sl.TransformerConfig, rows: int, length: int, chunk: int, device: Any):
        sharded = ShardedModel.of(config, None, [device])
        self.programs: Programs = programs(sharded, rows, length, min(chunk, length))
        shardings = sharded.plan.shardings("stored")
        initial = jax.jit(lambda: _initial(config), out_shardings=shardings)
        self.params = initial()
        self.state = self.programs.start()
        self.nothing = (np.zeros(rows, bool), np.full(8, -1, np.int32), {})
        self.prefill(min(chunk, length))
        self.decode(1)

    def prefill(self, length: int) -> Any:
        """Take prompts of `length` tokens in, in all rows."""
        rows, chunk = self.programs.rows, self.programs.chunk
        for first in range(0, length, chunk):
            brings = fresh(rows, chunk)
            brings.tokens[:], brings.counts[:] = 1, min(chunk, length - first)
            brings.starts[:], brings.ends[:] = first == 0, first + chunk >= length
            brings.limit[:] = self.programs.max_length
            self.state, output = self.programs.prefill(self.params, self.state, brings, *self.nothing)
        return output

    def decode(self, steps: int) -> Any:
        """Make `steps` tokens in every row."""
        output = None
        for first in range(0, steps, STEPS):
            count = np.int32(min(STEPS, steps - first))
            self.state, output = self.programs.decode(self.params, self.state, *self.nothing, count, np.int32(0))
        return output

    def measure(self, prompt: int, new: int, repeats: int) -> tuple[Sample, Sample]:
        """Seconds of taking prompts in, and of making `new` tokens after them."""
        # Decode follows prefill in every round: the rows are as long as they are to be.
        calls = {"prefill": lambda: self.prefill(prompt), "decode": lambda: self.decode(new)}
        rounds = [{name: interleaved({name: call}, 1)[name].median for name, call in calls.items()}
                  for _ in range(repeats)]  # fmt: skip
        return Sample(tuple(r["prefill"] for r in rounds)), Sample(tuple(r["decode"] for r in rounds))


def dispatch(device: Any, calls: int) -> Sample:
    """Seconds until a call of a one-step decode returns, the device idle before it."""
    bench = Bench(sl.TransformerConfig(**_TINY), 1, 128, 8, device)
    call = {"decode": lambda: bench.decode(1)}
    interleaved(call, 3)  # warm
    return interleaved(call, calls, until_done=False)["decode"]


def copy_bandwidth() -> float:
    """Bytes/s that the default device reads and writes together, at best, in a pass over a large array."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: fresh memory costs the system more than the copy
    arrays = [add(jnp.zeros(_COPIED // 4, jnp.float32))]

    def copy() -> Any:
        arrays.append(add(arrays.pop()))
        return arrays[-1]

    return 2 * _COPIED / min(interleaved({"copy": copy}, 10)["copy"].values)


def bytes_of_parameters(config: sl.TransformerConfig, rows: int) -> int:
    """Bytes of parameters that a step reads: of an embedding table that is not the head, a row for each row."""
    unread = 0 if config.tied else (config.vocab_size - rows) * config.d_model
    return (count_parameters(config) - unread) * jnp.dtype(config.param_dtype).itemsize


def bytes_of_row(config: sl.TransformerConfig, length: int) -> int:
    """Bytes of keys and values that a row of `length` tokens has, over all layers."""
    kept = sum(length if window is None else min(length, window) for window in config.windows)
    return 2 * kept * config.num_kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize


def _initial(config: sl.TransformerConfig) -> Any:
    return nnx.to_pure_dict(nnx.split(sl.Transformer(config, rngs=nnx.Rngs(0)))[1])
