"""What rows do to the samples, against counts over their draws in plain NumPy."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from typer.testing import CliRunner

from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.kinds import PLAN
from tailwise.cli import app
from tailwise.compare.gate import open_truth, treatment
from tailwise.compare.recipe import Truth, load_compare_recipe
from tailwise.compare.statistics import rank_correlation
from tailwise.errors import UserError
from tailwise.loader.order import Order, OrderOptions
from tailwise.requests import ClusterRequest, PlanRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.upkeep.remove import remove


@pytest.fixture
def truth(small_groups, tmp_path):
    """Each sample's group as its class, and a source: the two largest groups are "bulk", the others "rare"."""
    path = tmp_path / "truth.tsv"
    lines = [f"{row:06d}\t{each}\t{'bulk' if each < 2 else 'rare'}" for row, each in enumerate(small_groups)]
    path.write_text("\n".join(["key\tclass_index\tsource", *lines, "another\t3\trare"]) + "\n")
    return path


@pytest.fixture
def clustered(small_catalog):
    cluster(small_catalog, ClusterRequest(k=12))
    return small_catalog


def treated(plan, samples_seen, labels, **options):
    return treatment(Order(plan, OrderOptions(10, lanes=1, **options)), samples_seen, labels)


@pytest.mark.parametrize(
    "request_",
    [
        PlanRequest("random", keep=0.4),
        PlanRequest("dynamics", keep=0.4),
        PlanRequest("flat", keep=1.2, max_repeats=3),
        PlanRequest("dynamics", keep=0.4, dynamic=False),
        PlanRequest("dbp", keep=0.3),
    ],
    ids=lambda each: f"{each.method} {each.dynamic}",
)
@pytest.mark.parametrize("epochs", [1, 4])
def test_views_are_those_of_the_draws(clustered, request_, epochs):
    plan = make_plan(clustered, "p", request_)
    views = sum(plan.draw(epoch).astype(int) for epoch in range(epochs))
    found = treated(plan, int(views.sum()), None)
    assert (found.mean, found.sd) == (pytest.approx(views.mean()), pytest.approx(views.std()))
    assert found.never_seen == pytest.approx((views == 0).mean())
    assert (found.epochs, found.drawn) == (epochs, pytest.approx(views.sum() / epochs / 600))
    assert (found.rates, found.ratio, found.typicality) == ({}, None, None)
    # Half of one more epoch: between this and the next.
    half, after = treated(plan, int(views.sum() * (1 + 0.5 / epochs)), None), views + plan.draw(epochs)
    assert half.never_seen == pytest.approx((np.mean(views == 0) + np.mean(after == 0)) / 2)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("method", ["flat", "within"])
def test_views_of_a_random_draw_are_expected_values(clustered, dynamic, method):
    request = PlanRequest("flat", keep=1.2, max_repeats=3, draw="bernoulli", dynamic=dynamic)
    plan = make_plan(clustered, "p", request)
    if method == "within":
        plan = make_plan(clustered, "q", PlanRequest("within", of="p"))
    rates = plan.rate(slice(0, 600))
    generator = np.random.default_rng(0)
    views = []
    for _ in range(400):
        draws = np.floor(rates) + (generator.random((3, 600)) < rates % 1)
        views.append(draws.sum(axis=0) if dynamic else 3 * draws[0])
    found = treated(plan, 3 * 720, None)
    assert found.never_seen == pytest.approx(np.mean(np.array(views) == 0), abs=0.01)
    assert found.sd == pytest.approx(np.sqrt((np.array(views) ** 2).mean() - 3.6**2), rel=0.02)


def test_of_picked_batches_the_samples_that_are_trained_on_count(clustered, truth, small_groups):
    plan = make_plan(clustered, "p", PlanRequest("proportional", keep=1.0))
    order = Order(plan, OrderOptions(10, lanes=1, compose="diverse"))
    rows = np.concatenate([order.batch(number).rows for number in range(30)])
    views = np.bincount(rows, minlength=600)
    with open_truth(clustered, Truth(str(truth), by="source")) as labels:
        found = treated(plan, 300, labels, compose="diverse")
        assert treated(plan, 300, labels).rates == {"rare": 1, "bulk": 1}
    assert (found.drawn, found.epochs, found.mean) == (0.2, 2.5, 0.5)
    assert found.sd == pytest.approx(views.std())
    assert found.never_seen == pytest.approx((views == 0).mean())
    assert found.rates == pytest.approx(
        {name: views[mask].mean() / 2.5 for name, mask in (("rare", small_groups >= 2), ("bulk", small_groups < 2))}
    )
    assert found.rates["rare"] != pytest.approx(found.rates["bulk"], abs=0.01)


