"""The command line: `python -m shardlm train`, `explain`, `verify`, `generate`, `convert` and `checkpoints`."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

import shardlm as sl
from shardlm._command_line import HeldOut, Help, Parser, at_least, program
from shardlm._text import fold, width
from shardlm.checkpoint import command as checkpoints
from shardlm.data import Batches, Epoch
from shardlm.generate import after
from shardlm.generate import command as generation
from shardlm.hub import begin, convert
from shardlm.inspect import topologies
from shardlm.runtime import launch, processes, template
from shardlm.runtime.meeting import MeetingError
from shardlm.runtime.paths import local_path
from shardlm.runtime.strangers import printable
from shardlm.train import room

_MOST_CPU_DEVICES = 2048  # of one process: with more, JAX takes some to be another process's
_STOPPED = (sl.SaveError, sl.NonFiniteLoss, sl.VerificationError)  # and no mistake in the arguments
_SIZES = ("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0; 1 for training that had to stop, a wrong layout or a damaged checkpoint; 2 for a mistake in the arguments.
    """
    options = _parser().parse_args(arguments)
    options.given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError, ImportError, MeetingError, *_STOPPED) as error:
        text = " ".join(map(str, ("error:", error, *getattr(error, "__notes__", ()))))
        # It may quote files that somebody else has written, with commands to the terminal in them.
        text = "\n".join(printable(line, 10_000) for line in text.split("\n"))
        print(fold(text, width(sys.stderr) or sys.maxsize), file=sys.stderr)
        return 1 if isinstance(error, _STOPPED) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def command() -> None:
    """What the console script `shardlm` runs: `main`, and the end of a process of several."""
    processes.leave(main())


def train(options: argparse.Namespace) -> int:
    """`python -m shardlm train`: print the plan, train, evaluate, and show a sample."""
    if options.init_from is None and options.ignore_fields:
        raise ValueError("--ignore-fields is for the folder of --init-from, which is not given")
    layout = _start_devices(options.layout)
    config, start = (_config(options), None) if options.init_from is None else begin.read(options, _SIZES)
    # Before the text is read, which may take long.
    layout.check(config, options.batch_size, options.sequence)
    if config.max_sequence is not None and options.sequence > config.max_sequence:
        name = options.init_from or options.preset or "tiny"
        raise ValueError(f"sequence={options.sequence}, but {name} has {config.max_sequence} learned positions")
    for name, path in (("--checkpoint-dir", options.checkpoint_dir), ("--log-dir", options.log_dir)):
        if path is not None:
            local_path(path, name)
    if options.save_hf is not None:
        begin.check_save(config, options.save_hf)
    tokenizer = begin.tokenizer_of_run(options, start)
    given = (options.data, tokenizer, options.sequence, options.batch_size, options.seed, options.held_out)
    if _are_examples(options):
        data = sl.data.load_examples(*given, too_long=options.too_long)
    elif options.too_long is not None:
        raise ValueError(
            f"--too-long {options.too_long} is for examples, files named .jsonl; text of any length is cut"
        )
    else:
        data = sl.data.load(*given)
    if options.init_from is None:
        config = dataclasses.replace(config, vocab_size=data.tokenizer.vocab_size)
    else:
        begin.check_vocabulary(config, data.tokenizer, options.init_from)
    trainer = sl.Trainer(config, layout, sl.adamw(options.learning_rate, steps=options.steps), seed=options.seed)
    room.check_step(trainer, options.batch_size, options.sequence)
    rows = trainer.local_rows(options.batch_size)  # all of them, unless other processes read the others
    batches = Batches(data.train.packed, options.batch_size, options.seed, rows, tokenizer=data.train.tokenizer)
    held_out = None
    if data.held_out is not None:
        epoch = Epoch(data.held_out.packed, options.batch_size, rows)
        held_out = [epoch[i] for i in range(min(options.evaluate_batches, len(epoch)))]

    say = print if jax.process_index() == 0 else _silent
    say(f"{trainer.describe()}\n")
    say(fold(f"model: {_describe(config)}"))
    say(fold(f"data: {data}"))
    epochs = options.steps / data.train.steps_per_epoch
    run = f"{options.steps} steps of {options.batch_size} x {options.sequence} tokens, {epochs:.2f} epochs"
    say(fold(f"run: {run}") + "\n", flush=True)

    state = trainer.fit(
        batches,
        options.steps,
        state=begin.state(trainer, options),
        checkpoint_dir=options.checkpoint_dir,
        checkpoint_every=options.checkpoint_every,
        keep=options.keep,
        keep_every=options.keep_every,
        keep_best=options.keep_best,
        log_every=options.log_every,
        held_out=held_out,
        evaluate_every=options.evaluate_every if held_out else None,
        log_dir=options.log_dir,
        tensorboard=options.tensorboard,
        accept_changes=options.accept_changes,
    )
    if held_out and data.held_out is not None:
        kind = next(iter(data.counts["train"]))
        say(fold(f"held-out loss is over {len(held_out)} of {len(data.held_out)} batches of {kind} not trained on"))
    if options.sample:
        _show_sample(trainer, state, data.tokenizer, options, say)
    if options.save_hf:
        say(begin.save(trainer, state, data.tokenizer, options.save_hf))
    say(f"\n{after.what_next(options, trainer.config, data.tokenizer, options.given)}")
    return 0


