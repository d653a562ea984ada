"""The files of an evaluation: summary.json, and the classes and the curve of each classification set. Every run writes the same bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv as pa_csv

from tailwise.catalog.files import read_json, write_json
from tailwise.catalog.outputs import check_output_folder, for_spreadsheets
from tailwise.errors import ConflictError, UserError
from tailwise.evaluate.run import Evaluation, mean_over_sets
from tailwise.extras import STYLE, encode, require
from tailwise.storage.local import replacing
from tailwise.text import plain

SUMMARY = "summary.json"


def check_output(folder: Path, config: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Refuse a folder with another evaluation (unless `overwrite`) or other files; `config` decides the figures, as JSON values."""
    require("train", "matplotlib", purpose="`output`, which draws plots,")
    check_output_folder(folder, "`output`", marks=[SUMMARY, "classes-*.csv", "curve-*.svg"])
    if not (folder / SUMMARY).exists():
        return
    found = read_json(folder / SUMMARY)
    if not isinstance(found, dict) or not isinstance(found.get("config"), dict) or "sets" not in found:
        raise UserError(f"{folder / SUMMARY} is of no evaluation: give `output` a new or an empty folder")
    if not overwrite and found["config"] != config:
        other = ", ".join(name for name in config if found["config"].get(name) != config[name])
        raise ConflictError(f"{folder} holds another evaluation ({other}): give another folder, or `overwrite`")


def write_output(
    folder: Path,
    config: Mapping[str, Any],
    evaluations: Sequence[Evaluation],
    suite: Mapping[str, Any] | None = None,
    *,
    png: bool = False,
) -> None:
    """Write the files of the evaluations, each atomically; summary.json last. Curves are SVG and, if `png`, PNG too."""
    for item in evaluations:
        name = re.sub(r"[^\w.-]+", "-", item.name)
        if item.classes is not None:
            with replacing(folder / f"classes-{name}.csv", unique=True) as temporary:
                pa_csv.write_csv(for_spreadsheets(item.classes), temporary)
            if item.summary["curve"]:
                for suffix, content in draw_curve(item, png=png).items():
                    with replacing(folder / f"curve-{name}{suffix}", unique=True) as temporary:
                        temporary.write_bytes(content)
    write_json(folder / SUMMARY, {"config": dict(config), **as_json(evaluations, suite)}, unique=True)


def as_json(evaluations: Sequence[Evaluation], suite: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the figures of all sets, their mean, and the table of a suite, as JSON values."""
    table = {} if suite is None else {"suite": dict(suite)}
    return {"sets": [dict(item.summary) for item in evaluations], "mean": mean_over_sets(evaluations), **table}


def draw_curve(evaluation: Evaluation, *, png: bool = False) -> dict[str, bytes]:
    """Return the plot of an evaluation: a point per class, and the mean of each bin with its interval; see `encode`."""
    import matplotlib as mpl  # noqa: PLC0415  (an extra, and slow to import)
    from matplotlib.figure import Figure  # noqa: PLC0415

    table = evaluation.classes
    if table is None:
        raise ValueError("a retrieval set has no curve")
    counts, accuracy = (table[name].to_numpy().astype(np.float64) for name in ("train_count", "accuracy"))
    curve = [item for item in evaluation.summary["curve"] if item["accuracy"] is not None]
    middle = [max(0.5, (item["from"] * item["to"]) ** 0.5) for item in curve]
    means, low, high = (100 * np.array([item[name] for item in curve]) for name in ("accuracy", "low", "high"))
    # Text as text, and no random ids or dates: the same figures give the same bytes.
    with mpl.rc_context({**STYLE, "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        look: dict[str, Any] = {"s": 9, "color": "#8aa4c8", "alpha": 0.6, "linewidths": 0}
        axes.scatter(np.maximum(counts, 0.5), 100 * accuracy, label="class", **look)
        axes.errorbar(
            middle, means, yerr=np.maximum(0, [means - low, high - means]), color="#1f3f77", marker="o", markersize=4,
            linewidth=1.5, capsize=3, label="mean of the classes of a bin, 95 % interval",
        )  # fmt: skip
        axes.set_xscale("log", base=2)
        ticks = sorted({0.5 if item["from"] == 0 else float(item["from"]) for item in curve})
        axes.set_xticks(ticks, [f"{tick:,.0f}" if tick >= 1 else "0" for tick in ticks])
        axes.minorticks_off()
        top = max(10.0, 105 * float(np.nanmax(accuracy)))
        axes.set(ylim=(-0.02 * top, top), xlabel="training samples of the class")
        axes.set_ylabel("zero-shot accuracy of the class (%)")
        axes.set_title(f"{plain(evaluation.name)}: top-1 {100 * evaluation.summary['top1']['value']:.1f} %", loc="left")
        axes.grid(visible=True, linewidth=0.4, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(frameon=False, loc="outside lower center", ncols=2)
        return encode(figure, png=png)
