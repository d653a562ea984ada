"""The results of a comparison as a section of a page: differences with intervals, accuracy by frequency, plans, cost and settings.

Its plots are HTML with lines at percentages of a width: they need no library, follow the colours of the page, and their text is text,
which stays as large on a narrow screen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailwise.catalog.files import read_json
from tailwise.errors import NotFoundError, UnsupportedError
from tailwise.report.page import environment, safe
from tailwise.text import redacted

FORMAT = 1  # of summary.json
SUMMARY = "summary.json"
PLANS = "compare-"  # begins the names of plans that `compare` makes
METRICS = {
    "top1": "top-1",
    "mean_per_class": "mean per class",
    "head": "head",
    "medium": "medium",
    "few": "few",
    "text_retrieval@1": "text R@1",
    "image_retrieval@1": "image R@1",
    "mean_recall@1": "mean R@1",
}


def read_summary(folder: Path) -> dict[str, Any]:
    """Return the figures that `compare` wrote into a folder.

    Raises:
        UserError: the folder has no summary.json, or that of another command or version.
    """
    path = folder / SUMMARY
    if not path.is_file():
        raise NotFoundError(f"`study` {folder} has no {SUMMARY}: give the output folder of `tailwise compare`")
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT or "rests_on" not in found:
        remedy = "repeat `tailwise compare`, which trains nothing again"
        raise UnsupportedError(f"{path} is not of a comparison, or of another version of tailwise: {remedy}")
    return found


def study_section(summary: Mapping[str, Any]) -> Any:  # noqa: ANN401  (jinja2's)
    """Return the section of a page, as HTML, that shows a comparison; `summary` is what summary.json holds."""
    shown = environment()
    shown.filters |= {**FILTERS, "pairs": pairs, "hours": lambda seconds: f"{seconds / 3600:,.3f}"}
    axes = {name: _axis(summary["rows"], name) for name in summary["sets"]}
    curves = {name: found for name in summary["sets"] if (found := _curves(summary, name))}
    costs = [(row["cost"], len(row["seeds"])) for row in summary["rows"] if row["cost"]]
    seconds = sum((cost["train_seconds"] + cost["evaluate_seconds"]) * runs for cost, runs in costs)
    page = shown.get_template("study.html.j2").render(**summary, axes=axes, curves=curves, seconds=seconds)
    return safe(page)


# --- plots --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """An axis of `low` to `high`, from left to right, or from the bottom to the top if `upwards`."""

    low: float
    high: float
    upwards: bool = False

    def at(self, value: float) -> str:
        """Return the place of a value, as a percentage of the axis, from the left or the top."""
        share = (value - self.low) / (self.high - self.low)
        return f"{100 * (1 - share if self.upwards else share):.2f}%"

    @property
    def ticks(self) -> list[float]:
        """Round values, about five."""
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        return [round(step * at, 10) for at in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def _axis(rows: Sequence[Mapping[str, Any]], name: str) -> Axis | None:
    """Return the axis of all differences of a set; None if there are none."""
    found = [figure["difference"] for row in rows for figure in row["sets"].get(name, {}).values()]
    ends = [each[end] for each in found if each for end in ("low", "mean", "high") if each[end] is not None]
    if not ends:
        return None
    low, high = min(0, *ends), max(0, *ends)
    margin = 0.04 * (high - low) or 0.01
    return Axis(low - margin, high + margin)


def _curves(summary: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Return the accuracy of each row, and that of the baseline, by the classes' number of training samples; None without these."""
    curves = {row["row"]: row["curves"][name] for row in summary["rows"] if row["curves"].get(name)}
    bins = [item for curve in curves.values() for item in curve]
    if not bins:
        return None
    edges = min(item["from"] for item in bins), max(item["to"] for item in bins)
    x = Axis(_middle(edges[0], edges[0]) - 1, _middle(edges[1], edges[1]) + 0.2)
    y = Axis(0, 1.05 * max(item["mean"] + (item["sd"] or 0) for item in bins) or 1, upwards=True)
    points = {row: [_point(item, x, y) for item in curve] for row, curve in curves.items()}
    base = points.get(summary["baseline"], [])
    rows = {row: each for row, each in points.items() if row != summary["baseline"]} or points
    return {"rows": rows, "base": base, "ticks": [(tick, y.at(tick)) for tick in y.ticks], "edges": edges}


def _point(item: Mapping[str, Any], x: Axis, y: Axis) -> dict[str, Any]:
    """Return a bin of classes with its place, and those of its mean ± standard deviation."""
    error = item["sd"] or 0
    ends = [y.at(max(0, item["mean"] - error)), y.at(item["mean"] + error)]
    return {**item, "x": x.at(_middle(item["from"], item["to"])), "y": y.at(item["mean"]), "error": ends}


def _middle(least: int, greatest: int) -> float:
    """Return the place of frequencies on a logarithmic axis, 0 at one half."""
    return math.log2(max(0.5, math.sqrt(least * greatest)))


# --- figures as text ----------------------------------------------------------------------------------------------------


def percent(figure: Mapping[str, Any]) -> str:
    """Return a share as text, in %: the mean and the standard deviation over seeds."""
    deviation = "" if figure["sd"] is None else f" ± {100 * figure['sd']:.2f}"
    return f"{100 * figure['mean']:.2f}{deviation}"


def points(difference: Mapping[str, Any] | None) -> str:
    """Return a difference as text, in points, with its interval: * if that excludes 0, ** if it does so after Holm's correction, too."""
    if difference is None:
        return "–"
    mean = f"{100 * difference['mean']:+.2f}"
    if difference["low"] is None:
        return mean
    mark = "" if not difference["significant"] else "**" if difference["p_holm"] < 0.05 else "*"
    return f"{mean}{mark} ({100 * difference['low']:+.2f} … {100 * difference['high']:+.2f})"


def views(plan: Mapping[str, Any]) -> str:
    """Return how often a training sees each candidate: mean, and least to most."""
    seen = plan["exposures"]
    if not seen:
        return "–"
    bounds = "" if seen["least"] is None else f" ({seen['least']} … {seen['most']})"
    return f"{seen['mean']:.2f}{bounds}"


def pairs(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and value of each setting, as text, without those that have none."""
    for name, value in values.items():
        label = name.replace("_", " ")
        if isinstance(value, Mapping):
            yield from ((f"{label} {inner}", text) for inner, text in pairs(value))
        elif value not in (None, "", []):
            yield label, _as_text(value)


def in_words(values: Mapping[str, Any]) -> str:
    """Return settings as one line: method dynamics, keep 0.5."""
    return ", ".join(f"{name} {text}" for name, text in pairs(values))


def _as_text(value: Any) -> str:  # noqa: ANN401  (JSON values)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return in_words(value)
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_as_text, value))})" if len(value) > 1 else "".join(map(_as_text, value))
    return redacted(value) if isinstance(value, str) else f"{value:,.6g}" if isinstance(value, float) else f"{value:,}"


FILTERS: dict[str, Callable[..., str]] = {
    "named": METRICS.__getitem__, "percent": percent, "points": points, "views": views, "settings": in_words
}  # fmt: skip