def _are_examples(options: argparse.Namespace) -> bool:
    """Whether the files to train on are of examples; those held out are of the same kind."""
    examples = sl.data.are_examples(options.data)
    if not isinstance(options.held_out, float) and sl.data.are_examples(options.held_out) != examples:
        kinds = ("text", "examples (.jsonl)")
        raise ValueError(
            f"--held-out {' '.join(options.held_out)} is {kinds[not examples]}, and --data {kinds[examples]}: "
            "give both of one kind"
        )
    return examples


def explain(options: argparse.Namespace) -> int:
    """`python -m shardlm explain`: what a layout costs, on as many devices as it has, which need not exist."""
    layout = _of_devices(sl.Layout.parse(options.layout), options.devices)
    devices: Any = layout.num_devices
    if options.compile == "cpu":
        if devices > _MOST_CPU_DEVICES:
            raise ValueError(
                f"--compile: a process can have {_MOST_CPU_DEVICES} fake CPU devices, and this layout has {devices}. "
                "Leave it out, or compile with a smaller data axis, whose size does not change what a device keeps"
            )
        try:
            sl.fake_devices(devices)
        except RuntimeError as error:  # it came too late, as this is no command line of its own
            if len(jax.devices()) < devices:
                raise ValueError(str(error)) from error
        devices = jax.devices()[:devices]
    elif options.compile:
        jax.config.update("jax_platforms", "cpu")  # the compiler's plugin is not to look for its hardware
        devices = topologies.named(options.compile, devices)
    config = _config(options)
    trainer = sl.Trainer(config, layout, devices=devices)
    report = trainer.explain(
        options.batch_size, options.sequence, hardware=options.hardware, compile=bool(options.compile)
    )
    if options.json:
        print(report.to_json())
    else:
        print(report)
    return 1 if report.fits is False else 0


def _of_devices(layout: sl.Layout, devices: int | None) -> sl.Layout:
    """The layout with its sizes filled in from `--devices`, where that is given."""
    free = [axis for axis, size in layout.sizes.items() if size == -1]
    if free and devices is None:
        raise ValueError(f"--layout {layout}: {free[0]}=-1 is not filled yet: say with --devices how many there are")
    try:
        return layout.resolve(devices or layout.num_devices)
    except sl.LayoutError as error:
        if free:
            raise
        said = str(error).split(". ")[0]  # what follows is advice for Python
        raise ValueError(f"{said}, as --devices says: leave --devices out, or set a size to -1") from error


def verify(options: argparse.Namespace) -> int:
    """`python -m shardlm verify`: hold a layout to the numbers of one device, and say where it fails."""
    layout = _start_devices(options.layout)
    dtype, options.dtype = options.dtype or "float32", None  # of both sides, whatever the preset computes in
    config = _config(options)
    print("compiling both sides, one device and the layout ...\n", flush=True)
    print(
        sl.verify(
            config,
            layout,
            steps=options.steps,
            dtype=dtype,
            seed=options.seed,
            engine=options.engine,
            tolerance=options.tolerance,
        )
    )
    return 0


