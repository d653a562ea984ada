"""Summary of a comparison: means, paired differences and their significance, costs, and the settings behind them."""

from __future__ import annotations

import csv
import html
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tailwise.catalog import Catalog, layout
from tailwise.catalog.artifacts import find_manifest
from tailwise.catalog.drops import Survivors
from tailwise.catalog.files import read_json, write_json
from tailwise.compare.recipe import CompareRecipe
from tailwise.compare.statistics import Difference, detectable, holm, paired, spread
from tailwise.compare.treatment import treatment_notes
from tailwise.errors import UserError
from tailwise.extras import require
from tailwise.storage.local import replacing
from tailwise.text import plain, spreadsheet_cell

METRICS = {
    "top1": "top-1",
    "mean_per_class": "mean per class",
    "head": "head",
    "medium": "medium",
    "few": "few",
    "text_retrieval@1": "text R@1",
    "image_retrieval@1": "image R@1",
}
ALL_SETS = "mean over sets"
Results = Sequence[Mapping[str, Any]]


def figures(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the figures of one run, {set: {metric: share}}; for several classification sets, also their mean."""
    found: dict[str, dict[str, float]] = {}
    for item in result["evaluations"]:
        if item["task"] == "classification":
            values = {name: item[name]["value"] for name in ("top1", "mean_per_class")}
            values |= {name: group["accuracy"]["value"] for name, group in item["groups"].items()}
        else:
            values = {f"{name}@1": item[name]["1"]["value"] for name in ("text_retrieval", "image_retrieval")}
        found[item["set"]] = {name: value for name, value in values.items() if value is not None}
    classified = [found[item["set"]] for item in result["evaluations"] if item["task"] == "classification"]
    if len(classified) > 1:
        shared = [name for name in METRICS if all(name in values for values in classified)]
        found[ALL_SETS] = {name: sum(values[name] for values in classified) / len(classified) for name in shared}
    return found


def summarize(recipe: CompareRecipe, results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return all figures of a comparison, from the results of its finished runs, as JSON values."""
    done = list(results)
    by_row = {row.name: {item["seed"]: item for item in done if item["row"] == row.name} for row in recipe.rows}
    baseline = recipe.row(recipe.baseline).name
    shown = {name: {seed: figures(item) for seed, item in runs.items()} for name, runs in by_row.items()}
    sets = {
        name: [metric for metric in METRICS if metric in values]
        for runs in shown.values()
        for run in runs.values()
        for name, values in run.items()
    }
    rows = [
        {
            "row": row.name,
            "options": dict(row.plan),
            "compose": row.compose,
            "seeds": sorted(by_row[row.name]),
            **_about_runs(list(by_row[row.name].values())),
            "sets": {
                name: {
                    metric: _figure(shown[row.name], shown[baseline], name, metric, is_baseline=row.name == baseline)
                    for metric in metrics
                }
                for name, metrics in sets.items()
                if shown[row.name]
            },
        }
        for row in recipe.rows
    ]
    found = {name: {metric: _differences(rows, name, metric) for metric in metrics} for name, metrics in sets.items()}
    for metrics in found.values():
        for differences in metrics.values():
            _adjust([item for _, item in differences if item["p"] is not None])
    return {
        "name": recipe.name,
        "about": " ".join(recipe.about.split()),
        "baseline": baseline,
        "seeds": list(recipe.seeds),
        "runs": {"done": len(done), "all": len(recipe.rows) * len(recipe.seeds)},
        "sets": sets,
        "rows": rows,
        "power": {
            name: {metric: _power(item for _, item in differences) for metric, differences in metrics.items()}
            for name, metrics in found.items()
        },
        "words": {
            name: {metric: _words(differences, baseline) for metric, differences in metrics.items()}
            for name, metrics in found.items()
        },
        "treatments": treatment_notes(rows, baseline),
        "rests_on": _rests_on(recipe, done),
    }


def _figure(
    mine: Mapping[int, Mapping[str, Mapping[str, float]]],
    others: Mapping[int, Mapping[str, Mapping[str, float]]],
    name: str,
    metric: str,
    *,
    is_baseline: bool,
) -> dict[str, Any]:
    found = asdict(spread([run[name][metric] for run in mine.values()]))
    shared = sorted(set(mine) & set(others))
    if is_baseline or not shared:
        return {**found, "difference": None}
    difference = paired([mine[seed][name][metric] for seed in shared], [others[seed][name][metric] for seed in shared])
    return {**found, "difference": {**asdict(difference), "significant": difference.significant}}


def _differences(rows: Results, name: str, metric: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows that have a difference to the baseline, and this difference."""
    known = [(row["row"], row["sets"][name][metric]["difference"]) for row in rows if name in row["sets"]]
    return [(row, item) for row, item in known if item is not None]


def _adjust(differences: Sequence[dict[str, Any]]) -> None:
    """Add to each difference its p-value adjusted for the number of differences."""
    for item, p in zip(differences, holm([item["p"] for item in differences]), strict=True):
        item["p_holm"] = p


def _power(differences: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the least difference that the seeds detect, by the pooled spread of all rows; None with fewer than two seeds."""
    known = [item for item in differences if item["sd"] is not None]
    if not known:
        return None
    most = max(item["n"] for item in known)
    squares = [item["sd"] ** 2 for item in known if item["n"] == most]
    pooled = math.sqrt(sum(squares) / len(squares))
    return {"n": most, "sd": pooled, "detectable": detectable(pooled, most)}


def _words(differences: Iterable[tuple[str, Mapping[str, Any]]], baseline: str) -> str:
    """Return sentences on which differences to the baseline are significant, and which are not."""
    better, worse, neither = f"Significantly better than {baseline}", "Significantly worse", "Not significant"
    single = "One seed only, so nothing can be said"
    verdicts: dict[str, list[str]] = {better: [], worse: [], neither: [], single: []}
    for row, item in differences:
        mean, significant = 100 * item["mean"], item["significant"]
        if significant is None:
            verdicts[single].append(f"{row} ({mean:+.2f})")
            continue
        interval = f"{100 * item['low']:+.2f} … {100 * item['high']:+.2f}"
        note = ", not after Holm" if significant and item["p_holm"] >= 0.05 else ""
        verdict = neither if not significant else better if mean > 0 else worse
        verdicts[verdict].append(f"{row} ({mean:+.2f}; {interval}{note})")
    return " ".join(f"{verdict}: {'; '.join(items)}." for verdict, items in verdicts.items() if items)


def _about_runs(runs: Results) -> dict[str, Any]:
    """Return budget, plan and cost of a row's runs; means over its seeds."""
    if not runs:
        return {"plan": None, "cost": None}
    config = runs[0]["plan"]["config"]
    seconds = _mean(item["trained"]["seconds"] for item in runs)
    samples = runs[0]["trained"]["samples"]
    epochs = [item["trained"]["epochs"] for item in runs if item["trained"]["epochs"] is not None]
    return {
        "plan": {
            "draws": runs[0]["plan"]["draws"],
            "eligible": runs[0]["plan"]["eligible"],
            "exposures": runs[0]["plan"].get("exposures"),  # runs of earlier versions have none
            "dynamic": config.get("dynamic"),
            "draw": config.get("draw"),
            "clustering": config.get("clustering"),
            "without": config.get("without"),
        },
        "cost": {
            "samples_seen": samples,
            "train_seconds": seconds,
            "samples_per_second": samples / seconds,
            "evaluate_seconds": _mean(item["evaluate_seconds"] for item in runs),
            "unique_seen": _mean(item["trained"]["unique"] for item in runs),
            "epochs": max(epochs, default=None),
            "last_loss": _mean(item["trained"]["last_loss"] for item in runs),
        },
    }


def _mean(values: Iterable[float | None]) -> Any:  # noqa: ANN401  (a float; None if all values are None)
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _rests_on(recipe: CompareRecipe, done: Results) -> dict[str, Any]:
    """Return the training, encoders, clusterings, drop lists, versions and machines behind the results."""
    catalog = Catalog.open(recipe.catalog)
    configs = [item["plan"]["config"] for item in done]
    clusterings = {str(config["clustering"]) for config in configs if config.get("clustering")}
    lists = {str(name) for config in configs for name in config.get("without") or ()}
    settings = {name: _settings(catalog.clusters_folder(name)) for name in sorted(clusterings)}
    columns = {item.get("column") or "image" for item in settings.values()}
    encoders = {name: _json(catalog.embedding_folder(name) / layout.COLUMN) for name in sorted(columns)}
    unlike = sorted({item["trained"]["samples"] for item in done})
    if len(unlike) > 1:
        raise UserError(f"runs have seen {unlike} samples: must be one number to compare them; give another `output`")
    return {
        "samples_seen": unlike[0] if unlike else None,
        "pool": Survivors(catalog, (), catalog.snapshot()).pool,
        "train": asdict(recipe.train),
        "evaluate": {name: str(value) for name, value in recipe.evaluate.items()},
        "embeddings": encoders,
        "clusterings": settings,
        "drop_lists": {name: _settings(catalog.drops_folder(name)) for name in sorted(lists)},
        "versions": _each([item["versions"] for item in done]),
        "machines": _each([{**item["machine"], "device": item["trained"]["device"]} for item in done]),
    }


def _each(values: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    different: list[dict[str, Any]] = []
    for value in values:
        if dict(value) not in different:
            different.append(dict(value))
    return different


def _settings(folder: Path) -> dict[str, Any]:
    manifest = find_manifest(folder)
    return {**manifest["identity"]["config"], "found": manifest["summary"]} if manifest else {}


def _json(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.exists() else {}


# --- files --------------------------------------------------------------------------------------------------------------


def write_summary(output: Path, summary: Mapping[str, Any], *, plots: bool = True) -> None:
    """Write results.csv, summary.json and summary.md; with `plots`, which takes seconds, also summary.html and the plots."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "summary.json", summary, unique=True)
    _write(output / "results.csv", results_csv(summary))
    drawn: dict[str, str] = {}
    if plots:
        from tailwise.compare.plots import draw_plots  # noqa: PLC0415  (matplotlib is an extra)

        drawn = draw_plots(summary)
        for name, content in drawn.items():
            _write(output / f"{name}.svg", content)
    _write(output / "summary.md", _render("summary.md.j2", summary, drawn, markdown))
    if plots:
        _write(output / "summary.html", _render("summary.html.j2", summary, drawn))


def _write(path: Path, text: str) -> None:
    with replacing(path, unique=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def results_csv(summary: Mapping[str, Any]) -> str:
    """Return the table as CSV, a line for each row, set and metric; shares, not percentages."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = [item for item in Difference.__dataclass_fields__ if item != "n"]
    writer.writerow(["row", "set", "metric", "seeds", "mean", "sd", *(f"difference_{name}" for name in names),
                     "difference_p_holm", "significant", "train_seconds", "samples_per_second"])  # fmt: skip
    for row in summary["rows"]:
        for name, metrics in row["sets"].items():
            for metric, figure in metrics.items():
                texts = spreadsheet_cell(row["row"]), spreadsheet_cell(name), metric
                difference = figure["difference"] or {}
                values = [difference.get(item) for item in [*names, "p_holm", "significant"]]
                values += [row["cost"]["train_seconds"], row["cost"]["samples_per_second"]]
                writer.writerow([*texts, figure["n"], figure["mean"], figure["sd"], *values])
    return stream.getvalue()


def summary_text(summary: Mapping[str, Any]) -> str:
    """Return the text of summary.md for a terminal, without Markdown's escapes."""
    return _render("summary.md.j2", summary, {}, plain)


def markdown(text: object) -> str:
    """Return text that Markdown shows literally: no markup, table cells, links or HTML."""
    escaped = re.sub(r"[\\`*#|~\[\]]", r"\\\g<0>", html.escape(plain(text), quote=False))
    return escaped.replace("://", "&#58;//").replace("www.", "www&#46;")


def _render(
    template: str, summary: Mapping[str, Any], plots: Mapping[str, str], shown: Callable[[object], str] = plain
) -> str:
    require("train", "jinja2", purpose="a summary")
    import jinja2  # noqa: PLC0415  (an extra)

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tailwise.compare"),
        autoescape=template.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: shown(value) if type(value) is str else value,  # leaves out the SVG of plots, a Markup
    )
    environment.filters |= {"views": _views, "percent": _percent, "points": _points, "settings": _in_words}
    return environment.get_template(template).render(**summary, metric_names=METRICS, plots=plots)


def _percent(figure: Mapping[str, Any]) -> str:
    deviation = "" if figure["sd"] is None else f" ± {100 * figure['sd']:.2f}"
    return f"{100 * figure['mean']:.2f}{deviation}"


def _views(plan: Mapping[str, Any]) -> str:
    """Return how often a training sees each candidate: mean, and least to most."""
    seen = plan["exposures"]
    if not seen:
        return "–"
    bounds = "" if seen["least"] is None else f" ({seen['least']} … {seen['most']})"
    return f"{seen['mean']:.2f}{bounds}"


def _points(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return "–"
    mean = f"{100 * difference['mean']:+.2f}"
    if difference["low"] is None:
        return mean
    mark = "*" if difference["significant"] else ""
    return f"{mean}{mark} ({100 * difference['low']:+.2f} … {100 * difference['high']:+.2f})"


def _in_words(values: Mapping[str, Any]) -> str:
    """Return settings as text, without empty ones."""
    return ", ".join(f"{name} {value}" for name, value in values.items() if value not in (None, "", [], {}, "found"))
