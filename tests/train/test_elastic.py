"""A run that is killed goes on with another number of devices, with the same losses from the same tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests import xla

ROOT = Path(__file__).parents[2]

# Trains in float64 on as many fake devices as the layout has, and is killed while it makes the update of step `kill`,
# or, if that is negative, in the middle of saving its checkpoint. It logs what every update was trained on. With
# `undisturbed` it makes the whole run again in one go.
RUN = """
import faulthandler, json, os, signal, sys, threading, time
from pathlib import Path

faulthandler.dump_traceback_later(120, exit=True)
folder, layout, kill, undisturbed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]
import jax, numpy as np, shardlm as sl

layout = sl.Layout.parse(layout)
sl.fake_devices(layout.num_devices)
jax.config.update("jax_enable_x64", True)
config = sl.TransformerConfig(
    vocab_size=67, num_layers=2, d_model=12, num_heads=6, num_kv_heads=6, head_dim=2, d_ff=24, dtype="float64",
    param_dtype="float64",
)
trainer = sl.Trainer(config, layout, sl.adamw(1e-2, steps=10, warmup=1))

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def when_saving(step):
    while not any(folder.glob(f"run/{step}.saving-*/new/state")):
        time.sleep(0.0005)
    die()

class Batches:
    def __init__(self, name):
        self.log = (folder / name).open("a", buffering=1)

    def __getitem__(self, i):
        random = np.random.default_rng(i)
        tokens = random.integers(0, 67, (8, 9))
        if i + 1 == kill:
            threading.Timer(random.uniform(0, 0.01), die).start()
        self.log.write(json.dumps([i, int(tokens.sum())]) + "\\n")
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}

if kill < 0:
    threading.Thread(target=when_saving, args=(-kill,), daemon=True).start()
trainer.fit(Batches("trained"), 10, checkpoint_dir=folder / "run", checkpoint_every=3, log_every=1)
if undisturbed:
    trainer.fit(Batches("whole"), 10, log_dir=folder / "undisturbed", log_every=1)
"""


def lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_survives_kills_and_changes_of_its_devices(tmp_path):
    env = os.environ | {"XLA_FLAGS": xla.flags()}
    for layout, kill, expected in (
        ("data=2,fsdp=2,tensor=2", -6, -9),  # killed while it saves step 6: it has step 3, and perhaps 6
        ("fsdp=2,tensor=2", 9, -9),  # killed in step 9: it has step 6, and logged 7 and 8
        ("data=4,tensor=2", 0, 0),
    ):
        command = [sys.executable, "-c", RUN, str(tmp_path), layout, str(kill), *["undisturbed"][kill != 0 :]]
        result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert result.returncode == expected, result.stderr[-3000:]
    trained, whole = lines(tmp_path / "trained"), lines(tmp_path / "whole")
    assert len(trained) > len(whole) == 10  # some steps were made again
    # The last batch that each update was made from, whoever made it, is that of the undisturbed run.
    assert dict(trained) == dict(whole)
    found, expected = (
        {line["step"]: line for line in lines(tmp_path / name / "metrics.jsonl")} for name in ("run", "undisturbed")
    )
    assert list(found) == list(expected) == list(range(1, 11))
    for key in ("loss", "grad_norm"):
        curves = [np.array([line[key] for line in curve.values()]) for curve in (found, expected)]
        np.testing.assert_allclose(*curves, rtol=1e-12)
    assert (curves[0] != curves[1]).any()  # not by having been the same run
    manifest = json.loads((tmp_path / "run/10/metadata.json").read_text())["metadata"]
    assert (manifest["tokens"], manifest["layout"], manifest["next_batch"]) == (10 * 64, "data=4,tensor=2", 10)
    assert not [name for name in os.listdir(tmp_path / "run") if not (name.isdecimal() or name == "metrics.jsonl")]
