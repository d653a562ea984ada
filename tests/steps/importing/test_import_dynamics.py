"""The DynamiCS authors' files: joined by tar and key, cluster ids as a grouping."""

import itertools

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tailwise.catalog.clusterings import Clustering
from tailwise.cli import app
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.requests import PlanRequest, SourceRequest
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.upkeep.verify import verify

PART_ROWS = 5


@pytest.fixture
def pool(tmp_path, make_pool):
    """Two folders whose tars have the same base names and the same keys; [(path of the tar, key)] of all samples."""
    made = make_pool(tmp_path / "laion" / "a", [3, 3]) | make_pool(tmp_path / "laion" / "b", [3, 2])
    return [(path, key) for path, keys in made.items() for key in keys]


def vector(name):
    return np.random.default_rng([*name.encode()]).normal(size=6).astype(np.float32)


@pytest.fixture
def make_dynamics(tmp_path, make_partition):
    """`make_dynamics(names, ids, partitions=2)` → a folder of their files; names are dealt out to the partitions in turn."""

    def write(names, ids, partitions=2, shape=(-1, 1), rows=None):
        folder = tmp_path / "theirs"
        rows = [vector(name) for name in names] if rows is None else rows
        for number in range(partitions):
            mine = slice(number, None, partitions)
            make_partition(folder, number, names[mine], np.stack(rows[mine]))
            array = np.asarray(ids[mine], np.int64).reshape(shape)
            np.save(folder / "img_emb" / f"img_emb_{number}_indices.npy", array)
        return folder

    return write


def their_names(pool, root="/home/them/data"):
    """Their image_path: the tars lay elsewhere with them, in folders of the same names."""
    return [f"{root}/{path.parent.name}/{path.name}/{key}.jpg" for path, key in pool]


def column(catalog, name):
    return list(itertools.chain(*(catalog.samples(part, [name]).column(0).to_pylist() for part in catalog.parts())))


def labels(catalog, name="dynamics"):
    return np.concatenate(list(Clustering.open(catalog, name).parts("label"))).tolist()


def values(catalog, name="dynamics"):
    """The cluster id of each row, None for none."""
    table = Clustering.open(catalog, name).table.column("value").to_pylist()
    return [int(table[label]) if label >= 0 else None for label in labels(catalog, name)]


def check(catalog, names, lacking=()):
    rows = np.concatenate(catalog.embedding_parts("image", catalog.snapshot()))
    for row, name in zip(rows, names, strict=True):
        expected = vector(name) / np.linalg.norm(vector(name))
        np.testing.assert_allclose(row, 0 * expected if name in lacking else expected, atol=2e-3)


@pytest.mark.parametrize("shape", [(-1, 1), (-1,)])
def test_embeddings_and_cluster_ids_go_to_their_tar_and_key(run, tmp_path, pool, make_dynamics, shape):
    names = their_names(pool)
    ids = [40, 7, 7, 40, 0, 7, 7, 7, 40, 0, 12]
    order = np.random.default_rng(1).permutation(len(names))
    folder = make_dynamics([names[at] for at in order], [ids[at] for at in order], 3, shape)
    report = run(tmp_path / "laion", folder)
    catalog = report.catalog
    assert catalog.rejected() is None
    check(catalog, names)
    assert values(catalog) == ids
    table = Clustering.open(catalog, "dynamics").table.to_pylist()
    assert [(row["cluster"], row["value"], row["size"]) for row in table] == [
        (0, "0", 2),
        (1, "7", 5),
        (2, "12", 1),
        (3, "40", 3),
    ]
    assert [made.name for made in report.clusterings] == ["dynamics"]
    assert not (catalog.clusters_folder("dynamics") / "centroids.npy").exists()
    assert verify(catalog)[1] == []


def test_files_given_alone_are_told_apart_by_their_tars(run, tmp_path, pool, make_dynamics):
    names = their_names(pool)
    run(tmp_path / "laion")
    catalog = run(make_dynamics(names, list(range(len(names))))).catalog
    check(catalog, names)
    assert values(catalog) == list(range(len(names)))


