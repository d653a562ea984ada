"""Plans by SCS and HCS, against rates in plain NumPy."""

import numpy as np
import pytest

from tailwise.errors import UserError
from tailwise.plan.explain import explain
from tailwise.plan.quotas import UNITS
from tailwise.requests import FilterRequest, PlanRequest, ScoreRequest
from tailwise.steps.planning import cells
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.scoring.filter import filter_samples
from tailwise.steps.upkeep.excluded import Causes
from tailwise.steps.upkeep.why import why


@pytest.fixture
def scores():
    """A score of each row, 7 of them missing."""
    values = np.random.default_rng(4).normal(3, 2, 600)
    values[::90] = np.nan
    return values


@pytest.fixture
def scored(small_catalog, scores, tmp_path):
    """A catalog, and a file of scores by key."""
    lines = [f"{row:06d}\t{value!r}" for row, value in enumerate(scores.tolist()) if not np.isnan(value)]
    (tmp_path / "scores.tsv").write_text("\n".join(["key\tquality", *lines]) + "\n")
    return small_catalog, tmp_path / "scores.tsv"


@pytest.fixture
def unmerged(monkeypatch):
    """Groups of any size, so that each sample has its own rate."""
    monkeypatch.setattr(cells, "LEAST_QUOTA", 0.0)


def soft(logits, budget, alpha):
    """SCS's rates by bisection over τ, row by row."""
    low, high = 1e-12, 1e12
    for _ in range(400):
        middle = np.sqrt(low * high)
        low, high = (
            (middle, high) if np.log1p(alpha * middle * np.exp(logits)).sum() / alpha < budget else (low, middle)
        )
    return np.log1p(alpha * high * np.exp(logits)) / alpha


@pytest.mark.parametrize(("temperature", "logits"), [(None, False), (0.5, False), (1.0, True), (2.0, True)])
@pytest.mark.parametrize("draw", ["stream", "bernoulli"])
def test_scs_gives_its_rates_and_exact_counts(scored, scores, temperature, logits, draw, unmerged):
    catalog, file = scored
    request = PlanRequest(
        "scs", score="quality", score_file=file, budget=1500, temperature=temperature, logits=logits, draw=draw
    )
    plan = make_plan(catalog, "p", request)
    there = ~np.isnan(scores)
    known = scores[there].astype(np.float32).astype(np.float64)
    s = (known if logits else (known - known.mean()) / known.std()) / (temperature or 1.0)
    rates = plan.rate(slice(0, 600))
    np.testing.assert_allclose(rates[there], soft(s, 1500, 0.15), rtol=1e-3)
    assert not rates[~there].any() and rates.max() > 2
    assert plan.quotas.sum() == 1500 * UNITS
    draws = np.array([plan.draw(epoch) for epoch in range(4)])
    if draw == "stream":
        assert (draws.sum(axis=1) == 1500).all()
        floors = np.floor(rates)
        assert ((draws >= floors) & (draws <= floors + 1)).all()  # each sample has its rate, rounded down or up
        assert np.abs(draws.sum(axis=0) - 4 * rates).max() < 2
    else:
        assert abs(draws.sum(axis=1).mean() - 1500) < 60
    assert (draws[0] != draws[1]).any()


@pytest.mark.parametrize("dynamic", [True, False])
def test_rounding_favours_no_rate(scored, scores, dynamic):
    """The samples below any score get what their rates say, in each epoch, to within a group. A third of them have rates below 0.3."""
    catalog, file = scored
    request = PlanRequest("scs", score="quality", score_file=file, budget=400, dynamic=dynamic)
    plan = make_plan(catalog, "p", request)
    there = np.flatnonzero(~np.isnan(scores))
    known = scores[there].astype(np.float32).astype(np.float64)
    rates = soft((known - known.mean()) / known.std(), 400, 0.15)
    assert 9 <= len(plan.sizes) <= 13  # of 593 samples with different scores; 12.5 times 32 are 400
    order = np.argsort(known)
    for epoch in range(3):
        taken = plan.draw(epoch)[there][order].cumsum()
        assert np.abs(taken - rates[order].cumsum()).max() < 18


def test_hcs_caps_at_max_repeats(scored, scores, unmerged):
    catalog, file = scored
    plan = make_plan(catalog, "p", PlanRequest("hcs", score="quality", score_file=file, budget=900, max_repeats=3))
    rates, there = plan.rate(slice(0, 600)), ~np.isnan(scores)
    assert rates.max() == 3 and (rates == 3).sum() > 50
    s = (scores - scores[there].mean()) / scores[there].std()
    free = there & (rates < 2.99)
    np.testing.assert_allclose(rates[free] / np.exp(s[free]), (rates[free] / np.exp(s[free])).mean(), rtol=2e-3)
    assert plan.draw(0).max() == 3 and plan.draw(0).sum() == 900


