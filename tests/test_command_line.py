"""`python -m shardlm train` says what it does, does it, and outlives mistakes, Ctrl-C and kills; `verify` judges."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import shardlm as sl
from shardlm.__main__ import main
from shardlm._command_line import program
from shardlm.checkpoint import Checkpoints
from shardlm.parallel import zero
from tests import xla

ROOT = Path(__file__).parents[1]
SIZES = "--num-layers 1 --d-model 16 --num-heads 2 --num-kv-heads 1 --d-ff 24 --batch-size 4 --sequence 16 --sample 0"
PARAMETERS = 2 * 257 * 16 + 16 * (2 + 1 + 1) * 8 + 2 * 8 * 16 + 3 * 16 * 24 + 3 * 16


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A folder of six documents, of which a third is held out."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"def f{i}(x):\n    return x + {i}\n" * 20)
    return folder


ARGUMENTS = "--steps 120 --log-every 10 --checkpoint-every 15 --evaluate-every 50 --evaluate-batches 2"


def command(text: Path, *arguments: str | Path) -> list[str]:
    """`train` with the tiny model, then strings of arguments, and paths; what is given last holds."""
    parts = ["train --data", text, "--held-out 0.3", SIZES, *arguments]
    return [word for part in parts for word in ([str(part)] if isinstance(part, Path) else part.split())]


@pytest.fixture
def run(text, capsys):
    """Runs `train` in this process; returns the exit status, and what was printed."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(command(text, *arguments))
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of a run that nothing disturbed, and what it printed."""
    folder, output = tmp_path_factory.mktemp("whole"), io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(command(text, ARGUMENTS, "--sample 12 --checkpoint-dir", folder)) == 0
    return folder, output.getvalue().splitlines()


def records(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(directory: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in records(directory) if "loss" in line}


def start(text: Path, *arguments: str | Path) -> subprocess.Popen:
    """The same in a process of its own, with its output in pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "shardlm", *command(text, *arguments)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": xla.flags()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_until(child: subprocess.Popen, pattern: str) -> list[str]:
    """The lines that a process prints, up to the first that matches."""
    lines = []
    assert child.stdout is not None
    for line in child.stdout:
        lines.append(line.rstrip("\n"))
        if re.match(pattern, line):
            return lines
    raise AssertionError(f"the process ended before it printed {pattern!r}: {lines}, {child.communicate()}")


def test_a_run_prints_its_plan_its_progress_and_a_sample(whole):
    folder, lines = whole
    assert lines[:5] == [
        "no accelerator found: 8 fake CPU devices",
        "",
        "Layout data=2,fsdp=2,tensor=2",
        "axis    devices  what it does",
        "pipe          1  -",
    ]
    model = "model: 1 layers, d_model 16, 2 heads (1 kv) of 8, d_ff 24, vocabulary 257"
    at = lines.index(model)
    expected = [
        r"vocabulary 257 padded to 264",
        rf"{PARAMETERS:,} parameters \(float32, computing in float32\); on each device [\d.]+ kB of parameters and .*",
        r"",
        re.escape(model),
        r"data: train 4 documents, 2,244 tokens, 141 rows; held out 2 documents, 1,122 tokens, 71 rows \(rows of 16.*",
        r"run: 120 steps of 4 x 16 tokens, 3\.33 epochs",
        r"",
        r"compiling the initial parameters \.\.\.",
        r"compiling the step \.\.\.",
        r"first step after \d+\.\d s, compilation included",
        *[rf"step +{step}/120  loss \d\.\d{{4}}  grad_norm .* eta \d:\d\d:\d\d" for step in range(10, 51, 10)],
        r"step +50/120  held_out_loss \d\.\d{4}  held_out_perplexity +\d+\.\d+  eta \d:\d\d:\d\d",
        *[rf"step +{step}/120  loss \d\.\d{{4}}  grad_norm .* eta \d:\d\d:\d\d" for step in range(60, 101, 10)],
        r"step +100/120  held_out_loss .*",
        *[rf"step +{step}/120  loss \d\.\d{{4}} .*" for step in (110, 120)],
        r"step +120/120  held_out_loss .*",
        r"held-out loss is over 2 of 18 batches of documents not trained on",
        r"",
        r"sample at temperature 0\.7, 12 tokens in \d+\.\d s, after 'def ':",
        r"-{80}",
        r"def .*",
    ]
    for pattern, line in zip(expected, lines[at - 3 :], strict=False):
        assert re.fullmatch(pattern, line), (pattern, line)
    end = lines.index(f"the model and its tokenizer are in {folder}:")
    assert lines[end - 2] == "-" * 80
    commands = [line.strip().removeprefix(program()).split("#")[0].split() for line in lines[end + 1 :]]
    assert [words[0] for words in commands] == ["generate", "convert", "checkpoints", "train"]
    assert commands[-1][-2:] == ["--steps", "240"]
    found = losses(folder)
    assert list(found) == list(range(10, 121, 10))
    assert found[120] < found[10] - 1


