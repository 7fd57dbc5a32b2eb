"""XLA's GPU and TPU compilers move what the ledger of the traced step says, though no GPU or TPU is here.

What they made of each layout is recorded in `data`, trimmed to what communication depends on, so that the reading of it
is always checked. Where a compiler is installed (the extra `test` brings the GPU's to Linux), its programs are also
compiled afresh. To record again, with both: `JAX_PLATFORMS=cpu PYTHONPATH=. python tests/inspect/test_topologies.py`.

Of a kind over some axes, elements must agree and not calls: compilers move many arrays as one (the GPU's copies them
into one), and take the first iteration out of a loop. Both add scalars of the gradient's norm, at most one per
parameter and axes. The TPU's besides gathers in bfloat16 what only a matrix product reads, which computes in bfloat16
there, and does with an all-reduce what would gather or scatter pieces too small for its memory's tiles.
"""

import dataclasses
import re
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import shardlm as sl
from shardlm.inspect import ledger, topologies
from shardlm.inspect.hlo import Collective, collectives

DATA = Path(__file__).parent / "data"
CONFIG = sl.TransformerConfig(vocab_size=72, num_layers=3, d_model=32, num_heads=8, d_ff=40, vocab_multiple=8)
LAYOUTS = (
    "data=8",
    "fsdp=8,zero=1",
    "fsdp=8,zero=3",
    "tensor=8",
    "tensor=8,sequence_parallel",
    "data=2,fsdp=2,tensor=2",
    "data=2,fsdp=2,tensor=2,sequence_parallel",
)
COMPILED = ("fsdp=8,zero=3", "tensor=8,sequence_parallel", "data=2,fsdp=2,tensor=2,sequence_parallel")
ROWS, SEQUENCE = 8, 16
PARAMETERS = 12  # arrays: seven matrices and two norm scales of the layers, two tables, the last norm's scale
MAKE = {"gpu": topologies.gpus, "tpu": topologies.tpus}
INSTALLED = [name for name, platform in (("gpu", "cuda"), ("tpu", "tpu")) if topologies.installed(platform)]

Moved = dict[tuple[str, tuple[str, ...]], int]


def trainer(layout: str, devices, dtype: str = "float32") -> sl.Trainer:
    config = dataclasses.replace(CONFIG, dtype=dtype)
    return sl.Trainer(config, sl.Layout.parse(layout), optax.adam(1e-3), devices=devices)


def batch_for(made: sl.Trainer) -> dict[str, jax.ShapeDtypeStruct]:
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    return {
        name: jax.ShapeDtypeStruct((ROWS, SEQUENCE), dtype, sharding=made.batch_sharding)
        for name, dtype in dtypes.items()
    }


def compile_for(name: str, layout: str) -> str:
    made = trainer(layout, MAKE[name]())
    return made._step.lower(made.abstract_state, batch_for(made)).compile().as_text()


def recorded(name: str, layout: str) -> str:
    return (DATA / f"{name}-{re.sub('[=,]', '-', layout)}.txt").read_text(encoding="utf-8")


def sums(found: Counter[Collective]) -> Moved:
    """Elements by kind and axes."""
    moved: Counter = Counter()
    for key, n in found.items():
        moved[key.kind, key.axes] += key.elements * n
    return dict(moved)


def differences(text: str, layout: str) -> Moved:
    """By kind and axes, how many elements more than the ledger says the compiled program moves; 0 is left out."""
    sized = trainer(layout, 8)
    traced = sums(ledger(sized.step_function, sized.abstract_state, batch_for(sized)).counts())
    compiled = sums(collectives(text, sized.layout.mesh(jax.devices())))
    assert traced
    difference = {key: compiled.get(key, 0) - traced.get(key, 0) for key in traced.keys() | compiled.keys()}
    return {key: n for key, n in difference.items() if n}


def assert_gpu_agrees(text: str, layout: str) -> None:
    more = differences(text, layout)
    assert {kind for kind, _ in more} <= {"all-reduce"}
    assert all(0 < n <= PARAMETERS for n in more.values())


def assert_tpu_agrees(text: str, layout: str) -> None:
    more = differences(text, layout)
    # Activations and whole gradients are too large for it to change how they are moved.
    assert {axes for kind, axes in more if kind != "all-reduce"} <= {("fsdp",)}
    by_axes: Counter = Counter()
    for (_, axes), n in more.items():
        by_axes[axes] += n
    assert all(0 <= n <= PARAMETERS for n in by_axes.values())


AGREES = {"gpu": assert_gpu_agrees, "tpu": assert_tpu_agrees}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_the_compiler_moves_what_the_ledger_says(name: str, layout: str):
    AGREES[name](recorded(name, layout), layout)


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_a_collective_that_is_missing_or_runs_more_often_is_seen(name: str):
    layout = "data=2,fsdp=2,tensor=2,sequence_parallel"
    text = recorded(name, layout)
    lines = text.splitlines()
    [first] = [i for i, line in enumerate(lines) if re.search(r" (all-gather|reduce-scatter)(-start)?\(", line)][:1]
    with pytest.raises(AssertionError):
        AGREES[name]("\n".join(lines[:first] + lines[first + 1 :]), layout)
    twice = [lines[first].replace(" = ", ".again = ", 1)]
    with pytest.raises(AssertionError):
        AGREES[name]("\n".join(lines[:first] + twice + lines[first:]), layout)
    with pytest.raises(AssertionError):
        AGREES[name](text, "data=2,fsdp=2,tensor=2")


