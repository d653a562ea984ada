import json

import numpy as np
import pyarrow as pa
import pytest

from tailwise.catalog import columns
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.drops import DROPPED_SCHEMA
from tailwise.catalog.files import note_digest, read_array, read_json
from tailwise.errors import UserError
from tailwise.kernels.assign import MISSING, assign
from tailwise.requests import ClusterRequest
from tailwise.steps.clustering import tasks as stage
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.drops import write_drops
from tailwise.steps.importing.pool import import_pool


def column(catalog, name, kind):
    return np.concatenate(list(Clustering.open(catalog, name).parts(kind)))


def rows_of(catalog):
    return np.concatenate([np.asarray(block) for block in catalog.embedding_parts("image", catalog.snapshot())])


def centroids_of(catalog, name="main"):
    return read_array(catalog.clusters_folder(name) / "centroids.npy")


def plain_density(catalog, radius, member, name="main"):
    """Rows among `member` within the radius of each centroid."""
    rows = rows_of(catalog)[member].astype(np.float64)
    cosine = rows @ centroids_of(catalog, name).T.astype(np.float64) / np.linalg.norm(rows, axis=1)[:, None]
    return (cosine >= radius).sum(0).tolist()


def drop(catalog, name, rows, without=()):
    """A drop list made by hand."""
    table = pa.Table.from_pylist([{"row": row, "reason": "by hand"} for row in sorted(rows)], DROPPED_SCHEMA)
    config = {"without": list(without), "snapshot": catalog.snapshot().number}
    with Artifact(catalog.drops_folder(name), "filter", config, {}) as artifact:
        write_drops(artifact, catalog.parts(), [table])
        artifact.finish({})


def test_finds_the_groups_and_numbers_them_inside(small_catalog, small_groups):
    made = cluster(small_catalog, ClusterRequest(k=12))
    labels = column(small_catalog, "main", "label")
    # one group a cluster, both ways: as many pairs as groups
    assert len(set(zip(labels.tolist(), small_groups.tolist(), strict=True))) == 12
    assert sorted(made.table["size"].to_pylist(), reverse=True) == [193, 97, 64, 48, 39, 32, 28, 24, 21, 19, 18, 17]
    ranks = column(small_catalog, "main", "rank")
    for label in range(12):
        assert ranks[labels == label].tolist() == list(range((labels == label).sum()))


def test_the_table_says_what_a_plain_reference_says(small_catalog):
    made = cluster(small_catalog, ClusterRequest(k=30))
    centroids = read_array(small_catalog.clusters_folder("main") / "centroids.npy").astype(np.float64)
    x = np.concatenate(
        [np.asarray(block) for block in small_catalog.embedding_parts("image", small_catalog.snapshot())]
    )
    x = x.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    similarity = x @ centroids.T
    labels = column(small_catalog, "main", "label")
    assert np.array_equal(labels, similarity.argmax(1))
    np.testing.assert_allclose(column(small_catalog, "main", "similarity"), similarity.max(1), atol=1e-6)
    between = 1 - centroids @ centroids.T
    np.fill_diagonal(between, np.inf)
    for row in made.table.to_pylist():
        j = row["cluster"]
        assert row["size"] == (labels == j).sum()
        assert row["d_intra"] == pytest.approx((1 - similarity[labels == j, j]).mean(), abs=1e-6)
        assert row["d_inter"] == pytest.approx(np.sort(between[j])[:20].mean(), abs=1e-9)


def test_merging_leaves_no_two_centroids_nearer_than_the_threshold(small_catalog):
    made = cluster(small_catalog, ClusterRequest(k=60, merge=0.7))
    assert made.summary["fitted"] == 60
    assert made.summary["clusters"] == 12  # the groups are orthogonal, their members near
    centroids = read_array(small_catalog.clusters_folder("main") / "centroids.npy")
    cosine = centroids @ centroids.T
    assert cosine[~np.eye(len(cosine), dtype=bool)].max() < 0.7


def test_rows_without_embedding_belong_to_no_cluster(small_catalog):
    part = small_catalog.parts()[0]
    path = small_catalog.embedding_folder("image") / f"{part.name}.npy"
    rows = np.load(path)
    rows[[3, 77]] = 0
    np.save(path, rows)
    note_digest(path)
    made = cluster(small_catalog, ClusterRequest(k=12))
    labels = column(small_catalog, "main", "label")
    assert np.flatnonzero(labels == MISSING).tolist() == [3, 77]
    assert made.summary["samples"] == 598
    assert made.summary["without_embedding"] == 2
    assert sum(made.table["size"].to_pylist()) == 598


