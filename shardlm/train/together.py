"""A Trainer in a run of several processes: that all do the same, and what they wait in when one does not come."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from shardlm.checkpoint.processes import errors_of_all
from shardlm.inspect.ledger import ledger
from shardlm.runtime import begin
from shardlm.runtime.agreement import agree
from shardlm.runtime.processes import is_one_of_several
from shardlm.train.program import require_devices

if TYPE_CHECKING:
    from shardlm.train.trainer import Trainer


def run(trainer: "Trainer", function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a compiled function; the first time with arguments of these shapes, together with all other processes.

    Those compare it first, and wait until all have compiled it (`runtime.begin`); later calls ask nothing.

    On several CPU devices it returns when the result is there: of several programs in flight some may wait for ever, as
    their collectives block threads of one small pool.

    Raises:
        ValueError: on every process, naming what differs, or who did not come; or `sl.initialize` was forgotten.
    """
    require_devices(trainer.mesh)
    if spans_processes(trainer) and hasattr(function, "trace"):
        begin.begin(_what(function), function, arguments, lambda: facts(trainer))
    result = function(*arguments)
    if trainer.mesh.size > 1 and trainer.first_device.platform == "cpu":
        jax.block_until_ready(result)
    return result


def check_run(trainer: "Trainer", asked: Mapping[str, Any]) -> None:
    """The same for what `fit` is asked for, before it restores a checkpoint."""
    if spans_processes(trainer):
        agree("fit", facts(trainer) | dict(asked))


def by_all(make: Callable[..., Any], **given: Any) -> Any:
    """What `make` makes on each process of a run, which all come here. An OSError of one of them is raised on all."""
    made, error = None, None
    try:
        made = make(**given)
    except OSError as caught:
        error = caught
    if text := errors_of_all(error):
        raise error or OSError(text)
    return made


def spans_processes(trainer: "Trainer") -> bool:
    """Whether all processes of a run of several take part in this trainer's programs."""
    if jax.process_count() == 1:
        if is_one_of_several():
            raise ValueError(
                "this process was started as one of several, and has not joined them: call sl.initialize() before "
                "anything else"
            )
        return False
    return begin.spans_processes(trainer.mesh)


def facts(trainer: "Trainer") -> dict[str, Any]:
    """What makes two trainers of several processes the same, by name."""
    return {
        **_flat(trainer.program.identity()),
        "layout": str(trainer.layout),
        "seed": trainer.seed,
        "engine": trainer.engine,
        "jax_enable_x64": bool(jax.config.jax_enable_x64),  # pyright: ignore[reportAttributeAccessIssue]
        "optimizer state": {
            jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(trainer.abstract_state.opt_state)
        },
    }


def name() -> str:
    """This process in words."""
    return f"process {jax.process_index()} of {jax.process_count()}"


def waits_in(trainer: "Trainer", batch: Any) -> Callable[[], str]:
    """What to say of a step that hangs: the collectives between processes, in one of which it waits.

    Nothing tells from outside which of them it is: XLA's own threads have no Python stack. They are few, as only the
    axes that cross processes count, and each has the line that asks for it.
    """

    def say() -> str:
        crossing = _crossing_axes(trainer.mesh)
        if not crossing:
            return f"{name()}: no collective of this step waits for another process"
        entries = ledger(trainer.step_function, trainer.abstract_state, trainer.abstract_batch(batch))
        lines = {
            f"  {entry.kind} over {', '.join(entry.axes)} ({entry.phase}) {entry.source}".rstrip(): None
            for entry in entries
            if crossing.keys() & set(entry.axes)
        }
        head = f"{name()}: where a peer is late, the step waits in one of its collectives over {', '.join(crossing)}:"
        return "\n".join([head, *(lines or ["  those that the compiler added"])])

    return say


def _crossing_axes(mesh: Any) -> dict[str, None]:
    """Names of the mesh axes whose neighbours are in different processes, in mesh order."""
    crossing = {}
    for dim, axis in enumerate(mesh.axis_names):
        first = mesh.devices.take([0], axis=dim)
        pairs = zip((first.repeat(mesh.devices.shape[dim], axis=dim)).flat, mesh.devices.flat, strict=True)
        if any(a.process_index != b.process_index for a, b in pairs):
            crossing[axis] = None
    return crossing


def _what(function: Any) -> str:
    return {"<lambda>": "init"}.get(name := getattr(function, "__name__", "a program"), name)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
