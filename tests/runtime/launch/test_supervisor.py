"""The supervisor merges output, ends all when one dies, and leaves nobody. Its processes here know nothing of JAX."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shardlm.__main__ import main
from shardlm.runtime.launch.output import Output
from shardlm.runtime.launch.restarts import Restarts
from shardlm.runtime.launch.supervisor import Supervisor

PRELUDE = "import os, signal, subprocess, sys, time; i = int(os.environ['SHARDLM_PROCESS'])\n"


@pytest.fixture
def marker(tmp_path) -> str:
    """A word on the command line of every process of a test; none may be left after it."""
    word = f"shardlm-test-{tmp_path.name}-{os.getpid()}"
    yield word
    assert left(word) == []


def left(word: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            running = entry.name.isdecimal() and word.encode() in (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if running and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def supervise(marker: str, script: str, count: int = 2, restarts: int = 0, **options) -> tuple[int, list[str]]:
    """The exit status, and what the processes printed."""
    stream = io.BytesIO()
    supervisor = Supervisor(
        [sys.executable, "-S", "-c", PRELUDE + script, marker],
        Restarts(restarts, minimum=options.pop("minimum", count), count=count, backoff=0.0),
        output=Output(stream),
        **options,
    )
    status = supervisor.run()
    return status, stream.getvalue().decode().splitlines()


def send_when(number: int, path: Path, times: int = 1) -> threading.Thread:
    """Send this process a signal once a file exists."""

    def run():
        while not path.exists():
            time.sleep(0.01)
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_lines_are_merged_whole_with_the_number_of_their_process(marker):
    status, lines = supervise(
        marker,
        "print('[Gloo] Rank 0 is connected to 1 peer ranks. Expected number is : 1')  # the CPU backend's chatter\n"
        "for k in range(2000): print('x' * 50, k)\nsys.stderr.write(f'no newline {i}')",
        count=3,
    )
    assert status == 0
    for i in range(3):
        own = [line for line in lines if line.startswith(f"[{i}] ")]
        assert own == [*(f"[{i}] {'x' * 50} {k}" for k in range(2000)), f"[{i}] no newline {i}"]


def test_a_line_without_end_does_not_fill_the_memory(marker):
    status, lines = supervise(marker, "sys.stdout.write('y' * 3_000_000)", count=1)
    assert status == 0
    assert 20 < len(lines) < 60
    assert sum(line.count("y") for line in lines) == 3_000_000


def test_processes_know_who_they_are(marker):
    script = "print(*(os.environ['SHARDLM_' + n] for n in ('PROCESS', 'PROCESSES', 'DEVICES_PER_PROCESS', 'HANG')))"
    status, lines = supervise(marker, script, devices=4, extra={"SHARDLM_HANG": "5:5"})
    assert status == 0
    assert sorted(lines) == ["[0] 0 2 4 5:5", "[1] 1 2 4 5:5"]


def test_when_one_dies_the_rest_and_their_children_are_ended_and_it_is_reported(marker, capsys):
    script = """
subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(100)', sys.argv[1]])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if i == 1:
    print('last words')
    sys.exit(3)
time.sleep(100)
"""
    began = time.monotonic()
    status, _ = supervise(marker, script)
    assert status == 3 and time.monotonic() - began < 10.0
    said = capsys.readouterr().err
    assert "launch: process 1 of 2 ended with status 3 after " in said
    assert "launch:   | last words\nlaunch: not started again: no restarts are allowed (--restarts 0)\n" in said


def test_a_signal_is_named_and_all_are_started_again(marker, tmp_path, capsys):
    script = f"""
first = not os.path.exists({str(tmp_path / "was")!r})
if i == 0:
    time.sleep(0.3 if first else 0)
    open({str(tmp_path / "was")!r}, 'w').close()
    if first: os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.6)
print('done', os.environ['SHARDLM_PROCESSES'])
"""
    status, lines = supervise(marker, script, count=2, minimum=1, restarts=2)
    assert status == 0
    assert lines[-1:] == ["[0] done 1"]
    said = capsys.readouterr().err
    assert "process 0 of 2 was ended by SIGKILL after " in said
    assert "launch: restart 1 of 2 in 0 s, on 1 process\n" in said


def test_a_script_that_fails_at_once_is_not_started_for_ever(marker, capsys):
    status, lines = supervise(marker, "import nothing_of_this_name", count=1, restarts=9)
    assert status == 1
    assert sum("ModuleNotFoundError" in line for line in lines) == 2
    assert "failed in the same way twice, at once" in capsys.readouterr().err


def test_who_was_killed_with_another_is_not_blamed(marker, capsys):
    status, _ = supervise(marker, "time.sleep(0.2 * i)\nsys.exit(75) if i == 0 else os.kill(os.getpid(), 9)")
    assert status == 137
    assert "process 1 of 2 was ended by SIGKILL" in capsys.readouterr().err


def test_a_stopped_process_is_named(marker, capsys):
    script = "os.kill(os.getpid(), signal.SIGSTOP) if i == 1 else (time.sleep(1.0), os.abort())"
    assert supervise(marker, script)[0] == 134
    said = capsys.readouterr().err
    assert "process 1 is stopped (SIGSTOP, or a debugger): the others wait for it" in said
    assert "process 1 had been stopped" in said


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_lets_the_processes_end_themselves(marker, tmp_path, number, status, capsys):
    script = f"""
