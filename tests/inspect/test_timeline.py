"""The time at best is at most what others have measured, and counts no more than has to be moved."""

import pytest

import shardlm as sl
from shardlm.inspect.hardware import CATALOGUE, Hardware
from shardlm.inspect.report import of
from shardlm.inspect.timeline import Timeline
from shardlm.train import explain
from shardlm.train.transformer import TransformerProgram

MPT = {"mlp": sl.MLP(gated=False, activation="gelu"), "tied": True, "vocab_size": 50368}
LLAMA = {
    "vocab_size": 128256, "num_layers": 32, "d_model": 4096, "num_heads": 32, "num_kv_heads": 8, "d_ff": 14336,
}  # fmt: skip
PUBLISHED = {
    # tokens/s of one GPU: mosaicml/llm-foundry scripts/train/benchmarking/README.md, "H100 80GB BF16" and "A100 80GB
    # with 1600 Gbps node-node interconnect (RoCE)"
    "MPT-13B, 64 H100": (
        MPT | {"num_layers": 40, "d_model": 5120, "num_heads": 40}, "cudnn", "fsdp=64", "h100", 128, 2048,
        128 * 2048 / 64 / 4800,
    ),
    "MPT-70B, 32 A100": (
        MPT | {"num_layers": 80, "d_model": 8192, "num_heads": 64}, "cudnn", "fsdp=32,accumulate=16,remat=full", "a100",
        1024, 2048, 1024 * 2048 / 32 / 373,
    ),
    # seconds: arXiv:2205.05198 table 5, 175B with selective recomputation, 64 A100
    "GPT-175B, 64 A100": (
        MPT | {"vocab_size": 51200, "num_layers": 96, "d_model": 12288, "num_heads": 96}, "cudnn",
        "pipe=8,tensor=8,sequence_parallel,pipeline=interleaved:64:3:stored", "a100", 64, 2048, 13.75,
    ),
    # tokens/s of one GPU: pytorch/torchtitan benchmarks/llama3_h100_202412_torchtitan.md table 3
    "Llama-3-8B, 128 H100": (
        LLAMA, "cudnn", "fsdp=128,remat=dots", "h100", 256, 8192,
        256 * 8192 / 128 / 6514,
    ),
}  # fmt: skip


def times(
    config: sl.TransformerConfig, layout: str, batch_size: int, sequence: int, hardware: Hardware | str
) -> Timeline:
    """What `explain` says of the time, without what else it looks for."""
    parsed = sl.Layout.parse(layout)
    trainer = sl.Trainer(config, parsed, devices=parsed.num_devices)
    program, _ = explain._traceable(trainer.program)
    assert isinstance(program, TransformerProgram)
    batch = program.abstract_batch(explain._batch(program, batch_size, sequence, None))
    looked = explain._look(program, trainer, batch, (), None)
    found = of(looked, model="", num_parameters=0, on=hardware).timeline
    assert found is not None
    return found


def with_attention(implementation: str, **options) -> sl.TransformerConfig:
    attention = sl.Attention(implementation=implementation, **options.pop("attention", {}))
    return sl.TransformerConfig(dtype="bfloat16", attention=attention, **options)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_time_at_best_is_at_most_what_was_measured(name: str):
    sizes, attention, layout, hardware, batch_size, sequence, measured = PUBLISHED[name]
    found = times(with_attention(attention, **sizes), layout, batch_size, sequence, hardware)
    assert measured / 4 < found.overlapped < measured
    assert found.bound == "arithmetic"


SMALL = {"vocab_size": 64, "num_layers": 2, "d_model": 32, "num_heads": 4, "vocab_multiple": 64}


def test_scores_that_stay_on_the_chip_are_no_memory_traffic():
    """Twice as many keys for each query, in half as many rows: as many bytes, but for what plain attention writes."""
    moved = {}
    for name in ("xla", "chunked", "cudnn"):
        found = [
            times(with_attention(name, **SMALL), "data=2", rows, s, "h100").memory for rows, s in ((8, 64), (4, 128))
        ]
        moved[name] = found
    assert moved["chunked"] == moved["cudnn"]
    assert moved["chunked"][0] == pytest.approx(moved["chunked"][1], rel=1e-12)
    assert moved["xla"][1] > 1.3 * moved["xla"][0] > 1.3 * moved["chunked"][0]


def test_a_fused_kernel_leaves_out_what_causality_and_windows_hide():
    def arithmetic(name: str, *windows: int | None) -> float:
        options = {"windows": windows} if windows else {}
        return times(with_attention(name, attention=options, **SMALL), "data=1", 2, 64, "h100").arithmetic

    # Two products forward and five backward, of which one makes the scores again, in each of two layers.
    scores = 2 * 7 * 2 * 2 * 64 * 64 * 32 / CATALOGUE["h100"].peak("bfloat16")
    whole = arithmetic("chunked")
    assert arithmetic("chunked", 8) == whole
    assert arithmetic("cudnn") == pytest.approx(whole - scores * (1 - 65 / 128), rel=1e-12)
    hidden = 1 - (8 - 8 * 7 / 128) / 64
    assert arithmetic("cudnn", 8) == pytest.approx(whole - scores * hidden, rel=1e-12)


def test_links_of_different_kinds_are_used_at_once():
    line = Timeline(
        hardware=CATALOGUE["h100"], arithmetic=1.0, bubble=0.0, memory=0.5, intensity=1.0, ridge=1.0, model_flops=1.0,
        peak_flops=1.0, communication={("data",): 1.5, ("tensor",): 2.0, ("fsdp",): 1.0},
        links={("data",): "slow", ("tensor",): "fast", ("fsdp",): "slow"},
    )  # fmt: skip
    assert (line.overlapped, line.serial) == (2.5, 5.5)
    assert line.bound == "communication over data (slow links)"
