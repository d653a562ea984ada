"""An import that was interrupted and run again, or run with other workers, makes the very same bytes."""

import itertools

import numpy as np
import pytest

from tailwise.catalog.files import write_record
from tailwise.context import Context
from tailwise.execution.local import LocalExecutor
from tailwise.shards.containers import index_shard
from tailwise.steps.importing.pool import import_pool

SIZES = [3, 3, 2, 4, 1, 5]
PART_ROWS = 5  # parts: tars 0-1, 2-3, 4-5


class Interrupted(BaseException):
    """Like KeyboardInterrupt."""


def interrupting(step, items_done):
    """A `track` that raises in the step of this name after so many items."""

    def track(items, description, total=None):
        for position, item in enumerate(items):
            if description == step and position == items_done:
                raise Interrupted
            yield item

    return track


@pytest.fixture
def pool(tmp_path, make_pool, make_vectors, make_embeddings):
    """Six tars and three partitions of embeddings, all good."""
    made = make_pool(tmp_path / "pool", SIZES)
    make_embeddings(tmp_path / "pool", make_vectors(list(itertools.chain(*made.values()))), 3)
    return made


@pytest.fixture
def faulty_pool(tmp_path, make_tar, make_pool, make_vectors, make_partition):
    """As `pool`, with faults of tars and of embeddings in every part."""
    made = make_pool(tmp_path / "pool", SIZES)
    keys = list(itertools.chain(*made.values()))
    make_pool(tmp_path / "pool" / "00005b", [2])  # not found: tars lie beside it
    for number in (0, 2, 5):
        make_tar(tmp_path / "pool" / f"{number:05d}x.tar", [(f"lonely{number}.jpg", b"image")])
    make_tar(tmp_path / "pool" / "00005y.tar", [(f"{keys[0]}.jpg", b"image"), (f"{keys[0]}.txt", b"twin")])
    mixed = np.random.default_rng(1).permutation(keys).tolist()
    vectors = make_vectors(keys)
    for number in range(3):
        mine = [key for key in mixed[number::3] if key not in {keys[2], keys[9], keys[17]}]
        rows = np.stack([vectors[key] for key in mine])
        rows[0] = [0, np.nan, 0][number]
        make_partition(tmp_path / "pool", number, [*mine, mine[-1], f"stranger{number}"], [*rows, rows[0], rows[0]])
    return made


def run(tmp_path, catalog="catalog", workers=1, **options):
    options = {"max_rejected": 1.0, **options}  # the pool is full of faults
    return import_pool([str(tmp_path / "pool")], tmp_path / catalog, workers=workers, part_rows=PART_ROWS, **options)


def interrupt(tmp_path, step, items_done):
    with pytest.raises(Interrupted):
        run(tmp_path, context=Context(interrupting(step, items_done)))


def stamps(folder, pattern):
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob(pattern)}


STEPS = [
    *(("indexing tars", done) for done in range(6)),
    ("joining image keys", 0),
    ("joining image keys", 2),
    *(("image embeddings", done) for done in range(3)),
]


@pytest.mark.parametrize(("step", "items_done"), STEPS)
def test_interrupted_anywhere_and_run_again(tmp_path, pool, tree_bytes, step, items_done):
    whole = tree_bytes(run(tmp_path, "whole").catalog.folder)
    interrupt(tmp_path, step, items_done)
    folder = tmp_path / "catalog"
    half = {
        name: content
        for name, content in tree_bytes(folder).items()
        if not name.endswith(("pending.json", "head.json"))
    }
    assert set(half) < set(whole)
    assert all(whole[name] == content for name, content in half.items())
    assert not any("writing" in name or "joining" in name for name in half)
    run(tmp_path)
    assert tree_bytes(folder) == whole


FAULTY_STEPS = [
    *(("indexing tars", done) for done in range(10)),
    *(("image embeddings", done) for done in range(3)),
]


