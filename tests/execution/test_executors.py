"""Results do not depend on the executor: steps give the same bytes with a remote one, and on a Ray cluster; see conftest.py."""

import shutil

import numpy as np
import pytest
import torch

from tailwise.catalog import Catalog
from tailwise.context import Context
from tailwise.export import export, export_figures
from tailwise.plan.plan import Plan
from tailwise.requests import (
    ClusterRequest,
    DedupRequest,
    EmbedRequest,
    ExportRequest,
    GroupRequest,
    NamedScoreRequest,
    PlanRequest,
    ScoreRequest,
)
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.dedup.comparison import Comparison
from tailwise.steps.dedup.dedup import dedup
from tailwise.steps.dedup.members import Layout
from tailwise.steps.embedding.embed import embed
from tailwise.steps.grouping.group import group
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.scoring.named import make_named_score
from tailwise.steps.scoring.scores import score_parts
from tailwise.steps.upkeep.remove import remove

CLUSTERINGS = {
    "whole": ClusterRequest(k=12, density="auto"),
    "sampled": ClusterRequest(k=12, points_per_centroid=9, merge=0.9),
}
DROP_LISTS = {
    "greedy": DedupRequest(epsilon=0.05),
    "any-earlier": DedupRequest(epsilon=0.05, rule="any-earlier", order="random"),
    "target-share": DedupRequest(target_share=0.8),
    "exact": DedupRequest(exact="bytes", name="duplicates"),
}


@pytest.fixture
def other(small_catalog, tmp_path):
    return Catalog.open(shutil.copytree(small_catalog.folder, tmp_path / "other"))


@pytest.mark.parametrize("name", CLUSTERINGS)
def test_clusterings_are_the_same(small_catalog, other, tree_bytes, remote, name):
    made = cluster(small_catalog, CLUSTERINGS[name])
    assert tree_bytes(cluster(other, CLUSTERINGS[name], remote).folder) == tree_bytes(made.folder)


@pytest.mark.parametrize("along", [False, True])  # embeddings are gathered, or regrouped along
@pytest.mark.parametrize("name", DROP_LISTS)
def test_drop_lists_are_the_same(small_catalog, other, tree_bytes, remote, monkeypatch, name, along):
    if along:
        monkeypatch.setattr("tailwise.steps.dedup.members.plan_layout", lambda *_: Layout(50, False))
    for catalog, context in ((small_catalog, Context()), (other, remote)):
        cluster(catalog, ClusterRequest(k=6), context)
        dedup(catalog, DROP_LISTS[name], context)
    folders = [catalog.drops_folder("duplicates") for catalog in (small_catalog, other)]
    assert tree_bytes(folders[0]) == tree_bytes(folders[1])


def test_lists_against_a_set_are_the_same(small_catalog, other, tree_bytes, remote):
    path = str(small_catalog.embedding_path("image", small_catalog.parts()[1]))
    for catalog, context in ((small_catalog, Context()), (other, remote)):
        made = dedup(catalog, DedupRequest(against=(path,), epsilon=0.05), context)
    assert made.summary["dropped"] > 140
    folders = [catalog.drops_folder("contaminated") for catalog in (small_catalog, other)]
    assert tree_bytes(folders[0]) == tree_bytes(folders[1])


def test_a_process_opens_a_comparison_once(small_catalog, monkeypatch):
    opened, begin = [], Comparison.__init__
    monkeypatch.setattr(Comparison, "__init__", lambda *given: opened.append(begin(*given)))
    cluster(small_catalog, ClusterRequest(k=6))
    dedup(small_catalog, DROP_LISTS["greedy"])
    assert len(opened) == 1


def test_groupings_are_the_same(tars, tree_bytes, remote, tmp_path):
    other = Catalog.open(shutil.copytree(tars.folder, tmp_path / "other"))
    for catalog, context in ((tars, Context()), (other, remote)):
        made = group(catalog, GroupRequest("width"), context)
    assert made.table.num_rows == 5
    assert tree_bytes(tars.clusters_folder("width")) == tree_bytes(made.folder)


@pytest.mark.parametrize("name", ["caption-words", "normsim"])
def test_scores_are_the_same(small_catalog, other, tree_bytes, remote, name):
    options = (
        {"target": str(small_catalog.embedding_path("image", small_catalog.parts()[1]))} if name == "normsim" else {}
    )
    for catalog, context in ((small_catalog, Context()), (other, remote)):
        list(score_parts(catalog, catalog.snapshot(), ScoreRequest(name, options), context))
    assert tree_bytes(small_catalog.folder / "scores") == tree_bytes(other.folder / "scores")