def test_result_depends_on_neither_chunks_nor_threads(small_catalog, tree_bytes, small_pieces):
    cluster(small_catalog, ClusterRequest(k=40, merge=0.9, density="auto", name="a"))
    with small_pieces():
        cluster(small_catalog, ClusterRequest(k=40, merge=0.9, density="auto", name="b"))
    assert tree_bytes(small_catalog.clusters_folder("a")) == tree_bytes(small_catalog.clusters_folder("b"))


def test_fits_on_a_sample_and_assigns_all(small_catalog):
    made = cluster(small_catalog, ClusterRequest(k=12, points_per_centroid=20))  # about 240 of 600 rows
    assert made.summary["samples"] == 600
    assert made.summary["mean_cosine"] > 0.9
    assert not (small_catalog.clusters_folder("main") / "training").exists()


def test_resumes_after_an_interruption_with_the_same_bytes(small_catalog, tree_bytes, interrupted):
    cluster(small_catalog, ClusterRequest(k=12, name="whole"))
    folder = small_catalog.clusters_folder("broken")
    with interrupted(columns, "write_array", lambda path, _: path.name == "label-part-000001.npy"):
        cluster(small_catalog, ClusterRequest(k=12, name="broken"))
    assert not (folder / "manifest.json").exists()
    (unfinished,) = folder.parent.glob(".broken.unfinished/*")
    kept = {name: (unfinished / name).stat().st_mtime_ns for name in ("centroids.npy", "similarity-part-000000.npy")}
    cluster(small_catalog, ClusterRequest(k=12, name="broken"))
    assert kept == {name: (folder / name).stat().st_mtime_ns for name in kept}
    assert tree_bytes(folder) == tree_bytes(small_catalog.clusters_folder("whole"))


def test_a_rerun_does_nothing_and_other_settings_are_refused(small_catalog, tree_bytes):
    cluster(small_catalog, ClusterRequest(k=12))
    folder = small_catalog.clusters_folder("main")
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    cluster(small_catalog, ClusterRequest(k=12))
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(UserError, match="`k` 12 → 13"):
        cluster(small_catalog, ClusterRequest(k=13))
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "`k` 0"),
        ({"k": 601}, "between 1 and the 600 samples"),
        ({"k": 5, "merge": 1.5}, "`merge` 1.5"),
        ({"k": 5, "iterations": 0}, "`iterations` 0"),
        ({"k": 5, "density": 0}, "`density` 0"),
        ({"k": 5, "density": 1.01}, "`density` 1.01"),
        ({"k": 5, "density": float("nan")}, "`density` nan"),
        ({"k": 5, "density": "some"}, "`density` 'some'"),
        ({"k": 5, "without": ["none-such"]}, "none-such"),
        ({"k": 5, "max_memory": "1MB"}, "raise it, or ask for fewer clusters"),
        ({"k": 5, "name": "../evil"}, "can't name an artifact"),
        ({"k": 5, "column": "text"}, "600 of 600 samples have no text embeddings"),
    ],
)
def test_bad_requests_are_one_line_and_leave_nothing(small_catalog, options, message):
    with pytest.raises(UserError, match=message) as caught:
        cluster(small_catalog, ClusterRequest(**options))
    assert "\n" not in str(caught.value)
    assert not list((small_catalog.folder / "clusters").glob("*"))


def constant(catalog, rows=None):
    for part in catalog.parts():
        path = catalog.embedding_folder("image") / f"{part.name}.npy"
        array = np.load(path)
        array[: rows or len(array)] = array[0]
        np.save(path, array)
        note_digest(path)


def test_constant_embeddings_are_refused_unless_forced(small_catalog):
    constant(small_catalog)
    with pytest.raises(UserError, match="only 2 distinct rows for 12 clusters"):  # one a part
        cluster(small_catalog, ClusterRequest(k=12))
    made = cluster(small_catalog, ClusterRequest(k=12, force=True))
    assert made.summary["clusters"] == 2


def test_a_collapsed_clustering_is_refused_unless_forced(small_catalog):
    constant(small_catalog, rows=400)
    with pytest.raises(UserError, match=r"one of 12 clusters holds \d+ of 600 samples"):
        cluster(small_catalog, ClusterRequest(k=12))
    assert not (small_catalog.clusters_folder("main") / "manifest.json").exists()
    made = cluster(small_catalog, ClusterRequest(k=12, force=True))
    assert max(made.table["size"].to_pylist()) > 300


