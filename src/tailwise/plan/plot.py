"""Plots of a plan: size and quota of each cluster, how often samples are seen from head to tail, and the share of the pool that is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog.outputs import is_png, is_text, writing_output
from tailwise.errors import UserError
from tailwise.extras import require
from tailwise.figures import STYLE, encode
from tailwise.notebook import BLUE, GREY
from tailwise.plan.explain import explain, exposures
from tailwise.plan.plan import Plan
from tailwise.plan.quotas import UNITS
from tailwise.text import plain

POOL, DRAWN, WORDS = GREY, BLUE, "#66707a"
POINTS = 400  # of a curve; more clusters are shown as means of neighbours by size
RATE_BINS = 1 << 16
Values = npt.NDArray[np.float64]


def write_plot(plan: Plan, epochs: int, path: Path, *, png: bool = False, overwrite: bool = False) -> None:
    """Write the plot of a plan as SVG and, if `png`, as PNG beside it. See `plot_plan` and `writing_output`."""
    if path.suffix.lower() == ".png":
        raise UserError(f"plot {path}: name the SVG file; `png` writes a PNG file beside it")
    for suffix, content in plot_plan(plan, epochs, png=png).items():
        target, is_ours = (path, is_text("<?xml")) if suffix == ".svg" else (path.with_suffix(suffix), is_png)
        with writing_output(target, plan.catalog, overwrite=overwrite, is_ours=is_ours) as temporary:
            temporary.write_bytes(content)


def plot_plan(plan: Plan, epochs: int, *, png: bool = False) -> dict[str, bytes]:
    """Return the plot of a plan over its first epochs, as `encode` does; the same bytes for the same plan and versions.

    A plan by rate has no panel of clusters: its samples are shown from the highest to the lowest rate.
    """
    require("train", "matplotlib", purpose="`plot`")
    import matplotlib as mpl  # noqa: PLC0415  (an extra)
    from matplotlib.figure import Figure  # noqa: PLC0415

    shown = explain(plan, epochs).epochs
    style = STYLE | {"svg.fonttype": "path", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=(8 if plan.by_rate else 11, 2.8))
        figure.set_layout_engine("constrained", wspace=0.05)
        *sizes, seen, coverage = figure.subplots(1, 2 if plan.by_rate else 3)
        if plan.by_rate:
            places, views = _by_rate(plan, epochs)
            seen.set(xlabel="% of the pool, from the highest rate to the lowest")
        else:
            order = np.argsort(-plan.sizes, kind="stable")
            order = order[plan.sizes[order] > 0]
            places = _means(np.arange(1, len(order) + 1))
            if len(order) == 1:  # lines have two ends
                order, places = np.repeat(order, 2), np.array([0.5, 1.5])
            members = _means(plan.sizes[order])
            _plot_sizes(sizes[0], places, members, _means(plan.quotas[order] / UNITS))
            views = _means((plan.sizes * exposures(plan, epochs))[order]) / members
            seen.set(xlabel="clusters, from the largest to the smallest")
        drawn = sum(each.total for each in (shown if plan.dynamic else shown[:1] * epochs))
        _plot_views(seen, places, views, drawn / (plan.rows if plan.by_rate else int(plan.sizes.sum())), epochs)
        covered = [100 * each.covered / max(plan.pool, 1) for each in shown]
        coverage.plot(range(1, epochs + 1), covered, color=DRAWN, marker="o", markersize=3)
        budget = 100 * shown[0].total / max(plan.pool, 1)
        coverage.axhline(budget, color=POOL, zorder=0)
        coverage.text(epochs + 0.3, budget - 2, "budget of an epoch", ha="right", va="top", color=WORDS)
        coverage.set(ylim=(0, max(102, 1.05 * budget)), xlabel="epochs", ylabel="% of the pool shown")
        (sizes or [seen])[0].set_title(plain(f"plan {plan.name}: {plan.config['method']}"), loc="left")
        return encode(figure, png=png)


def _plot_sizes(axes: Any, places: Values, sizes: Values, quotas: Values) -> None:  # noqa: ANN401
    for values, color, alpha, label in ((sizes, POOL, 1, "in the pool"), (quotas, DRAWN, 0.85, "in one epoch")):
        axes.fill_between(places, values, 0.5, step="mid", color=color, alpha=alpha, label=label, linewidth=0)
    axes.set(yscale="log", ylim=(0.5, None), xlim=(places[0] - 0.5, places[-1] + 0.5))
    axes.set(xlabel="clusters, from the largest to the smallest", ylabel="samples")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False)


def _plot_views(axes: Any, places: Values, views: Values, mean: float, epochs: int) -> None:  # noqa: ANN401
    axes.plot(places, views, color=DRAWN, drawstyle="steps-mid")
    axes.axhline(mean, color=POOL, zorder=0)
    axes.text(1, mean, "mean", transform=axes.get_yaxis_transform(), ha="right", va="bottom", color=WORDS)
    axes.set(xlim=places[[0, -1]], ylim=(0, 1.1 * max(views.max(), mean)), ylabel=f"times seen in {epochs} epochs")


def _means(values: npt.NDArray[Any]) -> Values:
    """Return the means of at most POINTS runs of neighbours."""
    return np.array([part.mean() for part in np.array_split(values, min(POINTS, len(values)))])


def _by_rate(plan: Plan, epochs: int) -> tuple[Values, Values]:
    """Return a curve of the samples by falling rate: the share of the pool in %, and how often such a sample is seen, expected."""
    most = max(float(plan.rate(span).max(initial=0)) for span in plan.spans()) or 1.0
    counts = np.zeros(RATE_BINS + 1, np.int64)
    for span in plan.spans():
        places = np.rint(plan.rate(span) / most * RATE_BINS).astype(np.int64)
        counts += np.bincount(places, minlength=RATE_BINS + 1)
    found = np.flatnonzero(counts)[::-1]
    ends = np.cumsum(counts[found])
    at = np.linspace(0, plan.rows - 1, POINTS)
    chosen = found[np.searchsorted(ends, at, side="right")]
    return 100 * at / max(plan.rows - 1, 1), chosen.astype(np.float64) * (most / RATE_BINS * epochs)
