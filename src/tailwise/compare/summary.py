"""What the runs say together: means, paired differences, what is not significant, and what it all rests on."""

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
    """The figures of one run, {set: {metric: share}}; with more than one set of classification, their mean as well."""
    found: dict[str, dict[str, float]] = {}
    for item in result["evaluations"]:
        if item["task"] == "classification":
            values = {name: item[name]["value"] for name in ("top1", "mean_per_class")}
            values |= {name: group["accuracy"]["value"] for name, group in item["groups"].items()}
        else:
            values = {
                name: item[name.partition("@")[0]]["1"]["value"] for name in ("text_retrieval@1", "image_retrieval@1")
            }
        found[item["set"]] = {name: value for name, value in values.items() if value is not None}
    classified = [found[item["set"]] for item in result["evaluations"] if item["task"] == "classification"]
    if len(classified) > 1:
        shared = [name for name in METRICS if all(name in values for values in classified)]
        found[ALL_SETS] = {name: sum(values[name] for values in classified) / len(classified) for name in shared}
    return found


def summarize(recipe: CompareRecipe, results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """All figures of a comparison, as JSON values.

    Args:
        recipe: what is compared.
        results: of the runs that are done.
    """
    done = list(results)
    by_row = {row.name: {item["seed"]: item for item in done if item["row"] == row.name} for row in recipe.rows}
    baseline = recipe.row(recipe.baseline).name
    shown = {name: {seed: figures(item) for seed, item in runs.items()} for name, runs in by_row.items()}
    sets: dict[str, list[str]] = {}
    for runs in shown.values():
        for run in runs.values():
            for name, values in run.items():
                sets[name] = [metric for metric in METRICS if metric in values]
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
    for name, metrics in sets.items():
        for metric in metrics:
            _adjust(rows, name, metric)
    return {
        "name": recipe.name,
        "about": " ".join(recipe.about.split()),
        "baseline": baseline,
        "seeds": list(recipe.seeds),
        "runs": {"done": len(done), "all": len(recipe.rows) * len(recipe.seeds)},
        "sets": sets,
        "rows": rows,
        "power": {name: {metric: _power(rows, name, metric) for metric in metrics} for name, metrics in sets.items()},
        "words": {
            name: {metric: _words(rows, baseline, name, metric) for metric in metrics} for name, metrics in sets.items()
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


def _adjust(rows: Sequence[Mapping[str, Any]], name: str, metric: str) -> None:
    """Adds to each difference its p-value adjusted for all rows of the metric."""
    differences = [row["sets"][name][metric]["difference"] for row in rows if name in row["sets"]]
    tested = [item for item in differences if item is not None and item["p"] is not None]
    for item, p in zip(tested, holm([item["p"] for item in tested]), strict=True):
        item["p_holm"] = p


def _power(rows: Sequence[Mapping[str, Any]], name: str, metric: str) -> dict[str, Any] | None:
    """What the seeds can detect, by the spread of all rows' differences together; None with fewer than two seeds."""
    differences = [row["sets"][name][metric]["difference"] for row in rows if name in row["sets"]]
    known = [item for item in differences if item is not None and item["sd"] is not None]
    if not known:
        return None
    most = max(item["n"] for item in known)
    pooled = math.sqrt(
        sum(item["sd"] ** 2 for item in known if item["n"] == most) / sum(item["n"] == most for item in known)
    )
    return {"n": most, "sd": pooled, "detectable": detectable(pooled, most)}


def _words(rows: Sequence[Mapping[str, Any]], baseline: str, name: str, metric: str) -> str:
    """Which differences to the baseline are significant, and which are not."""
    better: list[str] = []
    worse: list[str] = []
    neither: list[str] = []
    single: list[str] = []
    for row in rows:
        difference = row["sets"].get(name, {}).get(metric, {}).get("difference")
        if difference is None:
            continue
        told = f"{row['row']} ({100 * difference['mean']:+.2f}"
        if difference["significant"] is None:
            single.append(f"{told})")
            continue
        told += f"; {100 * difference['low']:+.2f} … {100 * difference['high']:+.2f}"
        told += ", not after Holm)" if difference["significant"] and difference["p_holm"] >= 0.05 else ")"
        (neither if not difference["significant"] else better if difference["mean"] > 0 else worse).append(told)
    parts = [
        f"{verdict}: {'; '.join(items)}."
        for verdict, items in (
            (f"Significantly better than {baseline}", better),
            ("Significantly worse", worse),
            ("Not significant", neither),
            ("One seed only, so nothing can be said", single),
        )
        if items
    ]
    return " ".join(parts)


def _about_runs(runs: Results) -> dict[str, Any]:
    """Budget, plan and cost of a row's runs; means over its seeds."""
    if not runs:
        return {"plan": None, "cost": None}
    config = runs[0]["plan"]["config"]
    seconds = sum(item["trained"]["seconds"] for item in runs) / len(runs)
    samples = runs[0]["trained"]["samples"]
    seen = [item["trained"]["unique"] for item in runs if item["trained"]["unique"] is not None]
    epochs = [item["trained"]["epochs"] for item in runs if item["trained"]["epochs"] is not None]
    losses = [item["trained"]["last_loss"] for item in runs if item["trained"]["last_loss"] is not None]
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
            "evaluate_seconds": sum(item["evaluate_seconds"] for item in runs) / len(runs),
            "unique_seen": sum(seen) / len(seen) if seen else None,
            "epochs": max(epochs) if epochs else None,
            "last_loss": sum(losses) / len(losses) if losses else None,
        },
    }


def _rests_on(recipe: CompareRecipe, done: Results) -> dict[str, Any]:
    """Training, encoder, clusterings, drop lists, versions and machines."""
    catalog = Catalog.open(recipe.catalog)
    configs = [item["plan"]["config"] for item in done]
    clusterings = {str(config["clustering"]) for config in configs if config.get("clustering")}
    lists = {str(name) for config in configs for name in config.get("without") or ()}
    settings = {name: _settings(catalog.clusters_folder(name)) for name in sorted(clusterings)}
    columns = {item.get("column") or "image" for item in settings.values()}
    encoders = {name: _json(catalog.embedding_folder(name) / layout.COLUMN) for name in sorted(columns)}
    unlike = sorted({item["trained"]["samples"] for item in done})
    if len(unlike) > 1:
        raise UserError(f"runs have seen {unlike} samples: they can't be compared; give another `output`")
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
    """Writes results.csv, summary.json, summary.md and, with plots, summary.html and the plots.

    Args:
        output: folder.
        summary: of `summarize`.
        plots: whether to draw them, which takes seconds.

    Raises:
        UserError: jinja2 or matplotlib isn't installed.
    """
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
    """The table as CSV, a line for each row, set and metric; shares, not percentages."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = [item for item in Difference.__dataclass_fields__ if item != "n"]
    writer.writerow(["row", "set", "metric", "seeds", "mean", "sd", *(f"difference_{name}" for name in names),
                     "difference_p_holm", "significant", "train_seconds", "samples_per_second"])  # fmt: skip
    for row in summary["rows"]:
        for name, metrics in row["sets"].items():
            for metric, figure in metrics.items():
                difference = figure["difference"] or {}
                values = [
                    spreadsheet_cell(row["row"]),
                    spreadsheet_cell(name),
                    metric,
                    figure["n"],
                    figure["mean"],
                    figure["sd"],
                ]
                values += [difference.get(item) for item in [*names, "p_holm", "significant"]]
                writer.writerow([*values, row["cost"]["train_seconds"], row["cost"]["samples_per_second"]])
    return stream.getvalue()


def summary_text(summary: Mapping[str, Any]) -> str:
    """Return what summary.md says, for a terminal: text from outside as given, without Markdown's escapes."""
    return _render("summary.md.j2", summary, {}, plain)


def markdown(text: object) -> str:
    """Return text that Markdown shows as it is: no markup, no table cells, no links, no HTML."""
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
        finalize=lambda value: shown(value) if type(value) is str else value,  # the SVG of plots is Markup
    )
    environment.filters |= {"views": _views, "percent": _percent, "points": _points, "settings": _in_words}
    return environment.get_template(template).render(**summary, metric_names=METRICS, plots=plots)


def _percent(figure: Mapping[str, Any]) -> str:
    spread_of = "" if figure["sd"] is None else f" ± {100 * figure['sd']:.2f}"
    return f"{100 * figure['mean']:.2f}{spread_of}"


def _views(plan: Mapping[str, Any]) -> str:
    """How often a training sees each sample that the plan may draw: mean, and least to most."""
    if not plan["exposures"]:
        return "–"
    seen = plan["exposures"]
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
    """Settings as text, those left out that say nothing."""
    return ", ".join(f"{name} {value}" for name, value in values.items() if value not in (None, "", [], {}, "found"))