def _start_devices(text: str | None) -> sl.Layout:
    """The layout asked for, its sizes filled in; where there is no accelerator, as many CPU devices as it needs."""
    layout = None if text is None else sl.Layout.parse(text)
    unfilled = layout is None or -1 in layout.sizes.values()
    sl.initialize()
    if not processes.decides_devices():
        try:
            sl.fake_devices(8 if layout is None or unfilled else layout.num_devices)
        except RuntimeError as error:  # it came too late; this is no command line of its own
            raise ValueError(str(error)) from error
    devices, say = jax.devices(), print if jax.process_index() == 0 else _silent
    among = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    if devices[0].platform == "cpu":
        say(f"no accelerator found: {len(devices)} fake CPU devices{among}\n")
    else:
        say(f"{len(devices)} x {devices[0].device_kind}{among}\n")
    if layout is None:
        layout = sl.Layout(data=2, fsdp=2, tensor=2) if len(devices) == 8 else sl.Layout(fsdp=-1)
    return layout.resolve(len(devices))


def _config(options: argparse.Namespace) -> sl.TransformerConfig:
    """The preset with what was asked for changed; its vocabulary has yet to become the tokenizer's."""
    preset = options.preset or "tiny"
    changes: dict[str, Any] = {name: getattr(options, name) for name in _SIZES if getattr(options, name) is not None}
    if options.dtype is not None:
        changes["dtype"] = options.dtype
    if options.dropout is not None:
        changes["dropout"] = options.dropout
    if options.attention is not None:
        attention = sl.presets.get(preset).attention
        changes["attention"] = dataclasses.replace(attention, implementation=options.attention)
    # Sizes that follow from others are to follow from the new ones.
    if "d_model" in changes or "num_heads" in changes:
        changes.setdefault("head_dim", None)
    if "num_heads" in changes:
        changes.setdefault("num_kv_heads", None)
    return sl.presets.get(preset, **changes)


def _describe(config: sl.TransformerConfig) -> str:
    return (
        f"{config.num_layers} layers, d_model {config.d_model}, {config.num_heads} heads ({config.num_kv_heads} kv) of "
        f"{config.head_dim}, d_ff {config.d_ff}, vocabulary {config.vocab_size}"
    )


def _show_sample(
    trainer: sl.Trainer, state: sl.TrainState, tokenizer: Any, options: argparse.Namespace, say: Any
) -> None:
    began = time.perf_counter()
    ids = sl.sample(
        trainer, state, generation.prompt_ids(tokenizer, options.prompt), tokens=options.sample,
        window=options.sequence, temperature=options.temperature, seed=options.seed,
    )  # fmt: skip
    took = time.perf_counter() - began
    say(
        f"\nsample at temperature {options.temperature:g}, {len(ids)} tokens in {took:.1f} s, after {options.prompt!r}:"
    )
    line = "-" * min(80, width() or 80)
    say(line)
    say(options.prompt + tokenizer.decode(ids))
    say(line)


def _versions() -> str:
    return f"shardlm {sl.__version__}, jax {jax.__version__}, Python {sys.version.split()[0]}"


def _silent(*_: Any, **__: Any) -> None:
    pass


