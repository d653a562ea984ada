"""The wheel, installed where only the core dependencies are: commands work, and missing extras are named. The source tree is the same."""

import json
import re
import shlex
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


MISSING = {
    "embed catalog --encoder lite0": "demo",
    "embed catalog --encoder open_clip:ViT-B-32/openai": "encoders",
    "embed catalog --encoder transformers:facebook/dinov2-small": "encoders",
    "explain catalog epochs --plot plan.svg": "train",
    "train catalog epochs -- --model ViT-B-32": "train",
    "evaluate open_clip:ViT-B-32/openai --data pool": "train",
    "import s3://bucket/0.tar other": "s3",
    "demo": "demo",
}


def core_packages(name="tailwise", extras=()):
    """Return the names of all distributions that `pip install NAME[EXTRAS]` brings."""
    found = {name: distribution(name)}
    for line in found[name].requires or []:
        needed = Requirement(line)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            found |= {} if needed.name in found else core_packages(needed.name, tuple(needed.extras))
    return found


PIP = [sys.executable, "-m", "pip", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The path of the wheel."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([*PIP, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], check=True)
    (path,) = folder.glob("tailwise-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel in a virtual environment of its own with nothing but the core dependencies, which are linked in."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*PIP, "--python", python, "install", "--no-deps", wheel], check=True)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    for name, found in core_packages().items():
        if name == "tailwise":
            continue
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in {"..", "__pycache__"}}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(found.locate_file(top))))

    return folder


CHAIN = """
import contextlib, io, json, shlex, sys
from tailwise.cli import main

for command in sys.argv[1:]:
    sys.argv = ["tailwise", *shlex.split(command)]
    code, told = 0, io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    print(json.dumps([command, code, told.getvalue()]), flush=True)
"""


def run(folder, commands):
    """[command, exit code, output] of each of the commands, which share a process of the environment."""
    python = folder / "venv" / "bin" / "python"
    done = subprocess.run([python, "-c", CHAIN, *commands], check=False, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_core_dependencies_are_enough_and_a_missing_extra_is_named(installed, make_tar, make_image):
    folder = installed
    members = [(f"{i:03}.{e}", make_image(i) if e == "png" else b"words") for i in range(60) for e in ("png", "txt")]
    make_tar(folder / "pool" / "0.tar", members)
    rows = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    table = pa.table({"key": [f"{i:03}" for i in range(60)], "embedding": list(rows)})
    pq.write_table(table, folder / "rows.parquet")
    program = folder / "venv" / "bin" / "tailwise"
    subprocess.run([program, "import", "pool", "rows.parquet", "catalog"], check=True, cwd=folder, capture_output=True)
    commands = [
        "cluster catalog --k 6",
        "dedup catalog --epsilon 0.01",
        "plan catalog epochs --method dynamics --keep 0.5",
        "explain catalog epochs",
        "draw catalog epochs --epoch 0 --output rows-0.npy",
        "export catalog epochs rates.json --to rates-json",
        "status catalog",
        "verify catalog",
    ]
    for command, code, told in run(folder, commands):
        assert code == 0, (command, told)
    for command, code, told in run(folder, MISSING):
        check_message(command, MISSING[command], code, told)


def test_the_tree_installs_what_the_wheel_holds(wheel, tmp_path):
    subprocess.run([*PIP, "install", "--no-deps", "--no-compile", "--target", tmp_path, ROOT], check=True)
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}
    there = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "tailwise").rglob("*") if path.is_file()}
    assert there == {name for name in held if name.startswith("tailwise/")}
    assert {name: (tmp_path / name).read_bytes() for name in held} == held


def check_message(command, extra, code, told):
    """The message names the extra's packages in a command that works without a release and without a checkout."""
    assert code == 2, (command, told)
    assert "Traceback" not in told
    assert len(told.splitlines()) == 1
    found = re.search(r"pip install (.*)$", told.strip())
    assert found, told
    required = [Requirement(line) for line in distribution("tailwise").requires or []]
    expected = {
        (r.name, str(r.specifier))
        for r in required
        if r.marker and f'extra == "{extra}"' in str(r.marker).replace("'", '"')
    }
    assert {(r.name, str(r.specifier)) for r in map(Requirement, shlex.split(found.group(1)))} == expected
