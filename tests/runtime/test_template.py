"""Templates are what their systems read: shell and YAML, as far as that is known without a cluster."""

import subprocess

import pytest
import yaml

from shardlm.__main__ import main
from shardlm.runtime.clusters import COORDINATOR, PROCESS, PROCESSES
from shardlm.runtime.template import render

COMMAND = "python train.py --name 'a \"b\" {c} $d'"


def test_slurm(capsys):
    assert main(["template", "slurm", "--hosts", "3", "--name", "big", "--command", COMMAND]) == 0
    text = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    settings = dict(
        line[8:].split("=", 1) for line in text.splitlines() if line.startswith("#SBATCH --") and "=" in line
    )
    assert (settings["--nodes"], settings["--ntasks-per-node"], settings["--job-name"]) == ("3", "1", "big")
    # What the shell makes of the command is the command's words; srun's own exit status decides.
    script = 'srun() { shift 2; printf "%s\\n" "$@"; }\n' + text
    printed = subprocess.run(["bash"], input=script, text=True, capture_output=True, timeout=20)
    assert printed.returncode == 0
    assert printed.stdout.splitlines() == ["python", "train.py", "--name", 'a "b" {c} $d']


def test_kubernetes(capsys):
    assert (
        main(["template", "kubernetes", "--hosts", "3", "--devices", "4", "--name", "big", "--command", COMMAND]) == 0
    )
    job = yaml.safe_load(capsys.readouterr().out)
    assert (job["kind"], job["spec"]["network"]["enableDNSHostnames"]) == ("JobSet", True)
    [workers] = job["spec"]["replicatedJobs"]
    spec = workers["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (3, 3, "Indexed")
    [container] = spec["template"]["spec"]["containers"]
    assert container["command"] == ["python", "train.py", "--name", 'a "b" {c} $d']
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    environment = {item["name"]: item for item in container["env"]}
    # <JobSet>-<replicated job>-<job index>-<pod index>.<subdomain, by default the JobSet's name>
    assert (
        environment[COORDINATOR]["value"] == f"big-{workers['name']}-0-0.big:{container['ports'][0]['containerPort']}"
    )
    assert environment[PROCESSES]["value"] == "3"
    assert "job-completion-index" in environment[PROCESS]["valueFrom"]["fieldRef"]["fieldPath"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("Big", 2, 8, "x"), "--name 'Big' is not of lower-case letters"),
        (("a" * 43, 2, 8, "x"), "is not of lower-case letters, digits and inner hyphens, at most 42"),
        (("a", 0, 8, "x"), "--hosts 0 and --devices 8 are at least 1"),
        (("a", 2, 8, " "), "--command is empty"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        render("slurm", *options)
