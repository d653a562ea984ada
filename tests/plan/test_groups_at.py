"""Groups of rows reach compiled code only below the number of groups."""

import numpy as np
import pytest

from tailwise.errors import UserError
from tailwise.requests import ClusterRequest, PlanRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.planning.plan import make_plan


@pytest.mark.parametrize("group", [6, 2**31 - 1])
@pytest.mark.parametrize("rows", [slice(0, 600), np.array([3, 7, 599])])
@pytest.mark.parametrize(("row", "name"), [(7, "group.npy"), (599, "group-000001.npy")])
def test_a_group_that_the_plan_does_not_have_is_refused_by_name(small_catalog, group, rows, row, name):
    cluster(small_catalog, ClusterRequest(k=6))
    plan = make_plan(small_catalog, "p", PlanRequest("flat", keep=0.5))
    groups = np.array(plan.groups[:])
    np.testing.assert_array_equal(plan.groups_at(rows), groups[rows])
    assert groups.max() == 5
    part = small_catalog.parts()[name != "group.npy"]
    file = np.lib.format.open_memmap(plan.folder / name, mode="r+")  # a file that changes after it was hashed
    file[row - part.first_row] = group
    file.flush()
    for ask in (lambda: plan.groups_at(rows), lambda: plan.draw(1), lambda: plan.draw(0, rows)):
        with pytest.raises(UserError, match=rf"/{name} names the group {group:,} of 6: it is damaged"):
            ask()
