"""Templates are what their systems read: shell and YAML, as far as that is known without a cluster."""

import shlex
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
        (("a", 2, 8, "x 'y"), "is no command of a shell: No closing quotation"),
        (("a", 2, 8, "x 'y\n#SBATCH --uid=0'"), "has a character that cannot be printed, in "),
        (("a", 2, 8, "x 'y\u2028z'"), "has a character that cannot be printed, in "),
        (("a\n#SBATCH --uid=0", 2, 8, "x"), "is not of lower-case letters"),
    ],
)
@pytest.mark.parametrize("system", ["slurm", "kubernetes"])
def test_what_is_refused(system, options, message):
    with pytest.raises(ValueError, match=message):
        render(system, *options, image="train")


@pytest.mark.parametrize("name", ["no", "on", "y", "null", "true", "e1"])
@pytest.mark.parametrize("image", ["no", "1", "1e3", "host:5000/a_b/c-d:1.2@sha256:0f"])
def test_every_value_of_a_job_is_the_string_that_was_given(name, image):
    words = ["no", "1e3", "a: b", "- x", "#y", "{z}", "\\t\t", "'\"", "%d", "~", "&a", "é"]
    job = yaml.safe_load(render("kubernetes", name, 2, 1, shlex.join(words), image))
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    [container] = spec["containers"]
    assert (job["metadata"]["name"], container["image"], container["command"]) == (name, image, words)
    assert container["env"][0]["value"] == f"{name}-workers-0-0.{name}:4321"
    assert spec["volumes"][0]["persistentVolumeClaim"]["claimName"] == f"{name}-checkpoints"


@pytest.mark.parametrize("image", ["", "a b", "a: b", "x\ny: z", "{a}", '"', "-a", "a/", "a\x1b[2J", "é"])
def test_an_image_that_is_none_is_refused(image):
    with pytest.raises(ValueError, match="--image .* is no image: it is of letters, digits and"):
        render("kubernetes", "a", 2, 8, "x", image)
