"""The charts of the report, as Bokeh figures.

Bokeh draws axes, lines and bars, and gives the brush. `assets/report.js` paints the clusters into the charts of SCATTER: 50,000 of them, in
five charts, must follow a brush; Bokeh's own markers take seconds for that without a graphics card.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.plan.explain import explain
from tailwise.plan.plan import Plan
from tailwise.report.clusters import BINS, ClusterFigures
from tailwise.text import plain

COLORS = ("#3b6fb6", "#c2571a", "#2e8b57", "#8e4bb0", "#b8860b", "#0b8a99", "#b03a5b", "#5b6770")  # of plans
GREY = "#8a94a0"
HEIGHT = 300  # pixels
# Of the charts of clusters: the columns of both axes, and which are logarithmic. "quota" and "rate" are those of the plan that is shown.
SCATTER: dict[str, tuple[str, str, bool]] = {
    "rank": ("rank", "size", True),
    "quota": ("size", "quota", True),
    "distances": ("d_intra", "d_inter", False),
    "map": ("x", "y", False),
    "versus": ("rate", "versus", False),
}


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        name: of it, in the page and in links.
        title: of it.
        about: one sentence on how to read it.
        figure: Bokeh's.
    """

    name: str
    title: str
    about: str
    figure: Any


def make_charts(
    columns: Mapping[str, npt.NDArray[Any]],
    figures: ClusterFigures,
    plans: Sequence[Plan],
    epochs: int,
    duplicates: Mapping[str, tuple[npt.NDArray[np.int64], float]],
) -> list[Chart]:
    """Return the charts that can be drawn.

    Args:
        columns: columns of the clusters, [K] each.
        figures: of the same clusters.
        plans: P plans.
        epochs: of the coverage.
        duplicates: by drop list, counts of similarities to the most similar earlier sample in BINS from −1 to 1, int64 [BINS], and ε.
    """
    sizes = columns["size"]
    largest, count = float(max(sizes.max(initial=1), 2)), float(max(len(sizes), 2))
    charts = [
        Chart("rank", "Cluster sizes", "Each dot is a cluster: its size, and below it how many samples an epoch takes.",
              _log("clusters, from the largest", "samples", (0.8, count * 1.3), (0.3, largest * 1.6)))
    ]  # fmt: skip
    if plans:
        figure = _log("size of the cluster", "samples in an epoch", (0.8, largest * 1.6), (0.3, largest * 1.6))
        for repeats in sorted({int(plan.config.get("max_repeats") or 1) for plan in plans}):
            figure.line([0.8, largest * 1.6], [0.8 * repeats, largest * 1.6 * repeats], color=GREY, line_dash="dashed")
        about = "The quota of each cluster. On the dashed line every member is drawn as often as the plan allows."
        charts.append(Chart("quota", "Quotas", about, figure))
    if "d_intra" in columns:
        bounds = _padded(columns["d_intra"]), _padded(columns["d_inter"])
        figure = _figure("distance of members to their centroid", "distance to other centroids", *bounds)
        about = "Density-Based Pruning calls clusters simple that are dense (left) and near to others (below)."
        charts.append(Chart("distances", "Density of clusters", about, figure))
    if "x" in columns:
        figure = _figure("", "", _padded(columns["x"]), _padded(columns["y"]))
        figure.axis.visible, figure.grid.visible = False, False
        about = "Centroids in two dimensions. Near ones are similar; the area of a dot is the cluster's size."
        charts.append(Chart("map", "Map of clusters", about, figure))
    if len(plans) > 1:
        top = 1.05 * max(float(rates.max(initial=0)) for name, rates in columns.items() if name.startswith("rate:"))
        figure = _figure("copies of a member, first plan", "copies of a member, second plan", (0, top), (0, top))
        figure.line([0, top], [0, top], color=GREY, line_dash="dashed")
        about = "The rate of each cluster in both plans. Above the dashed line the second plan takes more."
        charts.append(Chart("versus", "Two plans", about, figure))
    if plans:
        charts.append(_coverage(plans, epochs))
    if figures.clustering.has_centroids:
        charts.append(_similarities(figures, plans))
    charts += [_duplicates(name, *found) for name, found in duplicates.items()]
    return charts


def _figure(x_label: str, y_label: str, x: tuple[float, float], y: tuple[float, float], axis: str = "linear") -> Any:  # noqa: ANN401
    from bokeh.models import BoxSelectTool  # noqa: PLC0415  (an extra)
    from bokeh.plotting import figure  # noqa: PLC0415

    drawn = figure(
        height=HEIGHT, sizing_mode="stretch_width", tools="", toolbar_location=None, x_axis_type=axis, y_axis_type=axis,
        x_range=x, y_range=y, x_axis_label=x_label, y_axis_label=y_label, background_fill_color=None,
        border_fill_color=None, outline_line_color=None, min_border_left=62, min_border_right=14,
    )  # fmt: skip
    brush = BoxSelectTool(continuous=True)
    drawn.add_tools(brush)
    drawn.toolbar.active_drag = brush
    return drawn


def _log(x_label: str, y_label: str, x: tuple[float, float], y: tuple[float, float]) -> Any:  # noqa: ANN401
    return _figure(x_label, y_label, x, y, "log")


