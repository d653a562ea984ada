"""benchmarks/: scripts that no other test runs; names that they import must be there."""

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks"
CODE = "import importlib, sys\nsys.path.insert(0, sys.argv[1])\nfor name in sys.argv[2:]: importlib.import_module(name)"


def test_every_benchmark_finds_what_it_imports(fork_python, tmp_path):
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    process = fork_python(CODE, FOLDER, *names, out=tmp_path / "log")
    process.join(300)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