def test_a_missing_compiler_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(topologies, "installed", lambda platform: False)
    with pytest.raises(ImportError, match=r"GPU compiler is not installed: pip install -e '.\[topologies\]'"):
        topologies.gpus(8)
    with pytest.raises(ImportError, match=r"TPU compiler is not installed: pip install -e '.\[tpu\]'"):
        topologies.tpus("v5e:2x4")


def test_devices_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="12 GPUs are not a positive multiple of per_host=8"):
        topologies.gpus(12)
    with pytest.raises(ValueError, match='cannot compile for \'h200\': it is "cpu", "h100", or a TPU slice'):
        topologies.named("h200", 8)


if INSTALLED:  # a parametrization over nothing would be a skipped test

    @pytest.mark.parametrize("layout", COMPILED)
    @pytest.mark.parametrize("name", INSTALLED)
    def test_a_fresh_compilation_moves_what_the_ledger_says(name: str, layout: str):
        AGREES[name](compile_for(name, layout), layout)

    @pytest.mark.parametrize("name", INSTALLED)
    def test_explain_takes_the_compilers_own_view(name: str):
        report = trainer("data=8", MAKE[name]()).explain(ROWS, SEQUENCE, compile=True)
        # Two scalars of the loss are in the ledger, and every gradient, which each compiler moves as one or two arrays.
        assert report.ledger.compiled and report.ledger.added == ()
        assert report.memory.compiled is not None and report.memory.compiled > report.memory.state

    @pytest.mark.parametrize("name", INSTALLED)
    def test_nothing_runs_on_devices_to_compile_for(name: str):
        with pytest.raises(ValueError, match="can be compiled for .* but nothing runs there"):
            trainer("data=8", MAKE[name]()).init()


# ---------------------------------------------------------------- recording


def trim(text: str) -> str:
    """The computations that communicate, and their callers; of each what communication and loop counts depend on."""
    bodies: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = match[1]
            bodies[name] = [("ENTRY " if line.startswith("ENTRY") else "") + f"%{name} (...) {{"]
        elif bodies and " = " in line:
            bodies[name].append(line)
    called = {
        name: {word for line in lines[1:] for word in re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", line)}
        for name, lines in bodies.items()
    }
    moves = r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(-start)?\("
    kept = {name for name, lines in bodies.items() if any(re.search(moves, line) for line in lines)}
    while more := {name for name in bodies if called[name] & kept} - kept:
        kept |= more
    conditions = {
        re.search(r"condition=%?([\w.\-]+)", line)[1]
        for name in kept for line in bodies[name] if " while(" in line and called_of(line) & kept
    }  # fmt: skip
    out = []
    for name, lines in bodies.items():
        if name not in kept | conditions:
            continue
        out.append(lines[0])
        operands = {word for line in lines if " while(" in line for word in re.findall(r"while\(%?([\w.\-]+)", line)}
        for line in lines[1:]:
            communicates = re.search(moves, line)
            counts = re.search(r"= s32\[\]\S* (copy|bitcast|constant|add|get-tuple-element)\(", line)
            calls = called_of(line) & kept and not communicates
            source = line.split(" = ")[0].split()[-1].lstrip("%") in operands
            if communicates or counts or calls or source or "ROOT " in line:
                short = shorten(line, bool(communicates))
                for gone in set(re.findall(r"=%?([\w.\-]+)", short)) & bodies.keys() - kept - conditions:
                    short = re.sub(rf", \w+=%?{re.escape(gone)}(?=,|$)", "", short)
                out.append(short)
        out.append("}\n")
    return "\n".join(out)


def called_of(line: str) -> set[str]:
    return set(re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", line))


def shorten(line: str, communicates: bool) -> str:
    trips = re.search(r'"known_trip_count":\{"n":"\d+"\}', line)
    line = re.split(r", (?:metadata|backend_config|output_to_operand_aliasing)=", line)[0] + (
        f", {called}" if "aliasing" in line and (called := "".join(re.findall(r"calls=%?[\w.\-]+", line))) else ""
    )
    if not communicates and "(" in line:
        line = re.sub(r" = \(.*?\) (?=[a-z\-]+\()", " = () ", line)
    return line + (f", backend_config={{{trips[0]}}}" if trips else "")


def record() -> None:
    for name in MAKE:
        for layout in LAYOUTS:
            text = compile_for(name, layout)
            mesh = sl.Layout.parse(layout).mesh(MAKE[name]())
            short = trim(text)
            assert collectives(short, mesh) == collectives(text, mesh)
            path = DATA / f"{name}-{re.sub('[=,]', '-', layout)}.txt"
            path.write_text(
                f"{layout}, jax {jax.__version__}, trimmed by tests/inspect/{Path(__file__).name}\n\n{short}\n"
            )
            print(path.name, len(short), file=sys.stderr)


if __name__ == "__main__":
    record()
