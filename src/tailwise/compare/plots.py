"""The plots of a comparison, as SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tailwise.extras import require
from tailwise.text import PLOT_STYLE, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"top1": "#222222", "head": "#4477aa", "medium": "#ccaa33", "few": "#cc4455"}
NAMES = {"top1": "top-1", "head": "head", "medium": "medium", "few": "few"}
ROW_INCHES = 0.45


def draw_plots(summary: Mapping[str, Any]) -> dict[str, str]:
    """Differences to the baseline with their intervals, and accuracies of all rows, for each set of classification.

    Args:
        summary: of `summarize`.

    Returns:
        {name of the file without .svg: SVG}; the same bytes for the same figures.

    Raises:
        UserError: matplotlib isn't installed.
    """
    require("train", "matplotlib", purpose="a plot")
    import matplotlib as mpl  # noqa: PLC0415  (an extra)

    with mpl.rc_context({**PLOT_STYLE, "svg.fonttype": "path"}):
        return _draw(summary)


def _draw(summary: Mapping[str, Any]) -> dict[str, str]:
    from matplotlib.figure import Figure  # noqa: PLC0415

    plots = {}
    for number, (name, known) in enumerate(summary["sets"].items()):
        metrics = [metric for metric in COLORS if metric in known]
        rows = [row for row in summary["rows"] if name in row["sets"]]
        others = [row for row in rows if row["row"] != summary["baseline"]]
        if not metrics or not rows:
            continue
        suffix = f"-{number + 1}" if number else ""
        compared = [row for row in others if row["sets"][name][metrics[0]]["difference"]]
        if compared:
            figure = Figure(figsize=(9, 1.3 + ROW_INCHES * len(compared)))
            _differences(figure, compared, name, metrics, summary["baseline"])
            plots[f"differences{suffix}"] = _svg(figure)
        figure = Figure(figsize=(9, 1.3 + ROW_INCHES * len(rows)))
        _accuracies(figure, rows, name, metrics)
        plots[f"accuracies{suffix}"] = _svg(figure)
    return plots


def _differences(
    figure: Figure, rows: Sequence[Mapping[str, Any]], name: str, metrics: Sequence[str], baseline: str
) -> None:
    axes = figure.add_subplot()
    axes.axvline(0, color="#999999", linewidth=1)
    for place, metric in enumerate(metrics):
        found = [row["sets"][name][metric]["difference"] for row in rows]
        shift = (place - (len(metrics) - 1) / 2) * 0.17
        ends = [[100 * (item["mean"] - (item["mean"] if item["low"] is None else item["low"])) for item in found],
                [100 * ((item["mean"] if item["high"] is None else item["high"]) - item["mean"]) for item in found]]  # fmt: skip
        axes.errorbar([100 * item["mean"] for item in found], [at + shift for at in range(len(rows))], xerr=ends, fmt="o",
                      markersize=4, linewidth=1.5, color=COLORS[metric], label=NAMES[metric])  # fmt: skip
    _frame(figure, [row["row"] for row in rows])
    axes.set_xlabel("points")
    axes.set_title(f"{plain(name)}: difference to {plain(baseline)}, 95 % interval", fontsize=11, loc="left")


def _accuracies(figure: Figure, rows: Sequence[Mapping[str, Any]], name: str, metrics: Sequence[str]) -> None:
    axes = figure.add_subplot()
    for place, metric in enumerate(metrics):
        found = [row["sets"][name][metric] for row in rows]
        shift = (place - (len(metrics) - 1) / 2) * 0.17
        axes.errorbar([100 * item["mean"] for item in found], [at + shift for at in range(len(rows))],
                      xerr=[100 * (item["sd"] or 0) for item in found], fmt="o", markersize=4, linewidth=1.5,
                      color=COLORS[metric], label=NAMES[metric])  # fmt: skip
    axes.set_xlim(left=0)
    _frame(figure, [row["row"] for row in rows])
    axes.set_xlabel("%")
    axes.set_title(f"{plain(name)}: accuracy, ± standard deviation over seeds", fontsize=11, loc="left")


def _frame(figure: Figure, names: Sequence[str]) -> None:
    axes = figure.axes[0]
    axes.set_yticks(range(len(names)), [*map(plain, names)])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, ncols=4, loc="upper left", bbox_to_anchor=(0, -0.5 / figure.get_figheight()), frameon=False)


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
