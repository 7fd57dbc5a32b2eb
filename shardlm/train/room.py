"""Whether what is about to run fits in memory, asked before anything is allocated.

What is exact (parameters, optimizer state, a cache) is refused by all who allocate it; the prediction of a whole step
(`inspect.memory`), which can be off by some, by the command line, before it compiles anything.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from shardlm._text import size
from shardlm.inspect import advice, memory
from shardlm.inspect.hardware import CATALOGUE
from shardlm.inspect.program import bytes_per_device
from shardlm.models.config import TransformerConfig
from shardlm.models.transformer import count_parameters
from shardlm.runtime.memory import Room, available
from shardlm.train.explain import look_at, tokens_of

if TYPE_CHECKING:
    from shardlm.layout import Layout
    from shardlm.train.trainer import Trainer

OFF = 1.1  # how far a predicted peak was seen from the true one: beyond it nothing is left to hope for
_FULL = 0.6  # of the memory, which a suggested model's share may take: a step needs more than its state
_SMALLEST = 8  # a head's and a model's width below which nothing is suggested


def require(
    needs: Mapping[str, int], devices: Sequence[Any], what: str, fix: Callable[[Room], str] = lambda room: ""
) -> None:
    """Refuse what does not fit.

    Args:
        needs: bytes on each device, by what they are for.
        devices: all of them, of one kind.
        what: is to be done, in words.
        fix: from the memory that there is, what to do.

    Raises:
        ValueError: it does not fit; the message has the numbers.
    """
    room, each = available(devices), sum(needs.values())
    if room is None or each <= room.each:
        return
    raise ValueError(f"{what} does not fit in memory: {_numbers(needs, room)}.{fix(room)}")


def check_state(trainer: "Trainer", what: str = "the training state") -> None:
    """Refuse a state that does not fit: parameters, optimizer state and variables of `trainer`, exact.

    Raises:
        ValueError: it does not fit.
    """
    state = trainer.abstract_state
    needs = {
        "parameters": bytes_per_device(state.params),
        "optimizer state": bytes_per_device(state.opt_state),
        "variables": bytes_per_device(state.variables),
    }
    require(needs, _devices(trainer), what, lambda room: _state_fix(trainer, needs, room))


def check_step(trainer: "Trainer", batch_size: int, sequence: int) -> None:
    """Refuse a step whose predicted peak is far beyond the memory; a small one is not even traced.

    Raises:
        ValueError: its state, or the whole step, does not fit.
    """
    check_state(trainer, "training")
    room = available(_devices(trainer))
    if room is None or _at_most(trainer, batch_size, sequence) < room.bytes or trainer.engine != "manual":
        return
    program, variant = look_at(trainer, tokens_of(batch_size, sequence))
    found = memory.of(program)
    if found.peak is None or found.peak <= OFF * room.each:
        return
    needs = {
        "the state": found.state,
        "activations kept for backward": found.activations or 0,
        f"gradients, temporaries and batch at {found.where}": found.peak - found.state - (found.activations or 0),
    }
    hardware = dataclasses.replace(CATALOGUE["h100"], name="here", memory=room.each)
    lines = advice.fitting(program, variant, found, hardware) if variant is not None else ()
    hints = "".join(f"\n  - {line}" for line in lines)
    raise ValueError(
        f"a step of {batch_size} x {sequence} tokens does not fit in memory, as predicted: {_numbers(needs, room)}."
        f"{hints}\n  - fewer rows than batch_size={batch_size}, or shorter ones than sequence={sequence}, take less"
    )


def smaller(config: Any, layout: "Layout", share: float) -> str:
    """Sizes with which a model has about `share` of its parameters at most and still fits the layout, in words.

    Fewer layers come first, then narrower ones. Empty where nothing was found, or the model is not ours.
    """
    if not isinstance(config, TransformerConfig):
        return ""
    whole = count_parameters(config)
    pipeline = layout.pipeline
    least = 1 if pipeline is None else layout.pipe * pipeline.chunks
    for halvings in range(12):
        sizes: dict[str, int] = {}
        if halvings:
            names = ("d_model", "d_ff", "head_dim")
            sizes = {name: max(_SMALLEST, getattr(config, name) >> halvings) for name in names}
        counts = {least} if halvings else {config.num_layers * eighths // 8 // least * least for eighths in range(1, 8)}
        for layers in sorted({least, *(n for n in counts if n >= least)}, reverse=True):
            try:
                other = dataclasses.replace(config, num_layers=layers, **sizes)
                layout.check(other)
            except (ValueError, TypeError):
                continue
            if count_parameters(other) <= share * whole:
                changed = {"num_layers": layers, **sizes}
                named = {name: n for name, n in changed.items() if n != getattr(config, name)}
                flags = " ".join(f"--{name.replace('_', '-')} {n}" for name, n in named.items())
                return f"{', '.join(f'{name}={n}' for name, n in named.items())} ({flags})"
    return ""


def _devices(trainer: "Trainer") -> list[Any]:
    return list(trainer.mesh.devices.flat) if trainer.has_devices else []


def _numbers(needs: Mapping[str, int], room: Room) -> str:
    each = sum(needs.values())
    parts = ", ".join(f"{size(count)} for {name}" for name, count in needs.items() if count)
    several = sum(count > 0 for count in needs.values()) > 1
    device = "the device" if room.devices == 1 else f"each of {room.devices} devices"
    text = f"on {device} {size(each)}" + (f" ({parts})" if several else f" for {parts.partition(' for ')[2]}")
    total = f", {size(each * room.devices)} in all" if room.shared and room.devices > 1 else ""
    return f"it takes {text}{total}, and there are {size(room.bytes)} {room.what}"


def _state_fix(trainer: "Trainer", needs: Mapping[str, int], room: Room) -> str:
    total = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(trainer.abstract_state))
    each, lines = total / trainer.mesh.size, []
    if each <= room.each and each < sum(needs.values()):
        lines.append(f"split over all devices, by fsdp with zero=3 or by tensor, it would take {size(each)} on each")
    elif not room.shared:
        lines.append(f"at least {math.ceil(total / room.each)} devices are needed, with fsdp and zero=3")
    if text := smaller(getattr(trainer, "config", None), trainer.layout, _FULL * room.each / sum(needs.values())):
        lines.append(f"a model that fits has {text}")
    lines.append("`explain` says what a layout takes, on devices that need not exist")
    return "".join(f"\n  - {line}" for line in lines)


def _at_most(trainer: "Trainer", rows: int, sequence: int) -> float:
    """Bytes on all devices together that a step stays below, roughly and without tracing it."""
    config = trainer.config
    state = trainer.abstract_state
    held = 3 * bytes_per_device(state) * trainer.mesh.size
    heads = config.num_heads * (config.head_dim or 1)
    layer = 30 * config.d_model + 8 * config.d_ff + 8 * heads + 4 * config.num_heads * sequence
    per_token = config.num_layers * layer + 8 * config.padded_vocab_size
    return held + 4.0 * rows * sequence * per_token
