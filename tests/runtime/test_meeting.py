"""Processes come together, or every one of them says who is missing, double or different. Threads play them."""

import contextlib
import json
import random
import re
import socket
import threading
import time

import pytest

from shardlm.runtime import reception
from shardlm.runtime.meeting import MeetingError, _listen, bind_address, meet, split

CODE = {"jax": "1", "shardlm's sources": "abc"}


@pytest.fixture
def coordinator() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def gather(coordinator: str, *processes: tuple, timeout: float = 5.0) -> list[str]:
    """What each of (count, index, identity) raises; empty for one that may go on."""
    found = [""] * len(processes)

    def run(place: int, count: int, index: int, identity=CODE):
        try:
            meet(coordinator, count, index, identity, timeout)
        except MeetingError as error:
            found[place] = str(error)

    threads = [threading.Thread(target=run, args=(place, *process)) for place, process in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
        assert not thread.is_alive()
    return found


def test_all_come(coordinator):
    assert gather(coordinator, (3, 2), (3, 0), (3, 1)) == ["", "", ""]
    assert gather(coordinator, (2, 1), (2, 0)) == ["", ""]  # the port is free again at once


def test_those_that_are_missing_are_named_on_all_that_came(coordinator):
    found = gather(coordinator, (4, 0), (4, 2), timeout=0.5)
    assert found[0] == found[1]
    assert "2 of 4 processes did not come (timeout 0 s): 1, 3" in found[0].replace("timeout 1 s", "timeout 0 s")


def test_different_numbers_of_processes(coordinator):
    found = gather(coordinator, (2, 0), (3, 1))
    assert found[0] == found[1]
    assert "process 1 was told of 3 processes, and process 0 of 2" in found[0]
    assert "process 1 was told of 2 processes, and process 0 of 3" in gather(coordinator, (3, 0), (2, 1))[1]


def test_two_with_the_same_number(coordinator):
    assert "2 processes say they are number 1, on " in gather(coordinator, (3, 0), (3, 1), (3, 1))[1]


def test_other_code_is_named(coordinator):
    found = gather(coordinator, (2, 0), (2, 1, CODE | {"jax": "2"}))
    assert found[0] == found[1]
    assert f"process 1 on {socket.gethostname()} runs other code: jax is 2 there and 1 on process 0" in found[0]
    assert "sources" not in found[0]


def test_the_port_is_taken(coordinator):
    with (
        socket.create_server(split(coordinator)),
        pytest.raises(MeetingError, match=r"process 0 cannot listen on port \d+: Address already in use\. If another"),
    ):
        meet(coordinator, 2, 0, CODE, 1.0)


def test_nobody_listens(coordinator):
    with pytest.raises(MeetingError, match=rf"process 1 did not reach process 0 at {coordinator} within .* refused\)"):
        meet(coordinator, 2, 1, CODE, 0.6)


def test_somebody_else_listens(coordinator):
    with socket.create_server(split(coordinator)) as other:
        other.settimeout(5.0)

        def answer():
            connection, _ = other.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(MeetingError, match="what answers there is not process 0 of this run, or ended"):
            meet(coordinator, 2, 1, CODE, 0.3)
        thread.join()


def test_a_stranger_does_not_disturb(coordinator):
    def knock():
        for _ in range(100):
            try:
                with socket.create_connection(split(coordinator), timeout=1.0) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\r\n")
                return
            except OSError:
                threading.Event().wait(0.02)

    threading.Thread(target=knock, daemon=True).start()
    found: list[str] = gather(coordinator, (2, 0), (2, 1))
    assert found == ["", ""]


@pytest.mark.parametrize("address", ["host", "host:", ":80", "host:0", "host:70000", "host:x"])
def test_an_address_is_host_and_port(address):
    with pytest.raises(ValueError, match="is not host:port, as in"):
        split(address)


def test_only_a_loopback_address_stays_on_the_machine():
    assert bind_address("127.0.0.1:80") == bind_address("localhost:80") == "127.0.0.1:80"
    assert bind_address("10.0.0.1:80") == "[::]:80"
    assert split("[fe80::1]:80") == ("fe80::1", 80)


# Strangers


HELLO = {"index": 1, "count": 2, "host": "h", "identity": CODE}
STRANGE = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"",
    b"\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,
    b"[" * 60_000 + b"\n",
    b'{"a":' * 10_000 + b"\n",
    b"9" * 10_000 + b"\n",
    b"x" * 200_000,
    b"{}\n",
    b"null\n",
    b"\xff\xfe\n",
    *(
        json.dumps(HELLO | change).encode() + b"\n"
        for change in [
            {"index": [1]}, {"index": {}}, {"index": "1"}, {"index": None}, {"index": True}, {"index": 1.0},
            {"index": -1}, {"index": 10**30}, {"count": [2]}, {"count": 0}, {"count": "2"}, {"count": float("nan")},
            {"host": 1}, {"host": None}, {"host": "\x1b[2J"}, {"host": "h" * 5000}, {"identity": None},
            {"identity": []}, {"identity": {"jax": 1}}, {"identity": {"jax": None}}, {"identity": {"\n": "1"}},
            {"more": 1},
        ]
    ),
    json.dumps({"index": [1]}).encode() + b"\n",
    json.dumps({name: value for name, value in HELLO.items() if name != "identity"}).encode() + b"\n",
    json.dumps(HELLO).encode() + b"\n" + json.dumps(HELLO).encode() + b"\n",
]  # fmt: skip


