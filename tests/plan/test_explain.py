import itertools
import json

import numpy as np
import pytest

from tailwise.errors import UserError
from tailwise.plan import METHODS
from tailwise.plan.explain import explain, passes
from tailwise.plan.methods import PICKS
from tailwise.requests import ClusterRequest, PlanRequest, ScoreRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.planning.plan import make_plan

# A score that every pool has, for the methods that go by one.
SCORES = {
    name: ScoreRequest("image-bytes") if PICKS[item.pick].by == "score" else None for name, item in METHODS.items()
}


@pytest.mark.parametrize(
    "request_",
    [*(PlanRequest(method, keep=0.37, score=SCORES[method]) for method in METHODS), PlanRequest("flat", keep=1.7, max_repeats=4),
     PlanRequest("dynamics", keep=0.5, dynamic=False)],
    ids=lambda item: f"{item.method}-{item.keep}-{item.dynamic}",
)  # fmt: skip
def test_what_is_foretold_is_what_is_drawn(small_catalog, request_):
    cluster(small_catalog, ClusterRequest(k=12, density="auto"))
    plan = make_plan(small_catalog, "p", request_)
    seen = np.zeros(600, bool)
    for figures in explain(plan, 6).epochs:
        copies = plan.draw(figures.epoch)
        seen |= copies > 0
        assert figures.total == copies.sum()
        assert figures.unique == (copies > 0).sum()
        assert figures.repeated == figures.total - figures.unique
        assert figures.covered == seen.sum()


def test_bernoulli_figures_are_expected_values(small_catalog):
    cluster(small_catalog, ClusterRequest(k=12))
    plan = make_plan(small_catalog, "p", PlanRequest("flat", keep=1.2, max_repeats=3, draw="bernoulli"))
    figures = explain(plan, 2)
    assert not figures.exact
    draws = np.stack([plan.draw(epoch) for epoch in range(600)])
    assert figures.epochs[0].total == pytest.approx(720)
    assert draws.sum(1).mean() == pytest.approx(figures.epochs[0].total, abs=2)
    assert (draws > 0).sum(1).mean() == pytest.approx(figures.epochs[0].unique, abs=2)
    both = ((draws[0::2] > 0) | (draws[1::2] > 0)).sum(1).mean()
    assert both == pytest.approx(figures.epochs[1].covered, abs=3)


def test_bins_run_from_head_to_tail_and_account_for_everything(small_catalog):
    cluster(small_catalog, ClusterRequest(k=12))
    explanation = explain(make_plan(small_catalog, "p", PlanRequest("dynamics", keep=0.5)), 1)
    bins = explanation.bins
    assert [item.name for item in bins] == ["head", "upper", "middle", "lower", "tail"]
    assert sum(item.samples for item in bins) == 600
    assert sum(item.clusters for item in bins) == 12
    assert sum(item.drawn for item in bins) == pytest.approx(300)
    assert all(before.smallest >= after.largest for before, after in itertools.pairwise(bins))
    assert all(before.rate <= after.rate for before, after in itertools.pairwise(bins))


def test_capped_clusters_are_counted(small_catalog):
    cluster(small_catalog, ClusterRequest(k=12))
    plan = make_plan(small_catalog, "p", PlanRequest("flat", keep=0.7))
    full = plan.cluster_rates() == 1
    explanation = explain(plan, 1)
    assert explanation.capped_clusters == full.sum() > 0
    assert explanation.capped_share == pytest.approx(plan.sizes[full].sum() / 420)


def test_figures_are_json(small_catalog):
    plan = make_plan(small_catalog, "p", PlanRequest("random", keep=0.5))
    assert json.loads(json.dumps(explain(plan, 2).as_json()))["epochs"][1]["total"] == 300


def test_bernoulli_plans_that_are_annealed_are_foretold_epoch_by_epoch(small_catalog):
    cluster(small_catalog, ClusterRequest(k=12))
    request = PlanRequest("dynamics", keep=0.5, draw="bernoulli", alpha_end=1.0, anneal_epochs=2)
    figures = explain(make_plan(small_catalog, "p", request), 4).epochs
    plan = make_plan(small_catalog, "p", request)
    unseen = np.ones(600)
    for item in figures:
        rates = plan.rate(slice(0, 600), item.epoch)
        unseen *= 1 - rates
        assert item.total == pytest.approx(300)
        assert item.covered == pytest.approx((1 - unseen).sum())


@pytest.mark.parametrize(
    ("request_", "seen"),
    [
        (PlanRequest("dynamics", keep=0.3), 900),  # five epochs
        (PlanRequest("dynamics", keep=0.3, alpha_end=1.0, anneal_epochs=3), 900),
        (PlanRequest("random", keep=0.5, dynamic=False), 1200),
        (PlanRequest("cap", per_cluster=20), 936),
        (PlanRequest("flat", keep=1.5, max_repeats=4), 2700),
    ],
)
def test_passes_are_those_of_the_draws(small_catalog, request_, seen):
    cluster(small_catalog, ClusterRequest(k=12))
    plan = make_plan(small_catalog, "p", request_)
    found = passes(plan, seen)
    epochs = int(found.epochs)
    views = sum(plan.draw(epoch).astype(int) for epoch in range(epochs))
    assert epochs == found.epochs == seen / plan.draw(0).sum() and views.sum() == seen
    assert found.seen == (views > 0).sum()
    kept = np.flatnonzero(plan.draw(0)) if not plan.dynamic else np.arange(600)
    assert (found.kept, found.mean) == (len(kept), seen / len(kept))
    assert len(found.bins) == (5 if plan.dynamic else 0)
    order = np.argsort(-plan.sizes, kind="stable")
    bins = [np.isin(plan.groups[:], members) for members in np.array_split(order, 5)][: len(found.bins)]
    np.testing.assert_allclose([views[mine].mean() for mine in bins], [*found.bins.values()], atol=1 / 20)


def test_an_incomplete_epoch_counts_by_its_part(small_catalog):
    plan = make_plan(small_catalog, "p", PlanRequest("random", keep=0.5))
    found = passes(plan, 450)
    assert (found.epochs, found.mean, found.seen) == (1.5, 0.75, 450)  # the second epoch takes the other half
    assert found.bins == {"all": 0.75}
    with pytest.raises(UserError, match="must lie between 0 and 10,000"):
        passes(plan, 300 * 20_000)


def test_passes_of_rates_are_expected_values(small_catalog):
    cluster(small_catalog, ClusterRequest(k=12))
    make_plan(small_catalog, "of", PlanRequest("dynamics", keep=0.4))
    plan = make_plan(small_catalog, "p", PlanRequest("within", of="of", clustering="main"))
    found, rates = passes(plan, 720), plan.rate(slice(0, 600))
    assert found.kept == 600 and found.epochs == pytest.approx(3, rel=1e-5) and not found.bins
    assert found.seen == pytest.approx((1 - (1 - rates) ** 3).sum(), rel=1e-3)
