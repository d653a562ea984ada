"""A plot of a plan, as SVG: size and quota of each cluster, and the share of the pool that the epochs cover."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from tailwise.catalog.outputs import is_text, writing_output
from tailwise.errors import UserError
from tailwise.extras import require
from tailwise.plan.explain import explain
from tailwise.plan.plan import Plan
from tailwise.plan.quotas import UNITS
from tailwise.text import PLOT_STYLE, plain

POOL, DRAWN = "#b8bec6", "#1f6f8b"


def write_plot(plan: Plan, epochs: int, path: Path, *, overwrite: bool = False) -> None:
    """Write the plot of a plan; see `plot_plan` and `writing_output`."""
    with writing_output(path, plan.catalog, overwrite=overwrite, is_ours=is_text("<?xml")) as temporary:
        temporary.write_text(plot_plan(plan, epochs), encoding="utf-8")


def plot_plan(plan: Plan, epochs: int) -> str:
    """Return the plot of a plan by clusters, with the coverage of its first epochs; the same SVG bytes for the same plan and versions."""
    if plan.by_rate:
        raise UserError(f"plan {plan.name!r} carries a rate per sample and has no clusters to plot: leave `plot` out")
    require("train", "matplotlib", purpose="`plot`")
    import matplotlib as mpl  # noqa: PLC0415  (an extra)
    from matplotlib.figure import Figure  # noqa: PLC0415

    order = np.argsort(-plan.sizes, kind="stable")
    order = order[plan.sizes[order] > 0]
    sizes, quotas = plan.sizes[order], plan.quotas[order] / UNITS
    shown = explain(plan, epochs).epochs
    style = PLOT_STYLE | {"svg.fonttype": "path", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=(8, 2.8), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(5, 3))
        ranks = np.arange(1, len(order) + 1)
        left.fill_between(ranks, sizes, 0.5, step="mid", color=POOL, label="in the pool", linewidth=0)
        left.fill_between(ranks, quotas, 0.5, step="mid", color=DRAWN, alpha=0.85, label="in one epoch", linewidth=0)
        left.set(yscale="log", ylim=(0.5, None), xlim=(0.5, len(order) + 0.5))
        left.set(xlabel="clusters, from the largest to the smallest", ylabel="samples")
        left.yaxis.set_major_formatter("{x:,.0f}")
        left.legend(frameon=False)
        left.set_title(plain(f"plan {plan.name}: {plan.config['method']}"), loc="left")
        covered = [100 * each.covered / plan.rows for each in shown]
        right.plot(range(1, epochs + 1), covered, color=DRAWN, marker="o", markersize=3)
        budget = 100 * shown[0].total / plan.rows
        right.axhline(budget, color=POOL, zorder=0)
        right.text(epochs + 0.3, budget - 2, "budget of an epoch", ha="right", va="top", color="#66707a")
        right.set(ylim=(0, 102), xlabel="epochs", ylabel="% of the pool shown")
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
