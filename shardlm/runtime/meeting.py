"""Processes meet before JAX connects them: whoever is missing, double or different is named, by every one of them.

`jax.distributed` ends a process by SIGABRT, with a page of its own stack, where a peer does not come. So process 0
first listens at the same address itself: each of the others says who it is in one line of JSON and gets one back,
`{"problem": ""}` or what is wrong. Then all go on to JAX.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

_LONGEST = 1 << 16  # bytes of a line
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


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
    """Where process 0 listens: on this machine alone if that is the address, else on all its networks."""
    host, port = split(coordinator)
    return f"127.0.0.1:{port}" if host in _LOOPBACK else f"[::]:{port}"


def _host(host: str, port: int, count: int, own: dict, deadline: float, timeout: float) -> None:
    try:
        server = _listen(host, port)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise MeetingError(
            f"process 0 cannot listen on port {port}: {reason}. If another program or an earlier run holds it, end "
            "that or choose another port, the same on all processes"
        ) from error
    hellos: list[dict[str, Any]] = [own]
    waiting: list[socket.socket] = []
    try:
        with server:
            while len(hellos) < count and (left := deadline - time.monotonic()) > 0:
                server.settimeout(left)
                try:
                    connection, _ = server.accept()
                    connection.settimeout(min(5.0, max(left, 0.1)))
                    hellos.append(_read(connection))
                    waiting.append(connection)
                    if _clash(hellos, count):  # hear those that are on their way, and end
                        deadline = min(deadline, time.monotonic() + 2.0)
                except (OSError, ValueError):  # nobody came in time; or somebody who speaks otherwise, a port scan
                    continue
        problem = _problem(hellos, count, timeout)
        for connection in waiting:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps({"problem": problem}).encode() + b"\n")
    finally:
        for connection in waiting:
            connection.close()
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
                connection.settimeout(left + timeout)
                problem = str(_read(connection)["problem"])
            except (OSError, ValueError, KeyError, TypeError):
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
    if host in _LOOPBACK:
        return socket.create_server(("127.0.0.1", port), backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=1024)


def _read(connection: socket.socket) -> dict[str, Any]:
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(4096)
        if not part or len(line) > _LONGEST:
            raise ValueError("not a line of ours")
        line += part
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("not a line of ours")
    return message


def _clash(hellos: list[dict[str, Any]], count: int) -> bool:
    indices = [hello.get("index") for hello in hellos]
    return len(set(indices)) < len(indices) or any(hello.get("count") != count for hello in hellos)


def _problem(hellos: list[dict[str, Any]], count: int, timeout: float) -> str:
    """What is wrong with those that came, in words; empty if nothing is."""
    problems = []
    by_index: dict[int, list[dict[str, Any]]] = {}
    for hello in hellos:
        by_index.setdefault(hello.get("index", -1), []).append(hello)
    for index, same in by_index.items():
        if len(same) > 1:
            problems.append(
                f"{len(same)} processes say they are number {index}, on {', '.join(h['host'] for h in same)}"
            )
        if others := sorted({h.get("count") for h in same} - {count}, key=str):
            problems.append(f"process {index} was told of {others[0]} processes, and process 0 of {count}")
    if missing := [i for i in range(count) if i not in by_index]:
        named = ", ".join(map(str, missing[:20])) + (" and others" if len(missing) > 20 else "")
        problems.append(f"{len(missing)} of {count} processes did not come (timeout {timeout:.0f} s): {named}")
    own = hellos[0]["identity"]
    for hello in hellos[1:]:
        theirs = hello.get("identity", {})
        problems += [
            f"process {hello.get('index')} on {hello.get('host')} runs other code: {name} is {theirs.get(name)} there "
            f"and {own.get(name)} on process 0"
            for name in own | theirs
            if theirs.get(name) != own.get(name)
        ]
    return "the processes of this run do not fit together:\n  - " + "\n  - ".join(problems) if problems else ""