def test_merging_everything_away_is_a_collapse(small_catalog):
    for part in small_catalog.parts():  # uncentred embeddings: all share a strong common direction
        path = small_catalog.embedding_folder("image") / f"{part.name}.npy"
        rows = np.load(path).astype(np.float32) + 1
        np.save(path, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16))
        note_digest(path)
    with pytest.raises(UserError, match="one of 12 clusters holds 600 of 600 samples"):
        cluster(small_catalog, ClusterRequest(k=12, merge=0.7))


def test_the_manifest_names_snapshot_inputs_and_files(small_catalog):
    cluster(small_catalog, ClusterRequest(k=12))
    manifest = read_json(small_catalog.clusters_folder("main") / "manifest.json")
    assert manifest["identity"]["inputs"] == {
        "snapshot": small_catalog.snapshot().id,
        "embeddings": small_catalog.embedding_id("image", small_catalog.snapshot()),
    }
    assert set(manifest["files"]) >= {"centroids.npy", "clusters.parquet", "label-part-000001.npy"}
    assert "/" not in json.dumps(manifest["files"])  # nothing of this machine's paths


# --- density ------------------------------------------------------------------------------------------------------------


def test_density_is_what_a_plain_reference_counts(small_catalog):
    path = small_catalog.embedding_folder("image") / f"{small_catalog.parts()[1].name}.npy"
    rows = np.load(path)
    rows[[0, 9]] = 0
    np.save(path, rows)
    note_digest(path)
    drop(small_catalog, "some", range(100, 160))
    made = cluster(small_catalog, ClusterRequest(k=40, density=0.95, without=["some"]))
    member = column(small_catalog, "main", "label") != MISSING
    assert member.sum() == 600 - 60 - 2
    assert made.table["density"].to_pylist() == plain_density(small_catalog, 0.95, member)
    assert made.summary["radius"] == 0.95
    assert not (small_catalog.clusters_folder("main") / "density").exists()


def test_density_says_how_common_a_group_is_where_sizes_do_not(small_catalog, small_groups):
    made = cluster(
        small_catalog, ClusterRequest(k=40, density=0.6)
    )  # several clusters a group; the groups are orthogonal
    labels = column(small_catalog, "main", "label")
    common = np.bincount(small_groups)[small_groups]
    assert np.array_equal(made.table["density"].to_numpy()[labels], common)
    assert not np.array_equal(made.table["size"].to_numpy()[labels], common)


def test_density_changes_nothing_else(small_catalog, tree_bytes):
    cluster(small_catalog, ClusterRequest(k=30, name="plain"))
    cluster(small_catalog, ClusterRequest(k=30, name="dense", density="auto"))
    plain, dense = (tree_bytes(small_catalog.clusters_folder(name)) for name in ("plain", "dense"))
    assert {name for name in plain if plain[name] != dense[name]} == {"clusters.parquet", "manifest.json"}
    manifests = [json.loads(files["manifest.json"]) for files in (plain, dense)]
    assert manifests[0]["identity"]["config"]["density"] is None
    assert manifests[1]["identity"]["config"]["density"] == "auto"
    assert manifests[0]["summary"]["radius"] is None


def test_auto_is_the_cosine_that_nearly_all_have_to_their_own_centroid(small_catalog):
    made = cluster(small_catalog, ClusterRequest(k=20, density="auto"))
    radius = made.summary["radius"]
    similarity = column(small_catalog, "main", "similarity").astype(np.float64)
    assert (similarity >= radius).mean() >= 0.95
    assert (similarity >= radius + 0.001).mean() < 0.95
    everyone = np.ones(600, bool)
    assert made.table["density"].to_pylist() == plain_density(small_catalog, radius, everyone)


def test_counting_goes_on_where_it_stopped(small_catalog, tree_bytes, interrupted):
    cluster(small_catalog, ClusterRequest(k=12, density="auto", name="whole"))
    folder = small_catalog.clusters_folder("broken")
    with interrupted(stage, "write_array", lambda path, _: path.parts[-2:] == ("density", "part-000001.npy")):
        cluster(small_catalog, ClusterRequest(k=12, density="auto", name="broken"))
    (first,) = folder.parent.glob(".broken.unfinished/*/density/part-000000.npy")
    np.save(first, np.load(first) + 1000)  # what is there isn't counted again
    made = cluster(small_catalog, ClusterRequest(k=12, density="auto", name="broken"))
    whole = Clustering.open(small_catalog, "whole")
    assert (made.table["density"].to_numpy() - whole.table["density"].to_numpy()).tolist() == [1000] * 12
    assert not (folder / "density").exists()


