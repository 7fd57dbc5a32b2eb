"""Every benchmark runs and prints what its help says. No time is asserted."""

import dataclasses
import functools

import pytest

from shardlm.bench import step
from shardlm.bench.__main__ import main, parser
from shardlm.bench.timing import Sample, interleaved

TINY = "--d-model 8 --heads 2 --kv-heads 1 --d-ff 16 --vocabulary 32"


def run(arguments: str) -> int:
    """The command line's exit status."""
    return main(arguments.split())


def test_step(capsys, monkeypatch):
    # The model given here is the one whose dispatch is timed: compile it once.
    monkeypatch.setattr(step, "Pair", functools.cache(step.Pair))
    assert run(f"step --layers 1 {TINY} --batch-size 1 --sequence 8 --repeats 2 --calls 2") == 0
    assert step.Pair.cache_info().misses == 1
    labels = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert labels[2:-1] == ["step", "reference", "ratio", "dispatch", "dispatch", "dispatch"]


def test_step_refuses_a_model_that_the_reference_is_not(capsys):
    assert run("step --preset gemma2_2b") == 2
    error = capsys.readouterr().err
    assert "the reference computes a plain Llama, and this model has" in error
    assert all(
        name in error for name in ("attention=", "mlp=", "norm=", "embedding_scale=", "tied=", "logit_soft_cap=")
    )


def test_the_defaults_follow_the_device():
    @dataclasses.dataclass
    class Device:
        platform: str
        device_kind: str

    options = parser().parse_args(["step", "--layers", "2"])
    for device, dtype, attention in [
        (Device("cpu", "cpu"), "float32", "xla"),
        (Device("gpu", "NVIDIA H100 80GB HBM3"), "bfloat16", "cudnn"),
        (Device("gpu", "AMD Instinct MI300X"), "bfloat16", "xla"),
        (Device("tpu", "TPU v5 lite"), "bfloat16", "xla"),
    ]:
        config = step.configure(options, device)
        assert (config.num_layers, config.dtype, config.attention.implementation) == (2, dtype, attention)


def test_steps_that_compute_something_else_are_not_compared():
    step.check_agreement(6.20001, 6.2, "float32")
    with pytest.raises(ArithmeticError, match=r"different losses, 6\.2001 and 6\.2"):
        step.check_agreement(6.2001, 6.2, "float32")
    with pytest.raises(ArithmeticError, match="different losses"):
        step.check_agreement(float("nan"), 6.2, "bfloat16")


def test_compile(capsys):
    assert run(f"compile {TINY} --layers 1 2 --repeats 1 --same-process --batch-size 4 --sequence 8") == 0
    lines = capsys.readouterr().out.splitlines()
    stages = ["build", "trace", "lower", "compile", "total"]
    assert [line.split()[:3] for line in lines[1:-1]] == [[str(n), "layers", stage] for n in (1, 2) for stage in stages]
    assert lines[-1].startswith("ratio of 2 to 1 layers: ")


def test_cold_starts_a_process_and_times_it(capfd, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert run(f"cold {TINY} --layers 1 --batch-size 2 --sequence 8 --layout data=2 --steps 2") == 0
    where, what, first, rest = capfd.readouterr().out.splitlines()
    assert where.endswith("layout data=2 on 2 fake devices")
    assert what.endswith("batch 2 x 8")
    assert first.startswith("first step ") and "import" in first
    assert rest.startswith("step ") and rest.endswith("2 steps")


def test_a_ratio_is_taken_round_by_round():
    ratio = Sample((2.0, 3.0, 40.0)) / Sample((1.0, 2.0, 10.0))
    assert ratio.values == (2.0, 1.5, 4.0)
    assert (ratio.median, ratio.quartiles) == (2.0, (1.75, 3.0))
    assert ratio.show("ms", 1e3) == "2,000 ms (1,750 to 3,000)"
    assert Sample((0.12345,)).show("s") == "0.123 s (0.123 to 0.123)"


def test_calls_take_turns_in_an_order_that_turns_round():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    times = interleaved(calls, 3)
    assert "".join(called) == "abbaab"
    assert {name: len(sample.values) for name, sample in times.items()} == {"a": 3, "b": 3}
