"""benchmarks/compare_installations.py, which compares the results of two versions."""

import shutil
import subprocess
import sys
from pathlib import Path

import tailwise

SOURCE = Path(tailwise.__file__).parents[1]
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compare_installations.py"


def test_a_changed_line_is_found_and_nothing_else_differs(tmp_path):
    other = tmp_path / "src"
    shutil.copytree(
        SOURCE / "tailwise", other / "tailwise"
    )  # with compiled kernels, which know their sources by the times that this keeps
    changed = other / "tailwise" / "export" / "files.py"
    before = changed.read_text()
    after = before.replace("epoch.rates(part.span)", "epoch.plan.rate(part.span, epoch.number)")
    assert after != before  # removed samples are no longer given a rate of 0
    changed.write_text(after)
    command = [sys.executable, SCRIPT, SOURCE, other, "--only", "tars", "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    lines = result.stdout.splitlines()
    differing = [line.split("  ")[1] for line in lines if line.startswith("differs")]
    assert differing == ["tars: export dynamics-2.json: files", "tars: export given-2.json: files"]
    assert sum(line.startswith("same") for line in lines) > 200
    assert lines[-1].endswith(", 2 differs, 0 new")