def end(*_):
    print('saved')
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
open({str(tmp_path)!r} + f'/up{{i}}', 'w').close()
time.sleep(100)
"""
    # The other is up by then or is ended by the signal, before it could save.
    thread = send_when(number, tmp_path / "up1")
    found, lines = supervise(marker, script, count=2)
    thread.join()
    assert found in (status, 128 + number)
    assert "[1] saved" in lines
    assert f"{signal.Signals(number).name}: the processes have 30 s to save and end" in capsys.readouterr().err


def test_those_that_do_not_end_are_killed(marker, tmp_path, capsys):
    script = "signal.signal(15, signal.SIG_IGN); open(sys.argv[1] and %r, 'w').close(); time.sleep(100)"
    thread = send_when(signal.SIGTERM, tmp_path / "up")
    status, _ = supervise(marker, script % str(tmp_path / "up"), count=1, grace=0.5)
    thread.join()
    assert status == 128 + signal.SIGTERM
    assert "process 0 did not end, and is killed" in capsys.readouterr().err


def test_a_second_signal_ends_all_at_once(marker, tmp_path):
    script = "signal.signal(15, signal.SIG_IGN); open(sys.argv[1] and %r, 'w').close(); time.sleep(100)"
    thread = send_when(signal.SIGINT, tmp_path / "up", times=2)
    began = time.monotonic()
    status, _ = supervise(marker, script % str(tmp_path / "up"), count=1, grace=60.0)
    thread.join()
    assert status == 130 and time.monotonic() - began < 10.0


def test_when_nobody_reads_the_run_ends(marker):
    class Closed(io.RawIOBase):
        def write(self, data):
            raise BrokenPipeError

    supervisor = Supervisor(
        [sys.executable, "-S", "-c", PRELUDE + "print('x'); time.sleep(100)", marker],
        Restarts(0, minimum=1, count=1),
        output=Output(Closed()),
    )
    assert supervisor.run() == 128 + signal.SIGTERM


def test_a_killed_supervisor_leaves_nobody(marker, tmp_path):
    """SIGKILL, which nothing can catch: the guard of the process group ends the rest, their children included."""
    script = (
        PRELUDE
        + f"""
subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(100)', sys.argv[1]])
open({str(tmp_path)!r} + f'/up{{i}}', 'w').close()
time.sleep(100)
"""
    )
    code = (
        "import sys; from shardlm.runtime.launch.supervisor import *\n"
        "Supervisor([sys.executable, '-S', '-c', sys.argv[1], sys.argv[2]], Restarts(0, 2, 2)).run()"
    )
    supervisor = subprocess.Popen(
        [sys.executable, "-c", code, script, marker], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    try:
        until = time.monotonic() + 60.0
        while not all((tmp_path / f"up{i}").exists() for i in range(2)) and time.monotonic() < until:
            time.sleep(0.05)
        assert len(left(marker)) == 5  # itself, two processes, and a child of each
    finally:
        supervisor.kill()
        supervisor.wait()
    until = time.monotonic() + 5.0
    while left(marker) and time.monotonic() < until:
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("launch", "what to run is missing: a script, or -m and a module"),
        ("launch no/such/file.py", "there is no file no/such/file.py (from "),
        ("launch -m nothing_of_this_name", "there is no module called nothing_of_this_name"),
        ("launch --processes 3 --elastic 1:2 x.py", "--processes 3 and --elastic 1:2: give one of them"),
        ("launch --hang 3 -m json", "SHARDLM_HANG='3' is not FACTOR:SECONDS"),
    ],
)
def test_a_mistake_is_one_error_and_status_2(arguments, message, capsys):
    assert main(arguments.split()) == 2
    assert f"{message}" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["--processes 0", "--elastic 3:2", "--elastic 2", "--restarts -1"])
def test_numbers_are_checked(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["launch", *arguments.split(), "x.py"])
    assert "argument --" in capsys.readouterr().err


def test_an_attempt_that_saved_a_later_checkpoint_gives_the_restarts_back(marker, tmp_path, capsys):
    """Killed in each of five attempts, of which all but one come further: two restarts in a row are enough."""
    script = f"""
from pathlib import Path
counter = Path({str(tmp_path / "attempts")!r})
attempt = int(counter.read_text()) if counter.exists() else 0
counter.write_text(str(attempt + 1))
saved = [100, 100, 200, 300, 400, 400][attempt]
Path(os.environ['SHARDLM_SAVED']).write_text(str(saved))
if attempt < 5: os.kill(os.getpid(), signal.SIGKILL)
"""
    status, _ = supervise(marker, script, count=1, restarts=2)
    assert status == 0
    said = capsys.readouterr().err
    made = [line.split()[2] for line in said.splitlines() if line.startswith("launch: restart ")]
    assert made == ["1", "2", "1", "1", "1"]
