"""Groups of rows reach compiled code only below the number of groups."""

import numpy as np
import pytest

from tailwise.catalog.files import write_array
from tailwise.errors import UserError
from tailwise.plan import Plan
from tailwise.plan import plan as module
from tailwise.requests import ClusterRequest, PlanRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.planning.plan import make_plan


@pytest.mark.parametrize("group", [6, 2**31 - 1])
@pytest.mark.parametrize("rows", [slice(0, 600), np.array([3, 7, 599])])
def test_a_group_that_the_plan_does_not_have_is_refused_by_name(small_catalog, monkeypatch, group, rows):
    cluster(small_catalog, ClusterRequest(k=6))
    plan = make_plan(small_catalog, "p", PlanRequest("flat", keep=0.5))
    groups = np.array(plan.groups)
    np.testing.assert_array_equal(plan.groups_at(rows), groups[rows])
    assert groups.max() == 5
    groups[7] = group
    write_array(plan.folder / "group.npy", groups)
    monkeypatch.setattr(module, "map_array", np.load)  # a file that changes after it was hashed
    damaged = Plan(small_catalog, "p")
    for ask in (lambda: damaged.groups_at(rows), lambda: damaged.draw(1), lambda: damaged.draw(0, rows)):
        with pytest.raises(UserError, match=rf"group\.npy names the group {group:,} of 6: it is damaged"):
            ask()
