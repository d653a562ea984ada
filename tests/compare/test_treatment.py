import numpy as np
import pytest

from tailwise.compare.summary import exposures, treatment_notes
from tailwise.requests import ClusterRequest, FilterRequest, PlanRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.scoring.filter import filter_samples


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("request_", [("random", 0.4, 1), ("dynamics", 0.4, 1), ("flat", 1.2, 3)])
@pytest.mark.parametrize("epochs", [1, 2, 3, 5])
def test_bounds_are_those_of_the_draws(small_catalog, request_, dynamic, epochs):
    method, keep, repeats = request_
    cluster(small_catalog, ClusterRequest(k=8))
    plan = make_plan(small_catalog, "p", PlanRequest(method, keep=keep, max_repeats=repeats, dynamic=dynamic))
    budget = round(keep * 600)
    draws = np.cumsum([plan.draw(epoch).astype(int) for epoch in range(epochs + 1)], axis=0)
    found = exposures(plan, epochs * budget)
    assert (found.least, found.most, found.mean) == (draws[-2].min(), draws[-2].max(), pytest.approx(epochs * keep))
    within = exposures(plan, epochs * budget + 1)
    assert (within.least, within.most) == (draws[-2].min(), draws[-1].max())


def test_rows_that_are_alike_or_draw_from_other_samples_are_named(small_catalog):
    filter_samples(small_catalog, FilterRequest("image-bytes", keep=0.5, name="large"))
    requests = {
        "full": PlanRequest("random", keep=1.0),
        "half": PlanRequest("random", keep=0.5),
        "once": PlanRequest("random", keep=0.5, dynamic=False),
        "left": PlanRequest("random", keep=0.5, without=["large"]),
    }
    rows = []
    for name, request in requests.items():
        seen = exposures(make_plan(small_catalog, name, request), 1200)
        rows.append({"row": name, "compose": "shuffle", "plan": {"exposures": vars(seen)}})
    alike, other = treatment_notes(rows, "full")
    assert (
        alike
        == "full and half are the same treatment: each sees every candidate exactly 2 times. They differ in order alone."
    )
    assert other.startswith("Other candidates than those of full: left. ")
    for row, name in zip(rows, requests, strict=True):  # 2.65 passes: the last is incomplete
        row["plan"]["exposures"] = vars(exposures(make_plan(small_catalog, name, requests[name]), 1590))
    nearly, _ = treatment_notes(rows, "full")
    assert nearly.startswith("full and half are nearly the same treatment: each sees every candidate 2 to 3 times.")
    assert treatment_notes([{"row": "old", "compose": "shuffle", "plan": {"exposures": None}}], "old") == []
