"""Two real processes of four devices: the numbers of one process, checkpoints that one process reads, a shared end.

They take seconds to start, so few runs serve many claims.
"""

import io
import json
import os
import re
import signal
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

import shardlm as sl
from shardlm.runtime.launch.output import Output
from shardlm.runtime.launch.restarts import Restarts
from shardlm.runtime.launch.supervisor import Supervisor
from tests import xla
from tests.runtime import worker

pytestmark = pytest.mark.usefixtures("x64_module")

LAYOUTS = ["data=2,fsdp=2,tensor=2", "pipe=2,fsdp=2,tensor=2,pipeline=1f1b:2"]
TIMEOUT = 240.0  # seconds: what hangs is ended, and fails


def launch(folder: Path, *arguments: str, **restarts: int) -> tuple[int, list[str]]:
    """Runs worker.py under the supervisor; the exit status, and what was printed but for gloo's own lines."""
    stream = io.BytesIO()
    supervisor = Supervisor(
        [sys.executable, worker.__file__, str(folder), *arguments],
        Restarts(**{"allowed": 0, "minimum": 2, "count": 2, "backoff": 0} | restarts),
        devices=4,
        grace=0.0,
        extra={"XLA_FLAGS": xla.flags(), "PYTHONPATH": os.pathsep.join(sys.path), "SHARDLM_HEARTBEAT": "10"},
        output=Output(stream),
    )
    timer = threading.Timer(TIMEOUT, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        status = supervisor.run()
    finally:
        timer.cancel()
    return status, [line for line in stream.getvalue().decode().splitlines() if "[Gloo]" not in line]


def said(lines: list[str], word: str) -> list:
    """What the processes said behind a word, in the order of their numbers where it matters."""
    found = [line.partition(f"{word} ") for line in sorted(lines) if f"] {word} " in line]
    return [json.loads(value) for _, _, value in found]


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of the run of two processes, and the lines that they printed."""
    folder = tmp_path_factory.mktemp("together")
    status, lines = launch(folder, "train", *LAYOUTS)
    assert status == 0, "\n".join(lines[-40:])
    return folder, lines


@pytest.fixture(scope="module")
def one_device() -> sl.Trainer:
    return worker.trainer_of("data=1", devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def alone(one_device, tmp_path_factory) -> tuple[list[dict], dict]:
    """The same in this process, on one device: its records, and what it says at the end."""
    folder = tmp_path_factory.mktemp("alone")
    result = worker.train(one_device, folder)
    return worker.records(folder), result


def losses(records: list[dict]) -> list[float]:
    return [record["loss"] for record in records]


def assert_same_curve(found: list[dict], expected: list[dict]) -> None:
    """Losses to rounding, and as many tokens in every step."""
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    np.testing.assert_allclose(losses(found), losses(expected), rtol=1e-12, atol=0)
    np.testing.assert_allclose(*([r["tokens"] for r in records] for records in (found, expected)), rtol=1e-6)


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_layouts_over_processes_give_the_curve_of_one_device(together, alone, number):
    folder, lines = together
    records, expected = alone
    assert_same_curve(worker.records(folder / str(number)), records)
    results = [result for result in said(lines, "RESULT") if result["layout"] == LAYOUTS[number]]
    assert [result["process"] for result in results] == [0, 1]
    for result in results:
        assert result["held_out"] == pytest.approx(expected["held_out"], rel=1e-12)
        assert result["sums"][0] == result["sums"][1]  # as trained, and as restored
        assert result["sums"] == pytest.approx(expected["sums"], rel=1e-10)
        assert result["sample"] == expected["sample"]


def test_the_comparison_can_fail(alone):
    changed = [record | {"loss": record["loss"] * (1 + 1e-11)} for record in alone[0]]
    with pytest.raises(AssertionError):
        assert_same_curve(changed, alone[0])


def test_each_process_reads_its_own_rows(together):
    rows = [result["rows"] for result in said(together[1], "RESULT")]
    # The stages of a pipeline see all rows.
    assert rows == [[0, 4], [0, 8], [4, 8], [0, 8]]


def test_only_the_first_process_logs(together):
    logged = [line for line in together[1] if re.search(r"step +\d+/4 |first step after", line)]
    assert len(logged) == 2 * worker.STEPS + 3  # two layouts, and the start of the run that is preempted
    assert all(line.startswith("[0] ") for line in logged)


def test_one_process_reads_what_two_have_saved_bit_for_bit(together, one_device):
    path = together[0] / "0" / str(worker.STEPS)
    eight, one = (sl.restore(path, trainer) for trainer in (worker.trainer_of("fsdp=4,tensor=2"), one_device))
    for (keys, a), b in zip(jax.tree_util.tree_leaves_with_path(eight), jax.tree.leaves(one), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(keys)


def test_a_hugging_face_model_goes_there_and_back_and_a_failed_write_is_heard_by_all(together):
    folder, lines = together
    first, second = said(lines, "HUB")
    assert first == second and first["equal"]
    one, two = first["errors"]
    assert one.startswith(f"{folder}/file/model could not be written: process 0: NotADirectoryError")
    assert two == f"{folder}/full could not be written: process 0: OSError: No space left on device"
    assert not list(folder.glob("full*"))
    assert len(list((folder / "model").glob("*.safetensors"))) > 1


def test_processes_that_would_do_something_else_say_so_before_they_do(together):
    errors = said(together[1], "DIFFERENT")
    assert len(errors) == 2 and errors[0] == errors[1]
    assert errors[0].startswith("init: the processes do not do the same:\n  - seed: 1 on process 1, 0 on process 0")


def test_rows_that_differ_between_processes_are_named_after_the_first_step_too(together):
    first, second = said(together[1], "SHAPES")
    assert first["errors"] == second["errors"] and len(first["errors"]) == 1
    assert first["errors"][0].startswith("step: the processes do not do the same:\n  - shape of ")
    assert "shape of tokens: int32[16, 12] on process 1, int32[12, 12] on process 0" in first["errors"][0]


def test_nobody_runs_a_program_that_another_process_still_compiles(together):
    """Who did would wait in its first collective, in which a CPU has 30 s."""
    first, second = said(together[1], "SHAPES")
    assert first["step"] == second["step"] == 2
    # The second sleeps first, so that without a wait the first would have run by then.
    assert max(first["compiled"], second["compiled"]) < min(first["ran"], second["ran"])


def test_after_sigterm_to_one_all_have_saved_the_same_step_and_end_well(together):
    folder, lines = together
    assert not said(lines, "NOT PREEMPTED")
    [step] = [int(line.split()[5]) for line in lines if "ended by SIGTERM: step" in line]
    assert sl.restore(folder / "preempted" / str(step), worker.trainer_of("fsdp=8")).step == step
    assert [record["step"] for record in worker.records(folder / "preempted")] == list(range(1, step + 1))


def test_a_run_goes_on_with_fewer_processes_and_then_with_more(alone, tmp_path, capfd):
    """Eight devices, of which four die; the rest goes on from the checkpoint; then eight on another layout."""
    status, lines = launch(tmp_path, "elastic", "data=-1,fsdp=2", allowed=1, minimum=1)
    assert status == 0, "\n".join(lines[-40:])
    reported = capfd.readouterr().err
    assert "process 1 of 2 was ended by SIGKILL" in reported and "restart 1 of 1 in 0 s, on 1 process\n" in reported
    assert any("layout was data=4,fsdp=2, is now data=2,fsdp=2" in line for line in lines)
    assert_same_curve(worker.records(tmp_path), alone[0])
    (tmp_path / str(worker.STEPS)).rename(tmp_path / "gone")
    worker.fit(worker.trainer_of("fsdp=2,tensor=4"), tmp_path)
    assert_same_curve(worker.records(tmp_path), alone[0])
