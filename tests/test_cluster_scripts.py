"""examples/ for Slurm and Kubernetes: they parse, and name commands and options that exist. No such cluster runs here."""

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from tailwise.cli import SHARED, SHARED_VALUES
from tailwise.cli.app import tree

FOLDER = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(FOLDER.glob("slurm_*.sh"))


def check_words(words):
    """Words of a command, from its name on."""
    options = {name for item in tree().commands[words[0]].params for name in item.opts} | {*SHARED, *SHARED_VALUES}
    assert {word for word in words if word.startswith("--")} <= options


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_slurm_scripts(script):
    subprocess.run(["bash", "-n", script], check=True)
    lines = [line.split("#")[0].strip() for line in script.read_text().splitlines()]
    commands = [line.split(" ", 1)[1] for line in lines if line.startswith(("tailwise ", "run "))]
    commands = [command for command in commands if not command.startswith('"$@"')]
    assert commands
    for command in commands:
        check_words(shlex.split(command))


def test_kubernetes_job():
    job = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    program, *words = shlex.split(job["spec"]["entrypoint"])
    assert program == "tailwise"
    check_words(words)
    cluster = job["spec"]["rayClusterSpec"]
    pods = [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
    for pod in pods:  # what all nodes share
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        (container,) = pod["spec"]["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert any(words[1].startswith(mount["mountPath"]) for mount in container["volumeMounts"])
