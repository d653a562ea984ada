"""kill -9 in the middle of work, then the same command again: the same bytes as without the kill."""

import signal

import pytest

from tailwise.catalog.files import file_stamp
from tailwise.requests import PlanRequest
from tailwise.steps.planning.plan import make_plan

OUTPUTS = {  # command, its output, and other settings
    "draw": ("draw CATALOG p --epoch 1 --output OUT", "--epoch 2"),
    "keys": ("export CATALOG p --to keys --epoch 1 --output OUT", "--epoch 2"),
    "rates-json": ("export CATALOG p --to rates-json --output OUT", ""),
    "excluded": ("excluded CATALOG p --epochs 1 --output OUT", "--epochs 2"),
}
# Kills itself when the output has its name.
KILLED = """
import os, signal, sys
from pathlib import Path
from tailwise.cli import main
from tailwise.storage import local
flush, output = local.flush, Path(sys.argv.pop(1))

def killed(path):
    flush(path)
    if path == output.parent:
        os.kill(os.getpid(), signal.SIGKILL)

local.flush = killed
main()
"""
SCRIPT = """
import sys
from tailwise import Catalog, ClusterRequest, cluster, import_pool, make_plan, PlanRequest
from tailwise.catalog import files
sources, folder, part_rows = sys.argv[2:-1], sys.argv[1], int(sys.argv[-1])
catalog = import_pool(sources, folder, workers=1, part_rows=part_rows).catalog
cluster(catalog, ClusterRequest(k=40))
make_plan(catalog, "p", PlanRequest("dbp", keep=0.3))
print("finished")
"""


@pytest.fixture(scope="module")
def start(fork_python, sources):
    """`start(folder)` starts the steps in a process of its own → the process, and its output once it has ended."""

    def start(folder):
        number = len(list(folder.parent.glob("out-*")))
        out, err = folder.parent / f"out-{number}", folder.parent / f"err-{number}"
        process = fork_python(SCRIPT, folder, *sources, 50, out=out, err=err)

        def end():
            process.join(300)
            return out.read_text(), err.read_text()

        return process, end

    return start


@pytest.fixture(scope="module")
def sources(tmp_path_factory, make_pool, make_vectors, make_embeddings):
    folder = tmp_path_factory.mktemp("sources")
    pool = make_pool(folder / "pool", [60] * 30)
    keys = [key for keys in pool.values() for key in keys]
    return [folder / "pool", make_embeddings(folder / "embeddings", make_vectors(keys), partitions=3)]


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """What comes of it without a kill."""
    folder = tmp_path_factory.mktemp("whole") / "catalog"
    assert start(folder)[1]()[0] == "finished\n"
    return folder


def finished_parts(folder):
    """Those whose marker, which comes last, is there: a part that the kill caught between the two is written again."""
    return [path for path in (folder / "samples").glob("*.parquet") if path.with_suffix(".json").exists()]


@pytest.mark.parametrize(
    "marker",
    [
        "samples/part-000007.json",
        "samples/part-000008.parquet",
        "embeddings/image/part-000011.npy",
        "clusters/.main.unfinished/*/label-part-000009.npy",
        "plans/.p.unfinished/*/pending.json",
    ],
)
def test_the_same_command_goes_on(start, whole, tmp_path, tree_bytes, marker, wait_until):
    broken = tmp_path / "broken"
    process, end = start(broken)
    wait_until(lambda: any(broken.glob(marker)) or not process.is_alive())
    process.kill()
    end()
    kept = {path: path.stat().st_mtime_ns for path in finished_parts(broken)}
    assert len(kept) >= 8
    assert start(broken)[1]()[0] == "finished\n"
    assert tree_bytes(broken) == tree_bytes(whole)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_two_at_once(start, whole, tmp_path, tree_bytes):
    """The second says so and ends; the first is not disturbed."""
    shared = tmp_path / "shared"
    started = [start(shared) for _ in range(3)]
    results = [(end()[1], process.exitcode) for process, end in started]
    assert any(code == 0 for _, code in results)
    for error, code in results:
        assert code == 0 or "another process is writing" in error.splitlines()[-1]
    assert start(shared)[1]()[0] == "finished\n"
    assert tree_bytes(shared) == tree_bytes(whole)


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_command_that_was_killed_after_publication_is_done(small_catalog, tmp_path, fork_python, run_tailwise, name):
    make_plan(small_catalog, "p", PlanRequest("random", keep=0.3))
    output = tmp_path / "outputs" / "out"
    output.parent.mkdir()
    command, other = (
        text.replace("CATALOG", str(small_catalog.folder)).replace("OUT", str(output)).split() for text in OUTPUTS[name]
    )
    killed = fork_python(KILLED, output, *command, out=tmp_path / "log")
    killed.join(300)
    assert killed.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    before = file_stamp(output)
    again = run_tailwise(*command)
    assert file_stamp(output) == before
    assert f"{output}: done already" in again.stderr
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    if other:
        refused = run_tailwise(*command, *other, code=2)
        assert file_stamp(output) == before
        assert f"{output} exists: name another file" in refused.stderr
    assert [path.name for path in output.parent.iterdir()] == ["out"]