def test_a_run_without_evaluation_and_sample(run):
    status, output, errors = run("--steps 2 --held-out 0 --layout fsdp=8 --batch-size 8 --dropout 0.1 --dtype bfloat16")
    assert (status, errors) == (0, "")
    assert "held out 0 documents" in output
    assert "computing in bfloat16" in output
    lines = output.splitlines()
    assert lines[-5].startswith("step     2/2  loss 5.")
    assert lines[-3].startswith("this model was not kept")
    assert lines[-2].endswith("--checkpoint-dir runs/mine")
    assert lines[-1] == f"  {program()} generate --model runs/mine --prompt 'def '"


def test_a_run_goes_on_on_another_layout(whole, run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    shutil.rmtree(folder / "120")  # as if it had been killed after step 105, or somewhat later
    status, output, errors = run(ARGUMENTS, "--layout fsdp=4,tensor=2 --checkpoint-dir", folder)
    assert (status, errors) == (0, "")
    lines = output.splitlines()
    at = lines.index(f"resumed from {folder}, step 105")
    assert lines[at - 1] == f"{folder}/metrics.jsonl: dropped 3 line(s), cut short or of steps after 105"
    assert lines[at + 1] == "  layout was data=2,fsdp=2,tensor=2, is now fsdp=4,tensor=2"
    found, expected = losses(folder), losses(whole[0])
    assert found == pytest.approx(expected, rel=1e-5)  # float32, summed in another order
    assert list(found) == list(expected)

    status, output, errors = run(ARGUMENTS, "--sample 3 --checkpoint-dir", folder)
    assert (status, errors) == (0, "")
    held_out = records(whole[0])[-1]["held_out_loss"]
    assert f"nothing to do: the run is at step 120 of 120\nheld_out_loss {held_out:.4f}\n" in output
    assert "sample at temperature" in output
    assert losses(folder) == found

    status, output, errors = run("--steps 121 --d-ff 32 --checkpoint-dir", folder)
    assert status == 2
    assert errors == f"error: the checkpoint of {folder}, step 120 is of another model: d_ff: 24 there, 32 here\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--layout dta=2", "error: cannot read the layout 'dta=2':\n  - unknown setting 'dta': did you mean 'data'?"),
        ("--layout data=3,fsdp=-1", "error: fsdp=-1 cannot be filled: data=3 = 3 does not divide the 8 devices"),
        ("--layout expert=8", "error: this layout contradicts itself:\n  - expert=8: the expert axis is not available"),
        ("--layout data=3", "error: fake_devices(3) came too late: JAX has already started, with 8 CPU device(s)"),
        ("--layout data=4,tensor=2 --num-heads 3 --head-dim 8 --d-ff 25 --batch-size 6",
         "error: the layout data=4,tensor=2 does not fit:\n  - num_heads=3 is not a positive multiple of tensor=2: "
         "tensor can be 1, 3, or num_heads 2 or 4\n  - d_ff=25 is not a positive multiple of tensor=2"),
        ("--batch-size 6", "error: the layout data=2,fsdp=2,tensor=2 does not fit:\n  - batch_size=6 is not a "),
        ("--preset lama3_8b", "error: no preset is called 'lama3_8b': did you mean 'llama3_8b'? The presets are tiny"),
        ("--data /no/such/folder", "error: no such file or folder: /no/such/folder"),
        ("--tokenizer words", "error: unknown tokenizer 'words'; legal are 'bytes', 'bpe:SIZE'"),
        ("--held-out 1.5", "error: held_out must be a fraction in 0 <= held_out < 1, got 1.5"),
        ("--dtype float31", "error: TransformerConfig: dtype='float31'; it is one of float32, bfloat16"),
        ("--dropout 1", "error: TransformerConfig: dropout=1.0; it is at least 0 and below 1"),
        ("--batch-size 4000", "error: batch_size=4000 is more than the"),
        ("--tensorboard", "error: tensorboard=True, but there is no directory to write the events to: give one"),
        ("--log-dir gs://bucket/a", "error: --log-dir='gs://bucket/a' is an address: give a local folder"),
        ("--checkpoint-dir gs://bucket/a", "error: --checkpoint-dir='gs://bucket/a' is an address: give a "),
        ("--preset gpt2 --sequence 1040", "error: sequence=1040, but gpt2 has 1024 learned positions"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_error_and_status_2(run, arguments, message):
    status, _, errors = run("--steps 1", arguments)
    assert status == 2
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("error") == 1
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "argument --steps: 0 is not a number from 1 on"),
        ("--steps many", "argument --steps: invalid int value: 'many'"),
        ("--sequence -8", "argument --sequence: -8 is not a number from 1 on"),
        ("--sample -1", "argument --sample: -1 is not a number from 0 on"),
        ("--temperature -0.5", "argument --temperature: -0.5 is not a number from 0 on"),
        ("--learning-rate nan", "argument --learning-rate: nan is not a number from 0 on"),
        ("--evaluate-batches 0", "argument --evaluate-batches: 0 is not a number from 1 on"),
        ("--d-model 16.0", "argument --d-model: invalid int value: '16.0'"),
        ("--layers 3", "unrecognized arguments: --layers 3 (did you mean --num-layers?)"),
        ("--step 3", "unrecognized arguments: --step 3 (did you mean --steps?)"),
    ],
)
def test_a_number_out_of_range_is_refused_before_anything_else(run, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        run(arguments)
    output, errors = capsys.readouterr()
    assert (exit.value.code, output) == (2, "")
    assert errors.splitlines()[-1].endswith(f"error: {message}")


VERIFY = "verify --layout data=2,fsdp=2,tensor=2 --num-layers 2 --d-model 16 --num-heads 2 --d-ff 24 --steps 1"


def test_verify_prints_the_comparison(capsys):
    assert main([*VERIFY.split(), "--dtype", "float64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop(2) == "compiling both sides, one device and the layout ..." and lines.pop(2) == ""
    assert lines[2].startswith(
        "data=2,fsdp=2,tensor=2 agrees with one device: 8 devices against 1, manual engine, float64"
    )
    assert [line.split()[0] for line in lines[3:8]] == ["quantity", "loss", "gradients", "parameters", "optimizer"]


def test_verify_ends_with_status_1_where_the_layout_is_wrong_and_2_for_a_mistake(capsys, monkeypatch):
    assert main([*VERIFY.split(), "--dtype", "int8"]) == 2
    assert "error: verify: dtype='int8'; it is one of 'float32', 'float64'" in capsys.readouterr().err
    finish = zero.finish
    monkeypatch.setattr(zero, "finish", lambda g, plan: 2 * finish(g, plan) if plan.axes else finish(g, plan))
    assert main(VERIFY.split()) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: data=2,fsdp=2,tensor=2 does not compute what one device computes")
    assert "diagnosis: scale on data: the gradient of head/table is 2 times what it should be" in errors
    assert "Traceback" not in errors


def test_a_command_must_be_given(capsys):
    with pytest.raises(SystemExit) as exit:
        main([])
    assert exit.value.code == 2
    assert "the following arguments are required: command" in capsys.readouterr().err


def test_the_help_shows_defaults_that_say_something(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", "--help"])
    output = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    assert "tokens per row (default: 128)" in output
    assert "order of batches and the sample (default: 0)" in output
    assert "what the sample continues (default: 'def ')" in output
    assert "None" not in output
    assert "False" not in output


def test_a_folder_that_cannot_be_written_and_a_missing_extra_are_mistakes(run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    status, _, errors = run("--steps 1 --checkpoint-dir", tmp_path / "file")
    assert status == 2
    assert errors.startswith("error: ")
    assert str(tmp_path / "file") in errors
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    status, _, errors = run("--steps 1 --tensorboard --log-dir", tmp_path)
    assert status == 2
    assert errors.startswith("error: tensorboard=True needs tensorboardX: pip install -e '.[tensorboard]'")


def test_a_loss_that_is_not_finite_is_status_1(run):
    status, output, errors = run("--steps 20 --learning-rate 1e38")
    assert status == 1
    assert re.match(
        r"error: step \d+: (loss|grad_norm) is (nan|inf); stopped, and there is no checkpoint\. Common", errors
    )
    assert "step     1" not in output


def test_the_same_command_ends_as_if_it_had_not_been_killed(whole, run, text, tmp_path):
    child = start(text, ARGUMENTS, "--checkpoint-dir", tmp_path)
    read_until(child, r"step +50/120  loss")
    child.kill()  # SIGKILL
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert 120 not in Checkpoints(tmp_path).steps()

    status, output, errors = run(ARGUMENTS, "--checkpoint-dir", tmp_path)
    assert (status, errors) == (0, "")
    assert re.search(rf"^resumed from {tmp_path}, step (30|45|60|75|90|105)$", output, re.MULTILINE)
    assert losses(tmp_path) == losses(whole[0])
    assert records(tmp_path)[-1]["held_out_loss"] == records(whole[0])[-1]["held_out_loss"]
    assert Checkpoints(tmp_path).steps() == Checkpoints(whole[0]).steps() == [90, 105, 120]


def test_ctrl_c_saves_and_ends_soon_with_status_130(text, tmp_path):
    child = start(text, "--steps 1000000 --log-every 10 --layout data=2 --checkpoint-dir", tmp_path)
    lines = read_until(child, r"step +20/1000000")
    assert lines[0] == "no accelerator found: 2 fake CPU devices"
    assert "Layout data=2" in lines
    began = time.monotonic()
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=60)
    assert time.monotonic() - began < 20  # it would run for hours
    assert child.returncode == 130
    # Compilers for hardware that is not here say so first.
    assert errors.endswith("interrupted\n") and "Traceback" not in errors
    match = re.search(rf"^stopped: step (\d+) is saved in {tmp_path}$", output, re.MULTILINE)
    assert match
    assert Checkpoints(tmp_path).latest() == int(match.group(1)) >= 20
    config = sl.TransformerConfig.from_dict(Checkpoints(tmp_path).metadata(int(match.group(1)))["config"])
    assert (config.d_model, config.vocab_size) == (16, 257)


def test_files_of_examples_are_read_as_such(run, tmp_path):
    file = tmp_path / "sums.jsonl"
    lines = [{"prompt": f"{a} + {b} = ", "completion": str(a + b)} for a in range(10) for b in range(10)]
    file.write_text("\n".join(map(json.dumps, lines)))
    status, output, errors = run("--steps 2 --held-out 0.2 --evaluate-batches 1 --data", file, "--sequence 8")
    assert (status, output.count("step ")) == (2, 0)
    assert re.search(
        r"error: \d+ of \d+ examples are longer than sequence=8 tokens; the longest, .*:\d+, has 1[12]: use", errors
    )
    status, output, errors = run("--steps 2 --held-out 0.2 --evaluate-batches 1 --data", file)
    assert (status, errors) == (0, "")
    assert re.search(r"data: train \d+ examples, [\d,]+ tokens, \d+ learned, \d+ rows; held out \d+ examples", output)
    assert "batches of examples not trained on" in output
    status, _, errors = run("--steps 2 --too-long drop")
    assert (status, errors.split(",")[0]) == (2, "error: --too-long drop is for examples")
