"""Processes meet before JAX connects them: whoever is missing, double or different is named, by every one of them.

`jax.distributed` ends a process by SIGABRT, with a page of its own stack, where a peer does not come. So process 0
first listens at the same address itself: each of the others says who it is in one line of JSON and gets one back,
`{"problem": ""}` or what is wrong. Then all go on to JAX. Who says anything else is a stranger, and disturbs nothing.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from shardlm.runtime.reception import LONGEST, Reception, local_address, parse

_SHOWN = 50  # differences between processes in a message


class MeetingError(RuntimeError):
    """The processes of a run did not come together."""


def meet(coordinator: str, count: int, index: int, identity: Mapping[str, str], timeout: float) -> None:
    """Return once all `count` processes have said the same.

    Args:
        coordinator: "host:port" of process 0.
        count, index: number of processes, and which this is.
        identity: what is to be the same on all of them; see `identity.identity`.
        timeout: seconds until those that are missing are named.

    Raises:
        MeetingError: the port is taken, nobody listens there, processes are missing, or they differ.
    """
    host, port = split(coordinator)
    hello = {"index": index, "count": count, "host": socket.gethostname(), "identity": dict(identity)}
    deadline = time.monotonic() + timeout
    if index == 0:
        _host(host, port, count, hello, deadline, timeout)
    else:
        _join(host, port, hello, deadline, timeout)


def split(coordinator: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[v6]:port". Raises ValueError."""
    host, colon, port = coordinator.rpartition(":")
    if not colon or not host.strip("[]") or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"initialize: the coordinator {coordinator!r} is not host:port, as in 10.0.0.1:4321")
    return host.strip("[]"), int(port)


def bind_address(coordinator: str) -> str:
    """Where process 0 listens: on the address that the coordinator names, or, if that is not known, on all networks."""
    host, port = split(coordinator)
    address = local_address(host) or "::"
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _host(host: str, port: int, count: int, own: dict, deadline: float, timeout: float) -> None:
    try:
        server = _listen(host, port)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise MeetingError(
            f"process 0 cannot listen on port {port}: {reason}. If another program or an earlier run holds it, end "
            "that or choose another port, the same on all processes"
        ) from error
    with server, Reception(server, own, count) as reception:
        reception.wait(deadline, lambda hellos: _clash(hellos, count))
        problem = _problem(reception.hellos, count, timeout)
        reception.answer(problem)
    if problem:
        raise MeetingError(problem)


def _join(host: str, port: int, hello: dict, deadline: float, timeout: float) -> None:
    failure = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host, port), timeout=min(5.0, left))
        except OSError as error:
            failure = str(error.strerror or error)
            time.sleep(min(0.1, left))
            continue
        with connection:
            try:
                connection.sendall(json.dumps(hello).encode() + b"\n")
                # Process 0 answers when all are there or its own time is up, which may have begun later.
                problem = _read_answer(connection, time.monotonic() + left + timeout)
            except (OSError, ValueError):
                # An earlier run's JAX, or another program: ours may yet come.
                failure = "what answers there is not process 0 of this run, or ended"
                time.sleep(min(0.5, left))
                continue
        if problem:
            raise MeetingError(problem)
        return
    raise MeetingError(
        f"process {hello['index']} did not reach process 0 at {host}:{port} within {timeout:.0f} s ({failure}). Is it "
        "running, is that its address, and does a firewall let the port through?"
    )


def _listen(host: str, port: int) -> socket.socket:
    address = local_address(host)
    if address:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=1024)
    print(
        f"initialize: {host} does not name one address of this machine alone: process 0 listens on all of its networks",
        file=sys.stderr,
        flush=True,
    )
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=1024)


def _read_answer(connection: socket.socket, deadline: float) -> str:
    """What process 0 says is wrong. OSError or ValueError where that is not what comes, or not before the deadline."""
    line = b""
    while not line.endswith(b"\n"):
        connection.settimeout(max(deadline - time.monotonic(), 1e-3))
        part = connection.recv(4096)
        line += part
        if not part or len(line) > LONGEST or time.monotonic() > deadline:
            raise ValueError("not a line of ours")
    problem = parse(line).get("problem")
    if not isinstance(problem, str):
        raise ValueError("not a line of ours")
    return "".join(letter for letter in problem if letter.isprintable() or letter == "\n")


def _clash(hellos: list[dict[str, Any]], count: int) -> bool:
    indices = [hello["index"] for hello in hellos]
    return len(set(indices)) < len(indices) or any(hello["count"] != count for hello in hellos)


def _problem(hellos: list[dict[str, Any]], count: int, timeout: float) -> str:
    """What is wrong with those that came, in words; empty if nothing is."""
    problems = []
    by_index: dict[int, list[dict[str, Any]]] = {}
    for hello in hellos:
        by_index.setdefault(hello["index"], []).append(hello)
    for index, same in by_index.items():
        if len(same) > 1:
            problems.append(
                f"{len(same)} processes say they are number {index}, on {', '.join(h['host'] for h in same)}"
            )
        if others := sorted({h["count"] for h in same} - {count}, key=str):
            problems.append(f"process {index} was told of {others[0]} processes, and process 0 of {count}")
    if missing := [i for i in range(count) if i not in by_index]:
        named = ", ".join(map(str, missing[:20])) + (" and others" if len(missing) > 20 else "")
        problems.append(f"{len(missing)} of {count} processes did not come (timeout {timeout:.0f} s): {named}")
    own = hellos[0]["identity"]
    for hello in hellos[1:]:
        theirs = hello["identity"]
        problems += [
            f"process {hello['index']} on {hello['host']} runs other code: {name} is {theirs.get(name)} there "
            f"and {own.get(name)} on process 0"
            for name in own | theirs
            if theirs.get(name) != own.get(name)
        ]
    if len(problems) > _SHOWN:
        problems[_SHOWN:] = [f"and {len(problems) - _SHOWN} more"]
    return "the processes of this run do not fit together:\n  - " + "\n  - ".join(problems) if problems else ""