def test_rates_by_thirds_of_the_classes_and_by_source(clustered, truth, small_groups, tmp_path):
    (tmp_path / "removed.txt").write_text("000001\n000002\n")
    remove(clustered, tmp_path / "removed.txt")
    kept = np.ones(600, bool)
    kept[[1, 2]] = False
    plan = make_plan(clustered, "p", PlanRequest("dynamics", keep=0.3, alpha=0.1))
    rates, similarity = (
        plan.rate(slice(0, 600)),
        np.concatenate(list(Clustering.open(clustered, "main").parts("similarity"))),
    )
    thirds = np.array(["head", "medium", "few"])[small_groups // 4]  # groups are numbered by falling size
    with open_truth(clustered, Truth(str(truth))) as labels:
        found = treated(plan, 1000, labels)
    assert found.rates == pytest.approx(
        {name: rates[kept & (thirds == name)].mean() for name in ("head", "medium", "few")}
    )
    assert found.ratio == pytest.approx(found.rates["few"] / found.rates["head"])
    wanted = []
    for each in range(12):
        inside = kept & (small_groups == each)
        constant = len(set(rates[inside])) == 1
        wanted += [0.0 if constant else spearmanr(rates[inside], similarity[inside])[0]] * inside.sum()
    assert found.typicality == pytest.approx(np.mean(wanted), abs=1e-9)
    with open_truth(clustered, Truth(str(truth), by="source")) as labels:
        found = treated(plan, 1000, labels)
    assert [*found.rates] == ["rare", "bulk"]  # of 310 and 290 samples, two of them removed
    assert found.rates["bulk"] == pytest.approx(rates[kept & (small_groups < 2)].mean())


def test_classes_of_equal_size_are_in_thirds_by_their_index(clustered, tmp_path):
    path = tmp_path / "truth.tsv"
    lines = [f"{row:06d}\t{8 + row % 4}" for row in reversed(range(600))]
    path.write_text("\n".join(["key\tclass_index", *lines]) + "\n")
    plan = make_plan(clustered, "p", PlanRequest("dynamics", keep=0.3))
    rates = plan.rate(slice(0, 600)).reshape(150, 4).mean(axis=0)  # of classes 8, 9, 10, 11
    with open_truth(clustered, Truth(str(path))) as labels:
        found = treated(plan, 1000, labels).rates
    assert found == pytest.approx({"head": rates[:2].mean(), "medium": rates[2], "few": rates[3]})


@pytest.mark.parametrize(("classes", "names"), [(1, ["head"]), (2, ["head", "medium"])])
def test_fewer_than_three_classes_have_fewer_groups(clustered, tmp_path, classes, names):
    path = tmp_path / "truth.tsv"
    path.write_text("\n".join(["key\tclass_index", *(f"{row:06d}\t{row % classes}" for row in range(600))]) + "\n")
    plan = make_plan(clustered, "p", PlanRequest("dynamics", keep=0.3))
    rates = plan.rate(slice(0, 600)).reshape(-1, classes).mean(axis=0)
    with open_truth(clustered, Truth(str(path))) as labels:
        found = treated(plan, 1000, labels)
    assert found.rates == pytest.approx(dict(zip(names, rates, strict=True)))
    assert found.ratio == (None if classes == 1 else pytest.approx(rates[1] / rates[0]))


def test_rank_correlations_of_groups():
    generator = np.random.default_rng(3)
    groups = generator.integers(0, 7, 300).astype(np.int32)
    groups[groups == 5] = 6
    groups[0] = 5  # alone
    x, y = generator.integers(0, 4, 300).astype(float), generator.normal(size=300)
    x[groups == 2] = 1
    found, members = rank_correlation(groups, x, y)
    assert members.tolist() == [(groups == each).sum() for each in (0, 1, 2, 3, 4, 6)]
    wanted = [0.0 if each == 2 else spearmanr(x[groups == each], y[groups == each])[0] for each in (0, 1, 2, 3, 4, 6)]
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_classes_are_ranked_in_batches_alike(clustered, truth, monkeypatch):
    plan = make_plan(clustered, "p", PlanRequest("dynamics", keep=0.3))
    with open_truth(clustered, Truth(str(truth))) as labels:
        whole = treated(plan, 1000, labels)
        monkeypatch.setattr("tailwise.compare.gate.BATCH_SAMPLES", 50)
        assert treated(plan, 1000, labels).typicality == pytest.approx(whole.typicality, abs=1e-12)


def test_a_truth_of_another_pool_is_refused(clustered, tmp_path):
    path = tmp_path / "other.tsv"
    path.write_text("key\tclass_index\n" + "".join(f"x{row}\t1\n" for row in range(10)))
    with pytest.raises(UserError, match="belong to no sample"), open_truth(clustered, Truth(str(path))):
        pass
    with pytest.raises(UserError, match="needs the column 'wnid'"), open_truth(clustered, Truth(str(path), "wnid")):
        pass


def invoke(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture
def drawn_truth(drawn_pool, tmp_path):
    """The first 700 of the 800 drawings are frequent classes."""
    from tailwise.catalog import Catalog

    catalog = Catalog.open(drawn_pool / "catalog")
    keys = [key for part in catalog.parts() for key in catalog.samples(part, ["key"]).column(0).to_pylist()]
    lines = [f"{key}\t{min(row // 100, 6) if row < 700 else 7 + row % 2}" for row, key in enumerate(keys)]
    path = tmp_path / "truth.tsv"
    path.write_text("\n".join(["key\tclass_index", *lines]) + "\n")
    return path


def test_the_gate_alone_trains_nothing_and_a_weak_one_is_refused(make_recipe, drawn_truth, tmp_path):
    rows = {
        "random dynamic": {"method": "random", "keep": 0.2},
        "half cost": {"method": "random", "keep": 0.2, "samples_seen": 128},
    }
    recipe = make_recipe(truth=str(drawn_truth), rows=rows)
    told = invoke(recipe, "--gate", "--output", tmp_path / "out", "--seeds", "0")
    assert told.exit_code == 0 and "128" in told.output
    assert told.output.endswith(f"next: tailwise compare {recipe} --output {tmp_path / 'out'} --seeds 0\n")
    found = json.loads(invoke(recipe, "--gate", "--output", tmp_path / "out", "--json").stdout)
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {
        "seconds"
    }  # of the plans, if no other test has made them
    assert [(row["row"], row["samples_seen"], row["cost"]) for row in found["rows"]] == [
        ("random dynamic", 256, 1.0), ("half cost", 128, 0.5),
    ]  # fmt: skip
    assert [row["ratio"] for row in found["rows"]] == [1.0, 1.0]
    refused = invoke(recipe, "--output", tmp_path / "out")
    assert "is 1.00: below 2" in str(refused.exception) and "force" in str(refused.exception)


def test_of_the_rows_only_those_asked_for_get_a_plan(make_recipe, tmp_path):
    rows = {f"random {keep}": {"method": "random", "keep": keep} for keep in (0.11, 0.12, 0.13)}  # of this test alone
    recipe = make_recipe(rows=rows, baseline="random 0.11", seeds=[0])
    catalog, out = load_compare_recipe(str(recipe)).catalog, ("--output", tmp_path / "out")

    def made():
        names = [name.split("-") for name in PLAN.finished(Path(catalog))]
        return [keep for _, method, keep, *_ in names if method == "random" and keep in {"0.11", "0.12", "0.13"}]

    found = json.loads(invoke(recipe, "--gate", *out, "--only", "random 0.12", "--json").stdout)
    assert [row["row"] for row in found["rows"]] == ["random 0.12"]
    assert made() == ["0.12"]
    told = invoke(recipe, *out, "--only", "random 0.13")
    assert told.exit_code == 0, told.exception
    assert made() == ["0.12", "0.13"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["row"] for row in summary["gate"]["rows"]] == ["random 0.12", "random 0.13"]  # whose plans are there
    assert [row["row"] for row in summary["rows"] if row["cost"]] == ["random 0.13"]


@pytest.mark.usefixtures("one_thread")
def test_rows_of_two_costs_and_a_method_taken_apart_in_one_study(make_recipe, drawn_truth, tmp_path):
    (tmp_path / "words.txt").write_text("red\nblue\ngreen\n")
    words = {"name": "words-0", "entries": str(tmp_path / "words.txt"), "allow-misses": True}
    of = {"method": "flat", "keep": 0.2, "clustering": "words-{seed}"}
    rows = {
        "random dynamic": {"method": "random", "keep": 0.2},
        "flat": of,
        "half cost": {"method": "within", "clustering": "words-{seed}", "of": of, "samples_seen": 128},
        "between": {"method": "between", "clustering": "words-{seed}", "of": of},
    }
    path = make_recipe(rows=rows, seeds=[0], prepare=[{"group": words}], truth={"file": str(drawn_truth)})
    told = invoke(path, "--output", tmp_path / "out", "--force")
    assert told.exit_code == 0, told.exception
    assert "between: drawn an epoch 20.0 %, epochs 1.60" in told.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    costs = {row["row"]: row["cost"]["samples_seen"] for row in summary["rows"]}
    assert costs == {"random dynamic": 256, "flat": 256, "half cost": 128, "between": 256}
    losses = {row: np.load(tmp_path / "out" / "runs" / row / "seed-0" / "losses.npy") for row in ("flat", "half-cost")}
    assert [len(each) for each in losses.values()] == [8, 4]  # steps, and so the schedule, are each row's own
    gate = {row["row"]: row for row in summary["gate"]["rows"]}
    assert gate["between"]["rates"] == pytest.approx(gate["flat"]["rates"])  # flat has one rate in each group
    assert gate["half cost"]["drawn"] == pytest.approx(0.2, rel=1e-6)
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "Every run has seen 128 to 256 samples" in text and "| half cost | 20.0 % | 0.80 | 0.16 ± " in text
    assert "What the rows do to the samples" in (tmp_path / "out" / "summary.html").read_text()
    plans = json.loads((tmp_path / "out" / "runs" / "between" / "seed-0" / "result.json").read_text())["plan"]
    assert plans["config"]["of"].startswith("compare-between-0-of-")
    recipe = load_compare_recipe(str(path))
    assert [row.samples_seen for row in recipe.rows] == [None, None, 128, None]
