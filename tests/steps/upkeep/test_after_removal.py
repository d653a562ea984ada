"""What is removed takes no part in anything that is made afterwards; what was made before stays."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.drops import DropList
from tailwise.cli import app
from tailwise.errors import UserError
from tailwise.plan import Plan
from tailwise.plan.explain import explain
from tailwise.requests import ClusterRequest, DedupRequest, FilterRequest, PlanRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.dedup.dedup import dedup
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.scoring.filter import filter_samples
from tailwise.steps.upkeep.excluded import write_excluded
from tailwise.steps.upkeep.remove import remove
from tailwise.steps.upkeep.verify import broken_inputs


def keys_of(catalog):
    return [key for part in catalog.parts() for key in catalog.samples(part, ["key"]).column(0).to_pylist()]


@pytest.fixture
def gone(small_catalog, tmp_path):
    """Removes every third sample; its rows."""
    keys = keys_of(small_catalog)[::3]

    def run():
        (tmp_path / "gone.txt").write_text("\n".join(keys))
        remove(small_catalog, tmp_path / "gone.txt")
        return np.arange(0, 600, 3)

    return run


def test_clusters_filters_and_duplicates_are_those_of_the_rest(small_catalog, gone):
    rows = gone()
    clustering = cluster(small_catalog, ClusterRequest(k=8))
    assert clustering.summary["samples"] == 400
    labels = np.concatenate(list(Clustering.open(small_catalog, "main").parts("label")))
    assert (labels[rows] == -1).all()
    filtered = filter_samples(small_catalog, FilterRequest("image-bytes", keep=0.25))
    assert (filtered.summary["samples"], filtered.summary["kept"]) == (400, 100)
    dropped = dedup(small_catalog, DedupRequest(epsilon=0.3))
    table = pq.read_table(small_catalog.drops_folder(dropped.name) / "dropped.parquet")
    assert table.num_rows
    assert not np.isin(table.column("row").to_numpy(), rows).any()
    assert not np.isin(table.column("kept_row").to_numpy(), rows).any()


def test_rates_of_removed_samples_are_0(small_catalog, gone, tmp_path):
    rows = gone()
    keys = keys_of(small_catalog)
    pq.write_table(pa.table({"key": keys, "rate": np.full(600, 0.5)}), tmp_path / "rates.parquet")
    plan = make_plan(small_catalog, "p", PlanRequest("rates", rates=tmp_path / "rates.parquet"))
    assert np.flatnonzero(plan.rates[:] == 0).tolist() == rows.tolist()
    pq.write_table(pa.table({"key": keys, "rate": np.zeros(600)}), tmp_path / "none.parquet")
    with pytest.raises(UserError, match="all 600 rates are 0"):
        make_plan(small_catalog, "q", PlanRequest("rates", rates=tmp_path / "none.parquet"))
    assert not small_catalog.plan_folder("q").exists()


def test_what_was_finished_before_is_opened_as_it_is(small_catalog, gone):
    request = PlanRequest("dynamics", keep=0.5)  # of the pool, which removed samples are no part of
    cluster(small_catalog, ClusterRequest(k=8))
    plan = make_plan(small_catalog, "p", request)
    gone()
    cluster(small_catalog, ClusterRequest(k=8))
    assert make_plan(small_catalog, "p", request).manifest == plan.manifest
    new = make_plan(small_catalog, "q", request)
    assert (plan.config["budget"], new.config["budget"]) == (300, 200)
    assert (plan.pool, new.pool) == (600, 400)
    with pytest.raises(UserError, match=r"other settings \(`keep`"):
        make_plan(small_catalog, "p", PlanRequest("dynamics", keep=0.4))


def test_keep_is_a_share_of_the_pool_whatever_lists_leave_out(small_catalog, gone):
    filter_samples(small_catalog, FilterRequest("image-bytes", keep=0.5, name="half"))
    cluster(small_catalog, ClusterRequest(k=8, name="all"))
    cluster(small_catalog, ClusterRequest(k=8, without=["half"]))
    requests = [
        PlanRequest("flat", keep=0.4),
        PlanRequest("flat", keep=0.4, clustering="all", without=["half"]),
        PlanRequest("random", keep=0.4, without=["half"]),
        PlanRequest("dbp", keep=0.4),
        PlanRequest("flat", keep=0.8, max_repeats=2),
    ]
    for number, request in enumerate(requests):
        assert make_plan(small_catalog, f"p{number}", request).draw(0).sum() == (480 if request.keep == 0.8 else 240)
    message = r"`keep` 0.6 asks for 360 samples of the pool of 600, but 300 can be drawn \(300 dropped by lists\): .* is 0.5, which"
    with pytest.raises(UserError, match=message):
        make_plan(small_catalog, "r", PlanRequest("flat", keep=0.6))
    gone()
    left = int((~DropList(small_catalog, "half").mask[:] & (np.arange(600) % 3 > 0)).sum())
    with pytest.raises(
        UserError, match=rf"240 samples of the pool of 400, but {left} can be drawn \({400 - left} dropped by lists\)"
    ) as caught:
        make_plan(small_catalog, "r", PlanRequest("flat", keep=0.6))
    largest = float(str(caught.value).split("share is ")[1].split(",")[0])
    assert make_plan(small_catalog, "r", PlanRequest("flat", keep=largest)).draw(0).sum() == left


def test_removed_samples_are_no_part_of_the_pool_anywhere(small_catalog, gone, tmp_path):
    def told(*words):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    folder = small_catalog.folder
    old = make_plan(small_catalog, "old", PlanRequest("random", keep=1.0))
    removed = gone()
    text = told("plan", folder, "all", "--method", "random", "--keep", 1.0)
    assert (
        "budget 400 of 400 samples (100.0% of the pool, without 200 removed samples; 400 samples can be drawn)" in text
    )
    plan = Plan(small_catalog, "all")
    assert np.flatnonzero(plan.draw(0) == 0).tolist() == removed.tolist()
    text = told("explain", folder, "all")
    assert (
        "budget 400 of 400 samples (100.0% of the pool, without 200 removed samples); 400 samples can be drawn (100.0%"
        in text
    )
    shares = json.loads(told("plan", folder, "half", "--method", "random", "--keep", 0.5, "--json"))
    assert (shares["pool"], shares["budget"], shares["share_of_pool"]) == (400, 200, 0.5)
    assert (explain(plan).rows, explain(plan).pool, explain(old).pool) == (600, 400, 600)
    assert filter_samples(small_catalog, FilterRequest("image-bytes", keep=0.5, name="f")).summary["kept"] == 200
    text = told("filter", folder, "--by", "image-bytes", "--keep", 1.0, "--name", "g")
    assert "100.0% of the pool of 400" in text
    (tmp_path / "entries.txt").write_text("group\n")
    assert (
        make_plan(small_catalog, "b", PlanRequest("text-balance", entries=tmp_path / "entries.txt", keep=1.0)).manifest[
            "summary"
        ]["expected"]
        == 400
    )
    pq.write_table(pa.table({"key": keys_of(small_catalog), "rate": np.full(600, 0.5)}), tmp_path / "rates.parquet")
    assert make_plan(small_catalog, "r", PlanRequest("rates", rates=tmp_path / "rates.parquet")).pool == 400


def test_a_list_that_was_made_anew_is_not_taken_for_the_old_one(small_catalog, tmp_path):
    filter_samples(small_catalog, FilterRequest("image-bytes", keep=0.5, name="half"))
    filter_samples(small_catalog, FilterRequest("caption-words", minimum=0, name="words", without=["half"]))
    cluster(small_catalog, ClusterRequest(k=8, without=["half"]))
    plan = make_plan(small_catalog, "p", PlanRequest("flat", keep=0.4))
    assert broken_inputs(small_catalog) == []
    shutil.rmtree(small_catalog.drops_folder("half"))
    assert broken_inputs(small_catalog) == [
        "drops/half is missing: clusters/main was made from it",
        "drops/half is missing: drops/words was made from it",
    ]
    with pytest.raises(UserError, match="clustering 'main' was made without it: restore"):
        write_excluded(small_catalog, tmp_path / "removed.parquet", plan)
    filter_samples(small_catalog, FilterRequest("image-bytes", keep=0.6, name="half"))
    assert broken_inputs(small_catalog)[0] == "drops/half was rebuilt since: clusters/main was made from it"
    with pytest.raises(UserError, match="'half' is not the one that clustering 'main' was made without"):
        write_excluded(small_catalog, tmp_path / "removed.parquet", plan)
    with pytest.raises(UserError, match="'half' is not the one that the drop list 'words' was made without"):
        make_plan(small_catalog, "q", PlanRequest("random", keep=0.5, without=["words"]))
