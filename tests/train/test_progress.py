"""A run shows one live line on a terminal, plain lines elsewhere; its files are whole after a kill and a resumption."""

import ast
import importlib
import io
import json
import math
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from shardlm.train import progress as module
from shardlm.train.progress import Progress

TRAINING = {
    "grad_norm": 0.8124,
    "learning_rate": 3e-4,
    "loss": 2.43104,
    "step_time": 0.0834,
    "tokens_per_second": 12345.0,
    "utilisation": 0.4123,
}


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Seconds that pass only when a test says so, for the elapsed and the remaining time."""
    monkeypatch.setenv("TERM", "xterm-256color")
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(
        module, "time", SimpleNamespace(monotonic=lambda: now.seconds, time=lambda: 1.7e9 + now.seconds)
    )
    return now


def console(*, terminal: bool = False, width: int = 120, **options) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, force_interactive=terminal, width=width, **options)


def plain(output: Console) -> list[str]:
    return output.file.getvalue().splitlines()


def screen(output: Console) -> list[str]:
    """The lines that a terminal would show: colours left out, erased lines gone."""
    rows, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[^\x1b]", output.file.getvalue()):
        if token == "\n":
            row, column = row + 1, 0
            rows += [""] * (row == len(rows))
        elif token == "\r":
            column = 0
        elif token == "\x1b[2K":
            rows[row] = ""
        elif token[0] == "\x1b":
            assert token[-1] in "mhl", f"the terminal of this test does not know {token!r}"
        else:
            rows[row] = rows[row][:column].ljust(column) + token + rows[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in rows if line.strip()]


def records(directory: Path) -> list[dict]:
    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    text = (directory / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]


def test_a_pipe_gets_one_plain_line_for_each_log(clock):
    output = console()
    with Progress(total=300, console=output) as progress:
        progress.message("[resumed] from step 100")
        for step in range(101, 121):
            progress.advance(step)
        progress.log(120, TRAINING)
        clock.seconds += 20 * 0.5  # slower than step_time says: evaluations and checkpoints count
        progress.log(140, TRAINING | {"loss": 12.0, "tokens": 1_234_567.0, "router_z": 12.34567})
    assert plain(output) == [
        "[resumed] from step 100",
        "step   120/300  loss 2.4310  grad_norm 0.812  lr 3.00e-04  12.3k tokens/s"
        "  83 ms/step  mfu 41.2 %  eta 0:00:15",
        "step   140/300  loss 12.0000  grad_norm 0.812  lr 3.00e-04  router_z 12.35  1.2M tokens  12.3k tokens/s"
        "  83 ms/step  mfu 41.2 %  eta 0:01:20",
    ]


def test_columns_stay_aligned():
    output = console()
    with Progress(total=12345, console=output) as progress:
        for step, loss, speed in ((9, 10.5, 120_000.0), (12340, 2.0, 9_900.0), (12345, 3.0, 980.0)):
            progress.log(step, {"loss": loss, "tokens_per_second": speed})
    assert plain(output) == [
        "step     9/12345  loss 10.5000  120.0k tokens/s  eta -:--:--",
        "step 12340/12345   loss 2.0000    9.9k tokens/s  eta 0:00:00",
        "step 12345/12345   loss 3.0000     980 tokens/s  eta 0:00:00",
    ]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("loss", math.nan, "loss nan"),
        ("held_out_loss", 2.5, "held_out_loss 2.5000"),
        ("grad_norm", 100.0, "grad_norm 100"),
        ("grad_norm", 1.5, "grad_norm 1.50"),
        ("learning_rate", 0.0, "lr 0.00e+00"),
        ("tokens", 999.0, "999 tokens"),
        ("tokens", 999_960.0, "1.0M tokens"),
        ("tokens", 3.2e12, "3.2T tokens"),
        ("tokens_per_second", math.inf, "inf tokens/s"),
        ("step_time", 0.0004, "0.4 ms/step"),
        ("step_time", 12.5, "12500 ms/step"),
        ("utilisation", 0.0521, "mfu 5.2 %"),
        ("accuracy", 1 / 3, "accuracy 0.3333"),
        ("accuracy", 1234567.0, "accuracy 1.235e+06"),
    ],
)
def test_a_metric_is_short_and_has_its_unit(name, value, text):
    output = console()
    Progress(total=300, console=output).log(7, {name: value})
    [line] = plain(output)
    assert line.split("  eta")[0] == f"step     7/300  {text}"


def test_a_terminal_keeps_one_live_line_below_the_plain_ones(clock):
    output = console(terminal=True, width=80)
    with Progress(total=300, start=100, console=output) as progress:
        progress.message("resumed from step 100")
        progress.advance(120)
        progress.log(120, TRAINING)
        print("printed by the user")
        clock.seconds += 65
        progress.advance(125)
        progress.log(120, {"held_out_loss": 2.5})
    *above, live = screen(output)
    assert above == [
        "resumed from step 100",
        "step   120/300  loss 2.4310  grad_norm 0.812  lr 3.00e-04  12.3k tokens/s",
        "                83 ms/step  mfu 41.2 %",
        "printed by the user",
        "step   120/300  held_out_loss 2.5000",
    ]
    assert re.fullmatch(r"[━╸╺ ]{10} 125/300  loss 2\.4310  12\.3k tok/s  83 ms  mfu 41\.2 %  0:01:05<0:00:15", live)
    assert len(live) == 80
    assert sys.stdout is not None and not type(sys.stdout).__module__.startswith("rich")


def test_a_long_message_is_cut_between_words():
    output = console(terminal=True, width=44)
    text = (
        "stopped: step 120 is saved in /home/you/runs/a-rather-long-name-of-a-folder-that-has-no-room because of Ctrl-C"
    )
    with Progress(total=300, console=output) as progress:
        progress.message(text)
    found = [line for line in screen(output) if "/300" not in line and line.strip()]
    assert len(found) > 1 and " ".join(found).split() == text.split()
    assert all(len(line.rstrip()) <= 44 or len(line.split()) == 1 for line in found)


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (120, ["loss 2.4310", "12.3k tok/s", "83 ms", "mfu 41.2 %", "0:00:00<0:00:15"]),
        (75, ["loss 2.4310", "12.3k tok/s", "83 ms", "0:00:00<0:00:15"]),
        (50, ["loss 2.4310", "0:00:00<0:00:15"]),
        (20, []),
    ],
)
def test_the_live_line_never_breaks(width, shown):
    output = console(terminal=True, width=width)
    with Progress(total=300, console=output) as progress:
        progress.advance(120)
        progress.log(120, TRAINING)
    live = screen(output)[-1]
    assert len(live) == width
    assert re.split("  +", live.split(maxsplit=1)[1]) == ["120/300", *shown]


def test_an_exception_leaves_the_terminal_in_order_and_the_file_complete(tmp_path):
    output, stdout = console(terminal=True), sys.stdout
    with (
        pytest.raises(KeyboardInterrupt),
        Progress(total=300, directory=tmp_path, console=output) as progress,
    ):
        assert sys.stdout is not stdout  # what is printed goes above the live line
        progress.log(10, {"loss": 2.5})
        raise KeyboardInterrupt
    assert sys.stdout is stdout
    written = output.file.getvalue()
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")  # the cursor is back
    assert written.rindex("\n") > written.rindex("0/300")  # a traceback begins on a line of its own
    assert [record["step"] for record in records(tmp_path)] == [10]
    progress.close()
    progress.close()
    assert output.file.getvalue() == written


def test_a_notebook_gets_plain_text():
    output = console(terminal=True, force_jupyter=True)
    with Progress(total=300, console=output) as progress:
        progress.advance(7)
        progress.log(7, {"loss": 2.5})
    assert output.file.getvalue() == "step     7/300  loss 2.5000  eta -:--:--\n"


def test_a_pipe_is_no_terminal_even_where_colours_are_forced(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress(total=300) as progress:
        progress.advance(7)
        progress.log(7, {"loss": 2.5})
    assert capsys.readouterr().out == "step     7/300  loss 2.5000  eta -:--:--\n"


def test_each_log_is_a_line_of_json(tmp_path, clock):
    folder = tmp_path / "runs" / "a"
    with Progress(total=300, directory=folder, console=console()) as progress:
        progress.log(10, {"loss": 2, "grad_norm": 0.5})
        assert len(records(folder)) == 1  # on disk now, not when the run ends
        clock.seconds += 5
        progress.log(10, {"held_out_loss": math.nan, "low": -math.inf, "high": math.inf})
    first, second = records(folder)
    assert first == {"step": 10, "time": 1.7e9 + 1000, "loss": 2.0, "grad_norm": 0.5}
    assert isinstance(first["loss"], float)
    assert second == {"step": 10, "time": 1.7e9 + 1005, "held_out_loss": "NaN", "low": "-Infinity", "high": "Infinity"}
    assert math.isnan(float(second["held_out_loss"])) and float(second["low"]) == -math.inf


@pytest.mark.parametrize("torn", ["", '{"step": 60, "time": 17', '{"step": 40, "loss": 1.0}', "\0\0\0", '{"step"\xff'])
def test_resuming_drops_the_lines_of_later_steps_and_a_torn_one(tmp_path, torn):
    file = tmp_path / "metrics.jsonl"
    whole = ['{"step": 20, "loss": 3.0}', '{"other": 1}', '{"step": 40, "held_out_loss": 2.0}']
    later = ['{"step": 50, "loss": 1.5}', '{"step": 41, "loss": 1.5}']
    file.write_text("\n".join(whole + later + [torn]), encoding="latin-1")
    output = console()
    with Progress(total=300, start=40, directory=tmp_path, console=output) as progress:
        progress.log(50, {"loss": 1.25})
    complete = [torn] if torn.endswith("}") else []  # only its line end is missing
    *lines, new = file.read_text(encoding="utf-8").splitlines()
    assert lines == whole + complete
    assert json.loads(new)["loss"] == 1.25
    dropped = 2 + (torn != "" and not complete)
    assert plain(output)[0] == f"{file}: dropped {dropped} line(s), cut short or of steps after 40"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_file_with_nothing_to_drop_is_not_rewritten(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 40}\n')
    before, output = file.stat(), console()
    Progress(total=300, start=40, directory=tmp_path, console=output)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert plain(output) == []


def test_steps_in_any_order_and_beyond_the_total_are_accepted(tmp_path):
    for terminal in (False, True):
        with Progress(total=3, directory=tmp_path, console=console(terminal=terminal)) as progress:
            for step in (2, 5, 1, 1, 7):
                progress.advance(step)
                progress.log(step, {"loss": 1.0})
        assert [record["step"] for record in records(tmp_path)] == [2, 5, 1, 1, 7]


def test_a_log_is_due_at_intervals_and_at_the_end():
    progress = Progress(total=25, log_every=10, console=console())
    assert [step for step in range(1, 26) if progress.due(step)] == [10, 20, 25]


def test_other_processes_show_and_record_nothing(tmp_path):
    output = console(terminal=True)
    options = {"directory": tmp_path / "a", "tensorboard": True, "console": output, "enabled": False}
    with Progress(total=300, log_every=5, **options) as progress:
        progress.advance(7)
        progress.log(7, {"loss": 1.0})
        progress.message("text")
        assert progress.due(5)
    assert output.file.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def test_advancing_is_cheap():
    with Progress(total=20_000, console=console(terminal=True)) as progress:
        began = time.perf_counter()
        for step in range(20_000):
            progress.advance(step)
        # It takes 2 us. The bound leaves room for a busy machine; a refresh at each step would take 1000 us.
        assert (time.perf_counter() - began) / 20_000 < 20e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_every": 0}, "log_every=0; it is a number of steps, at least 1"),
        ({"tensorboard": True}, "tensorboard=True, but there is no directory to write the events to: give one"),
        ({"directory": "gs://bucket/a"}, "log_dir='gs://bucket/a' is an address: give a local folder"),
        ({"directory": Path("gs://bucket/a")}, "log_dir='gs:/bucket/a' is an address: give a local folder"),
        ({"directory": ""}, "log_dir='' is empty: name a path"),
    ],
)
@pytest.mark.parametrize("enabled", [True, False])
def test_a_wrong_option_is_an_error_on_every_process(options, message, enabled):
    with pytest.raises(ValueError, match=re.escape(message)):
        Progress(total=300, enabled=enabled, console=console(), **options)


def test_a_metric_cannot_take_the_name_of_the_step():
    with pytest.raises(ValueError, match="a metric is called 'time', as the step or the time of its line: rename it"):
        Progress(total=300, console=console()).log(1, {"loss": 1.0, "time": 2.0})


def test_tensorboard_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"needs tensorboardX: pip install -e '.\[tensorboard\]'"):
        Progress(total=300, directory=tmp_path, tensorboard=True, console=console())


def test_tensorboard_gets_each_scalar_at_once_and_hides_what_was_dropped(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, logdir, purge_step):
            calls.append(("open", logdir, purge_step))

        def __getattr__(self, name):
            return lambda *arguments: calls.append((name, *arguments))

    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=SummaryWriter))
    with Progress(total=300, start=40, directory=tmp_path, tensorboard=True, console=console()) as progress:
        progress.log(50, {"loss": 1.5, "grad_norm": 0.5})
    assert calls == [
        ("open", str(tmp_path), 41),
        ("add_scalar", "loss", 1.5, 50),
        ("add_scalar", "grad_norm", 0.5, 50),
        ("flush",),
        ("close",),
    ]


def test_events_can_be_read_back(tmp_path):
    event_pb2 = importlib.import_module("tensorboardX.proto.event_pb2")  # of the extra test: missing, it fails
    with Progress(total=300, directory=tmp_path, tensorboard=True, console=console()) as progress:
        progress.log(50, {"loss": 1.5})
    progress.close()
    [file] = tmp_path.glob("events.out.tfevents.*")
    data, values = file.read_bytes(), []
    while data:  # each record: length (8 bytes), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        values += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    assert values == [(50, "loss", 1.5)]


def test_neither_it_nor_what_it_imports_of_ours_imports_jax():
    root, seen, todo = Path(module.__file__).parents[2], set(), ["shardlm.train.progress"]
    while todo:
        name = todo.pop()
        if name in seen or not name.startswith("shardlm."):
            continue
        seen.add(name)
        for node in ast.walk(ast.parse((root / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                around = ".".join(name.split(".")[: -node.level]) + "." if node.level else ""
                imported = f"{around}{node.module}"
                assert not imported.startswith("jax") and imported not in ("shardlm", "shardlm.train"), name
                todo.append(imported)
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith(("jax", "shardlm")) for alias in node.names), name
    assert "shardlm.train.record" in seen