def test_heads_and_mixes_are_the_same(small_catalog, other, tree_bytes, remote, tmp_path):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    torch.save(layers.state_dict(), tmp_path / "head.pth")
    for catalog, context in ((small_catalog, Context()), (other, remote)):
        make_named_score(catalog, NamedScoreRequest(name="h", head=tmp_path / "head.pth", activation="relu"), context)
        make_named_score(catalog, NamedScoreRequest(name="m", mix="z(h) + z(image-bytes)"), context)
    assert tree_bytes(small_catalog.folder / "named-scores") == tree_bytes(other.folder / "named-scores")


@pytest.mark.parametrize("draw", ["stream", "bernoulli"])
@pytest.mark.parametrize("name", ["parquet", "keys", "rates-json"])
def test_draws_and_exports_are_the_same(small_catalog, other, tree_bytes, remote, tmp_path, draw, name):
    for catalog in (small_catalog, other):
        make_plan(catalog, "p", PlanRequest("random", keep=1.3, max_repeats=2, draw=draw))
    for epoch in (3, 5):  # the second from the slots that the first keeps
        export(Plan(small_catalog, "p"), name, tmp_path / f"{epoch}", epoch=epoch)
        export(Plan(other, "p"), name, tmp_path / f"{epoch} remote", epoch=epoch, context=remote)
        assert (tmp_path / f"{epoch} remote").read_bytes() == (tmp_path / f"{epoch}").read_bytes()
    plans = [catalog.plan_folder("p") for catalog in (small_catalog, other)]
    assert tree_bytes(plans[0]) == tree_bytes(plans[1])
    figures = [export_figures(Plan(small_catalog, "p"), name, 3, context) for context in (None, remote)]
    assert figures[0] == figures[1]


@pytest.fixture
def tars(tmp_path, make_tar, make_image):
    """A catalog of tars in several parts; samples have uids of their own."""
    for shard in range(4):
        members = []
        for at in range(5):
            key = f"{shard}{at}"
            members += [(f"{key}.jpg", make_image(at)), (f"{key}.txt", key.encode())]
            members.append((f"{key}.json", f'{{"uid": "{int(key):032x}", "width": {at + 1}}}'.encode()))
        make_tar(tmp_path / "pool" / f"{shard:05d}.tar", members)
    return import_pool(tmp_path / "pool", tmp_path / "catalog", workers=1, part_rows=7).catalog


@pytest.mark.parametrize("name", ["datacomp", "shards"])
def test_exports_of_tars_are_the_same(tars, tree_bytes, remote, tmp_path, name):
    plan = make_plan(tars, "p", PlanRequest("random", keep=1.3, max_repeats=2))
    for folder, context in (("plain", Context()), ("remote", remote)):
        (tmp_path / folder).mkdir()
        sharding = ExportRequest(shard_samples=9, workers=1) if name == "shards" else None
        export(plan, name, tmp_path / folder / "out", epoch=2, request=sharding, context=context)
    assert tree_bytes(tmp_path / "plain") == tree_bytes(tmp_path / "remote")


def test_an_export_is_written_again_after_a_removal(tars, tmp_path, remote):
    """The error of a task comes through pickle."""
    plan = make_plan(tars, "p", PlanRequest("random", keep=1.0))
    (tmp_path / "keys.txt").write_text("11\n")

    def removing(items, *_):
        remove(tars, tmp_path / "keys.txt")
        return items

    made = export(plan, "keys", tmp_path / "out.txt", context=Context(removing, remote.executor))
    assert made == 19
    assert "11" not in (tmp_path / "out.txt").read_text().splitlines()


def test_embeddings_are_the_same(small_catalog, other, tree_bytes, remote, monkeypatch):
    monkeypatch.setattr("tailwise.steps.embedding.column.ITEM_BATCHES", 2)
    request = EmbedRequest(encoder="pixels", column="seen", of="image", workers=1)
    for catalog, context in ((small_catalog, Context()), (other, remote)):
        embed(catalog, request, context)
    assert tree_bytes(small_catalog.folder / "embeddings") == tree_bytes(other.folder / "embeddings")


def test_imports_are_the_same(tree_bytes, remote, tmp_path, make_pool, make_vectors, make_embeddings):
    """Embeddings of some samples, then of the others: both for parts of their own, and for parts that have some already."""
    pool = make_pool(tmp_path / "pool", [5, 4, 6, 3])
    keys = [key for keys in pool.values() for key in keys]
    for name, mine in (("first", keys[2:11]), ("second", keys[:2] + keys[11:])):
        vectors = {**make_vectors(mine), "stranger": np.ones(8)}
        make_embeddings(tmp_path / name, {**vectors, mine[1]: np.zeros(8)}, partitions=2)
    for folder, context in (("plain", Context()), ("remote", remote)):
        for name in ("first", "second"):
            sources = [tmp_path / "pool", tmp_path / name]
            import_pool(sources, tmp_path / folder, workers=1, part_rows=5, max_rejected=1.0, context=context)
    assert tree_bytes(tmp_path / "plain") == tree_bytes(tmp_path / "remote")
