"""Parts of map steps: real processes, at the same time, over one catalog."""

import os
import shutil
import signal
import uuid

import numpy as np
import pytest

from tailwise.catalog import Catalog
from tailwise.context import Context
from tailwise.errors import PartDoneError, UserError
from tailwise.execution.base import KERNEL, Apply, Task
from tailwise.execution.executors import PartExecutor, open_executor, parse_part
from tailwise.requests import ClusterRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.importing.pool import import_pool

PARTS = 3


@pytest.fixture
def start(tmp_path, fork_python):
    """`start(*words)` begins a command in a process of its own."""

    def run(*words):
        out = tmp_path / f"said-{uuid.uuid4().hex}"
        process = fork_python("from tailwise.cli import main; main()", *words, out=out)
        process.out = out
        return process

    return run


def said(process):
    process.join(300)
    assert process.exitcode == 0, process.out.read_text()
    return process.out.read_text()


@pytest.fixture
def twins(tmp_path, make_pool):
    """Two equal catalogs of four shards, 1,200 samples and several parts."""
    make_pool(tmp_path / "pool", [300, 500, 100, 300])
    import_pool([str(tmp_path / "pool")], tmp_path / "one", workers=1, part_rows=350)
    shutil.copytree(tmp_path / "one", tmp_path / "parts")
    return Catalog.open(tmp_path / "one"), Catalog.open(tmp_path / "parts")


EMBED = ("--encoder", "pixels", "--column", "image", "--batch-size", 2)


def test_parts_of_an_embedding_at_the_same_time_give_the_bytes_of_one_run(twins, start, run_tailwise, tree_bytes):
    one, parts = (catalog.folder for catalog in twins)
    run_tailwise("embed", one, *EMBED)
    lines = list(map(said, [start("embed", parts, *EMBED, "--part", f"{at}/{PARTS}") for at in (1, 2, 3)]))
    items = [int(line.split(": ")[1].split(" ")[0]) for line in lines]
    assert sum(items) == sum(-(-size // 32) for size in (300, 500, 100, 300))
    assert max(items) - min(items) <= 1
    assert any("no item is left; when all parts have ended, run the command without --part" in line for line in lines)
    assert not list((parts / "embeddings" / "image").glob("part-*"))  # parts finish nothing
    assert "0 items done; no item is left" in run_tailwise("embed", parts, *EMBED, "--part", "2/3").stdout
    run_tailwise("embed", parts, *EMBED)
    assert tree_bytes(parts) == tree_bytes(one)


def test_a_killed_part_is_run_again(twins, start, run_tailwise, tree_bytes, wait_until):
    one, parts = (catalog.folder for catalog in twins)
    run_tailwise("embed", one, *EMBED)
    killed = start("embed", parts, *EMBED, "--part", "1/2")
    wait_until(lambda: any((parts / "embeddings").rglob("shard-*.json")), killed.is_alive)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    (there,) = (parts / "embeddings" / "image" / "unfinished").iterdir()
    (there / "shard-00000000-00000000.npy.0.writing").write_bytes(b"of a killed process")
    kept = {path: path.stat().st_mtime_ns for path in there.glob("shard-*.json")}
    line = said(start("embed", parts, *EMBED, "--part", "2/2"))
    assert "items are left for other parts" in line
    again = said(start("embed", parts, *EMBED, "--part", "1/2"))
    assert "no item is left" in again
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    run_tailwise("embed", parts, *EMBED)
    assert tree_bytes(parts) == tree_bytes(one)


def test_the_plain_command_and_parts_exclude_one_another(twins, start, run_tailwise, wait_until):
    _, parts = (catalog.folder for catalog in twins)
    part = start("embed", parts, *EMBED, "--part", "1/2")
    wait_until(lambda: any((parts / "embeddings").rglob("shard-*.json")), part.is_alive)
    os.kill(part.pid, signal.SIGSTOP)
    try:
        assert "another process is writing" in run_tailwise("embed", parts, *EMBED, code=2).stderr
    finally:
        os.kill(part.pid, signal.SIGCONT)
    said(part)
    run_tailwise("embed", parts, *EMBED)


@pytest.mark.parametrize("step", ["filter", "cluster"])
def test_parts_of_artifacts_give_the_bytes_of_one_run(small_catalog, tmp_path, start, run_tailwise, tree_bytes, step):
    if step == "filter":
        words = ("--by", "caption-characters", "--min", 8, "--name", "long")
    else:
        cluster(small_catalog, ClusterRequest(k=12))
        words = ("--extends", "main", "--name", "again")
    shutil.copytree(small_catalog.folder, tmp_path / "parts")
    run_tailwise(step, small_catalog.folder, *words)
    lines = list(map(said, [start(step, tmp_path / "parts", *words, "--part", f"{at}/{PARTS}") for at in (1, 2, 3)]))
    assert sorted(int(line.split(": ")[1].split(" ")[0]) for line in lines) == [0, 1, 1]  # two parts of the catalog
    run_tailwise(step, tmp_path / "parts", *words)
    assert tree_bytes(tmp_path / "parts") == tree_bytes(small_catalog.folder)
    assert (
        "run the command without --part"
        in run_tailwise(step, tmp_path / "parts", *words, "--name", "other", "--part", "1/1").stdout
    )
    assert not (tmp_path / "parts" / "drops" / "other").exists()
    assert not (tmp_path / "parts" / "clusters" / "other").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("embed", "--column", "both"), "--part: one column at a time"),
        (("cluster", "--k", 3), "--part: k-means is fitted by one process"),
        (("plan", "p", "--method", "random"), "--part is for embed, filter, cluster: run plan without it"),
        (("filter", "--by", "x", "--file", "x.csv", "--min", 0), "--part: this step keeps intermediate files"),
    ],
)
def test_what_cannot_be_divided_is_refused(small_catalog, run_tailwise, tmp_path, monkeypatch, words, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.csv").write_text("key,x\n000000,1\n")
    step, *rest = words
    encoder = ("--encoder", "pixels") if step == "embed" else ()
    assert line in run_tailwise(step, small_catalog.folder, *rest, *encoder, "--part", "1/2", code=2).stderr


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "a/b", "1/3/5", "-1/3", "", "1/12345678901"])
def test_bad_parts_are_refused(text):
    with pytest.raises(UserError, match="give I/N"):
        parse_part(text)


