"""What notebooks show of a catalog, a clustering and a plan."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from tailwise.catalog import Catalog
from tailwise.catalog.clusterings import Clustering
from tailwise.notebook import areas, shown
from tailwise.requests import ClusterRequest, PlanRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.planning.plan import make_plan


def cells(html):
    """The cells of the one table in HTML that a strict parser takes, by the first of each row."""
    root = ElementTree.fromstring(html)
    return {row[0].text: row[1].text for row in root.iter("tr")}


def test_a_catalog_a_clustering_and_a_plan(small_catalog):
    cluster(small_catalog, ClusterRequest(k=12))
    plan = make_plan(small_catalog, "p", PlanRequest("dynamics", keep=0.5))
    found = cells(small_catalog._repr_html_())
    assert found.items() >= {("samples", "600"), ("embeddings", "image"), ("clusterings", "main"), ("plans", "p")}
    clustering = Clustering.open(small_catalog, "main")
    found = cells(clustering._repr_html_())
    sizes = clustering.table["size"].to_numpy()
    assert found["clusters"] == "12"
    assert found["sizes"].startswith(f"{sizes.min()} … {sizes.max()}, ")
    html = plan._repr_html_()
    assert cells(html)["budget of an epoch"] == "300 (50.0% of the pool)"
    assert html.count("<polygon") == 2
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")


def test_a_plan_by_rate_and_an_empty_catalog(small_catalog, tmp_path):
    (tmp_path / "rates.json").write_text(json.dumps({f"{row:06d}": 0.5 for row in range(600)}))
    plan = make_plan(small_catalog, "p", PlanRequest("rates", rates=tmp_path / "rates.json"))
    assert cells(plan._repr_html_())["method"] == "rates"
    assert cells(Catalog.create(tmp_path / "new")._repr_html_()) == {"samples": "0"}


def test_text_from_outside_is_shown_and_secrets_are_not():
    html = shown(
        "<script>",
        {"a&b": "<img src=x onerror=y>\x1b[31m", "at": "https://me:word@host/x?token=1", "no": None, "zero": 0},
    )
    assert cells(html) == {"a&b": "<img src=x onerror=y>\\x1b[31m", "at": "https://host/x?…", "zero": "0"}
    assert "<script" not in html


@pytest.mark.parametrize("count", [0, 1, 7, 120, 100_000])
def test_pictures_have_a_bound(count):
    values = np.sort(np.random.default_rng(0).pareto(1, count))[::-1]
    html = areas({"a": ("red", values), "b": ("blue", values / 2)})
    assert len(html) < 8000
    heights = [float(y) for points in re.findall(r"points='([^']+)'", html) for y in re.findall(r",([\d.-]+)", points)]
    assert min(heights) >= 0 and max(heights) <= 80