@pytest.mark.parametrize(
    "form", ["{folder}/{stem}/{key}", "{folder}/{stem}/{key}.webp", "s3://x/{folder}/{stem}.tar/{key}"]
)
def test_other_ways_to_name_the_tar(run, tmp_path, pool, make_dynamics, form):
    names = [form.format(folder=path.parent.name, stem=path.stem, key=key) for path, key in pool]
    check(run(tmp_path / "laion", make_dynamics(names, [0] * len(names))).catalog, names)


def test_plans_are_made_over_the_cluster_ids(run, tmp_path, pool, make_dynamics):
    ids = [0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2]
    catalog = run(tmp_path / "laion", make_dynamics(their_names(pool), ids)).catalog
    plan = make_plan(catalog, "flat", PlanRequest("flat", budget=6, clustering="dynamics"))
    drawn = np.bincount(np.repeat(ids, plan.draw(0)), minlength=3)
    assert drawn.tolist() == [2, 2, 2]


def test_tars_that_can_not_be_told_apart(run, tmp_path, pool, make_dynamics, rejected_counts):
    names = [f"{path.name}/{key}.jpg" for path, key in pool[:6]]
    run(tmp_path / "laion")
    with pytest.raises(UserError, match=r"ambiguous tar: 6"):
        run(make_dynamics(names, [0] * 6))


def test_too_many_ids_that_can_not_be_used_are_refused(run, tmp_path, pool, make_dynamics):
    """Four of eleven names fit both tars called 00000: their ids, and their embeddings, belong to no one sample."""
    names = [
        f"{path.name}/{key}.jpg" if at in (0, 1, 6, 7) else name
        for at, ((path, key), name) in enumerate(zip(pool, their_names(pool), strict=True))
    ]
    folder = make_dynamics(names, list(range(11)), 1)
    run(tmp_path / "laion")
    for path in folder.glob("img_emb/img_emb_?.npy"):
        path.unlink()
    told = r"4 of 11 rows of cluster ids \(36.4%\) can't be used, more than `max_rejected` 0.1: ambiguous tar: 4"
    with pytest.raises(UserError, match=told):
        run(folder, max_rejected=0.1)
    assert values(run(folder, max_rejected=0.5).catalog).count(None) == 4


def test_tars_given_with_the_files_are_meant(run, tmp_path, pool, make_dynamics):
    """`b` alone is given, so that 00000.tar is b's; a's samples have the same names, and get nothing."""
    run(tmp_path / "laion" / "a")
    names = [f"{path.name}/{key}.jpg" for path, key in pool[6:]]
    catalog = run(tmp_path / "laion" / "b", make_dynamics(names, [3, 3, 3, 4, 4])).catalog
    check(catalog, [*(f"none {at}" for at in range(6)), *names], lacking=[f"none {at}" for at in range(6)])
    assert values(catalog) == [None] * 6 + [3, 3, 3, 4, 4]


def test_a_tar_that_was_not_imported_is_not_taken_for_another(run, tmp_path, pool, make_dynamics, rejected_counts):
    names = their_names(pool)
    ids = list(range(len(names)))
    catalog = run(tmp_path / "laion" / "b", make_dynamics(names, ids)).catalog
    check(catalog, names[6:])
    assert values(catalog) == ids[6:]
    counts = rejected_counts(catalog)
    assert counts["image embeddings", "embedding without sample"] == 6
    assert counts["cluster ids", "cluster id without sample"] == 6


