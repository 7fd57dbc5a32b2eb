"""What a verification keeps in memory, asked before any of it is allocated."""

from shardlm._text import size
from shardlm.inspect.program import bytes_per_device
from shardlm.runtime import memory
from shardlm.train.room import smaller
from shardlm.train.trainer import Trainer

_FULL = 0.7  # of the memory, which a suggested model takes


def check(trainer: Trainer, reference: Trainer) -> None:
    """Refuse to compare what does not fit, on the devices or on the host.

    The reference is one device with the whole model, twice: as it is, and from parameters moved by rounding. NumPy has
    where they begin, and what they and the layout come to, for comparison: four states, as was measured on CPU devices,
    where all of it together was 25 times the parameters with Adam on fsdp=4, and this gives 23.

    Args:
        trainer: of the layout.
        reference: of one device.

    Raises:
        ValueError: it does not fit; the message has the numbers of both sides, and a model that would fit.
    """
    room, host = memory.available(list(trainer.mesh.devices.flat)), memory.host_memory()
    whole, own = bytes_per_device(reference.abstract_state), bytes_per_device(trainer.abstract_state)
    grads = bytes_per_device(reference.abstract_state.params)
    first = 2 * whole + own + 2 * grads  # of the device that holds the reference too, both sides' gradients included
    shared = room is not None and room.shared
    beside = first + (trainer.mesh.size - 1) * own if shared else 0
    wanted = {"host": (4 * whole + beside, host, "free on this machine")}
    if room is not None and not shared:
        wanted["device"] = first, room.bytes, room.what
    for place, (needed, there, what) in wanted.items():
        if there is None or needed <= there:
            continue
        fitting = smaller(getattr(trainer, "config", None), trainer.layout, _FULL * there / needed)
        raise ValueError(
            f"verify does not fit in memory: it takes about {size(needed)} on the {place}, and there are "
            f"{size(there)} {what}.\n  - one device's side: {size(whole)} of state, kept twice on the first device and "
            f"four times in NumPy\n  - the layout's side: {size(own)} of state on each of {trainer.mesh.size} devices\n"
            f"  - take a smaller model of the same kind, as what a layout computes is right or wrong at any size"
            + (f": {fitting}" if fitting else "")
        )
