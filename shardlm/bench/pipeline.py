"""`python -m shardlm.bench pipeline`: the step time of pipeline schedules side by side, and their bubble."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

import shardlm as sl
from shardlm.bench import model
from shardlm.bench.timing import Sample, interleaved, machine
from shardlm.parallel.pipeline import Times, make_table, synchronous
from shardlm.train.metrics import model_flops_per_token

_LONGER = 4  # the second step of each schedule has so many times the microbatches

_HELP = f"""
Time Trainer.step under several pipeline schedules, and without a pipeline on the same devices, on the same rows.

no pipeline   the devices of the stages split the batch instead (data), as many rows at a time, in as many turns
              (accumulate), and backward makes the forward again (remat=full), as stages do if not told otherwise
ratio         to no pipeline, round by round
bubble        time beyond that of a pipeline which is always full, over the latter. Measured: a step of {_LONGER} times
              the microbatches takes as much longer as a full pipeline takes for those added; all else that a step does
              once, as the optimizer's update, counts as bubble. Simulated: from the table of ticks, FLOPs for times
stash         microbatches whose inputs a stage keeps at most, or whose residuals

Schedules are 1f1b, gpipe, interleaved (with --chunks), each also as 1f1b-stored and so on, which keeps residuals where
the others make the forward again, and zb-h1, which always keeps them.

The steps take turns. Each number is a median, with the lower and upper quartile behind it.

Without accelerators this runs on 8 fake CPU devices. They share the machine's cores and, where those are fewer, run one
after another: times are then the work of all devices together, in which nothing waits and nothing overlaps. What is
measured as bubble there is work too: a stage without a microbatch computes in its tick all the same, and throws the
result away.
"""

_CPU: dict[str, Any] = {"num_layers": 4, "d_model": 128, "num_heads": 4, "d_ff": 512, "vocab_size": 512}
_ACCELERATOR: dict[str, Any] = {
    "num_layers": 16,
    "d_model": 2048,
    "num_heads": 16,
    "num_kv_heads": 8,
    "d_ff": 5632,
    "vocab_size": 32_768,
}


def add(commands: Any) -> None:
    """Add the command to an argparse object of subcommands."""
    parser = commands.add_parser(
        "pipeline",
        help="step time of pipeline schedules and of no pipeline, with measured and simulated bubble",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    model.add_sizes(parser)
    parser.add_argument("--layout", default="pipe=4,data=-1", help="with pipe=2 or more (default pipe=4,data=-1)")
    parser.add_argument("--schedules", nargs="+", default=["1f1b", "gpipe"], help="default 1f1b gpipe")
    parser.add_argument("--chunks", type=int, help="pieces of the model per stage, of interleaved (default 2)")
    parser.add_argument("--microbatches", type=int, default=8, help="a multiple of pipe (default 8)")
    parser.add_argument("--rows", type=int, default=1, help="of a microbatch on each device (default 1)")
    parser.add_argument("--sequence", type=int, help="tokens per row (default: 2048 on an accelerator, 128 on a CPU)")
    parser.add_argument("--dtype", help="of the computation (default: bfloat16 on an accelerator, float32 on a CPU)")
    parser.add_argument("--repeats", type=int, default=10, help="values per time (default 10)")


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    sl.fake_devices(8)
    device = jax.devices()[0]
    accelerator = device.platform != "cpu"
    layout, devices = _on_devices(options)
    config = sl.TransformerConfig(
        **((_ACCELERATOR if accelerator else _CPU) | model.given_sizes(options)),
        dtype=options.dtype or ("bfloat16" if accelerator else "float32"),
    )
    count, sequence = options.microbatches, options.sequence or (2048 if accelerator else 128)
    rows = count * options.rows * layout.batch_shards
    plain = without_pipeline(layout, count)
    if options.chunks is not None and not any(name.startswith("interleaved") for name in options.schedules):
        raise ValueError(f"--chunks {options.chunks} is of the schedule interleaved, which --schedules does not name")
    chunks = 2 if options.chunks is None else options.chunks
    piped = {name: scheduled(layout, name, count, chunks) for name in options.schedules}
    longer = {name: scheduled(layout, name, _LONGER * count, chunks) for name in options.schedules}
    print(f"{machine(device)}; {len(devices)}{'' if accelerator else ' fake'} devices")
    print(f"{model.describe(config)}; batch {rows} x {sequence}", flush=True)

    calls = {"no pipeline": _steps(config, plain, devices, rows, sequence)}
    for name in options.schedules:
        calls[name] = _steps(config, piped[name], devices, rows, sequence)
        calls[f"{name}, longer"] = _steps(config, longer[name], devices, _LONGER * rows, sequence)
    seconds = interleaved(calls, options.repeats)

    print(f"no pipeline   {seconds['no pipeline'].show('ms', 1e3)}, {plain}")
    for name, chosen in piped.items():
        assert chosen.pipeline is not None
        table = make_table(chosen.pipeline.schedule, layout.pipe, count, chosen.pipeline.chunks)
        measured = bubble(seconds[name], seconds[f"{name}, longer"])
        simulated = synchronous(table, times(config, chosen, sequence))
        print(f"{name:13} {seconds[name].show('ms', 1e3)}, {chosen}, stash {table.stash_slots}")
        print(f"  ratio       {(seconds[name] / seconds['no pipeline']).show()}")
        print(f"  bubble      {measured.show('%', 100)} measured, {simulated.bubble_fraction:.1%} simulated")
    if not accelerator:
        print("fake devices share the cores: times are total work, and the bubble is work thrown away, not waiting")
    return 0


def scheduled(layout: sl.Layout, name: str, microbatches: int, chunks: int = 2) -> sl.Layout:
    """`layout` under a schedule, as the command names it.

    Raises:
        LayoutError: it has no pipeline, or there is no such schedule.
    """
    if layout.pipe == 1:
        raise sl.LayoutError(f"the layout {layout} has no pipeline: set pipe to 2 or more")
    schedule = name.removesuffix("-stored")
    pipeline = sl.Pipeline(
        schedule=schedule,
        microbatches=microbatches,
        chunks=chunks if schedule == "interleaved" else 1,
        recompute=schedule == name != "zb-h1",
    )
    return dataclasses.replace(layout, pipeline=pipeline)


def without_pipeline(layout: sl.Layout, microbatches: int) -> sl.Layout:
    """The same devices without a pipeline: the stages' split the batch, and take the same rows at a time.

    Raises:
        ValueError: for microbatches that the devices of all stages cannot share out.
    """
    if microbatches < 1 or microbatches % layout.pipe:
        raise ValueError(
            f"microbatches={microbatches} is not a positive multiple of pipe={layout.pipe}: without a pipeline, the "
            f"devices of its {layout.pipe} stages could not share them out"
        )
    return dataclasses.replace(
        layout,
        pipe=1,
        pipeline=None,
        data=layout.data * layout.pipe,
        accumulate=microbatches // layout.pipe,
        remat="full",
    )


def times(config: sl.TransformerConfig, layout: sl.Layout, sequence: int) -> Times:
    """FLOPs per token: of a chunk's layers, whose forward backward may make again, and of the head."""
    assert layout.pipeline is not None
    head, pieces = 6.0 * config.d_model * config.vocab_size, layout.pipe * layout.pipeline.chunks
    forward = (model_flops_per_token(config, sequence) - head) / 3 / pieces
    scores = (
        4.0 * config.num_layers * config.num_heads * config.head_dim * sequence / pieces
    )  # no weight has part in it
    again = layout.pipeline.recompute + (layout.remat == "full")
    return Times(
        forward=forward,
        backward=(2 + again) * forward,
        input_gradient=forward + scores,
        weight_gradient=forward - scores,
        head=head,
    )