def _add_model(add: Callable[..., Any], add_start: Callable[..., Any] | None = None) -> None:
    (add_start or add)(
        "--preset",
        help="sizes of a new model, a name in sl.presets (default: tiny); train takes the tokenizer's vocabulary",
    )
    for name in _SIZES:
        add(f"--{name.replace('_', '-')}", type=at_least(1), help="instead of the preset's")
    add("--dropout", type=float, help="instead of the preset's")
    add(
        "--dtype",
        help="of the computation, instead of the preset's: float32 (f32) or bfloat16 (bf16); of verify: float32, "
        "float64",
    )
    add("--attention", choices=("xla", "chunked", "cudnn"), help="how it is computed, instead of the preset's way")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=program(), description="Transformers on any layout of devices.")
    parser.add_argument("--version", action="version", version=_versions())
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser(
        "train",
        help="train a Transformer on text",
        description="Train a decoder-only Transformer on text, evaluate it on held-out documents, and show a sample.",
        formatter_class=Help,
    )
    command.set_defaults(run=train)
    add = command.add_argument

    count, size = at_least(0), at_least(1)
    add("--layout", help='"data=2,fsdp=2,tensor=2,zero=3,sequence_parallel"; one size may be -1; also accumulate=, '
        "remat= (default: data=2,fsdp=2,tensor=2 on 8 devices, else fsdp=-1)")  # fmt: skip
    one_of = command.add_mutually_exclusive_group().add_argument
    begin.add_init_from(one_of)
    _add_model(add, one_of)
    add("--data", nargs="+", help="text files or folders (default: the sources of Python's standard library), "
        'also .jsonl files of lines such as {"text": ...}; or .jsonl files of examples, prompts and completions, whose '
        "completions are learned")  # fmt: skip
    add(
        "--too-long",
        choices=("truncate", "drop"),
        help="what to do with examples longer than --sequence, else an error",
    )
    add("--tokenizer", help='"bytes" (the default), or "bpe:8192" to train byte-level BPE (extra hf); a run goes on '
        "with the one in its checkpoints")  # fmt: skip
    add("--held-out", nargs="+", action=HeldOut, default=0.05, help="fraction of documents kept for "
        "evaluation, 0 for none, of a single document its end; or files or folders to evaluate on")  # fmt: skip
    add("--steps", type=size, default=400, help="updates in all, those before a resumption included")
    add("--batch-size", type=size, default=16, help="rows per step, over all devices")
    add("--sequence", type=size, default=128, help="tokens per row")
    add("--learning-rate", type=at_least(0, float), default=3e-3, help="peak of warm-up and cosine")
    add("--seed", type=int, default=0, help="of parameters, dropout, order of batches and the sample")
    add("--checkpoint-dir", help="save here, and resume from here if there is something, on any layout")
    add("--accept-changes", action="store_true", help="resume although the data, their order or --sequence are others")
    add("--checkpoint-every", type=size, default=100, help="steps")
    add("--keep", type=size, default=3, help="newest checkpoints that stay")
    add("--keep-every", type=size, help="checkpoints of steps that this divides stay too")
    add("--keep-best", type=size, help="so many of lowest held-out loss stay too")
    begin.add_options(add)
    add("--log-every", type=size, default=10, help="steps")
    add("--log-dir", help="where metrics.jsonl goes (default: the checkpoint folder)")
    add("--tensorboard", action="store_true", help="write TensorBoard events too (extra tensorboard)")
    add("--evaluate-every", type=size, default=200, help="steps")
    add("--evaluate-batches", type=size, default=32, help="held-out batches to evaluate on")
    add("--sample", type=count, default=200, help="tokens of text to show at the end; 0 for none")
    add("--prompt", default="def ", help="what the sample continues (default: %(default)r)")
    add("--temperature", type=at_least(0, float), default=0.7, help="of the sample; 0 takes the likeliest token")

    command = commands.add_parser(
        "explain",
        help="what a layout costs, before you rent it",
        description="Say what a training step keeps, sends and computes on each device, and how long that takes at "
        "best. Nothing is run, and the devices need not exist. Exits with 1 where the memory is not enough.",
        formatter_class=Help,
    )
    command.set_defaults(run=explain)
    add = command.add_argument
    add("--layout", required=True, help='"fsdp=64,tensor=8"; one size may be -1 if --devices is given')
    add("--devices", type=size, help="how many there are (default: as many as the layout has)")
    _add_model(add)
    add("--batch-size", type=size, default=16, help="rows per step, over all devices")
    add("--sequence", type=size, default=128, help="tokens per row")
    add("--hardware", help=f"judge it by this: {', '.join(sl.inspect.CATALOGUE)}")
    add("--compile", nargs="?", const="cpu", metavar="FOR", help="compile the step too, for the compiler's own view: "
        "for fake CPU devices (cpu, the default), or, with their compiler installed and none of them, for GPUs (h100) "
        "or a TPU slice (v5e:2x4)")  # fmt: skip
    add("--json", action="store_true", help="print the report as JSON")

    _add_verify(commands)
    launch.add(commands)
    template.add(commands)
    convert.add_command(commands)
    checkpoints.add(commands)
    generation.add(commands, Help)
    return parser


def _add_verify(commands: Any) -> None:
    command = commands.add_parser(
        "verify",
        help="check that a layout computes what one device computes",
        description="Compare losses, gradients, parameters and optimizer state of a layout with those of one device, "
        "on random data, and name the first place where they part.",
        formatter_class=Help,
    )
    command.set_defaults(run=verify)
    add = command.add_argument
    add("--layout", help="as of train (default: data=2,fsdp=2,tensor=2 on 8 devices, else fsdp=-1)")
    _add_model(add)
    add("--steps", type=at_least(1), default=3, help="updates after which parameters are compared")
    add("--engine", default="manual", help="manual or auto")
    add("--seed", type=int, default=0, help="of parameters, data and dropout")
    add("--tolerance", type=float, help="relative to a leaf's largest element (default: from the arithmetic)")


if __name__ == "__main__":
    command()
