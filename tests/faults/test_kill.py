"""kill -9 in the middle of work, then the same command again: the same bytes as without the kill."""

import os
import signal
import subprocess
import sys
import time

import pytest

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


def start(sources, folder, stderr=None):
    command = [sys.executable, "-c", SCRIPT, str(folder), *map(str, sources), "50"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory, make_pool, make_vectors, make_embeddings):
    folder = tmp_path_factory.mktemp("sources")
    pool = make_pool(folder / "pool", [60] * 30)
    keys = [key for keys in pool.values() for key in keys]
    return [folder / "pool", make_embeddings(folder / "embeddings", make_vectors(keys), partitions=3)]


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    """What comes of it without a kill."""
    folder = tmp_path_factory.mktemp("whole") / "catalog"
    assert start(sources, folder).communicate(timeout=100)[0] == "finished\n"
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
        "clusters/main/label-part-000009.npy",
        "plans/p/pending.json",
    ],
)
def test_the_same_command_goes_on(sources, whole, tmp_path, tree_bytes, marker):
    broken = tmp_path / "broken"
    process = start(sources, broken)
    deadline = time.monotonic() + 100
    while not (broken / marker).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = {path: path.stat().st_mtime_ns for path in finished_parts(broken)}
    assert len(kept) >= 8
    assert start(sources, broken).communicate(timeout=100)[0] == "finished\n"
    assert tree_bytes(broken) == tree_bytes(whole)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_two_at_once(sources, whole, tmp_path, tree_bytes):
    """The second says so and ends; the first is not disturbed."""
    shared = tmp_path / "shared"
    processes = [start(sources, shared, stderr=subprocess.PIPE) for _ in range(3)]
    results = [(*process.communicate(timeout=100), process.returncode) for process in processes]
    assert any(code == 0 for *_, code in results)
    for _, error, code in results:
        assert code == 0 or "another process is writing" in error.splitlines()[-1]
    assert start(sources, shared).communicate(timeout=100)[0] == "finished\n"
    assert tree_bytes(shared) == tree_bytes(whole)
