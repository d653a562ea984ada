"""Files about dependencies agree with pyproject.toml."""

import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIRED = [Requirement(line) for lines in (PROJECT["dependencies"], *EXTRAS.values()) for line in lines]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_are_allowed_versions_of_what_make_test_installs():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {normal(name): version for name, version in (line.split("==") for line in lines)}
    assert not [name for name in pinned if name.startswith(("triton", "nvidia-", "cuda-"))]
    assert not {"torch", "torchvision"} & set(pinned)
    tested = [Requirement(line) for line in (*PROJECT["dependencies"], *EXTRAS["dev"])]
    assert {normal(item.name) for item in tested} - pinned.keys() == {"torch"}
    for item in REQUIRED:
        version = pinned.get(normal(item.name))
        assert version is None or item.specifier.contains(version), (str(item), version)


def test_each_direct_dependency_has_its_licence_in_the_table():
    rows = re.findall(
        r"^\| ([\w.-]+) \| ([\w, ]+) \| (.+) \|$", (ROOT / "docs" / "about" / "licences.md").read_text(), re.M
    )
    listed = {name: users.split(", ") for name, users, _ in rows if name != "package"}
    groups = {"core": PROJECT["dependencies"], **EXTRAS}
    expected = {
        item.name: [group for group, lines in groups.items() if item.name in {Requirement(line).name for line in lines}]
        for item in REQUIRED
    }
    assert listed == expected
    assert not [name for name, _, licence in rows if "not stated" in licence]


def test_ci_installs_the_constraints_of_its_python_only(tmp_path):
    made = subprocess.run(
        ["make", "-n", "test", "demo", f"VENV={tmp_path}", "CONSTRAINTS=constraints.txt"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert made.count("--constraint constraints.txt --editable") == 2
    plain = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--constraint" not in plain
