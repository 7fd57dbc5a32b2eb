"""Several processes, one run: finding one another, and ending when one of them fails."""

import faulthandler
import importlib.util
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import jax

from shardlm._arguments import not_integer, not_number
from shardlm._errors import is_int
from shardlm.runtime import clusters, identity, meeting
from shardlm.runtime.devices import fake_devices

HEARTBEAT = 30  # seconds; a stall of the network is shorter, and JAX's 100 are long to hold devices for nothing
TIMEOUT = 50  # seconds; with JAX's own handshake behind it, what is wrong is said within a minute
_LONGEST = 1e6  # seconds
TRANSIENT = 75  # exit status (EX_TEMPFAIL of sysexits.h) of a process that failed through no fault of its own


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    devices_per_process: int | None = None,
    heartbeat: int | None = None,
    timeout: float | None = None,
) -> None:
    """Join the other processes of this run; on one process, do nothing. Call it before the first use of a device.

    Who they are comes from the arguments, else from `SHARDLM_COORDINATOR`, `SHARDLM_PROCESSES` and `SHARDLM_PROCESS`
    (`python -m shardlm launch` sets them), else from Slurm or Open MPI; on TPU slices, from JAX. Where there is nothing
    of all this, the run has one process. Calling it again does nothing.

    Before JAX connects them, the processes compare their numbers, versions and sources. Afterwards a process that ends
    by an exception ends at once, so that its launcher sees it, and SIGTERM to any of them is what `Trainer.fit` saves
    and ends by. SIGUSR1 prints the Python stacks of all threads.

    Args:
        coordinator: "host:port" where process 0 is to listen, the same on all processes.
        processes: how many there are.
        process: which this is, from 0.
        devices_per_process: of the accelerators of this machine, each of its processes takes so many, in order; on a
            CPU, so many fake devices. Default `SHARDLM_DEVICES_PER_PROCESS`; without it a process alone on its machine
            takes all accelerators, and one of several the one with its own local number.
        heartbeat: seconds after which a process that is not heard of counts as dead, and all end. Default
            `SHARDLM_HEARTBEAT`, or 30.
        timeout: seconds to wait for the others. Default `SHARDLM_TIMEOUT`, or 50. Later, `SHARDLM_PATIENCE` is how many
            seconds a process waits for the others to begin a program that it begins (default 3600; 300 in the middle of
            a run), after which it names those that do something else.

    Raises:
        ValueError: the numbers are incomplete or out of range.
        RuntimeError: JAX has started already; the port is taken; the coordinator is not reached; processes are missing,
            or run other code. The message names them.

    Example:
        >>> import shardlm as sl
        >>> sl.initialize()
        >>> trainer = sl.Trainer(sl.presets.tiny(), sl.Layout(data=-1))
    """
    place = _place(coordinator, processes, process)
    if devices_per_process is not None and (problem := not_integer("devices_per_process", devices_per_process, 1)):
        raise ValueError(f"initialize: {problem}")
    devices = devices_per_process or clusters.integer(os.environ, clusters.DEVICES, 0)
    wait = _seconds(timeout, "SHARDLM_TIMEOUT", TIMEOUT)
    beat = _seconds(heartbeat, "SHARDLM_HEARTBEAT", HEARTBEAT)
    if jax.distributed.is_initialized():
        return
    if place is None and _on_tpu_slice():
        _connect(heartbeat_timeout_seconds=beat)
        return
    if devices:
        fake_devices(devices)
    if place is None or place.count == 1:
        return
    meeting.meet(place.coordinator, place.count, place.index, identity.identity(), wait)
    _connect(
        coordinator_address=place.coordinator,
        num_processes=place.count,
        process_id=place.index,
        local_device_ids=_local_devices(place, devices),
        cluster_detection_method="deactivate",
        initialization_timeout=wait,
        heartbeat_timeout_seconds=beat,
        coordinator_bind_address=meeting.bind_address(place.coordinator),
    )


def leave(status: int) -> NoReturn:
    """End this process with an exit status: at once if it failed, without waiting for peers that wait for it.

    JAX's own end is a barrier of all processes. One that failed would hang in it, and the others in their step.
    """
    if status and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def is_one_of_several(environment: Mapping[str, str] | None = None) -> bool:
    """Whether `python -m shardlm launch`, or who else sets the variables, started this process as one of several."""
    return clusters.integer(os.environ if environment is None else environment, clusters.PROCESSES, 1) > 1


def decides_devices() -> bool:
    """Whether how many devices this process has is decided: it has joined others, or its launcher says it."""
    return jax.distributed.is_initialized() or clusters.DEVICES in os.environ


def _place(coordinator: str | None, processes: int | None, process: int | None) -> clusters.Place | None:
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    if all(value is None for value in given.values()):
        place = clusters.detect(os.environ)
    elif missing := [name for name, value in given.items() if value is None]:
        raise ValueError(f"initialize: {', '.join(missing)} not given; coordinator, processes and process go together")
    else:
        if not isinstance(coordinator, str):
            raise ValueError(f"initialize: the coordinator {coordinator!r} is not host:port, as in 10.0.0.1:4321")
        place = clusters.Place(coordinator, processes, process, 0, 1, "arguments")  # pyright: ignore
    if place is None:
        return None
    meeting.split(place.coordinator)
    numbers = (place.count, place.index)
    if not all(map(is_int, numbers)) or not 0 <= place.index < place.count:
        raise ValueError(
            f"initialize: process {place.index!r} of {place.count!r} ({place.source}); the number of processes is at "
            "least 1, and process from 0 to one below it"
        )
    return place


def _seconds(given: float | None, name: str, default: int) -> int:
    value = clusters.integer(os.environ, name, default) if given is None else given
    if not_number(name, value, 1, _LONGEST):
        raise ValueError(f"initialize: {name}={value!r}; it is a number of seconds, at least 1")
    return int(value)


def _connect(**options: Any) -> None:
    try:
        jax.distributed.initialize(**options)
    except RuntimeError as error:
        if "before" in str(error):  # JAX's words: it must be called before any use of a device
            raise RuntimeError(
                "initialize came too late: JAX has already started. The first use of a device (jax.devices(), any "
                "jax.numpy operation, sl.Trainer) starts it: call sl.initialize() before that"
            ) from error
        raise
    before = sys.excepthook

    def end(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        before(kind, error, traceback)
        leave(130 if issubclass(kind, KeyboardInterrupt) else TRANSIENT if _says_a_peer_died(error) else 1)

    sys.excepthook = end
    if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        faulthandler.register(signal.SIGUSR1, all_threads=True)


def _says_a_peer_died(error: BaseException) -> bool:
    """Whether a collective or JAX's service failed because another process has gone."""
    words = ("Gloo", "NCCL", "closed by peer", "reset by peer", "Socket closed", "heartbeat", "UNAVAILABLE", "ABORTED")
    return isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error) for word in words)


def _local_devices(place: clusters.Place, devices: int) -> list[int] | None:
    """Which of the machine's accelerators this process takes; None is all. On CPU it decides nothing."""
    if devices:
        return list(range(place.local_index * devices, (place.local_index + 1) * devices))
    return [place.local_index] if place.local_count > 1 else None


def _on_tpu_slice() -> bool:
    """Whether this machine is a host of a TPU slice, whose peers JAX asks the cloud's metadata for."""
    chips = any(os.path.exists(path) for path in ("/dev/accel0", "/dev/vfio/0"))
    return chips and importlib.util.find_spec("libtpu") is not None
