import json

import numpy as np
import pytest

from tailwise.catalog.files import read_array, read_json
from tailwise.errors import UserError
from tailwise.kernels.assign import MISSING
from tailwise.stages import cluster as stage
from tailwise.stages.cluster import cluster


def column(catalog, name, kind):
    return np.concatenate(list(catalog.label_parts(name, catalog.snapshot(), kind)))


def test_finds_the_groups_and_numbers_them_inside(small_catalog, small_groups):
    made = cluster(small_catalog, clusters=12)
    labels = column(small_catalog, "main", "label")
    # one group a cluster, both ways: as many pairs as groups
    assert len(set(zip(labels.tolist(), small_groups.tolist(), strict=True))) == 12
    assert sorted(made.table["size"].to_pylist(), reverse=True) == [193, 97, 64, 48, 39, 32, 28, 24, 21, 19, 18, 17]
    ranks = column(small_catalog, "main", "rank")
    for label in range(12):
        assert ranks[labels == label].tolist() == list(range((labels == label).sum()))


def test_the_table_says_what_a_plain_reference_says(small_catalog):
    made = cluster(small_catalog, clusters=30)
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
    made = cluster(small_catalog, clusters=60, merge=0.7)
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
    made = cluster(small_catalog, clusters=12)
    labels = column(small_catalog, "main", "label")
    assert np.flatnonzero(labels == MISSING).tolist() == [3, 77]
    assert made.summary["samples"] == 598
    assert made.summary["without_embedding"] == 2
    assert sum(made.table["size"].to_pylist()) == 598


def test_result_depends_on_neither_chunks_nor_threads(small_catalog, tree_bytes, monkeypatch):
    import torch

    cluster(small_catalog, clusters=40, merge=0.9, name="a")
    monkeypatch.setattr(stage, "CHUNK_ROWS", 37)
    monkeypatch.setattr("tailwise.kernels.kmeans.CHUNK_ROWS", 53)
    monkeypatch.setattr("tailwise.kernels.assign.TILE_ROWS", 19)
    monkeypatch.setattr("tailwise.kernels.assign.TILE_CENTROIDS", 7)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cluster(small_catalog, clusters=40, merge=0.9, name="b")
    finally:
        torch.set_num_threads(before)
    assert tree_bytes(small_catalog.clusters_folder("a")) == tree_bytes(small_catalog.clusters_folder("b"))


def test_fits_on_a_sample_and_assigns_all(small_catalog):
    made = cluster(small_catalog, clusters=12, points_per_centroid=20)  # about 240 of 600 rows
    assert made.summary["samples"] == 600
    assert made.summary["mean_cosine"] > 0.9
    assert not (small_catalog.clusters_folder("main") / "training").exists()


def test_resumes_after_an_interruption_with_the_same_bytes(small_catalog, tree_bytes, monkeypatch):
    cluster(small_catalog, clusters=12, name="whole")
    folder = small_catalog.clusters_folder("broken")
    real = stage.write_array

    def breaks(path, array):
        if path.name == "label-part-000001.npy":
            raise KeyboardInterrupt
        real(path, array)

    monkeypatch.setattr(stage, "write_array", breaks)
    with pytest.raises(KeyboardInterrupt):
        cluster(small_catalog, clusters=12, name="broken")
    assert not (folder / "manifest.json").exists()
    kept = {name: (folder / name).stat().st_mtime_ns for name in ("centroids.npy", "similarity-part-000000.npy")}
    monkeypatch.setattr(stage, "write_array", real)
    cluster(small_catalog, clusters=12, name="broken")
    assert kept == {name: (folder / name).stat().st_mtime_ns for name in kept}
    assert tree_bytes(folder) == tree_bytes(small_catalog.clusters_folder("whole"))


def test_a_rerun_does_nothing_and_other_settings_are_refused(small_catalog, tree_bytes):
    cluster(small_catalog, clusters=12)
    folder = small_catalog.clusters_folder("main")
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    cluster(small_catalog, clusters=12)
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"clusters 12 → 13"):
        cluster(small_catalog, clusters=13)
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 0}, "--clusters 0"),
        ({"clusters": 601}, "between 1 and the 600 samples"),
        ({"clusters": 5, "merge": 1.5}, "--merge 1.5"),
        ({"clusters": 5, "iterations": 0}, "--iterations 0"),
        ({"clusters": 5, "max_memory_bytes": 10**6}, "raise it, or ask for fewer clusters"),
        ({"clusters": 5, "name": "../evil"}, "can't name an artifact"),
        ({"clusters": 5, "column": "text"}, "600 of 600 samples have no text embeddings"),
    ],
)
def test_bad_requests_are_one_line_and_leave_nothing(small_catalog, options, message):
    with pytest.raises(UserError, match=message) as caught:
        cluster(small_catalog, **options)
    assert "\n" not in str(caught.value)
    assert not list((small_catalog.folder / "clusters").glob("*"))


def constant(catalog, rows=None):
    for part in catalog.parts():
        path = catalog.embedding_folder("image") / f"{part.name}.npy"
        array = np.load(path)
        array[: rows or len(array)] = array[0]
        np.save(path, array)


def test_constant_embeddings_are_refused_unless_forced(small_catalog):
    constant(small_catalog)
    with pytest.raises(UserError, match="only 2 distinct rows for 12 clusters"):  # one a part
        cluster(small_catalog, clusters=12)
    made = cluster(small_catalog, clusters=12, force=True)
    assert made.summary["clusters"] == 2


def test_a_collapsed_clustering_is_refused_unless_forced(small_catalog):
    constant(small_catalog, rows=400)
    with pytest.raises(UserError, match=r"one of 12 clusters holds \d+ of 600 samples"):
        cluster(small_catalog, clusters=12)
    assert not (small_catalog.clusters_folder("main") / "manifest.json").exists()
    made = cluster(small_catalog, clusters=12, force=True)
    assert max(made.table["size"].to_pylist()) > 300


def test_merging_everything_away_is_a_collapse(small_catalog):
    for part in small_catalog.parts():  # uncentred embeddings: all share a strong common direction
        path = small_catalog.embedding_folder("image") / f"{part.name}.npy"
        rows = np.load(path).astype(np.float32) + 1
        np.save(path, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16))
    with pytest.raises(UserError, match="one of 12 clusters holds 600 of 600 samples"):
        cluster(small_catalog, clusters=12, merge=0.7)


def test_the_manifest_names_snapshot_inputs_and_files(small_catalog):
    cluster(small_catalog, clusters=12)
    manifest = read_json(small_catalog.clusters_folder("main") / "manifest.json")
    assert manifest["identity"]["inputs"] == {
        "snapshot": small_catalog.snapshot().id,
        "embeddings": small_catalog.embedding_id("image", small_catalog.snapshot()),
    }
    assert set(manifest["files"]) >= {"centroids.npy", "clusters.parquet", "label-part-000001.npy"}
    assert "/" not in json.dumps(manifest["files"])  # nothing of this machine's paths