def visit(coordinator: str, words: list[bytes], pause: float = 0.0, stay: float = 0.0) -> socket.socket:
    """A stranger who comes once somebody listens, and says these words one after another."""
    for _ in range(500):
        try:
            stranger = socket.create_connection(split(coordinator), timeout=1.0)
            break
        except OSError:
            time.sleep(0.01)
    else:
        raise AssertionError("nobody listens")
    with contextlib.suppress(OSError):  # it is shown the door
        for word in words:
            stranger.sendall(word)
            time.sleep(pause)
    time.sleep(stay)
    return stranger


def test_no_stranger_ends_or_delays_a_meeting(coordinator, capfd):
    """Whatever they say or do not say, the processes of the run meet, and the strangers are named."""
    count, rng = 3, random.Random(0)
    strange = STRANGE + [rng.randbytes(rng.randrange(1, 300)) + b"\n" * rng.randrange(2) for _ in range(50)]
    host = threading.Thread(target=gather, args=(coordinator, (count, 0)))
    host.start()
    strangers = [visit(coordinator, [words]) for words in strange]
    slow = threading.Thread(target=visit, args=(coordinator, [b'{"index": 1'] * 40, 0.02), daemon=True)
    slow.start()
    began = time.monotonic()
    assert gather(coordinator, (count, 2), (count, 1)) == ["", ""]
    assert time.monotonic() - began < 2.0  # not the 5 s in which a stranger who says nothing is dropped
    host.join(10.0)
    assert not host.is_alive()
    for stranger in strangers:
        stranger.close()
    said = capfd.readouterr().err
    assert (
        len(re.findall(r"initialize: dropped a connection from 127\.0\.0\.1 port \d+, which is no process", said)) == 10
    )
    assert "further strangers are dropped without a word" in said
    assert "\x1b" not in said


@pytest.mark.parametrize("line", [line for line in STRANGE if line.count(b"\n") == 1])
def test_every_field_of_a_message_is_checked(line):
    with pytest.raises(ValueError, match="^it"):
        reception.parse_hello(line.rstrip(b"\n"))
    assert reception.parse_hello(json.dumps(HELLO).encode()) == HELLO


def test_process_0_keeps_its_time_whoever_drips(coordinator, monkeypatch, capfd):
    """One who sends a byte now and then, and many who say nothing, do not make it wait longer."""
    monkeypatch.setattr(reception, "PROMPT", 0.2)
    monkeypatch.setattr(reception, "_SILENT", 5)

    def drip():
        with contextlib.suppress(AssertionError):  # it came too late
            visit(coordinator, [b" "] * 30, 0.05)

    threads = [threading.Thread(target=drip, daemon=True) for _ in range(20)]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    [found] = gather(coordinator, (2, 0), timeout=0.6)
    assert "1 of 2 processes did not come" in found
    assert time.monotonic() - began < 1.5
    said = capfd.readouterr().err
    assert "it said nothing complete within 0.2 s" in said or "too many others are waiting" in said


def test_a_process_keeps_its_time_whoever_answers(coordinator):
    """What listens at the address sends a byte now and then and never ends its line."""
    with socket.create_server(split(coordinator)) as other:

        def drip():
            with contextlib.suppress(OSError):
                connection, _ = other.accept()
                for _ in range(100):
                    connection.sendall(b" ")
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(MeetingError, match="what answers there is not process 0 of this run"):
            meet(coordinator, 2, 1, CODE, 0.4)
        assert time.monotonic() - began < 2.0


def test_a_process_that_left_and_comes_again_is_one(coordinator):
    threading.Thread(
        target=lambda: visit(coordinator, [json.dumps(HELLO | {"count": 3}).encode() + b"\n"], stay=0.1).close(),
        daemon=True,
    ).start()
    host: list = []
    thread = threading.Thread(target=lambda: host.extend(gather(coordinator, (3, 0))))
    thread.start()
    time.sleep(0.5)
    assert gather(coordinator, (3, 1), (3, 2)) == ["", ""]
    thread.join(10.0)
    assert host == [""]


def test_process_0_listens_where_the_coordinator_is_and_nowhere_else(monkeypatch, capfd):
    def names(*addresses: str):
        found = [(socket.AF_INET6 if ":" in a else socket.AF_INET, 1, 6, "", (a, 0)) for a in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: found)
        return bind_address("node:80")

    monkeypatch.setattr(
        reception, "_is_local", lambda address: address in ("10.0.0.7", "fd00::7", "127.0.1.1", "10.0.0.8")
    )
    assert names("10.0.0.7") == "10.0.0.7:80"
    assert names("fd00::7") == "[fd00::7]:80"
    assert names("fd00::7", "10.0.0.7") == "10.0.0.7:80"
    assert names("127.0.1.1", "10.0.0.7") == "10.0.0.7:80"
    assert names("127.0.1.1") == "[::]:80"  # what some systems call themselves; for others it is another address
    assert names("10.9.9.9") == "[::]:80"  # an address in front of this machine
    assert names("10.0.0.7", "10.0.0.8") == "[::]:80"
    monkeypatch.undo()
    monkeypatch.setattr(reception, "_RESOLVE", 0.0)
    assert bind_address("no-such-name.invalid:80") == "[::]:80"
    assert bind_address("127.0.0.2:80") == "127.0.0.2:80"
    with _listen("127.0.0.1", 0) as server:
        assert server.getsockname()[0] == "127.0.0.1"
    assert capfd.readouterr().err == ""
    with _listen("203.0.113.9", 0):
        assert (
            "203.0.113.9 does not name one address of this machine alone: process 0 listens on all"
            in capfd.readouterr().err
        )