def test_faults(run, tmp_path, pool, make_dynamics, rejected_counts):
    names = their_names(pool)
    rows = [vector(name) for name in names]
    rows[4] = np.full(6, np.nan, np.float32)
    ids = list(range(len(names)))
    ids[2] = -1
    folder = make_dynamics(
        [*names, names[0], f"{names[0]}x/stranger.jpg"], [*ids, 9, 9], 1, rows=[*rows, rows[1], rows[1]]
    )
    catalog = run(tmp_path / "laion", folder).catalog
    check(catalog, names, lacking=[names[4]])
    assert values(catalog) == [0, 1, None, *range(3, 11)]
    assert rejected_counts(catalog) == {
        ("image embeddings", "NaN or Inf"): 1,
        ("image embeddings", "duplicate embedding"): 1,
        ("image embeddings", "embedding without sample"): 1,
        ("cluster ids", "duplicate cluster id"): 1,
        ("cluster ids", "cluster id without sample"): 1,
    }


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"junk", "unreadable cluster ids"),
        (np.zeros((5, 1), np.int64), "rows differ from metadata"),
        (np.zeros((6, 1), np.float32), "not a column of cluster ids"),
        (np.zeros((6, 2), np.int64), "not a column of cluster ids"),
        (np.array([{}] * 6, object), "unreadable cluster ids"),
    ],
    ids=["junk", "length", "floats", "two columns", "pickled"],
)
def test_one_file_of_ids_that_can_not_be_used(run, tmp_path, pool, make_dynamics, rejected_counts, content, reason):
    names = their_names(pool)
    folder = make_dynamics(names, [5] * len(names))
    path = folder / "img_emb" / "img_emb_0_indices.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    catalog = run(tmp_path / "laion", folder).catalog
    check(catalog, names)
    assert values(catalog) == [None, 5] * 5 + [None]
    assert ("cluster ids", reason) in rejected_counts(catalog)


def test_no_id_belongs_to_a_sample(run, tmp_path, pool, make_dynamics):
    folder = make_dynamics(their_names(pool), [-1] * len(pool))
    with pytest.raises(UserError, match=r"no cluster id in .* is at least 0"):
        run(tmp_path / "laion", folder)


def test_the_same_import_again_does_nothing(run, tmp_path, pool, make_dynamics, tree_bytes):
    folder = make_dynamics(their_names(pool), [1] * len(pool))
    catalog = run(tmp_path / "laion", folder).catalog
    before = tree_bytes(catalog.folder)
    report = run(tmp_path / "laion", folder)
    assert tree_bytes(catalog.folder) == before
    assert report.clusterings[0].summary["samples"] == len(pool)


def test_a_name_of_ones_own(run, tmp_path, pool, make_dynamics):
    folder = make_dynamics(their_names(pool), [1] * len(pool))
    catalog = run(tmp_path / "laion", folder, options=SourceRequest(clustering="theirs")).catalog
    assert set(labels(catalog, "theirs")) == {0}
    with pytest.raises(
        UserError,
        match="the clustering 'theirs' was made from something else: name that of these cluster ids with `clustering`",
    ):
        np.save(folder / "img_emb" / "img_emb_0_indices.npy", np.full((6, 1), 2))
        run(tmp_path / "laion", folder, options=SourceRequest(clustering="theirs"))


class Interrupted(BaseException):
    """Like KeyboardInterrupt."""


@pytest.mark.parametrize(("step", "done"), [("joining cluster ids", 1), ("grouping samples", 1)])
def test_interrupted_and_run_again(run, tmp_path, pool, make_dynamics, tree_bytes, step, done):
    folder = make_dynamics(their_names(pool), list(range(len(pool))))

    def track(items, description, total=None):
        for position, item in enumerate(items):
            if (description, position) == (step, done):
                raise Interrupted
            yield item

    sources = [str(tmp_path / "laion"), str(folder)]
    whole = tree_bytes(import_pool(sources, tmp_path / "whole", workers=1, part_rows=5).catalog.folder)
    with pytest.raises(Interrupted):
        run(*sources, context=Context(track))
    run(*sources)
    left = {name: content for name, content in tree_bytes(tmp_path / "catalog").items() if not name.endswith(".lock")}
    assert left == {name: content for name, content in whole.items() if not name.endswith(".lock")}


def test_the_command_line(tmp_path, pool, make_dynamics):
    folder = make_dynamics(their_names(pool), [1] * len(pool))
    words = ["import", str(tmp_path / "laion"), str(folder), str(tmp_path / "catalog"), "--workers", "1"]
    result = CliRunner().invoke(app, [*words, "--clusters-name", "c"])
    assert result.exit_code == 0
    assert "clustering 'c': 11 samples in 1 clusters" in result.output
    assert pq.read_table(tmp_path / "catalog" / "clusters" / "c" / "clusters.parquet").num_rows == 1