def test_parts_are_for_the_local_executor():
    with pytest.raises(UserError, match="without an engine"):
        open_executor("ray", part="1/2")


class _Write(Task):
    def __init__(self, folder):
        self.folder = folder

    def files(self, item):
        return (self.folder / str(item),)

    def run(self, item, worker):
        (self.folder / str(item)).touch()


@pytest.mark.parametrize(("items", "parts"), [(0, 1), (1, 4), (10, 3), (12, 12), (7, 8)])
def test_the_shares_make_up_the_whole(tmp_path, items, parts):
    runs = []
    for number in range(1, parts + 1):
        executor = PartExecutor(number, parts)
        try:
            before = {path.name for path in tmp_path.iterdir()}
            with pytest.raises(PartDoneError) as end:
                Context(executor=executor).run(_Write(tmp_path), range(items), "", KERNEL)
            runs.append({path.name for path in tmp_path.iterdir()} - before)
            assert end.value.unfinished == items - sum(map(len, runs))
        finally:
            executor.close()
    assert sorted(int(name) for run in runs for name in run) == list(range(items))
    assert np.ptp([len(run) for run in runs]) <= 1


def test_what_needs_the_results_of_all_ends_a_part():
    executor = PartExecutor(1, 2)
    try:
        with pytest.raises(PartDoneError, match="no item is left"):
            executor.reduce(Apply(abs), [1, 2], max)
        with pytest.raises(PartDoneError, match="no item is left"):
            executor.map(Apply(abs), [1, 2])
        called = []
        with pytest.raises(PartDoneError, match=": 0 items done; no item is left"):
            Context(executor=executor).run(Apply(called.append), [1, 2, 3], "", KERNEL)
        assert not called
    finally:
        executor.close()
