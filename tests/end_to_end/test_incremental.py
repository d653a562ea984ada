"""New shards join what is there: no clustering is fitted anew, no old sample judged again, and a new plan holds both."""

import numpy as np
import pytest

import tailwise
from tailwise.catalog.drops import DropList
from tailwise.requests import ClusterRequest, DedupRequest


@pytest.fixture
def grown(small_catalog, make_pool, make_vectors, make_embeddings, tmp_path):
    """A deduplicated, clustered and planned catalog, to which a shard of 60 samples was added, 10 of them near copies of old ones."""
    tailwise.cluster(small_catalog, ClusterRequest(k=8, name="fine"))
    tailwise.dedup(small_catalog, DedupRequest(epsilon=0.1, clustering="fine"))
    tailwise.cluster(small_catalog, ClusterRequest(k=5, without=["duplicates"]))
    tailwise.make_plan(small_catalog, "old", tailwise.PlanRequest("dynamics", budget=6))
    pool = make_pool(tmp_path / "more", [60], first_shard=7)
    keys = [key for keys in pool.values() for key in keys]
    vectors = dict(make_vectors(keys, 16))
    old = np.asarray(small_catalog.embedding("image", small_catalog.parts()[0]))
    kept = np.flatnonzero(~DropList(small_catalog, "duplicates").mask[: len(old)])
    for key, row in zip(keys[:10], kept, strict=False):
        vectors[key] = old[row].astype(np.float32) + 0.001
    make_embeddings(tmp_path / "emb", vectors)
    tailwise.import_pool([str(tmp_path / "more"), str(tmp_path / "emb")], small_catalog.folder, workers=1)
    return small_catalog


def test_new_shards_enter_a_new_plan_without_clustering_again(grown, tree_bytes):
    before = {name: tree_bytes(grown.folder / name) for name in ("clusters", "drops", "plans")}
    tailwise.cluster(grown, ClusterRequest(extends="fine", name="fine-2"))
    report = tailwise.dedup(
        grown, DedupRequest(epsilon=0.1, clustering="fine-2", extends="duplicates", name="duplicates-2")
    )
    tailwise.cluster(grown, ClusterRequest(extends="main", name="main-2", without=["duplicates-2"]))
    assert report is not None
    dropped, old_dropped = DropList(grown, "duplicates-2").mask[:], DropList(grown, "duplicates").mask[:]
    half = round(0.5 * (660 - int(dropped.sum())))
    plan = tailwise.make_plan(grown, "new", tailwise.PlanRequest("dynamics", budget=half, clustering="main-2"))
    assert np.array_equal(dropped[:600], old_dropped)
    assert dropped[600:610].all()  # the near copies
    assert plan.rows == 660
    assert plan.sizes.sum() == 660 - dropped.sum()
    copies = plan.draw(0)
    assert copies[600:].any()
    assert not copies[dropped].any()
    assert copies.sum() == half
    kept = np.flatnonzero(~dropped[:600])
    old_plan = tailwise.Plan(grown, "old")
    assert np.array_equal(plan.groups[kept], old_plan.groups[kept])
    assert np.array_equal(plan.ranks[kept], old_plan.ranks[kept])
    for name, files in before.items():
        after = tree_bytes(grown.folder / name)
        assert {path: after[path] for path in files} == files
