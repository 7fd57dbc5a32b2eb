"""Process 0 hears who comes to the meeting: many at once, each for a short time, and strangers not at all."""

import ipaddress
import json
import selectors
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shardlm._errors import is_int

LONGEST = 1 << 16  # bytes of a line
PROMPT = 5.0  # seconds in which one who connects says who it is
CLASH = 2.0  # seconds in which those are heard who are on their way, once it is known that something does not fit
_SILENT = 256  # connections at once that have said nothing yet; beyond these the oldest is dropped
_NAMED = 10  # strangers that are named; further ones are dropped without a word
_MOST = 1 << 31  # processes
_TEXT = 1000  # characters of a text in a message
_RESOLVE = 3.0  # seconds until a name that nobody knows yet is given up


@dataclass(eq=False)
class Visitor:
    """A connection to process 0.

    Attributes:
        connection: its socket, which does not block.
        address: from where, for messages.
        until: when it is dropped if it has not said who it is.
        said: what has come of its line.
        hello: its message, once it is there and right.
    """

    connection: socket.socket
    address: str
    until: float
    said: bytes = b""
    hello: dict[str, Any] | None = None


class Reception:
    """Accepts connections until `count` processes have said who they are; use it in a `with` statement.

    Whoever is slow, leaves, or says something else holds up nobody: it is dropped with one line.

    Args:
        server: listens.
        own: the message of process 0.
        count: how many are to come, process 0 included.
    """

    def __init__(self, server: socket.socket, own: dict[str, Any], count: int):
        self._server, self._own, self._count = server, own, count
        self._visitors: list[Visitor] = []
        self._strangers = 0
        self._selector = selectors.DefaultSelector()
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ)

    def __enter__(self) -> "Reception":
        return self

    def __exit__(self, *error: object) -> None:
        for visitor in list(self._visitors):
            self._drop(visitor)
        self._selector.close()

    @property
    def hellos(self) -> list[dict[str, Any]]:
        """The messages of those that are here, process 0's own first."""
        return [self._own, *(visitor.hello for visitor in self._visitors if visitor.hello is not None)]

    def wait(self, deadline: float, clash: Callable[[list[dict[str, Any]]], bool]) -> None:
        """Return when all are here, or at the deadline; soon after `clash` says that something does not fit."""
        while len(self.hellos) < self._count and (now := time.monotonic()) < deadline:
            silent = [visitor for visitor in self._visitors if visitor.hello is None]
            for visitor in silent:
                if visitor.until <= now:
                    self._drop(visitor, f"it said nothing complete within {PROMPT:g} s")
            until = min([deadline, *(visitor.until for visitor in silent if visitor.until > now)])
            for key, _ in self._selector.select(until - now):
                if key.data is None:
                    self._accept()
                elif self._hear(key.data) and clash(self.hellos):
                    deadline = min(deadline, time.monotonic() + CLASH)

    def answer(self, problem: str) -> None:
        """Tell those that are here what is wrong; empty where nothing is."""
        line = json.dumps({"problem": problem}).encode() + b"\n"
        for visitor in self._visitors:
            if visitor.hello is not None:
                try:
                    visitor.connection.settimeout(1.0)
                    visitor.connection.sendall(line)
                except OSError:  # it has gone, or does not listen
                    continue

    def _accept(self) -> None:
        try:
            connection, address = self._server.accept()
        except OSError:  # it has gone again, or there are too many open files: others may yet go
            time.sleep(0.01)
            return
        connection.setblocking(False)
        silent = [visitor for visitor in self._visitors if visitor.hello is None]
        if len(silent) >= _SILENT:
            self._drop(silent[0], "too many others are waiting")
        visitor = Visitor(connection, f"{address[0]} port {address[1]}", time.monotonic() + PROMPT)
        self._visitors.append(visitor)
        self._selector.register(connection, selectors.EVENT_READ, visitor)

    def _hear(self, visitor: Visitor) -> bool:
        """Read what a visitor says; returns whether its message is complete now."""
        if visitor not in self._visitors:  # dropped for another since it was seen to have said something
            return False
        try:
            part = visitor.connection.recv(4096)
        except BlockingIOError:
            return False
        except OSError:
            part = b""
        if not part:
            self._drop(visitor, "" if visitor.hello or not visitor.said else "it left in the middle of a line")
            return False
        visitor.said += part
        line, newline, more = visitor.said.partition(b"\n")
        if visitor.hello is not None or more or len(line) > LONGEST:
            self._drop(visitor, "it said more than one line" if newline else "its line does not end")
            return False
        if not newline:
            return False
        try:
            visitor.hello = parse_hello(line)
        except ValueError as error:
            self._drop(visitor, str(error))
            return False
        return True

    def _drop(self, visitor: Visitor, why: str = "") -> None:
        """End a connection; with `why`, say so, as of a stranger."""
        self._selector.unregister(visitor.connection)
        visitor.connection.close()
        self._visitors.remove(visitor)
        if why:
            self._strangers += 1
            more = "; further strangers are dropped without a word" if self._strangers == _NAMED else ""
            if self._strangers <= _NAMED:
                print(
                    f"initialize: dropped a connection from {visitor.address}, which is no process of this run: "
                    f"{why}{more}",
                    file=sys.stderr,
                    flush=True,
                )


def parse_hello(line: bytes) -> dict[str, Any]:
    """The message in which a process says who it is; ValueError, with what is wrong, for any other line."""
    message = parse(line)
    if message.keys() != {"index", "count", "host", "identity"}:
        raise ValueError("its message has other fields")
    identity = message["identity"]
    checks = {
        "index": is_int(message["index"]) and 0 <= message["index"] < _MOST,
        "count": is_int(message["count"]) and 1 <= message["count"] < _MOST,
        "host": _is_text(message["host"]),
        "identity": isinstance(identity, dict) and all(map(_is_text, [*identity, *identity.values()])),
    }
    if wrong := [f"its {name} is {_short(message[name])}" for name, is_right in checks.items() if not is_right]:
        raise ValueError(", ".join(wrong))
    return message


def parse(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; ValueError for everything else."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise ValueError(f"it said {_short(bytes(line[:100]))}")
    return message


def local_address(host: str) -> str:
    """The address of this machine that the coordinator's name stands for; empty where it is none, or not only one.

    A name that leads back to this machine alone (127.0.1.1 for its own name, as some systems have it) is another
    address for the others, so it does not count, unless the loopback address itself was given.
    """
    if host == "localhost":
        return "127.0.0.1"
    try:
        found = {str(ipaddress.ip_address(host))}
        may_be_loopback = True
    except ValueError:
        found, may_be_loopback = _resolved(host), False
    local = [a for a in sorted(found) if (may_be_loopback or not ipaddress.ip_address(a).is_loopback) and _is_local(a)]
    version_4 = [address for address in local if ":" not in address]
    return next((only[0] for only in (version_4, local) if len(only) == 1), "")


def _resolved(host: str) -> set[str]:
    deadline = time.monotonic() + _RESOLVE
    while True:  # the record of a pod that has just started comes a moment later
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            return {str(address[0]) for *_, address in found if "%" not in str(address[0])}
        except (OSError, UnicodeError):
            if time.monotonic() > deadline:
                return set()
            time.sleep(0.2)


def _is_local(address: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _TEXT and value.isprintable()


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
