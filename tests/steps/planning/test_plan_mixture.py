"""Mixtures, against sums over rows in plain NumPy."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tailwise.errors import UserError
from tailwise.plan import Plan
from tailwise.plan.explain import cluster_list
from tailwise.plan.quotas import UNITS
from tailwise.requests import ClusterRequest, GroupRequest, PlanRequest, ScoreRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.grouping.group import group
from tailwise.steps.grouping.write import sources_of
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning import cells
from tailwise.steps.planning.factors import mixture_of_factors
from tailwise.steps.planning.mixture import read_shares
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.scoring.scores import score_parts
from tailwise.steps.upkeep.delete import delete
from tailwise.steps.upkeep.excluded import Causes

NAMES = ("big", "middle", "small")  # 400, 150 and 40 rows; 10 rows have none


@pytest.fixture
def kinds():
    return np.random.default_rng(3).permutation(np.repeat([0, 1, 2, -1], [400, 150, 40, 10]))


@pytest.fixture
def pool(small_catalog, kinds, tmp_path):
    """A grouping of three kinds, and clusters that do not follow them."""
    lines = [f"{row:06d}\t{NAMES[kind]}" for row, kind in enumerate(kinds.tolist()) if kind >= 0]
    (tmp_path / "kinds.tsv").write_text("\n".join(["key\tkind", *lines]) + "\n")
    group(small_catalog, GroupRequest("kind", file=tmp_path / "kinds.tsv"))
    cluster(small_catalog, ClusterRequest(k=12))
    return small_catalog


def mixture(shares, **options):
    return PlanRequest("mixture", shares=shares, clustering="kind", **options)


def counts_by_kind(plan, kinds, epoch=0):
    return [int(plan.draw(epoch)[kinds == kind].sum()) for kind in (0, 1, 2, -1)]


@pytest.mark.parametrize(
    ("shares", "options", "wanted"),
    [
        ("big=0.5,small=0.5", {"budget": 60}, [30, 0, 30, 0]),
        ("big=1,middle=2,small=1", {"budget": 200}, [50, 100, 50, 0]),  # refused unless repeated: see below
        ({"middle": 0.7, "small": 0.3}, {"keep": 0.25, "max_repeats": 2}, [0, 105, 45, 0]),
        ("big=0.6,small=0.4", {"budget": 300}, [260, 0, 40, 0]),  # small is at its maximum; big gets what is above
        ("big=0.6,small=0.4", {"budget": 300, "max_repeats": 3}, [180, 0, 120, 0]),
        ("big=0.2,middle=0.3,small=0.5", {"budget": 250}, [84, 126, 40, 0]),  # 210 in the proportion 2 : 3
    ],
)
@pytest.mark.parametrize("more", [{}, {"dynamic": False}, {"draw": "bernoulli"}])
def test_groups_give_their_shares(pool, kinds, shares, options, wanted, more):
    if shares == "big=1,middle=2,small=1":
        options = {**options, "max_repeats": 2}
    plan = make_plan(pool, "p", mixture(shares, **options, **more))
    quotas = [item["quota"] for item in plan.summary["mixture"]]
    assert quotas == [count for count in wanted if count]
    if "draw" not in more:
        assert counts_by_kind(plan, kinds) == counts_by_kind(plan, kinds, 3) == wanted
        assert np.array_equal(plan.draw(0), plan.draw(1)) == ("dynamic" in more)
    assert [item["value"] for item in cluster_list(plan)] == [*NAMES]
    reasons = {item["reason"] for item in Causes(pool, plan).of(slice(0, 460)).to_pylist()}
    assert "its group has no share in the mixture" in reasons


def test_members_may_be_the_best_of_their_group(pool, kinds):
    score = ScoreRequest("image-bytes")
    plan = make_plan(pool, "p", mixture("big=0.5,middle=0.5", budget=100, pick="highest", score=score))
    taken = plan.draw(0).astype(bool)
    values = np.concatenate(list(score_parts(pool, plan.snapshot, score)))
    for kind in (0, 1):
        mine = kinds == kind
        assert taken[mine].sum() == 50 and values[mine & taken].min() >= values[mine & ~taken].max()


ORIGINALS = {
    "dynamics": PlanRequest("dynamics", keep=0.4),
    "repeats": PlanRequest("flat", keep=1.1, max_repeats=3),
    "bernoulli": PlanRequest("dynamics", keep=0.3, draw="bernoulli"),
    "score": PlanRequest("scs", score=ScoreRequest("image-bytes"), keep=0.5),
    "between": PlanRequest("within", of="base", clustering="main"),  # a rate per row
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("of", ORIGINALS)
def test_a_mixture_of_a_plan_keeps_its_rates_inside_groups(pool, kinds, of, merged, monkeypatch):
    if not merged:
        monkeypatch.setattr(cells, "LEAST_QUOTA", 0.0)
    make_plan(pool, "base", PlanRequest("dynamics", keep=0.5))
    original = make_plan(pool, "of", ORIGINALS[of])
    plan = make_plan(pool, "p", mixture("big=0.2,middle=0.5,small=0.3", of="of", max_repeats=20))
    before, after, budget = original.rate(slice(0, 600)), plan.rate(slice(0, 600)), plan.quotas.sum() / UNITS
    assert budget == round(before.sum())
    for kind, share in enumerate((0.2, 0.5, 0.3)):
        mine = kinds == kind
        assert after[mine].sum() == pytest.approx(share * budget, abs=1e-5)
        wanted = before[mine] * (share * budget / before[mine].sum())
        if merged:
            order = np.argsort(wanted, kind="stable")
            assert np.abs(after[mine][order].cumsum() - wanted[order].cumsum()).max() < 0.5 * cells.LEAST_QUOTA
        else:
            np.testing.assert_allclose(after[mine], wanted, rtol=2e-3)
    assert not after[kinds < 0].any()
    draws = np.array([plan.draw(epoch) for epoch in range(3)])
    assert (draws.sum(axis=1) == budget).all()
    assert (np.abs(draws - after) < 1).all()  # exact counts: each sample its rate, rounded down or up
    assert {item["reason"] for item in Causes(pool, plan).of(slice(0, 600)).to_pylist()} == {
        "its group has no share in the mixture, or plan of never draws it"
    }


def test_what_a_group_cannot_give_is_dealt_to_the_others(pool, kinds):
    make_plan(pool, "of", PlanRequest("dynamics", keep=0.5))
    plan = make_plan(pool, "p", mixture("big=0.1,middle=0.3,small=0.6", of="of"))
    assert [item["quota"] for item in plan.summary["mixture"]] == [110, 150, 40]  # 300 in all, at most once
    assert counts_by_kind(plan, kinds) == [110, 150, 40, 0]
    assert plan.draw(0).max() == 1


@pytest.mark.parametrize("draw", ["stream", "bernoulli"])
def test_a_mixture_of_a_static_plan_is_of_what_it_draws(pool, kinds, draw):
    of = make_plan(pool, "of", PlanRequest("dynamics", keep=0.4, dynamic=False, draw=draw))
    plan = make_plan(pool, "p", mixture("big=0.3,middle=0.7", of="of", max_repeats=9))
    drawn, copies = of.draw(0), plan.draw(0)
    assert copies.sum() == drawn.sum() and not copies[(drawn == 0) | (kinds == 2)].any()
    assert counts_by_kind(plan, kinds)[:2] == pytest.approx([0.3 * drawn.sum(), 0.7 * drawn.sum()], abs=1)


def test_other_shares_are_named(pool):
    make_plan(pool, "p", mixture("big=1,small=1", keep=0.1))
    with pytest.raises(UserError, match=r"\(`shares` big=0.5, small=0.5 → big=0.75, small=0.25\)"):
        make_plan(pool, "p", mixture("big=3,small=1", keep=0.1))
    with pytest.raises(UserError, match=r"other settings \((?!.*`without`)"):
        make_plan(pool, "p", PlanRequest("mixture", of="p", shares="big=1", clustering="kind"))


def test_the_bound_of_copies_is_that_of_the_plan_or_the_given_one(pool):
    make_plan(pool, "of", PlanRequest("dynamics", keep=0.5, max_repeats=3))
    for asked, most in ((None, 3), (1, 1), (2, 2), (5, 5)):
        plan = make_plan(pool, f"p{asked}", mixture("big=0.4,small=0.6", of="of", max_repeats=asked))
        assert plan.config["max_repeats"] == most and plan.draw(0).sum() == 300
        assert plan.rate(slice(0, 600)).max() == most


def test_a_mixture_of_a_subset_repeats_its_samples_and_stays_static(pool, kinds):
    of = make_plan(pool, "of", PlanRequest("ssp", keep=0.3))
    with pytest.raises(
        UserError, match=r"can give .* of the 180 of plan 'of', up to 1 times an epoch: raise `max_repeats`"
    ):
        make_plan(pool, "p", mixture("middle=1,small=1", of="of"))
    plan = make_plan(pool, "p", mixture("middle=1,small=1", of="of", max_repeats=12))
    subset, drawn = of.draw(0).astype(bool), plan.draw(0)
    assert not plan.dynamic and not drawn[~subset].any()
    assert drawn[kinds == 1].sum() == drawn[kinds == 2].sum() == 90
    assert np.ptp(drawn[subset & (kinds == 2)]) <= 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), st.integers(1, 1100), st.integers(1, 3))
def test_shares_are_water_filling(request_pool, weights, budget, repeats):
    pool, sizes = request_pool
    request = mixture(dict(zip(NAMES, weights, strict=True)), budget=budget, max_repeats=repeats)
    most = repeats * sizes
    if budget > most.sum():
        budget, request = int(most.sum()), mixture(request.shares, budget=int(most.sum()), max_repeats=repeats)
    plan = make_plan(pool, "p", request)
    wanted, left = np.zeros(3), np.ones(3, bool)
    while True:  # deal again until nobody is above
        rest = budget - wanted[~left].sum()
        wanted[left] = rest * np.array(weights)[left] / np.array(weights)[left].sum()
        above = left & (wanted > most)
        if not above.any():
            break
        wanted[above], left = most[above], left & ~above
    np.testing.assert_allclose(plan.quotas / UNITS, wanted, atol=1e-5 * budget)
    assert plan.quotas.sum() == budget * UNITS and plan.draw(1).sum() == budget
    delete(pool, ["plans/p"])


@pytest.fixture
def request_pool(pool):
    return pool, np.array([400, 150, 40])


def test_the_source_of_a_shard_is_a_folder_of_its_path():
    assert sources_of(["/d/laion/0.tar", "/d/laion/x/1.tar", "/d/cc12m/0.tar"]) == ["laion", "laion", "cc12m"]
    assert sources_of(["/d/0.tar", "/d/cc12m/0.tar"]) == ["d", "cc12m"]
    assert sources_of(["s3://a/0.tar", "s3://b/0.tar"]) == ["a", "b"]
    assert sources_of(["/d/e/0.tar", "/d/e/1.tar"]) == ["e", "e"]
    assert sources_of(["/data/laion/0.tar", "/data/laion-2/0.tar"]) == ["laion", "laion-2"]
    assert sources_of([]) == []


@pytest.fixture
def sourced(tmp_path, make_tar, make_image):
    """30 samples of laion in two shards, and 10 of cc12m that were imported first."""
    for name, first, count in (("laion/0", 0, 20), ("laion/1", 20, 10), ("cc12m/0", 30, 10)):
        members = [
            member
            for row in range(first, first + count)
            for member in ((f"{row:03d}.jpg", make_image(row)), (f"{row:03d}.txt", b"a caption"))
        ]
        make_tar(tmp_path / "data" / f"{name}.tar", members)
    for name in ("cc12m", "laion"):
        made = import_pool([str(tmp_path / "data" / name)], tmp_path / "catalog", workers=1)
    return made.catalog


def test_sources_are_mixed(sourced, tmp_path):
    with pytest.raises(UserError, match=r"tailwise group .*catalog --by source"):
        make_plan(sourced, "p", PlanRequest("mixture", shares="laion=0.5,cc12m=0.5", budget=16))
    made = group(sourced, GroupRequest("source"))
    assert made.values == ["cc12m", "laion"] and made.table["size"].to_pylist() == [10, 30]
    (tmp_path / "shares.json").write_text(json.dumps({"laion": 3, "cc12m": 1}))
    request = PlanRequest("mixture", shares=str(tmp_path / "shares.json"), budget=16)
    plan = make_plan(sourced, "p", request)
    assert [plan.draw(2)[:10].sum(), plan.draw(2)[10:].sum()] == [4, 12]
    assert plan.summary["mixture"][0] == {"group": "cc12m", "samples": 10, "share": 0.25, "quota": 4.0}
    assert isinstance(make_plan(sourced, "p", request), Plan)  # the same request opens it
    make_plan(sourced, "q", PlanRequest("mixture", shares="laion=1,cc12m=1", of="p"))
    with pytest.raises(UserError, match="plans/q"):
        delete(sourced, ["plans/p"])


def test_mistakes_are_named(pool, tmp_path):
    make_plan(pool, "of", PlanRequest("dynamics", keep=0.4))
    (tmp_path / "bad.json").write_text('["big"]')
    (tmp_path / "twice.json").write_text('{"big": 1, "small": 1, "big": 2}')
    for request, message in (
        (PlanRequest("mixture", clustering="kind", keep=0.5), "needs `shares`"),
        (mixture("big=0.5,bigger=0.5", keep=0.1), "has no group 'bigger': did you mean 'big'"),
        (mixture("big=0.5,big=0.5", keep=0.1), "`shares` big is given twice"),
        (mixture("big=-1", keep=0.1), "numbers above 0"),
        (mixture("big", keep=0.1), "`shares` 'big': give NAME=VALUE"),
        (mixture(str(tmp_path / "bad.json"), keep=0.1), "numbers above 0"),
        (mixture(str(tmp_path / "twice.json"), keep=0.1), "can't be read as JSON: it gives 'big' twice"),
        (mixture(str(tmp_path / "none.json"), keep=0.1), "can't be read"),
        (mixture("big=1", of="of", keep=0.1), "`keep` does nothing with `of`: plan 'of' decides it"),
        (mixture("big=1", keep=0.1, alpha=0.3), "`alpha` does nothing with method 'mixture'"),
        (mixture("small=1", keep=0.5), "40 can be drawn"),
        (PlanRequest("flat", keep=0.1, shares="big=1"), "`shares` does nothing without method 'mixture'"),
    ):
        with pytest.raises(UserError, match=message):
            make_plan(pool, "p", request)
    assert read_shares({"b": 1, "a": 3}) == read_shares(" b =1e308, a=3e307") | {"a": 0.75, "b": 0.25}


def test_open_clips_factors_are_a_mixture(sourced, tmp_path):
    make_plan(sourced, "epochs", PlanRequest("random", keep=0.5))
    data = f"{tmp_path}/data/laion/{{0..1}}.tar::{tmp_path}/data/cc12m/0.tar"
    mixture = mixture_of_factors(Plan(sourced, "epochs"), data, "1::3")
    assert mixture.name == "epochs-mixture-1-3" and not mixture.finished
    assert mixture.request.shares == {"laion": 0.5, "cc12m": 0.5}  # 30 · 1 against 10 · 3
    plan = mixture.make()
    assert mixture.finished and plan.draw(1).sum() == 20
    assert [plan.draw(1)[:10].tolist(), plan.draw(1)[10:].sum()] == [[1] * 10, 10]
    typed = f"`tailwise plan {sourced.folder} epochs-mixture-1-3 --method mixture --of epochs --max-repeats 1 --shares laion=0.5,cc12m=0.5`"
    assert mixture.command == typed
    with pytest.raises(UserError, match=r"each sample of cc12m would be drawn .* at most 255 are possible: lower"):
        make_plan(sourced, "long", PlanRequest("random", keep=200.0, max_repeats=200))
        mixture_of_factors(Plan(sourced, "long"), data, "1::9")
    more = mixture_of_factors(Plan(sourced, "epochs"), data, "0.5::9")
    assert more.request.max_repeats == 2  # 90 : 15 of 20 samples: 17 of 10
    assert more.make().draw(0)[:10].sum() == pytest.approx(17, abs=1)


def test_factors_after_another_import_get_a_grouping_of_their_snapshot(
    sourced, tmp_path, make_tar, make_image, run_tailwise
):
    group(sourced, GroupRequest("source"))
    make_tar(tmp_path / "data" / "yfcc" / "0.tar", [("y.jpg", make_image(99)), ("y.txt", b"a caption")])
    old = make_plan(sourced, "old", PlanRequest("mixture", shares="laion=1", budget=5))
    import_pool([str(tmp_path / "data" / "yfcc")], sourced.folder, workers=1)
    told = run_tailwise(
        "plan", sourced.folder, "again", "--method", "mixture", "--shares", "laion=1", "--budget", "5"
    ).stdout
    assert "1 newer samples are not included (make the groups of 'source' again under another name" in told
    data = f"{tmp_path}/data/laion/{{0..1}}.tar::{tmp_path}/data/cc12m/0.tar"
    mixture = mixture_of_factors(make_plan(sourced, "epochs", PlanRequest("random", keep=0.5)), data, "1::3")
    assert "--clustering source-3" in mixture.command
    plan = mixture.make()
    assert plan.draw(0)[:10].sum() == 10 and plan.draw(0)[-1] == 0 and plan.snapshot.number > old.snapshot.number


@pytest.mark.parametrize(
    ("data", "factors", "message"),
    [
        ("{0}/laion/0.tar::{0}/cc12m/0.tar", "1", "one factor for each"),
        ("{0}/laion/0.tar::{0}/laion/1.tar", "1::2", "each source once"),
        ("{0}/laion/0.tar::{0}/cc12m/0.tar", "1::x", "numbers above 0"),
        ("{0}/laion/0.tar::{0}/cc12m/0.tar", "1::-2", "numbers above 0"),
        ("{0}/laion/7.tar::{0}/cc12m/0.tar", "1::2", "its shards are not those of one source of the catalog"),
        (None, "1::2", "give --train-data too"),
    ],
)
def test_factors_that_do_not_fit_are_refused(sourced, tmp_path, data, factors, message):
    plan = make_plan(sourced, "epochs", PlanRequest("random", keep=0.5))
    with pytest.raises(UserError, match=message):
        mixture_of_factors(plan, data and data.format(tmp_path / "data"), factors)
