"""Which process of how many this is, and where the first one listens: what a launcher left in the environment.

`jax.distributed` detects clusters too; here it is done before, so that what is wrong can be said before JAX, which ends
the process where its peers do not come.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

COORDINATOR = "SHARDLM_COORDINATOR"
PROCESSES = "SHARDLM_PROCESSES"
PROCESS = "SHARDLM_PROCESS"
LOCAL_PROCESSES = "SHARDLM_LOCAL_PROCESSES"
LOCAL_PROCESS = "SHARDLM_LOCAL_PROCESS"
DEVICES = "SHARDLM_DEVICES_PER_PROCESS"


@dataclass(frozen=True)
class Place:
    """A process among its peers.

    Attributes:
        coordinator: "host:port" at which process 0 listens.
        count: number of processes.
        index: of this one, from 0.
        local_index: among those on the same machine.
        local_count: how many those are.
        source: who said so, for messages.
    """

    coordinator: str
    count: int
    index: int
    local_index: int
    local_count: int
    source: str


def detect(environment: Mapping[str, str]) -> Place | None:
    """The place that the environment gives, or None: `SHARDLM_...`, else Slurm's or Open MPI's.

    Raises:
        ValueError: variables that are missing, or no numbers, or contradict one another.
    """
    if any(name in environment for name in (COORDINATOR, PROCESSES, PROCESS)):
        return _ours(environment)
    if {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"} <= environment.keys():
        return _slurm(environment)
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return _open_mpi(environment)
    return None


def _ours(environment: Mapping[str, str]) -> Place:
    missing = [name for name in (COORDINATOR, PROCESSES, PROCESS) if not environment.get(name)]
    if missing:
        raise ValueError(
            f"initialize: {', '.join(missing)} not set; {COORDINATOR}, {PROCESSES} and {PROCESS} go together"
        )
    count, index = (integer(environment, name) for name in (PROCESSES, PROCESS))
    local_count = integer(environment, LOCAL_PROCESSES, 1)
    local_index = integer(environment, LOCAL_PROCESS, 0)
    return Place(environment[COORDINATOR], count, index, local_index, local_count, f"{PROCESSES} and {PROCESS}")


def _slurm(environment: Mapping[str, str]) -> Place:
    """Of a job step, as JAX does it: the first host of its list, and a port that follows from the job's number."""
    port = environment.get("JAX_COORDINATOR_PORT") or _port(integer(environment, "SLURM_JOB_ID"))
    tasks = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return Place(
        f"{first_host(environment['SLURM_STEP_NODELIST'])}:{port}",
        integer(environment, "SLURM_NTASKS"),
        integer(environment, "SLURM_PROCID"),
        integer(environment, "SLURM_LOCALID"),
        int(tasks[0]) if tasks else 1,
        "Slurm",
    )


def _open_mpi(environment: Mapping[str, str]) -> Place:
    """The address of `mpirun` itself, which runs on the first host: "1531576320.0;tcp://10.96.0.1,10.0.0.1:34911"."""
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    found = re.match(r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri)
    port = environment.get("JAX_COORDINATOR_PORT")
    if not found:
        raise ValueError(
            f"initialize: Open MPI started this process, but OMPI_MCA_orte_hnp_uri={uri!r} names no address (Open MPI "
            f"5 does not set it): set {COORDINATOR} to host:port of process 0, {PROCESSES} and {PROCESS}"
        )
    return Place(
        f"{found[2] or f'[{found[3]}]'}:{port or _port(int(found[1]) // 2**12)}",
        integer(environment, "OMPI_COMM_WORLD_SIZE"),
        integer(environment, "OMPI_COMM_WORLD_RANK"),
        integer(environment, "OMPI_COMM_WORLD_LOCAL_RANK"),
        integer(environment, "OMPI_COMM_WORLD_LOCAL_SIZE", 1),
        "Open MPI",
    )


def first_host(nodes: str) -> str:
    """The first of Slurm's compact list of hosts.

    Example:
        >>> first_host("gpu[007-015,020],login1")
        'gpu007'
    """
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\])?([^,]*)", nodes)
    if not found:
        raise ValueError(f"initialize: SLURM_STEP_NODELIST={nodes!r} names no host")
    return "".join(part or "" for part in found.groups())


def _port(job: int) -> int:
    """In the upper 4096 ports, another for each of 4096 jobs in a row."""
    return 65536 - 4096 + job % 4096


def integer(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The integer that a variable holds; without a default it must be set. Raises ValueError."""
    text = environment.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(f"initialize: {name}={text!r} is not an integer") from None
