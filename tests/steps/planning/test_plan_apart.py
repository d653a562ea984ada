"""A plan taken apart, against sums over its rows in plain NumPy."""

import numpy as np
import pytest

from tailwise.errors import UserError
from tailwise.plan import Plan
from tailwise.plan.explain import cluster_list, explain
from tailwise.plan.quotas import UNITS
from tailwise.requests import ClusterRequest, FilterRequest, GroupRequest, PlanRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.grouping.group import group
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.scoring.filter import filter_samples
from tailwise.steps.upkeep.delete import delete
from tailwise.steps.upkeep.excluded import Causes

ENTRIES = ["group 0", "group 1", "group 7", "group 11"]  # of 12: others have no entry


@pytest.fixture
def pool(small_catalog, tmp_path):
    """Clusters that do not follow the captions, a grouping of some captions, and a drop list."""
    cluster(small_catalog, ClusterRequest(k=25))
    (tmp_path / "entries.txt").write_text("\n".join(ENTRIES) + "\n")
    group(small_catalog, GroupRequest(entries=tmp_path / "entries.txt", name="captions"))
    filter_samples(small_catalog, FilterRequest("image-bytes", keep=0.8, name="large"))
    return small_catalog


@pytest.fixture
def groups_of(small_groups):
    """Group of each row: an index of ENTRIES, or one more for captions without an entry."""
    return np.array(
        [next((at for at, name in enumerate(ENTRIES) if name == f"group {each}"), 4) for each in small_groups]
    )


ORIGINALS = {
    "dynamics": PlanRequest("dynamics", keep=0.4),
    "repeats": PlanRequest("flat", keep=1.1, max_repeats=2),
    "left out": PlanRequest("dynamics", keep=0.3, without=["large"], draw="bernoulli"),
}


@pytest.mark.parametrize("request_", ORIGINALS.values(), ids=ORIGINALS)
def test_between_gives_each_group_its_mean_rate(pool, groups_of, request_):
    of = make_plan(pool, "of", request_)
    plan = make_plan(pool, "p", PlanRequest("between", of="of", clustering="captions"))
    inside, rates = of.candidates(slice(0, 600)), of.rate(slice(0, 600))
    wanted = np.zeros(600)
    for each in range(5):
        members = inside & (groups_of == each)
        wanted[members] = rates[members].mean()
    np.testing.assert_allclose(plan.rate(slice(0, 600)), wanted, atol=1e-6)
    assert plan.quotas.sum() == of.quotas.sum()
    assert np.array_equal(plan.candidates(slice(0, 600)), inside)
    draws = np.array([plan.draw(epoch) for epoch in range(3)])
    assert (draws.sum(axis=1) == of.quotas.sum() // UNITS).all()  # exact counts, whatever the draw of `of`
    assert np.array_equal(np.bincount(groups_of, draws[1], 5), plan.counts(1)[np.bincount(groups_of[inside]) > 0])
    assert explain(plan, 2).asked == draws[0].sum()


def water(rates, target, most):
    """Scale rates to a sum, by bisection; none above `most`."""
    low, high = 0.0, most / rates[rates > 0].min()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(rates * middle, most).sum() < target else (low, middle)
    return np.minimum(rates * high, most)


@pytest.mark.parametrize("request_", ORIGINALS.values(), ids=ORIGINALS)
def test_within_gives_all_groups_one_mean_and_keeps_the_order_of_their_members(pool, groups_of, request_):
    of = make_plan(pool, "of", request_)
    plan = make_plan(pool, "p", PlanRequest("within", of="of", clustering="captions"))
    inside, rates, found = of.candidates(slice(0, 600)), of.rate(slice(0, 600)), plan.rate(slice(0, 600))
    mean, most = rates.sum() / inside.sum(), of.config["max_repeats"]
    for each in range(5):
        members = inside & (groups_of == each)
        np.testing.assert_allclose(found[members], water(rates[members], mean * members.sum(), most), rtol=1e-5)
    assert found.sum() == pytest.approx(rates.sum(), rel=1e-6)
    assert (found <= most).all() and not found[~inside].any()
    assert (plan.draw_name, plan.by_rate, plan.dynamic) == ("bernoulli", True, True)


def test_rates_at_the_bound_are_refilled(pool, groups_of):
    """At 0.9 of the pool, most rates are 1 at once: what a scale would put above goes to the others of the group."""
    make_plan(pool, "of", PlanRequest("flat", keep=0.9))
    plan = make_plan(pool, "p", PlanRequest("within", of="of", clustering="captions"))
    found = plan.rate(slice(0, 600))
    assert (found == 1).sum() > 100
    for each in range(5):
        assert found[groups_of == each].mean() == pytest.approx(0.9, rel=1e-5)
    again = make_plan(pool, "q", PlanRequest("between", of="p", clustering="captions"))  # of a plan by rate
    np.testing.assert_allclose(again.cluster_rates()[again.sizes > 0], 0.9, rtol=1e-5)


def test_a_static_plan_stays_static(pool, groups_of):
    of = make_plan(pool, "of", PlanRequest("dbp", keep=0.3))
    plan = make_plan(pool, "p", PlanRequest("between", of="of", clustering="captions"))
    assert not plan.dynamic and not (plan.quotas % UNITS).any()
    assert plan.draw(0).sum() == 180
    taken = of.draw(0)
    counts = [taken[groups_of == each].sum() for each in range(5)]
    assert np.abs(plan.counts(0)[plan.sizes > 0] - counts).max() == 0
    with pytest.raises(UserError, match=r"too few of them have a rate above 0 for the mean rate 0.3.*`pick` random"):
        make_plan(pool, "q", PlanRequest("within", of="of", clustering="captions"))


def test_the_group_of_no_group_is_listed_and_its_causes_are_told(pool):
    make_plan(pool, "of", ORIGINALS["left out"])
    plan = make_plan(pool, "p", PlanRequest("between", of="of", clustering="captions"))
    listed = cluster_list(plan)
    assert len(listed) == len(plan.sizes) and listed[-1]["value"] is None
    causes = Causes(pool, plan).of(slice(0, 460)).to_pylist()
    assert {item["stage"] for item in causes} == {"filter"}


def test_mistakes_are_named(pool):
    make_plan(pool, "of", PlanRequest("dynamics", keep=0.4, alpha_end=1.0, anneal_epochs=3))
    for request, message in (
        (PlanRequest("between"), "method 'between' needs `of`"),
        (PlanRequest("between", of="none"), "plan"),
        (PlanRequest("within", of="of"), "plan 'of' changes its rates"),
        (PlanRequest("within", of="of", keep=0.5), "`keep`"),
        (PlanRequest("flat", of="of", keep=0.5), "`of`"),
    ):
        with pytest.raises(UserError, match=message):
            make_plan(pool, "p", request)


def test_a_plan_in_use_is_not_deleted_unasked_and_the_same_request_opens_the_plan(pool, tree_bytes):
    make_plan(pool, "of", PlanRequest("dynamics", keep=0.4))
    for method in ("between", "within"):
        request = PlanRequest(method, of="of", clustering="captions")
        make_plan(pool, method, request)
        before = tree_bytes(pool.plan_folder(method))
        assert isinstance(make_plan(pool, method, request), Plan)
        assert tree_bytes(pool.plan_folder(method)) == before
    with pytest.raises(UserError, match="plans/between"):
        delete(pool, ["plans/of"])