@pytest.mark.parametrize(("step", "items_done"), FAULTY_STEPS)
def test_what_was_left_out_is_the_same_too(tmp_path, faulty_pool, tree_bytes, rejected_counts, step, items_done):
    report = run(tmp_path, "whole")
    whole = tree_bytes(report.catalog.folder)
    assert len(rejected_counts(report.catalog)) >= 7
    interrupt(tmp_path, step, items_done)
    again = run(tmp_path)
    assert tree_bytes(tmp_path / "catalog") == whole
    assert rejected_counts(again.catalog) == rejected_counts(report.catalog)


def test_interrupted_twice(tmp_path, pool, tree_bytes):
    whole = tree_bytes(run(tmp_path, "whole").catalog.folder)
    for step, items_done in (
        ("indexing tars", 3),
        ("indexing tars", 2),
        ("image embeddings", 0),
        ("image embeddings", 0),
    ):
        interrupt(tmp_path, step, items_done)
    run(tmp_path)
    assert tree_bytes(tmp_path / "catalog") == whole


def test_finished_parts_are_not_done_again(tmp_path, pool, tree_bytes):
    whole = tree_bytes(run(tmp_path, "whole").catalog.folder)
    interrupt(tmp_path, "indexing tars", 5)
    folder = tmp_path / "catalog"
    finished = stamps(folder, "part-*")
    assert {path.stem for path in finished} == {"part-000000", "part-000001"}
    saved = {}
    for path in list(pool)[:4]:  # reading them again would find nothing good
        saved[path] = path.read_bytes()
        path.write_bytes(bytes(len(saved[path])))
    interrupt(tmp_path, "image embeddings", 1)  # after two parts
    assert {path: stamp for path, stamp in stamps(folder, "part-*").items() if path in finished} == finished
    finished = stamps(folder, "part-*")
    assert len([path for path in finished if path.suffix == ".npy"]) == 2
    for path, content in saved.items():  # a finished import looks at the first block of each tar
        path.write_bytes(content)
    run(tmp_path)
    assert {path: stamp for path, stamp in stamps(folder, "part-*").items() if path in finished} == finished
    assert tree_bytes(folder) == whole


def test_other_tars_than_before_the_interruption(tmp_path, pool, make_pool, make_vectors, make_embeddings, tree_bytes):
    """What lies there is taken for no more than it is: the finished part of a tar that has changed is made anew."""
    interrupt(tmp_path, "indexing tars", 5)
    make_pool(tmp_path / "pool", [40], first_shard=2)
    keys = [f"{shard:05d}{row:04d}" for shard, size in enumerate([3, 3, 40, 4, 1, 5]) for row in range(size)]
    make_embeddings(tmp_path / "pool", make_vectors(keys), 3)
    run(tmp_path)
    run(tmp_path, "whole")
    assert tree_bytes(tmp_path / "catalog") == tree_bytes(tmp_path / "whole")


KILLED = """
import os, sys
from tailwise.context import Context
from tailwise.execution.local import LocalExecutor
from tailwise.shards.containers import index_shard
from tailwise.steps.importing.pool import import_pool

def track(items, description, total=None):
    for position, item in enumerate(items):
        if (description, position) == (sys.argv[3], int(sys.argv[4])):
            os._exit(9)
        yield item

import_pool([sys.argv[1]], sys.argv[2], workers=1, part_rows=5, context=Context(track))
"""


@pytest.mark.parametrize(("step", "items_done"), [("indexing tars", 3), ("image embeddings", 1)])
def test_killed_and_run_again(fork_python, tmp_path, pool, tree_bytes, step, items_done):
    """No `finally` runs in a killed process; half-written files of it are planted beside."""
    whole = tree_bytes(run(tmp_path, "whole").catalog.folder)
    folder = tmp_path / "catalog"
    process = fork_python(KILLED, tmp_path / "pool", folder, step, items_done, out=tmp_path / "log")
    process.join(300)
    assert process.exitcode == 9, (tmp_path / "log").read_text()
    (folder / "samples" / "part-000001.parquet.writing").write_bytes(b"half")
    (folder / "shards.parquet.writing").write_bytes(b"half")
    if step == "image embeddings":
        (folder / "embeddings" / "image" / "part-000001.npy.writing").write_bytes(b"half")
    run(tmp_path)
    left = {name: content for name, content in tree_bytes(folder).items() if not name.endswith(".writing")}
    assert left == whole


