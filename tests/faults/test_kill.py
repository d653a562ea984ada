"""kill -9 in the middle of work, then the same command again: the same bytes as without the kill."""

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


@pytest.fixture(scope="module")
def start(fork_python, sources):
    """`start(folder)` starts the steps in a process of its own → the process, and its output once it has ended."""

    def start(folder):
        number = len(list(folder.parent.glob("out-*")))
        out, err = folder.parent / f"out-{number}", folder.parent / f"err-{number}"
        process = fork_python(SCRIPT, folder, *sources, 50, out=out, err=err)

        def end():
            process.join(100)
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
        "clusters/main/label-part-000009.npy",
        "plans/p/pending.json",
    ],
)
def test_the_same_command_goes_on(start, whole, tmp_path, tree_bytes, marker):
    broken = tmp_path / "broken"
    process, end = start(broken)
    deadline = time.monotonic() + 100
    while not (broken / marker).exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.0005)
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
