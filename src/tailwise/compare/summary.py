"""Summary of a comparison: means, paired differences and their significance, costs, and the settings behind them."""

from __future__ import annotations

import csv
import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from tailwise import __version__
from tailwise.catalog import Catalog, layout
from tailwise.catalog.artifacts import find_manifest
from tailwise.catalog.drops import Survivors
from tailwise.catalog.files import read_json, write_json
from tailwise.compare.ledger import Ledger, ledger_table
from tailwise.compare.recipe import CompareRecipe
from tailwise.compare.statistics import Difference, detectable, holm, paired, spread
from tailwise.evaluate.sets import TASKS
from tailwise.extras import require
from tailwise.plan.plan import Plan
from tailwise.report.page import render
from tailwise.report.study import FILTERS, FORMAT, METRICS, SUMMARY, study_section
from tailwise.storage.local import replacing
from tailwise.text import plain, spreadsheet_cell

ALL_SETS = "mean over sets"
Results = Sequence[Mapping[str, Any]]
Figures = Mapping[int, Mapping[str, Mapping[str, float]]]  # of a row: by seed, set and metric


def figures(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the figures of one run, {set: {metric: share}}; for several sets, also means over classification and over retrieval sets."""
    found: dict[str, dict[str, float]] = {}
    for item in result["evaluations"]:
        if item["task"] == "classification":
            values = {name: item[name]["value"] for name in ("top1", "mean_per_class")}
            values |= {name: group["accuracy"]["value"] for name, group in item["groups"].items()}
        else:
            values = {
                f"{name}@1": item[name]["1"]["value"] for name in ("text_retrieval", "image_retrieval", "mean_recall")
            }
        found[item["set"]] = {name: value for name, value in values.items() if value is not None}
    if len(found) > 1:
        tasks = [[found[item["set"]] for item in result["evaluations"] if item["task"] == task] for task in TASKS]
        shared = [(name, sets) for name in METRICS for sets in tasks if sets and all(name in values for values in sets)]
        found[ALL_SETS] = {name: sum(values[name] for values in sets) / len(sets) for name, sets in shared}
    return found


def summarize(
    recipe: CompareRecipe,
    results: Iterable[Mapping[str, Any]],
    gate: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return all figures of a comparison as JSON values.

    They are made from the results of its finished runs, what its rows do (`gate`), and the seconds of the steps that it ran, by artifact.
    """
    done = list(results)
    by_row = {row.name: {item["seed"]: item for item in done if item["row"] == row.name} for row in recipe.rows}
    baseline = recipe.row(recipe.baseline).name
    shown = {name: {seed: figures(item) for seed, item in runs.items()} for name, runs in by_row.items()}
    known = [values for runs in shown.values() for run in runs.values() for values in run.items()]
    sets = {name: [metric for metric in METRICS if metric in values] for name, values in known}
    ledger = Ledger(Catalog.open(recipe.catalog), seconds or {})
    rows: list[dict[str, Any]] = [
        {
            "row": row.name,
            "options": dict(row.plan),
            "compose": row.compose,
            "seeds": sorted(by_row[row.name]),
            **_about_runs(list(by_row[row.name].values())),
            "ledger": ledger.of(list(by_row[row.name].values())),
            "sets": {name: {} for name in sets if shown[row.name]},
            "curves": _curves(list(by_row[row.name].values())),
        }
        for row in recipe.rows
    ]
    power: dict[str, dict[str, Any]] = {name: {} for name in sets}
    words: dict[str, dict[str, str]] = {name: {} for name in sets}
    for name, metric in ((name, metric) for name, metrics in sets.items() for metric in metrics):
        differences: dict[str, dict[str, Any]] = {}
        for row in (row for row in rows if name in row["sets"]):
            mine, others = shown[row["row"]], {} if row["row"] == baseline else shown[baseline]
            figure = row["sets"][name][metric] = _figure(mine, others, name, metric)
            if figure["difference"] is not None:
                differences[row["row"]] = figure["difference"]
        tested = [item for item in differences.values() if item["p"] is not None]
        for item, p in zip(tested, holm([item["p"] for item in tested]), strict=True):
            item["p_holm"] = p
        power[name][metric] = _power(differences.values())
        words[name][metric] = _words(differences, baseline)
    return {
        "format": FORMAT,
        "name": recipe.name,
        "about": " ".join(recipe.about.split()),
        "baseline": baseline,
        "seeds": list(recipe.seeds),
        "runs": {"done": len(done), "all": len(recipe.rows) * len(recipe.seeds)},
        "sets": sets,
        "retrieval": any("mean_recall@1" in metrics for metrics in sets.values()),
        "rows": rows,
        "power": power,
        "words": words,
        "treatments": treatment_notes(rows, baseline),
        "gate": gate,
        "ledger": ledger_table(rows),
        "rests_on": _rests_on(recipe, done),
    }


def _figure(mine: Figures, others: Figures, name: str, metric: str) -> dict[str, Any]:
    """Return the spread of a figure over seeds, and its difference to that of `others` at the seeds of both; None without such seeds."""
    found = asdict(spread([run[name][metric] for run in mine.values()]))
    shared = sorted(set(mine) & set(others))
    if not shared:
        return {**found, "difference": None}
    difference = paired([mine[seed][name][metric] for seed in shared], [others[seed][name][metric] for seed in shared])
    return {**found, "difference": {**asdict(difference), "significant": difference.significant}}


def _curves(runs: Results) -> dict[str, list[dict[str, Any]]]:
    """Return, by set, the accuracy of bins of classes by training frequency: mean and spread over a row's runs."""
    found: dict[str, dict[tuple[int, int, int], list[float]]] = {}
    for item in (item for run in runs for item in run["evaluations"]):
        for each in item.get("curve") or ():
            if each["accuracy"] is not None:
                key = each["from"], each["to"], each["classes"]
                found.setdefault(item["set"], {}).setdefault(key, []).append(each["accuracy"])
    heads = ("from", "to", "classes")
    return {
        name: [{**dict(zip(heads, key, strict=True)), **asdict(spread(bins[key]))} for key in sorted(bins)]
        for name, bins in found.items()
    }


def _power(differences: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the least difference that the seeds detect, by the pooled spread of all rows; None with fewer than two seeds."""
    known = [item for item in differences if item["sd"] is not None]
    if not known:
        return None
    most = max(item["n"] for item in known)
    squares = [item["sd"] ** 2 for item in known if item["n"] == most]
    pooled = math.sqrt(sum(squares) / len(squares))
    return {"n": most, "sd": pooled, "detectable": detectable(pooled, most)}


def _words(differences: Mapping[str, Mapping[str, Any]], baseline: str) -> str:
    """Return sentences on which differences to the baseline are significant, and which are not."""
    better, worse, neither = f"Significantly better than {baseline}", "Significantly worse", "Not significant"
    single = "One seed only, so nothing can be said"
    verdicts: dict[str, list[str]] = {better: [], worse: [], neither: [], single: []}
    for row, item in differences.items():
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
    plan, samples = runs[0]["plan"], runs[0]["trained"]["samples"]
    seconds = _mean(item["trained"]["seconds"] for item in runs)
    epochs = [item["trained"]["epochs"] for item in runs if item["trained"]["epochs"] is not None]
    return {
        "plan": {
            "draws": plan["draws"],
            "eligible": plan["eligible"],
            "exposures": plan.get("exposures"),  # runs of earlier versions have none
            **{name: plan["config"].get(name) for name in ("dynamic", "draw", "clustering", "without")},
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
    paths = {name: catalog.embedding_folder(name) / layout.COLUMN for name in sorted(columns)}
    encoders = {name: dict(read_json(path)) if path.exists() else {} for name, path in paths.items()}
    seen = {item["trained"]["samples"] for item in done}
    return {
        "samples_seen": min(seen, default=None),
        "most_samples_seen": max(seen, default=None),
        "pool": Survivors(catalog, (), catalog.snapshot()).pool,
        "train": asdict(recipe.train),
        "evaluate": {name: str(value) for name, value in recipe.evaluate.items()},
        "embeddings": encoders,
        "clusterings": settings,
        "drop_lists": {name: _settings(catalog.drops_folder(name)) for name in sorted(lists)},
        "versions": _different([item["versions"] for item in done]),
        "machines": _different([{**item["machine"], "device": item["trained"]["device"]} for item in done]),
    }


def _different(values: Results) -> Results:
    return [value for at, value in enumerate(values) if value not in values[:at]]


def _settings(folder: Path) -> dict[str, Any]:
    manifest = find_manifest(folder)
    return {**manifest["identity"]["config"], "found": manifest["summary"]} if manifest else {}


# --- files --------------------------------------------------------------------------------------------------------------


def write_summary(output: Path, summary: Mapping[str, Any], *, png: bool = False) -> None:
    """Write results.csv, summary.json, summary.md, summary.html, and the plots as SVG and, if `png`, as PNG."""
    from tailwise.compare.plots import draw_plots  # noqa: PLC0415  (matplotlib is an extra)

    output.mkdir(parents=True, exist_ok=True)
    write_json(output / SUMMARY, summary, unique=True)
    plots = draw_plots(summary, png=png)
    texts = {
        "results.csv": results_csv(summary),
        "summary.md": summary_markdown(summary),
        "summary.html": summary_page(summary),
    }
    for name, content in {**plots, **{name: text.encode() for name, text in texts.items()}}.items():
        with replacing(output / name, unique=True) as temporary:
            temporary.write_bytes(content)


def results_csv(summary: Mapping[str, Any]) -> str:
    """Return the table as CSV, a line for each row, set and metric; shares, not percentages."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = [*(item for item in Difference.__dataclass_fields__ if item != "n"), "p_holm"]
    heads = ["row", "set", "metric", "seeds", "mean", "sd", *(f"difference_{name}" for name in names)]
    writer.writerow([*heads, "significant", "train_seconds", "samples_per_second"])
    for row in summary["rows"]:
        cost = [row["cost"]["train_seconds"], row["cost"]["samples_per_second"]] if row["sets"] else []
        for name, metrics in row["sets"].items():
            for metric, figure in metrics.items():
                texts = spreadsheet_cell(row["row"]), spreadsheet_cell(name), metric
                difference = [(figure["difference"] or {}).get(item) for item in [*names, "significant"]]
                writer.writerow([*texts, figure["n"], figure["mean"], figure["sd"], *difference, *cost])
    return stream.getvalue()


def summary_page(summary: Mapping[str, Any]) -> str:
    """Return the comparison as a page in the design of the report, which opens from a disk."""
    about = f"Comparison of {len(summary['rows'])} rows. Made by tailwise {__version__}."
    return render({}, title=summary["name"], about=about, study=study_section(summary))


def markdown(text: object) -> str:
    """Return text that Markdown shows literally: no markup, table cells, links or HTML."""
    escaped = re.sub(r"[\\`*#|~\[\]]", r"\\\g<0>", html.escape(plain(text), quote=False))
    return escaped.replace("://", "&#58;//").replace("www.", "www&#46;")


def summary_markdown(summary: Mapping[str, Any]) -> str:
    """Return the comparison as Markdown."""
    require("train", "jinja2", purpose="a summary")
    import jinja2  # noqa: PLC0415  (an extra)

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tailwise.compare"), trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, finalize=lambda value: markdown(value) if type(value) is str else value,
    )  # fmt: skip
    environment.filters |= FILTERS
    return environment.get_template("summary.md.j2").render(**summary)


# --- treatments: which samples a run could draw, and how often a training saw each of them ----------------------------


@dataclass(frozen=True)
class Exposures:
    """How often the samples that a plan may draw (candidates) are seen."""

    candidates: str  # hash of the set of candidates
    mean: float  # mean number of views of a candidate
    least: int | None  # fewest views of any candidate; None where the draw is random
    most: int | None  # most views of any candidate; None where the draw is random
    uniform: bool = False  # True if every candidate has the same rate in every epoch


def exposures(plan: Plan, samples_seen: int) -> Exposures:
    """Return how often a training that goes through a plan's epochs in order sees each candidate."""
    hashed, candidates = blake2b(digest_size=16), 0
    for span in plan.spans():
        inside = plan.candidates(span)
        hashed.update(np.packbits(inside).tobytes())
        candidates += int(inside.sum())
    least, most = _bounds(plan, samples_seen) if plan.exact else (None, None)
    one_rate = not (plan.by_rate or plan.annealed) and np.ptp(plan.cluster_rates()[plan.sizes > 0]) < 1e-6
    return Exposures(hashed.hexdigest(), samples_seen / max(candidates, 1), least, most, bool(one_rate))


def _bounds(plan: Plan, samples_seen: int) -> tuple[int, int]:
    """Return the fewest and most views of a candidate. The last epoch may be incomplete."""
    full = plan.sizes > 0
    sizes, counts = plan.sizes[full], plan.counts(0)[full]
    if not plan.dynamic:  # every epoch holds the same samples
        epochs, rest = divmod(samples_seen, int(counts.sum()))
        return epochs * int((counts // sizes).min()), (epochs + (rest > 0)) * int((-(-counts // sizes)).max())
    # Copies of two members of a cluster differ by one at most, over any number of epochs.
    taken, epoch = np.zeros_like(counts), 0
    while int(taken.sum() + counts.sum()) <= samples_seen:
        taken, epoch = taken + counts, epoch + 1
        counts = plan.counts(epoch)[full]
    least = int((taken // sizes).min())
    if int(taken.sum()) < samples_seen:
        taken = taken + counts
    return least, int((-(-taken // sizes)).max())


def treatment_notes(rows: Sequence[Mapping[str, Any]], baseline: str) -> list[str]:
    """Return sentences on summary rows that are the same treatment, and on rows with other candidates than the baseline."""
    known = [row for row in rows if row["plan"] and row["plan"].get("exposures")]
    alike: dict[tuple[Any, ...], list[str]] = {}
    for row in known:
        seen = row["plan"]["exposures"]
        if seen["least"] is not None and seen["most"] - seen["least"] <= bool(seen.get("uniform")):
            times = (
                f"exactly {seen['least']}" if seen["least"] == seen["most"] else f"{seen['least']} to {seen['most']}"
            )
            alike.setdefault((seen["candidates"], times, row["compose"]), []).append(row["row"])
    notes = [
        f"{' and '.join(names)} are {'the same treatment' if 'exactly' in times else 'nearly the same treatment'}: each sees every "
        f"candidate {times} times. They differ in order alone."
        for (_, times, _), names in alike.items()
        if len(names) > 1
    ]
    base = next((row["plan"]["exposures"]["candidates"] for row in known if row["row"] == baseline), None)
    other = [row["row"] for row in known if base is not None and row["plan"]["exposures"]["candidates"] != base]
    if other:
        notes.append(
            f"Other candidates than those of {baseline}: {', '.join(other)}. Their differences mix what may be drawn with how it is drawn; "
            "give rows the same `without`, or `proportional` over the same grouping, to compare draws alone."
        )
    return notes
