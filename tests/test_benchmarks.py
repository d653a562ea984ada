"""benchmarks/: scripts that no other test runs; names that they import must be there."""

import runpy
from pathlib import Path

from tailwise.catalog import Catalog

FOLDER = Path(__file__).parents[1] / "benchmarks"
CODE = "import importlib, sys\nsys.path.insert(0, sys.argv[1])\nfor name in sys.argv[2:]: importlib.import_module(name)"


def test_every_benchmark_finds_what_it_imports(fork_python, tmp_path):
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    process = fork_python(CODE, FOLDER, *names, out=tmp_path / "log")
    process.join(300)
    assert process.exitcode == 0, (tmp_path / "log").read_text()


def test_made_up_shards_are_a_catalog(tmp_path):
    """They have all columns of the schema, whatever these are by now."""
    append_shards = runpy.run_path(str(FOLDER / "common.py"))["append_shards"]
    append_shards(Catalog.create(tmp_path / "catalog"), [3, 5, 2], per_part=2)
    catalog = Catalog.open(tmp_path / "catalog")
    assert [part.rows for part in catalog.parts()] == [8, 2]
    assert catalog.snapshot().rows == 10
