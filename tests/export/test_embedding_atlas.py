import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tailwise.catalog.files import note_digest
from tailwise.errors import UserError
from tailwise.export import embedding_atlas as module
from tailwise.export import export
from tailwise.export.embedding_atlas import SCHEMA
from tailwise.kernels.projection import principal_axes
from tailwise.requests import ClusterRequest, ExportRequest, GroupRequest, PlanRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.grouping.group import group
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.upkeep.remove import remove


@pytest.fixture
def plan(small_catalog, tmp_path):
    """A plan of 12 clusters; row 3 has no embedding, row 7 is removed."""
    (part, *_) = small_catalog.parts()
    path = small_catalog.embedding_path("image", part)
    vectors = np.load(path)
    vectors[3] = 0
    np.save(path, vectors)
    note_digest(path)
    cluster(small_catalog, ClusterRequest(k=12))
    plan = make_plan(small_catalog, "p", PlanRequest("dynamics", keep=0.5))
    (tmp_path / "keys.txt").write_text("000007\n")
    remove(small_catalog, tmp_path / "keys.txt")
    return plan


def written(plan, path, **options):
    count = export(plan, "embedding-atlas", path, request=ExportRequest(**options))
    table = pq.read_table(path)
    assert table.schema.equals(SCHEMA)
    assert len(table) == count
    return table


def test_each_sample_has_its_place_cluster_rate_and_thumbnail(plan, tmp_path, monkeypatch):
    table = written(plan, tmp_path / "a.parquet")
    rows = np.setdiff1d(np.arange(600), [7])
    assert table["key"].to_pylist() == [f"{row:06d}" for row in rows]
    groups = plan.groups[:][rows]
    assert table["cluster"].to_pylist() == [str(group) if group >= 0 else None for group in groups.tolist()]
    np.testing.assert_array_equal(table["rate"], plan.rate(rows))
    vectors = np.concatenate(plan.catalog.embedding_parts("image", plan.snapshot))[rows].astype(np.float64)
    there = vectors.any(axis=1)
    mean, axes = principal_axes(vectors[there].astype(np.float32))
    for name, expected in zip("xy", ((vectors - mean) @ axes.T).T, strict=True):
        np.testing.assert_allclose(table[name].to_numpy()[there], expected[there], atol=1e-6)
        assert table[name].null_count == 1
    for item in table["thumbnail"].to_pylist():
        with Image.open(io.BytesIO(item["bytes"])) as image:
            assert image.format == "JPEG"
            assert max(image.size) <= 96
    monkeypatch.setattr(module, "CHUNK_ROWS", 7)
    assert written(plan, tmp_path / "b.parquet").equals(table)


def test_a_limit_chooses_samples_of_the_whole_pool(plan, tmp_path, monkeypatch):
    table = written(plan, tmp_path / "a.parquet", limit=100)
    rows = np.array(table["key"].to_pylist(), int)
    assert (np.diff(rows) > 0).all()
    assert 7 not in rows
    assert 30 < (rows < 300).sum() < 70
    monkeypatch.setattr("tailwise.plan.plan.CHUNK_ROWS", 90)
    assert written(plan, tmp_path / "b.parquet", limit=100).equals(table)


def test_values_of_a_grouping_and_plans_without_clusters(small_catalog, tmp_path):
    keys = [f"{row:06d}" for row in range(600)]
    (tmp_path / "kinds.csv").write_text("key,kind\n" + "".join(f"{key},k{int(key) % 3}\n" for key in keys))
    group(small_catalog, GroupRequest("kind", file=tmp_path / "kinds.csv"))
    plan = make_plan(small_catalog, "p", PlanRequest("proportional", keep=0.5, clustering="kind"))
    table = written(plan, tmp_path / "a.parquet")
    assert table["cluster"].to_pylist() == [f"k{int(key) % 3}" for key in keys]
    plan = make_plan(small_catalog, "q", PlanRequest("random", keep=0.5))
    assert written(plan, tmp_path / "b.parquet")["cluster"].null_count == 600


def test_mistakes(plan, tmp_path):
    with pytest.raises(UserError, match="`projection` 'tsne': use pca or umap"):
        ExportRequest(projection="tsne")
    with pytest.raises(UserError, match="`limit` does nothing in an export to keys: it is for embedding-atlas"):
        export(plan, "keys", tmp_path / "a.txt", epoch=0, request=ExportRequest(limit=5))


def test_umap(plan, tmp_path):
    pytest.importorskip("umap", reason="umap-learn is not installed")
    table = written(plan, tmp_path / "a.parquet", projection="umap")
    assert table["x"].null_count == 1
    assert np.ptp(table["x"].to_numpy()[10:]) > 1
