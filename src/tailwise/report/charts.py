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
from tailwise.report.clusters import BINS, EDGES, ClusterFigures
from tailwise.text import plain

# Of plans; with three times the luminance of both backgrounds. The dashes distinguish them without colours.
COLORS = ("#3d7cc9", "#cc6014", "#2f8f5b", "#a05cc2", "#a37a10", "#0f8a99", "#cc4d72", "#75828e")
DASHES = ("solid", "dashed", "dotted", "dotdash")
GREY = "#838d99"
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
        legend: of lines: color, dash, label, and the number of the plan if the line shows only with it.
    """

    name: str
    title: str
    about: str
    figure: Any
    legend: tuple[tuple[str, str, str, int | None], ...] = ()


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
    most = float(max(sizes.max(initial=1), 2)) * 1.6
    filled = [values[values > 0].min(initial=most) for values in (sizes, *figures.quotas)]
    least, least_size = max(0.3, min(filled) / 1.6), filled[0] / 1.6
    about = "Each dot is a cluster."
    if plans:
        about += " Coloured dots: its samples. Small grey dots: how many samples of it an epoch of the plan takes."
    ranked = _log("rank of the cluster, from the largest", "samples", (0.8, max(len(sizes), 2) * 1.3), (least, most))
    charts = [Chart("rank", "Cluster sizes", about, ranked)]
    if plans:
        figure = _log("samples in the cluster", "samples in an epoch", (least_size, most), (least, most))
        for number, plan in enumerate(plans):
            repeats = int(plan.config.get("max_repeats") or 1)
            figure.line([least_size, most], [least_size * repeats, most * repeats], color=GREY, line_dash="dashed",
                        name=f"plan{number}", visible=number == 0)  # fmt: skip
        about = "What an epoch of the plan takes of each cluster. A cluster on the dashed line gives all that the plan allows."
        charts.append(Chart("quota", "Quotas", about, figure))
    if "d_intra" in columns:
        bounds = _padded(columns["d_intra"]), _padded(columns["d_inter"])
        figure = _figure("distance of members to their centroid", "distance to other centroids", *bounds)
        about = (
            "Dense clusters are left, clusters near to others are below. Complexity is the product of both distances."
        )
        charts.append(Chart("distances", "Density of clusters", about, figure))
    if "x" in columns:
        figure = _figure("", "", _padded(columns["x"]), _padded(columns["y"]))
        figure.axis.visible, figure.grid.visible = False, False
        about = "Near clusters are similar. The area of a dot is the size of the cluster."
        charts.append(Chart("map", "Map of clusters", about, figure))
    if len(plans) > 1:
        top = 1.05 * max(float(rates.max(initial=0)) for name, rates in columns.items() if name.startswith("rate:"))
        figure = _figure("rate in the plan", "rate in the other plan", (0, top), (0, top))
        figure.line([0, top], [0, top], color=GREY, line_dash="dashed")
        about = "How often an epoch draws a sample of each cluster. Above the dashed line the other plan draws more."
        charts.append(Chart("versus", "Two plans", about, figure))
    if plans:
        charts.append(_coverage(plans, epochs))
    if figures.clustering.has_centroids:
        charts.append(_similarities(figures, plans))
    charts += [_duplicates(name, *found) for name, found in duplicates.items()]
    return charts


def _figure(x_label: str, y_label: str, x: tuple[float, float], y: tuple[float, float], axis: str = "linear") -> Any:  # noqa: ANN401
    from bokeh.models import BoxSelectTool, NumeralTickFormatter  # noqa: PLC0415  (an extra)
    from bokeh.plotting import figure  # noqa: PLC0415

    drawn = figure(
        height=HEIGHT, sizing_mode="stretch_width", tools="", toolbar_location=None, x_axis_type=axis, y_axis_type=axis,
        x_range=x, y_range=y, x_axis_label=x_label, y_axis_label=y_label, background_fill_color=None,
        border_fill_color=None, outline_line_color=None, min_border_left=62, min_border_right=14,
    )  # fmt: skip
    drawn.axis.formatter = NumeralTickFormatter(format="0,0.[000]")
    brush = BoxSelectTool(continuous=True)
    drawn.add_tools(brush)
    drawn.toolbar.active_drag = brush
    return drawn


def _log(x_label: str, y_label: str, x: tuple[float, float], y: tuple[float, float]) -> Any:  # noqa: ANN401
    from bokeh.models import FixedTicker  # noqa: PLC0415  (an extra)

    drawn = _figure(x_label, y_label, x, y, "log")
    # report.js sets the ticks: Bokeh's overlap below two decades.
    drawn.xaxis.ticker, drawn.yaxis.ticker = FixedTicker(), FixedTicker()
    return drawn


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
    figure = _still("epochs", "% of the pool", (0.5, epochs + 0.5), (0, 103))
    legend = []
    for number, plan in enumerate(plans):
        covered = [100 * each.covered / max(plan.pool, 1) for each in explain(plan, epochs).epochs]
        color, dash = COLORS[number % len(COLORS)], DASHES[number % len(DASHES)]
        figure.line([*range(1, epochs + 1)], covered, color=color, line_width=2, line_dash=dash)
        figure.scatter([*range(1, epochs + 1)], covered, color=color, size=5)
        legend.append((color, dash, plain(plan.name), None))
    about = "Share of the pool that the epochs so far have shown. A level curve shows no new samples."
    return Chart("coverage", "Coverage", about, figure, tuple(legend))


def _similarities(figures: ClusterFigures, plans: Sequence[Plan]) -> Chart:
    found = figures.similarities
    used = np.flatnonzero(found[0])
    first, last = (int(used[0]), int(used[-1])) if len(used) else (0, BINS - 1)
    top = float(found.max(initial=1)) * 1.08
    figure = _still("similarity to the centroid", "samples", (EDGES[first], EDGES[last + 1]), (0, top))
    middle = (EDGES[:-1] + EDGES[1:]) / 2
    inside = slice(max(first - 1, 0), last + 2)
    figure.step(middle[inside], found[0][inside], mode="center", color=GREY, line_width=2)
    legend: list[tuple[str, str, str, int | None]] = [(GREY, "solid", "pool", None)]
    for number in range(len(plans)):
        drawn, color = found[1 + number], COLORS[number % len(COLORS)]
        left = (found[0] - drawn).clip(min=0)
        for values, dash, label in ((drawn, "solid", "drawn in an epoch"), (left, "dotted", "not drawn")):
            figure.step(middle[inside], values[inside], name=f"plan{number}", line_dash=dash,
                        mode="center", color=color, line_width=2, visible=number == 0)  # fmt: skip
            legend.append((color, dash, label, number))
    about = "Typical samples are right: they are similar to the centroid of their cluster."
    return Chart("similarity", "Typical and untypical samples", about, figure, tuple(legend) if plans else ())


def _duplicates(name: str, counts: npt.NDArray[np.int64], epsilon: float) -> Chart:
    from bokeh.models import Label, Span  # noqa: PLC0415  (an extra)

    used = np.flatnonzero(counts)
    first = int(used[0]) if len(used) else 0
    top = float(counts.max(initial=1)) * 1.15
    figure = _still("similarity to the most similar earlier sample", "samples", (EDGES[first], 1.01), (0, top))
    left, right = EDGES[:-1][first:], EDGES[1:][first:]
    dropped = left >= 1 - epsilon - 1e-9
    figure.quad(left=left, right=right, bottom=0, top=counts[first:], line_color=None,
                fill_color=[COLORS[1] if each else GREY for each in dropped.tolist()])  # fmt: skip
    figure.add_layout(Span(location=1 - epsilon, dimension="height", line_color=COLORS[1], line_dash="dashed"))
    figure.add_layout(
        Label(x=1 - epsilon, y=top * 0.93, text=f"1 − ε = {1 - epsilon:g}", x_offset=-6, text_align="right",
              text_color=COLORS[1], text_font_size="12px")
    )  # fmt: skip
    about = "Samples right of the line are near-duplicates. The first of each group is kept, the others are dropped."
    return Chart(f"duplicates-{name}", f"Near-duplicates ({plain(name)})", about, figure)


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
