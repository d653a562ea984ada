"""Results do not depend on the executor: steps give the same bytes with one that reverses items and loses workers and caches."""

import shutil

import pytest

from tailwise.catalog import Catalog
from tailwise.requests import ClusterRequest
from tailwise.steps.clustering.cluster import cluster

REQUESTS = {
    "whole": ClusterRequest(k=12, density="auto"),
    "sampled": ClusterRequest(k=12, points_per_centroid=9, merge=0.9),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_clusterings_are_the_same(small_catalog, tree_bytes, tmp_path, shaky, name):
    other = Catalog.open(shutil.copytree(small_catalog.folder, tmp_path / "other"))
    made = cluster(small_catalog, REQUESTS[name])
    assert tree_bytes(cluster(other, REQUESTS[name], shaky).folder) == tree_bytes(made.folder)
