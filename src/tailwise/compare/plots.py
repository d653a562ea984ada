"""The plots of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tailwise.extras import STYLE, encode, require
from tailwise.text import plain

COLORS = {"top1": "#222222", "head": "#4477aa", "medium": "#ccaa33", "few": "#cc4455"}
Bar = tuple[float, float, float]  # mean, and lengths of the error bar below and above


def draw_plots(summary: Mapping[str, Any], *, png: bool = False) -> dict[str, bytes]:
    """Return {file name: SVG or, if `png`, PNG} of each classification set: differences to the baseline with intervals, and all accuracies.

    The same figures give the same bytes.
    """
    require("train", "matplotlib", purpose="a plot")
    import matplotlib as mpl  # noqa: PLC0415  (an extra)

    with mpl.rc_context({**STYLE, "svg.fonttype": "path"}):
        plots = {name: encode(figure, png=png, bbox_inches="tight") for name, figure in _figures(summary)}
    return {f"{name}{suffix}": content for name, files in plots.items() for suffix, content in files.items()}


def _figures(summary: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the name and the figure of each plot."""
    for number, (name, known) in enumerate(summary["sets"].items()):
        metrics = [metric for metric in COLORS if metric in known]
        rows = {row["row"]: row["sets"][name] for row in summary["rows"] if name in row["sets"]}
        if not metrics or not rows:
            continue
        suffix = f"-{number + 1}" if number else ""
        if compared := {row: found for row, found in rows.items() if found[metrics[0]]["difference"]}:
            found_of = {metric: [found[metric]["difference"] for found in compared.values()] for metric in metrics}
            differences = {metric: [*map(_difference, found)] for metric, found in found_of.items()}
            title = f"{plain(name)}: difference to {plain(summary['baseline'])}, 95 % interval"
            yield f"differences{suffix}", _plot([*compared], differences, title, "points")
        accuracies = {metric: [_accuracy(found[metric]) for found in rows.values()] for metric in metrics}
        title = f"{plain(name)}: accuracy, ± standard deviation over seeds"
        yield f"accuracies{suffix}", _plot([*rows], accuracies, title, "%")


def _difference(found: Mapping[str, float | None]) -> Bar:
    mean, low, high = found["mean"] or 0, found["low"], found["high"]
    return 100 * mean, 100 * (mean - (mean if low is None else low)), 100 * ((mean if high is None else high) - mean)


def _accuracy(found: Mapping[str, float | None]) -> Bar:
    error = 100 * (found["sd"] or 0)
    return 100 * (found["mean"] or 0), error, error


def _plot(names: Sequence[str], bars: Mapping[str, Sequence[Bar]], title: str, unit: str) -> Any:  # noqa: ANN401  (matplotlib is an extra)
    """Return a plot with a line per name, and a bar per metric on each line."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(9, 1.3 + 0.45 * len(names)))
    axes = figure.add_subplot()
    if unit == "points":
        axes.axvline(0, color="#999999", linewidth=1)
    for place, (metric, found) in enumerate(bars.items()):
        shift = (place - (len(bars) - 1) / 2) * 0.17
        means, below, above = zip(*found, strict=True)
        axes.errorbar(means, [at + shift for at in range(len(names))], xerr=[below, above], fmt="o",
                      markersize=4, linewidth=1.5, color=COLORS[metric], label=metric.replace("top1", "top-1"))  # fmt: skip
    if unit == "%":
        axes.set_xlim(left=0)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_yticks(range(len(names)), [*map(plain, names)])
    axes.set(xlabel=unit, ylim=(len(names) - 0.5, -0.5))
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, ncols=4, loc="upper left", bbox_to_anchor=(0, -0.5 / figure.get_figheight()), frameon=False)
    return figure
