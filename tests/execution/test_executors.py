"""Results do not depend on the executor: steps give the same bytes with one that reverses items and loses workers and caches."""

import shutil

import pytest

from tailwise.catalog import Catalog
from tailwise.context import Context
from tailwise.requests import ClusterRequest, DedupRequest, ScoreRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.dedup.dedup import dedup
from tailwise.steps.dedup.members import Layout
from tailwise.steps.scoring.scores import score_parts

CLUSTERINGS = {
    "whole": ClusterRequest(k=12, density="auto"),
    "sampled": ClusterRequest(k=12, points_per_centroid=9, merge=0.9),
}
DROP_LISTS = {
    "greedy": DedupRequest(epsilon=0.05),
    "any-earlier": DedupRequest(epsilon=0.05, rule="any-earlier", order="random"),
}


@pytest.fixture
def other(small_catalog, tmp_path):
    return Catalog.open(shutil.copytree(small_catalog.folder, tmp_path / "other"))


@pytest.mark.parametrize("name", CLUSTERINGS)
def test_clusterings_are_the_same(small_catalog, other, tree_bytes, shaky, name):
    made = cluster(small_catalog, CLUSTERINGS[name])
    assert tree_bytes(cluster(other, CLUSTERINGS[name], shaky).folder) == tree_bytes(made.folder)


@pytest.mark.parametrize("along", [False, True])  # embeddings are gathered, or regrouped along
@pytest.mark.parametrize("name", DROP_LISTS)
def test_drop_lists_are_the_same(small_catalog, other, tree_bytes, shaky, monkeypatch, name, along):
    if along:
        monkeypatch.setattr("tailwise.steps.dedup.members.plan_layout", lambda *_: Layout(50, False))
    for catalog, context in ((small_catalog, Context()), (other, shaky)):
        cluster(catalog, ClusterRequest(k=6), context)
        dedup(catalog, DROP_LISTS[name], context)
    folders = [catalog.drops_folder("duplicates") for catalog in (small_catalog, other)]
    assert tree_bytes(folders[0]) == tree_bytes(folders[1])


@pytest.mark.parametrize("name", ["caption-words", "normsim"])
def test_scores_are_the_same(small_catalog, other, tree_bytes, shaky, name):
    options = (
        {"target": str(small_catalog.embedding_path("image", small_catalog.parts()[1]))} if name == "normsim" else {}
    )
    for catalog, context in ((small_catalog, Context()), (other, shaky)):
        list(score_parts(catalog, catalog.snapshot(), ScoreRequest(name, options), context))
    assert tree_bytes(small_catalog.folder / "scores") == tree_bytes(other.folder / "scores")
