"""Two runs of everything give the same bytes, whatever the workers, threads, chunks and part borders."""

import numpy as np
import pytest

from tailwise import PlanRequest, cluster, export_plan, import_pool, make_plan
from tailwise.plan import METHODS
from tailwise.plan.methods import PICKS
from tailwise.requests import ClusterRequest, ScoreRequest

SCORE = ScoreRequest("image-bytes")  # that every pool has


def everything(sources, folder, *, workers, clusters, merge):
    catalog = import_pool(sources, folder / "catalog", workers=workers, part_rows=9000).catalog
    cluster(catalog, ClusterRequest(k=clusters, merge=merge, density="auto"))
    cluster(catalog, ClusterRequest(k=clusters, name="plain", points_per_centroid=20))
    for method, item in METHODS.items():
        plan = make_plan(
            catalog, method, PlanRequest(method, keep=0.277, score=SCORE if PICKS[item.pick].by == "score" else None)
        )
        for epoch in (0, 3):
            np.save(folder / f"{method}-{epoch}.npy", plan.draw(epoch))
            export_plan(plan, "parquet", folder / f"{method}-{epoch}.parquet", epoch=epoch)
        export_plan(plan, "rates-json", folder / f"{method}.json")
        export_plan(plan, "keys", folder / f"{method}.txt", epoch=0)
    return catalog


def compare(sources, tmp_path, tree_bytes, pieces, **options):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
    everything(sources, first, workers=1, **options)
    with pieces:
        everything(sources, second, workers=2, **options)
    files, others = tree_bytes(first), tree_bytes(second)
    assert files.keys() == others.keys()
    assert [name for name in files if files[name] != others[name]] == []
    assert len(files) > 50


def test_small_pool(_small_catalog_source, tmp_path, tree_bytes, small_pieces):
    sources = [str(_small_catalog_source / name) for name in ("pool", "embeddings")]
    compare(sources, tmp_path, tree_bytes, small_pieces(), clusters=40, merge=0.9)


@pytest.mark.shared_data
def test_real_pool(shared_data, tmp_path, tree_bytes, small_pieces):
    folder = shared_data / "tinyimagenet-lt"
    sources = [str(folder / "train"), str(folder / "embeddings")]
    compare(sources, tmp_path, tree_bytes, small_pieces(20), clusters=400, merge=0.7)