def test_few_values_are_few_groups_and_drop_lists_are_left_out(small_catalog):
    """Equal scores have equal rates: one group, whatever the number of samples."""
    filter_samples(small_catalog, FilterRequest("image-bytes", keep=0.8, name="small"))
    plan = make_plan(small_catalog, "p", PlanRequest("scs", score="caption-characters", keep=0.5, without=["small"]))
    assert len(plan.sizes) == 2 and plan.sizes.sum() == plan.summary["eligible"] < 600  # "group 1", "group 11"
    assert plan.draw(3).sum() == 300
    same = make_plan(small_catalog, "q", PlanRequest("hcs", score="caption-words", keep=0.5))
    assert same.sizes.tolist() == [600] and same.draw(0).sum() == 300


def test_the_plan_tells_rates_and_no_clusters(scored):
    catalog, file = scored
    plan = make_plan(catalog, "p", PlanRequest("scs", score="quality", score_file=file, keep=1.5))
    bins = explain(plan, 2).bins
    assert [item.name for item in bins] == ["highest", "high", "middle", "low", "lowest"]
    assert [item.rate for item in bins] == sorted((item.rate for item in bins), reverse=True)
    assert max(item.samples for item in bins) < 150 and sum(item.samples for item in bins) == 593
    assert not plan.has_clusters
    assert why(catalog, "000001", ["p"])["samples"][0]["plans"][0]["cluster"] is None
    assert {item["reason"] for item in Causes(catalog, plan).of(slice(0, 460)).to_pylist()} == {"no score quality"}


@pytest.mark.parametrize("method", ["scs", "hcs"])
def test_plans_are_repeatable_to_the_byte_and_static_ones_stay(scored, tree_bytes, method):
    catalog, file = scored
    request = PlanRequest(method, score="quality", score_file=file, keep=0.5, dynamic=False)
    first, second = make_plan(catalog, "a", request), make_plan(catalog, "b", request)
    assert tree_bytes(catalog.plan_folder("a")) == tree_bytes(catalog.plan_folder("b"))
    assert np.array_equal(first.draw(0), second.draw(5)) and first.draw(0).sum() == 300


def test_mistakes_are_named(scored, tmp_path):
    catalog, file = scored
    (tmp_path / "infinite.tsv").write_text("\n".join(["key\tquality", *(f"{row:06d}\tinf" for row in range(600))]))
    given = {"score": "quality", "score_file": file}
    for request, message in (
        (PlanRequest("scs", keep=0.5), "needs `score`"),
        (PlanRequest("scs", **given), "either `keep` SHARE"),
        (PlanRequest("scs", **given, keep=0.5, alpha=0.0), "`alpha` 0.0: must be above 0"),
        (PlanRequest("scs", **given, keep=0.5, temperature=0.0), "`temperature` 0.0"),
        (PlanRequest("scs", **given, keep=0.5, max_repeats=2), "`max_repeats` does nothing with method 'scs'"),
        (PlanRequest("scs", **given, budget=100_000, alpha=0.001, temperature=0.1), "at most 255 are possible"),
        (PlanRequest("hcs", **given, keep=0.5, alpha=0.5), "`alpha` does nothing with method 'hcs'"),
        (PlanRequest("hcs", **given, keep=1.5), "at most 1"),
        (PlanRequest("flat", keep=0.5, logits=True), "`logits` does nothing without method"),
        (PlanRequest("random", keep=0.5, score_file=file), "`score_file` does nothing with `pick` random"),
    ):
        with pytest.raises(UserError, match=message):
            make_plan(catalog, "p", request)
    infinite = ScoreRequest("quality", {"file": str(tmp_path / "infinite.tsv")})
    with pytest.raises(UserError, match="infinite"):
        make_plan(catalog, "p", PlanRequest("scs", score=infinite, keep=0.5))


def test_a_file_of_scores_serves_the_pick_of_highest_scores(scored, scores):
    catalog, file = scored
    plan = make_plan(catalog, "p", PlanRequest("top-score", score="quality", score_file=file, budget=100))
    taken = plan.draw(0).astype(bool)
    assert scores[taken].min() > np.nanmax(np.where(taken, np.nan, scores))