def test_killed_after_a_join_was_noted_as_done(tmp_path, pool, tree_bytes):
    """Its note of what is under way is still there: the join is not done, or noted, a second time."""
    folder, kept = tmp_path / "catalog", []

    def track(items, description, total=None):
        for item in items:
            if description == "image embeddings":
                kept.append((folder / "embeddings" / "image" / "pending.json").read_bytes())
            yield item

    run(tmp_path, context=Context(track))
    whole = tree_bytes(folder)
    (folder / "embeddings" / "image" / "pending.json").write_bytes(kept[0])
    run(tmp_path)
    assert tree_bytes(folder) == whole


def test_killed_before_the_snapshot_was_listed(tmp_path, pool, tree_bytes):
    """The next import lists it: a loss of it would go unnoticed else."""
    folder = run(tmp_path).catalog.folder
    whole = tree_bytes(folder)
    write_record(folder / "snapshots" / "head.json", {"entries": []})
    run(tmp_path)
    assert tree_bytes(folder) == whole


def test_workers_and_folders_make_no_difference(tmp_path, faulty_pool, tree_bytes):
    one = run(tmp_path, "one", workers=1)
    two = run(tmp_path, "deep/er/two", workers=2)
    assert tree_bytes(one.catalog.folder) == tree_bytes(two.catalog.folder)
    assert one.rejections.counts == two.rejections.counts
    assert one.snapshot == two.snapshot


@pytest.mark.parametrize("chunk_rows", [1, 2, 5])
def test_chunks_make_no_difference(tmp_path, faulty_pool, tree_bytes, monkeypatch, chunk_rows):
    whole = run(tmp_path, "whole")
    for name in ("CHUNK_ROWS", "FILL_ROWS"):
        monkeypatch.setattr(f"tailwise.steps.importing.joining.{name}", chunk_rows)
    report = run(tmp_path)
    listed = {"rejected/image-embeddings-000001.parquet"}  # same cases, though not in the same order
    ours, theirs = tree_bytes(report.catalog.folder), tree_bytes(whole.catalog.folder)
    assert {name for name in theirs if ours.get(name) != theirs[name]} <= listed
    assert report.rejections.counts == whole.rejections.counts


def test_small_files_are_read_by_this_process_unless_workers_are_given(tmp_path, pool, interrupted):
    def indexes(_, calls, *__):
        return getattr(calls.task, "function", None) is index_shard

    for given, used in ((None, 1), (2, 2)):
        with interrupted(LocalExecutor, "_run", indexes) as calls:
            run(tmp_path, str(given), workers=given)
        assert calls[-1][-1].workers == used


def test_interrupted_with_two_workers(tmp_path, pool, tree_bytes):
    whole = tree_bytes(run(tmp_path, "whole").catalog.folder)
    with pytest.raises(Interrupted):
        run(tmp_path, workers=2, context=Context(interrupting("indexing tars", 3)))
    run(tmp_path, workers=2)
    assert tree_bytes(tmp_path / "catalog") == whole


def test_an_interrupted_append(tmp_path, pool, make_pool, make_vectors, make_embeddings, tree_bytes):
    for name in ("whole", "catalog"):
        run(tmp_path, name)
    before = tree_bytes(tmp_path / "whole")
    more = make_pool(tmp_path / "pool", [6, 2, 3], first_shard=6)
    keys = list(itertools.chain(*pool.values(), *more.values()))
    make_embeddings(tmp_path / "pool", make_vectors(keys), 3)
    run(tmp_path, "whole")
    for step, items_done in (("indexing tars", 2), ("image embeddings", 1)):
        interrupt(tmp_path, step, items_done)
        now = tree_bytes(tmp_path / "catalog")
        changing = {"shards.parquet", "snapshots/head.json"}
        assert all(now[name] == content for name, content in before.items() if name not in changing)
    run(tmp_path)
    assert tree_bytes(tmp_path / "catalog") == tree_bytes(tmp_path / "whole")
