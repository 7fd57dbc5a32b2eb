"""`python -m shardlm explain` answers about clusters that are not here, and says what would make a model fit."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shardlm.__main__ import main

ROOT = Path(__file__).parents[1]
LARGE = "--preset llama3_70b --dtype bfloat16 --batch-size 512 --sequence 8192 --hardware h100"
SMALL = (
    "--preset tiny --num-layers 2 --d-model 32 --num-heads 4 --num-kv-heads 2 --d-ff 48 --batch-size 8 --sequence 16"
)


@pytest.fixture
def run(capsys):
    """Runs `explain` in this process; returns the exit status, and what was printed."""

    def call(arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["explain", *arguments.split()])
        return status, *capsys.readouterr()

    return call


def test_a_70b_model_on_512_devices_and_the_advice_holds(run):
    status, out, _ = run(f"{LARGE} --layout fsdp=64,tensor=8")
    assert status == 1
    assert "70,553,706,496 parameters" in out and "512 devices" in out and "DOES NOT FIT" in out
    assert "1.000" in out and "NVIDIA H100 SXM" in out
    advised = re.search(r"--layout\s+(\S+)\s+--attention\s+(\S+)", out)
    status, out, _ = run(f"{LARGE} --layout {advised[1]} --attention {advised[2]}")
    assert status == 0
    assert re.search(r"fits, .* to spare of 80 GB", out)


def test_a_405b_model_on_4096_devices(run):
    arguments = "--preset llama3_1_405b --dtype bfloat16 --attention chunked --batch-size 2048 --sequence 8192"
    layout = "data=8,fsdp=64,tensor=8,sequence_parallel,remat=full,accumulate=4"
    status, out, _ = run(f"{arguments} --layout {layout} --hardware h100 --json")
    report = json.loads(out)
    assert status == 0
    assert report["devices"] == 4096 and report["num_parameters"] == 405_853_388_800
    # f32 parameters and Adam's two moments, over fsdp x tensor; norm scales are not split by tensor.
    assert report["memory"]["state"] == pytest.approx(12 * report["num_parameters"] / 512, rel=1e-3)
    assert {line["ratio"] for line in report["communication"].values()} == {1.0}
    assert report["fits"] is True


def test_it_needs_no_devices_and_starts_none():
    """In a process of its own, which must not become 512 devices."""
    code = (
        "import sys, jax; from shardlm.__main__ import main; "
        "main(sys.argv[1:]); print(len(jax.devices()), 'devices here')"
    )
    words = ["explain", *f"{LARGE} --layout fsdp=64,tensor=8".split()]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1 devices here"


def test_sizes_are_filled_and_the_compiler_is_asked(run):
    status, out, _ = run(f"{SMALL} --layout fsdp=-1,tensor=2 --devices 4 --compile")
    assert status == 0
    assert "fsdp=2 x tensor=2 = 4 devices" in out
    assert "peak, by the compiler here" in out and "the compiler adds" in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (f"{SMALL} --layout data=2 --hardware h1", r"unknown hardware 'h1'"),
        (f"{SMALL} --layout fsdp=-1", r"fsdp=-1 is not filled yet"),
        (f"{SMALL} --layout data=3", r"batch_size=8 is not a positive multiple of data=3"),
        (f"{SMALL} --layout tensor=3", r"num_heads=4"),
        (f"{SMALL} --layout data=2 --devices 3", r"data=2 = 2 devices, but there are 3"),
        ("--preset llama9 --layout data=1", r"llama9"),
        (f"{SMALL} --layout data=4096 --batch-size 4096 --compile", r"can have 2048 fake CPU devices, and .* has 4096"),
        (f"{SMALL} --layout data=16 --batch-size 16 --compile", r"with 8 CPU device"),
    ],
)
def test_mistakes_are_one_line(run, arguments, text):
    status, _, error = run(arguments)
    assert status == 2
    assert error.startswith("error: ")
    assert re.search(text, error)
