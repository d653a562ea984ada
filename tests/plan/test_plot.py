import json
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tailwise.errors import ConflictError, UserError
from tailwise.plan.explain import _by_rate, exposures, plot_plan, write_plot
from tailwise.requests import ClusterRequest, PlanRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.upkeep.remove import remove

REQUESTS = {
    "dynamic": PlanRequest("dynamics", keep=0.5),
    "annealed": PlanRequest("dynamics", keep=0.3, alpha_end=1.0, anneal_epochs=3),
    "static": PlanRequest("dynamics", keep=0.5, dynamic=False),
    "ranked": PlanRequest("dbp", keep=0.4),
    "bernoulli": PlanRequest("flat", keep=0.5, draw="bernoulli"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_exposures_are_means_over_the_members_of_clusters(small_catalog, name):
    cluster(small_catalog, ClusterRequest(k=12))
    plan = make_plan(small_catalog, "p", REQUESTS[name])
    epochs = 2000 if name == "bernoulli" else 5
    seen = np.sum([plan.draw(epoch) for epoch in range(epochs)], axis=0, dtype=np.int64)
    found = [seen[plan.groups[:] == group].mean() for group in range(12)]
    np.testing.assert_allclose(exposures(plan, epochs), found, rtol=0.05 if name == "bernoulli" else 1e-12)


def test_samples_of_a_plan_by_rate_fall_from_the_highest_rate(small_catalog, tmp_path):
    rates = {f"{row:06d}": (0.0, 0.25, 1.0, 2.0)[row // 150] for row in range(600)}
    (tmp_path / "rates.json").write_text(json.dumps(rates))
    plan = make_plan(small_catalog, "p", PlanRequest("rates", rates=tmp_path / "rates.json"))
    shares, views = _by_rate(plan, 4)
    assert shares[[0, -1]].tolist() == [0, 100]
    np.testing.assert_allclose(views, np.repeat([8.0, 4.0, 1.0, 0.0], 100))
    assert set(plot_plan(plan, 4)) == {".svg"}


def test_plots_are_svg_and_png_and_the_same_again(small_catalog, tmp_path):
    cluster(small_catalog, ClusterRequest(k=12))
    plan = make_plan(small_catalog, "p", PlanRequest("dynamics", keep=0.5))
    path = tmp_path / "plot.svg"
    for _ in range(2):  # the second finds the same bytes
        write_plot(plan, 3, path, png=True)
    ElementTree.parse(path)
    with Image.open(tmp_path / "plot.png") as image:
        assert (image.format, image.size) == ("PNG", (2200, 560))
    with pytest.raises(ConflictError, match="overwrite"):
        write_plot(plan, 4, path, png=True)
    write_plot(plan, 4, path, png=True, overwrite=True)
    with pytest.raises(UserError, match="name the SVG file"):
        write_plot(plan, 3, tmp_path / "plot.png")


def test_one_cluster_is_drawn_and_shares_are_of_the_pool(small_catalog, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("tailwise.plan.explain.encode", lambda figure, png: figures.append(figure))
    (tmp_path / "keys.txt").write_text("".join(f"{row:06d}\n" for row in range(150)))
    remove(small_catalog, tmp_path / "keys.txt")
    plot_plan(make_plan(small_catalog, "p", PlanRequest("random", keep=1.5, max_repeats=3)), 3)
    (figure,) = figures
    sizes, seen, coverage = figure.axes
    assert np.ptp(sizes.collections[0].get_paths()[0].vertices[:, 0]) == np.ptp(seen.lines[0].get_xdata()) == 1
    assert coverage.lines[0].get_ydata().tolist() == [100, 100, 100]
    assert coverage.get_ylim()[1] > coverage.lines[1].get_ydata()[0] == 150