# --- without ------------------------------------------------------------------------------------------------------------


def test_what_lists_drop_belongs_to_no_cluster_and_is_not_fitted(small_catalog, tree_bytes):
    gone, also = list(range(0, 600, 5)), list(range(1, 600, 5))
    drop(small_catalog, "first", gone)
    drop(small_catalog, "second", also, without=["first"])
    made = cluster(small_catalog, ClusterRequest(k=30, without=["second"], name="a"))
    labels = column(small_catalog, "a", "label")
    dropped = np.isin(np.arange(600), [*gone, *also])
    assert np.array_equal(labels == MISSING, dropped)
    assert not column(small_catalog, "a", "similarity")[dropped].any()
    assert (made.summary["samples"], made.summary["dropped"], made.summary["without_embedding"]) == (360, 240, 0)
    assert np.array_equal(made.table["size"].to_numpy(), np.bincount(labels[~dropped], minlength=30))
    for part in small_catalog.parts():  # whatever they hold
        path = small_catalog.embedding_folder("image") / f"{part.name}.npy"
        rows = np.load(path)
        rows[dropped[part.span]] = rows[~dropped[part.span]][0]
        np.save(path, rows)
        note_digest(path)
    cluster(small_catalog, ClusterRequest(k=30, without=["second"], name="b"))
    a, b = (tree_bytes(small_catalog.clusters_folder(name)) for name in "ab")
    del a["manifest.json"], b["manifest.json"]  # they name other embeddings
    assert a == b
    assert not (small_catalog.clusters_folder("a") / "training").exists()


def test_lists_are_part_of_what_a_clustering_is_made_of(small_catalog):
    drop(small_catalog, "some", range(50))
    cluster(small_catalog, ClusterRequest(k=12, without=["some"]))
    manifest = read_json(small_catalog.clusters_folder("main") / "manifest.json")
    assert manifest["identity"]["config"]["without"] == ["some"]
    assert "without some" in manifest["identity"]["inputs"]
    with pytest.raises(UserError, match="without"):
        cluster(small_catalog, ClusterRequest(k=12))


# --- extends ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def grow(tmp_path, make_pool, make_embeddings):
    """`grow(catalog)` imports two more tars (90 and 60 samples, two parts), of the groups that are there and of another one."""

    def grown(catalog):
        pool = make_pool(tmp_path / "more", [90, 60], first_shard=50)
        keys = [key for keys in pool.values() for key in keys]
        generator = np.random.default_rng(7)
        known = rows_of(catalog).astype(np.float64)
        base = np.concatenate([known[generator.integers(0, len(known), 100)], generator.normal(size=(50, 16))])
        rows = base + 0.02 * generator.normal(size=base.shape)
        source = make_embeddings(tmp_path / "more", dict(zip(keys, rows, strict=True)))
        import_pool([str(tmp_path / "more"), str(source)], catalog.folder, workers=1, part_rows=80)
        return type(catalog).open(catalog.folder)

    return grown


def test_an_extended_clustering_equals_a_fresh_assignment(small_catalog, grow):
    cluster(small_catalog, ClusterRequest(k=20))
    before = {kind: column(small_catalog, "main", kind) for kind in ("label", "similarity", "rank")}
    catalog = grow(small_catalog)
    assert (catalog.snapshot().number, catalog.snapshot().rows) == (2, 750)
    made = cluster(catalog, ClusterRequest(extends="main", name="more"))
    centroids = centroids_of(catalog)
    np.testing.assert_array_equal(centroids_of(catalog, "more"), centroids)
    labels, similarity = assign(rows_of(catalog), centroids, device="cpu")
    np.testing.assert_array_equal(column(catalog, "more", "label"), labels)
    np.testing.assert_array_equal(column(catalog, "more", "similarity"), similarity.astype(np.float32))
    for kind, values in before.items():
        np.testing.assert_array_equal(column(catalog, "more", kind)[:600], values)
    ranks = column(catalog, "more", "rank")
    for label in range(20):
        assert ranks[labels == label].tolist() == list(range((labels == label).sum()))
    assert np.array_equal(made.table["size"].to_numpy(), np.bincount(labels, minlength=20))
    assert "density" not in made.table.column_names


