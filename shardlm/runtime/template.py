"""`python -m shardlm template slurm` or `kubernetes`: a job file to start from."""

import argparse
import json
import re
import shlex
from typing import Any

_SLURM = """\
#!/bin/bash
# Submit with: sbatch this-file. One process on each host, with all of its GPUs.
#SBATCH --job-name={name}
#SBATCH --nodes={hosts}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={devices}
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# SIGTERM to the processes 120 s before the time is up: fit saves the step, and all end with status 0.
#SBATCH --signal=TERM@120
#SBATCH --requeue

# sl.initialize() finds hosts, number and port in Slurm's own variables. A process that fails ends the step at once; the
# loop then starts it again from the newest checkpoint.
for attempt in 1 2 3 4; do
    srun --kill-on-bad-exit=1 --label {command} && exit 0
    echo "attempt $attempt ended with status $?" >&2
    sleep 10
done
exit 1
"""

_KUBERNETES = """\
# Apply with: kubectl apply -f this-file (JobSet: https://jobset.sigs.k8s.io). One process in each pod.
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {quoted_name}
spec:
  network:
    enableDNSHostnames: true
  failurePolicy:
    maxRestarts: 3  # all pods are made anew, and go on from the newest checkpoint
  replicatedJobs:
    - name: workers
      replicas: 1
      template:
        spec:
          parallelism: {hosts}
          completions: {hosts}
          completionMode: Indexed
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120  # SIGTERM comes first: fit saves the step, and all end with status 0
              containers:
                - name: train
                  image: {image}
                  command: {command}
                  ports:
                    - containerPort: 4321
                  env:
                    - name: SHARDLM_COORDINATOR
                      value: {coordinator}
                    - name: SHARDLM_PROCESSES
                      value: "{hosts}"
                    - name: SHARDLM_PROCESS
                      valueFrom:
                        fieldRef:
                          fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
                    - name: SHARDLM_TIMEOUT
                      value: "600"  # images may take long to arrive
                  resources:
                    limits:
                      nvidia.com/gpu: {devices}
                  volumeMounts:
                    - name: checkpoints
                      mountPath: /checkpoints
              volumes:
                - name: checkpoints
                  persistentVolumeClaim:
                    claimName: {claim}  # one that all pods can write to (ReadWriteMany)
"""


def add(commands: Any) -> None:
    """Add the command to an argparse object of subcommands."""
    parser = commands.add_parser(
        "template",
        help="print a job file for Slurm or Kubernetes",
        description="Print an sbatch file, or a Kubernetes JobSet, that trains on several hosts; then change it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("system", choices=("slurm", "kubernetes"))
    add("--name", default="train", help="of the job: letters, digits and hyphens")
    add("--hosts", type=int, default=2, help="hosts, one process on each")
    add("--devices", type=int, default=8, help="GPUs of each host")
    add("--image", default="registry.example.com/train:latest", help="of the container (kubernetes)")
    add(
        "--command",
        default="python -m shardlm train --layout fsdp=-1,tensor=8 --checkpoint-dir /checkpoints/train",
        help="what each process runs",
    )


def run(options: argparse.Namespace) -> int:
    """Print the template."""
    print(render(options.system, options.name, options.hosts, options.devices, options.command, options.image), end="")
    return 0


def render(system: str, name: str, hosts: int, devices: int, command: str, image: str = "") -> str:
    """The text of a template. Every value in it is one that its system reads back as it was given.

    Raises:
        ValueError: a name or an image that Kubernetes would refuse, fewer than one host or device, no command, or one
            that no shell and no YAML can hold.
    """
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?", name):
        raise ValueError(
            f"template: --name {name!r} is not of lower-case letters, digits and inner hyphens, at most 42"
        )
    if hosts < 1 or devices < 1:
        raise ValueError(f"template: --hosts {hosts} and --devices {devices} are at least 1")
    try:
        words = shlex.split(command)
    except ValueError as error:  # a quotation mark that is not closed
        raise ValueError(f"template: --command {command!r} is no command of a shell: {error}") from error
    if not words:
        raise ValueError("template: --command is empty")
    if wrong := [word for word in words if _UNPRINTABLE.search(word)]:
        raise ValueError(f"template: --command has a character that cannot be printed, in {wrong[0]!r}")
    if system == "slurm":
        return _SLURM.format(name=name, hosts=hosts, devices=devices, command=shlex.join(words))
    if not _IMAGE.fullmatch(image):
        raise ValueError(
            f"template: --image {image!r} is no image: it is of letters, digits and . _ - / : @, as in "
            "registry.example.com/train:latest"
        )
    return _KUBERNETES.format(
        quoted_name=_quoted(name), hosts=hosts, devices=devices, command=f"[{', '.join(map(_quoted, words))}]",
        image=_quoted(image), coordinator=_quoted(f"{name}-workers-0-0.{name}:4321"),
        claim=_quoted(f"{name}-checkpoints"),
    )  # fmt: skip


# What an image is called: host:port/path:tag@digest. Control characters have no place in a job file, nor have the line
# breaks that only YAML knows.
_IMAGE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/:@-]{0,253}[A-Za-z0-9])?")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff]")


def _quoted(text: str) -> str:
    """A YAML string: a plain `no`, `1e3` or `a: b` would be something else. JSON's strings are YAML's."""
    return json.dumps(text, ensure_ascii=False)
