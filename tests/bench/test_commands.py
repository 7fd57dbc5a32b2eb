"""Every benchmark runs and prints what its help says. No time is asserted."""

import dataclasses
import functools

import pytest

import shardlm as sl
from shardlm.bench import generate, pipeline, step
from shardlm.bench.__main__ import main, parser
from shardlm.bench.timing import Sample, interleaved
from shardlm.parallel.pipeline import make_table, synchronous
from shardlm.train.metrics import model_flops_per_token
from tests import xla

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


def test_generate(capsys, monkeypatch):
    monkeypatch.setattr(generate, "_COPIED", 1 << 12)
    # The model given here is the one whose dispatch is timed: compile it once.
    monkeypatch.setattr(generate, "Bench", functools.cache(generate.Bench))
    shape = "--batch-size 1 --prompt 120 --new 8 --chunk 8"
    assert run(f"generate --layers 1 {TINY} {shape} --repeats 2 --calls 2") == 0
    assert generate.Bench.cache_info().misses == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-5:-1]] == ["prefill", "decode", "limit", "dispatch"]


def test_the_bytes_of_a_step_of_generation():
    config = sl.TransformerConfig(
        vocab_size=32, num_layers=2, d_model=8, num_heads=2, num_kv_heads=1, d_ff=16, param_dtype="bfloat16",
        attention=sl.Attention(windows=(5, None)),
    )  # fmt: skip
    # Queries and output 8 x 8, keys and values 8 x 4, MLP 3 x 8 x 16, norms; the head, and the rows of the embedding.
    layer = 2 * 64 + 2 * 32 + 3 * 128 + 2 * 8
    assert generate.bytes_of_parameters(config, 3) == 2 * (2 * layer + 8 + 32 * 8 + 3 * 8)
    assert generate.bytes_of_row(config, 9) == (5 + 9) * 2 * 4 * 4


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
    monkeypatch.setenv("XLA_FLAGS", xla.flags())
    assert run(f"cold {TINY} --layers 1 --batch-size 2 --sequence 8 --layout data=2 --steps 2") == 0
    where, what, first, rest = capfd.readouterr().out.splitlines()
    assert where.endswith("layout data=2 on 2 fake devices")
    assert what.endswith("batch 2 x 8")
    assert first.startswith("first step ") and "import" in first
    assert rest.startswith("step ") and rest.endswith("2 steps")


def test_pipeline(capsys):
    sizes = f"{TINY} --layers 2 --layout pipe=2 --microbatches 2 --sequence 8"
    assert run(f"pipeline {sizes} --repeats 2 --schedules 1f1b zb-h1") == 0
    where, what, plain, *rest, note = capsys.readouterr().out.splitlines()
    assert where.endswith("2 fake devices") and what.endswith("batch 2 x 8")
    assert plain.startswith("no pipeline ") and plain.endswith(", data=2,remat=full")
    assert [line.split()[0] for line in rest] == ["1f1b", "ratio", "bubble", "zb-h1", "ratio", "bubble"]
    assert "pipeline=1f1b:2, stash" in rest[0] and "pipeline=zb-h1:2:stored, stash" in rest[3]
    assert all(line.endswith(" simulated") for line in rest[2::3])
    assert note.startswith("fake devices share the cores")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--layout data=8", "the layout data=8 has no pipeline: set pipe to 2 or more"),
        ("--microbatches 6", "microbatches=6 is not a positive multiple of pipe=4"),
        ("--schedules 1f1b zb-h2", "schedule='zb-h2' is not one of '1f1b', 'gpipe', 'interleaved', 'zb-h1'"),
        ("--chunks 3", "--chunks 3 is of the schedule interleaved, which --schedules does not name"),
        ("--layout pipe=4,data=3", "pipe=4 x data=3 = 12 devices, but there are 8"),
        ("--layout pipe=8,pipeline=1f1b:16", "leave pipeline out; --schedules and --microbatches say it here"),
    ],
)
def test_pipeline_refuses(arguments, message, capsys):
    assert run(f"pipeline {arguments}") == 2
    assert message in capsys.readouterr().err


def test_the_reference_of_a_pipeline_takes_the_same_rows_at_a_time():
    layout = sl.Layout(pipe=4, data=2)
    plain = pipeline.without_pipeline(layout, 8)
    assert plain == sl.Layout(data=8, accumulate=2, remat="full")
    rows = 8 * layout.batch_shards
    assert rows // layout.batch_shards // 8 == rows // plain.batch_shards // plain.microbatches == 1


def test_the_bubble_measured_is_the_bubble_simulated_where_times_are_those_of_the_simulation():
    config = sl.TransformerConfig(**step._TINY | {"num_layers": 4})
    times = pipeline.times(config, sl.Layout(pipe=4), sequence=8)
    # Without the forward that backward makes again, forward and backward are as long as this backward.
    model_flops = 4 * times.backward + times.head
    assert model_flops == pytest.approx(model_flops_per_token(config, 8))
    once, longer = (synchronous(make_table("1f1b", 4, m), times) for m in (8, 32))
    measured = pipeline.bubble(Sample((once.makespan,)), Sample((longer.makespan,)))
    assert measured.median == pytest.approx(once.bubble_fraction)
    assert 0 < once.bubble_fraction < 3 / 8  # the head is never idle


def test_a_schedule_is_named_with_what_stages_keep():
    def named(name, chunks=2):
        return str(pipeline.scheduled(sl.Layout(pipe=4), name, 8, chunks).pipeline)

    assert [named(name) for name in ("1f1b", "1f1b-stored", "zb-h1")] == ["1f1b:8", "1f1b:8:stored", "zb-h1:8:stored"]
    assert [named("interleaved"), named("interleaved-stored", 3)] == ["interleaved:8:2", "interleaved:8:3:stored"]


def test_split_backwards_take_together_what_a_whole_one_does():
    config = sl.TransformerConfig(**step._TINY | {"num_layers": 4})
    again, whole, split = (
        pipeline.times(config, sl.Layout.parse(f"pipe=4,pipeline={text}"), sequence=8)
        for text in ("1f1b:8", "1f1b:8:stored", "zb-h1:8:stored")
    )
    assert split.input_gradient + split.weight_gradient == whole.backward == 2 * whole.forward
    assert again.backward == 3 * again.forward and split.weight_gradient < split.input_gradient


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


def test_checkpoint(capsys):
    assert run("checkpoint --megabytes 4 --repeats 2 --layout data=1") == 0
    lines = capsys.readouterr().out.splitlines()
    megabytes, what = lines[1].split(" MB in ")
    assert 1.0 < float(megabytes) <= 4.0 and what.endswith("arrays; layout data=1")
    assert [line.split("  ")[0] for line in lines[2:-1]] == ["synchronous", "blocked", "in all", "restore", "ratio"]