def test_rows_that_were_assigned_are_not_assigned_again(small_catalog, grow, watched):
    cluster(small_catalog, ClusterRequest(k=20))
    catalog = grow(small_catalog)
    with watched(stage.Assigner, "__call__") as calls:
        cluster(catalog, ClusterRequest(extends="main", name="more"))
        assert sum(len(x) for _, x in calls) == 150
        cluster(catalog, ClusterRequest(extends="more", name="again"))
        assert sum(len(x) for _, x in calls) == 150
    assert np.array_equal(column(catalog, "again", "label"), column(catalog, "more", "label"))


def test_what_the_base_dropped_is_assigned_unless_a_list_drops_it_again(small_catalog, grow):
    drop(small_catalog, "old", range(40))
    cluster(small_catalog, ClusterRequest(k=20, without=["old"]))
    catalog = grow(small_catalog)
    with pytest.raises(UserError, match="'old' was made for snapshot 1"):
        cluster(catalog, ClusterRequest(extends="main", name="refused", without=["old"]))
    everyone, _ = assign(rows_of(catalog), centroids_of(catalog), device="cpu")
    cluster(catalog, ClusterRequest(extends="main", name="all"))
    np.testing.assert_array_equal(column(catalog, "all", "label"), everyone)
    gone = [*range(20), 300, 301, 700]
    drop(catalog, "new", gone)
    made = cluster(catalog, ClusterRequest(extends="main", name="less", without=["new"]))
    expected = everyone.copy()
    expected[gone] = MISSING
    np.testing.assert_array_equal(column(catalog, "less", "label"), expected)
    assert made.summary["dropped"] == 23


def test_other_embeddings_are_assigned_anew(small_catalog, grow):
    cluster(small_catalog, ClusterRequest(k=20))
    catalog = grow(small_catalog)
    part = catalog.parts()[0]
    path = catalog.embedding_folder("image") / f"{part.name}.npy"
    np.save(path, np.load(path)[::-1])
    note_digest(path)
    catalog = type(catalog).open(catalog.folder)
    cluster(catalog, ClusterRequest(extends="main", name="more"))
    labels, _ = assign(rows_of(catalog), centroids_of(catalog), device="cpu")
    np.testing.assert_array_equal(column(catalog, "more", "label"), labels)
    assert not np.array_equal(labels[:600], column(catalog, "main", "label"))


def test_density_is_counted_over_old_and_new_within_the_same_radius(small_catalog, grow):
    base = cluster(small_catalog, ClusterRequest(k=20, density="auto"))
    catalog = grow(small_catalog)
    made = cluster(catalog, ClusterRequest(extends="main", name="more"))
    assert made.summary["radius"] == base.summary["radius"]
    assert made.table["density"].to_pylist() == plain_density(catalog, base.summary["radius"], slice(None))
    assert sum(made.table["density"].to_pylist()) > sum(base.table["density"].to_pylist())


def test_an_interrupted_extension_goes_on_with_the_same_bytes(small_catalog, grow, tree_bytes, interrupted):
    cluster(small_catalog, ClusterRequest(k=20, density=0.9))
    catalog = grow(small_catalog)
    cluster(catalog, ClusterRequest(extends="main", name="whole"))
    folder = catalog.clusters_folder("broken")
    stops = ((columns, "label-part-000002.npy"), (stage, "part-000003.npy"), (columns, "rank-part-000001.npy"))
    for module, name in stops:
        with interrupted(module, "write_array", lambda path, _, name=name: path.name == name):
            cluster(catalog, ClusterRequest(extends="main", name="broken"))
        assert not (folder / "manifest.json").exists()
    cluster(catalog, ClusterRequest(extends="main", name="broken"))
    assert tree_bytes(folder) == tree_bytes(catalog.clusters_folder("whole"))


def test_what_cannot_be_extended_is_said(small_catalog):
    with pytest.raises(UserError, match=r"no clustering named 'none' \(there: none\)"):
        cluster(small_catalog, ClusterRequest(extends="none", name="more"))
    cluster(small_catalog, ClusterRequest(k=12))
    with pytest.raises(UserError, match="exists with other settings"):
        cluster(small_catalog, ClusterRequest(extends="main", name="main"))
    (small_catalog.clusters_folder("main") / "centroids.npy").unlink()
    with pytest.raises(UserError, match="has no centroids to assign new samples to"):
        cluster(small_catalog, ClusterRequest(extends="main", name="more"))