def bubble(once: Sample, longer: Sample) -> Sample:
    """Bubble over ideal time, from steps of m and of `_LONGER` times m microbatches, round by round.

    With t the time of a full pipeline per microbatch, the steps take c + m t and c + n m t, so c / (m t) follows.
    """
    pairs = zip(once.values, longer.values, strict=True)
    return Sample(tuple((_LONGER - 1) * short / (long - short) - 1 for short, long in pairs))


def _on_devices(options: argparse.Namespace) -> tuple[sl.Layout, list[Any]]:
    """The layout, a -1 in it filled from the devices there are, and the devices that it takes."""
    if "pipeline" in options.layout:
        raise ValueError(f"--layout {options.layout}: leave pipeline out; --schedules and --microbatches say it here")
    layout, devices = sl.Layout.parse(options.layout), jax.devices()
    if -1 in layout.sizes.values() or layout.num_devices > len(devices):
        layout = layout.resolve(len(devices))  # an error if they are too few
    return layout, devices[: layout.num_devices]


def _steps(
    config: sl.TransformerConfig, layout: sl.Layout, devices: list[Any], rows: int, sequence: int
) -> Callable[[], Any]:
    """A call that makes one update; compiled, and the batch placed."""
    trainer = sl.Trainer(config, layout, devices=devices)
    batch = trainer.place(model.random_batch(config, rows, sequence))
    state, _ = jax.block_until_ready(trainer.step(trainer.init(), batch))

    def step() -> Any:
        nonlocal state
        state, metrics = trainer.step(state, batch)
        return state, metrics

    return step
