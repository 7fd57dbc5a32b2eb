"""Processes come together, or every one of them says who is missing, double or different. Threads play them."""

import socket
import threading

import pytest

from shardlm.runtime.meeting import MeetingError, bind_address, meet, split

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