def _still(x_label: str, y_label: str, x: tuple[float, float], y: tuple[float, float]) -> Any:  # noqa: ANN401
    """Return a figure that is not brushed."""
    drawn = _figure(x_label, y_label, x, y)
    drawn.tools = []
    return drawn


def _padded(values: npt.NDArray[Any]) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    space = 0.06 * (high - low) or 0.5
    return low - space, high + space


def _coverage(plans: Sequence[Plan], epochs: int) -> Chart:
    figure = _still("epochs", "% of the pool seen so far", (0.5, epochs + 0.5), (0, 103))
    for plan, color in zip(plans, _colors(plans), strict=True):
        covered = [100 * each.covered / max(plan.pool, 1) for each in explain(plan, epochs).epochs]
        label = plain(plan.name)
        figure.line([*range(1, epochs + 1)], covered, color=color, line_width=2, legend_label=label)
        figure.scatter([*range(1, epochs + 1)], covered, color=color, size=5, legend_label=label)
    _place_legend(figure)
    about = "How much of the pool the epochs have shown. A curve that ends level never shows the rest."
    return Chart("coverage", "Coverage", about, figure)


def _similarities(figures: ClusterFigures, plans: Sequence[Plan]) -> Chart:
    found = figures.similarities
    used = np.flatnonzero(found[0])
    first, last = (int(used[0]), int(used[-1])) if len(used) else (0, BINS - 1)
    edges = np.linspace(-1, 1, BINS + 1)
    top = float(found.max(initial=1)) * 1.08
    figure = _still("similarity to the centroid", "samples", (edges[first], edges[last + 1]), (0, top))
    middle = (edges[:-1] + edges[1:]) / 2
    inside = slice(max(first - 1, 0), last + 2)
    figure.step(middle[inside], found[0][inside], mode="center", color=GREY, line_width=2, legend_label="pool")
    for number in range(len(plans)):
        drawn = found[1 + number]
        options = {"mode": "center", "color": COLORS[0], "line_width": 2, "visible": number == 0}
        figure.step(middle[inside], drawn[inside], name=f"plan{number}", legend_label="drawn in an epoch", **options)
        left = (found[0] - drawn).clip(min=0)
        figure.step(
            middle[inside], left[inside], name=f"plan{number}", line_dash="dotted", legend_label="not drawn", **options
        )
    _place_legend(figure)
    about = "Samples by their similarity to their centroid, and those that an epoch of the plan draws."
    return Chart("similarity", "Typical and untypical samples", about, figure)


def _duplicates(name: str, counts: npt.NDArray[np.int64], epsilon: float) -> Chart:
    from bokeh.models import Label, Span  # noqa: PLC0415  (an extra)

    edges = np.linspace(-1, 1, BINS + 1)
    used = np.flatnonzero(counts)
    first = int(used[0]) if len(used) else 0
    top = float(counts.max(initial=1)) * 1.15
    figure = _still("similarity to the most similar earlier sample", "samples", (edges[first], 1.01), (0, top))
    left, right = edges[:-1][first:], edges[1:][first:]
    dropped = left >= 1 - epsilon - 1e-9
    figure.quad(left=left, right=right, bottom=0, top=counts[first:], line_color=None,
                fill_color=[COLORS[1] if each else GREY for each in dropped.tolist()])  # fmt: skip
    figure.add_layout(Span(location=1 - epsilon, dimension="height", line_color=COLORS[1], line_dash="dashed"))
    figure.add_layout(
        Label(x=1 - epsilon, y=top * 0.93, text=f"ε = {epsilon:g}", x_offset=-6, text_align="right",
              text_color=COLORS[1], text_font_size="12px")
    )  # fmt: skip
    about = "Samples right of the line are duplicates: they are left out, but for the first of each group."
    return Chart(f"duplicates-{name}", f"Duplicates: {plain(name)}", about, figure)


def _colors(plans: Sequence[Plan]) -> list[str]:
    return [COLORS[number % len(COLORS)] for number in range(len(plans))]


def _place_legend(figure: Any) -> None:  # noqa: ANN401
    legend = figure.legend
    legend.location, legend.background_fill_alpha, legend.border_line_color = "top_left", 0.0, None
    legend.label_text_font_size, legend.padding, legend.spacing = "11px", 2, 0


def as_json(charts: Sequence[Chart]) -> tuple[str, dict[str, str]]:
    """Return Bokeh's document with all charts as JSON, and the id of each chart's figure by name. The same charts give the same bytes."""
    from bokeh.core.json_encoder import serialize_json  # noqa: PLC0415  (an extra)
    from bokeh.document import Document  # noqa: PLC0415
    from bokeh.embed.util import standalone_docs_json_and_render_items  # noqa: PLC0415

    document = Document()
    for chart in charts:
        document.add_root(chart.figure)
    docs, _ = standalone_docs_json_and_render_items([chart.figure for chart in charts])
    numbers: dict[str, str] = {}  # Bokeh counts its objects in the whole process

    def renumbered(identity: str) -> str:
        return numbers.setdefault(identity, f"p{len(numbers)}")

    text = re.sub(
        r'"id":"(p\d+)"', lambda found: f'"id":"{renumbered(found[1])}"', serialize_json(next(iter(docs.values())))
    )
    return text, {chart.name: renumbered(chart.figure.id) for chart in charts}
