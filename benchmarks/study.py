"""The runs of a study in one file: collected from the output folder of `tailwise compare`, and the tables of docs/findings made from it.

A line of the file is the `result.json` of one run, and the right answers of each class ("right": {set: [count, …]}, by class index).
Runs of several sessions and machines may be in one file; all rows of a seed should be of one machine.
usage: study.py add OUTPUT studies/NAME.jsonl         (takes runs that the file lacks)
       study.py missing RECIPE studies/NAME.jsonl     (rows and seeds that the file lacks)
       study.py rarity CATALOG GROUPING FILE.tsv      (a score for SCS: -ln of the size of the sample's group)
       study.py retrieval TEST.parquet FOLDER         (an evaluation set of a table's images and captions)
       study.py show studies/NAME.jsonl [--baseline "random dynamic"] [--counts classes.tsv] [--plot FILE.svg]
"""

import argparse
import csv
import io
import json
import statistics
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tailwise.catalog.catalog import Catalog
from tailwise.catalog.clusterings import Clustering
from tailwise.compare.recipe import load_compare_recipe
from tailwise.compare.statistics import Difference, holm, paired, spread
from tailwise.compare.summary import figures
from tailwise.export.plan_bundle import without_folders

Run = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add")
    add.add_argument("output", type=Path)
    missing = commands.add_parser("missing")
    missing.add_argument("recipe")
    rare = commands.add_parser("rarity")
    rare.add_argument("catalog", type=Path)
    rare.add_argument("grouping")
    retrieval = commands.add_parser("retrieval")
    retrieval.add_argument("table", type=Path)
    show = commands.add_parser("show")
    for each in (add, missing, rare, retrieval, show):
        each.add_argument("file", type=Path)
    show.add_argument("--baseline", default="random dynamic")
    show.add_argument("--counts", type=Path, help="classes.tsv of web-lt: adds thirds of the rare classes")
    show.add_argument("--plot", type=Path, help="draws the differences, as .svg or .png")
    asked = parser.parse_args()
    if asked.command == "rarity":
        write_rarity(asked.catalog, asked.grouping, asked.file)
        return
    if asked.command == "retrieval":
        write_retrieval(asked.table, asked.file)
        return
    runs = read(asked.file)
    if asked.command == "add":
        collect(asked.output, asked.file, runs)
    elif asked.command == "missing":
        given = [f"{key}=x" for key in ("catalog", "evaluate.data", "truth.file")]
        recipe = load_compare_recipe(asked.recipe, [*given, "sources=[x]"])
        done = {(run["row"], run["seed"]) for run in runs}
        for seed in recipe.seeds:
            lacking = [row.name for row in recipe.rows if (row.name, seed) not in done]
            print(f"seed {seed}: {'; '.join(lacking) or 'complete'}")
    else:
        found = print_tables(runs, asked.baseline, asked.counts)
        if asked.plot:
            plot(found, asked.baseline, asked.plot)


def read(path: Path) -> list[Run]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def collect(output: Path, path: Path, runs: list[Run]) -> None:
    known = {(run["row"], run["seed"]) for run in runs}
    for file in sorted(output.glob("runs/*/seed-*/result.json")):
        run: Run = json.loads(file.read_text())
        if (run["row"], run["seed"]) in known:
            continue
        run["evaluated"].pop("data", None)  # folders of that machine
        run["right"] = {}
        for item in run["evaluations"]:
            if item["task"] == "classification":
                classes = pq.read_table(file.parent / f"classes-{item['set']}.parquet")
                run["right"][item["set"]] = classes["right"].to_pylist()
        runs.append(without_folders(run))
    lines = [json.dumps(run, sort_keys=True) for run in sorted(runs, key=lambda run: (run["seed"], run["row"]))]
    path.write_text("\n".join(lines) + "\n")
    print(f"{path}: {len(runs)} runs, {len(runs) - len(known)} of them new")


def write_rarity(folder: Path, grouping: str, path: Path) -> None:
    catalog = Catalog.open(folder)
    groups = Clustering.open(catalog, grouping)
    labels = [np.asarray(part) for part in groups.parts("label")]
    sizes = np.bincount(np.concatenate(labels) + 1)  # samples without a group are one
    with path.open("w") as stream:
        stream.write("uid\trarity\n")
        for part, label in zip(catalog.parts(), labels, strict=True):
            for uid, score in zip(
                catalog.samples(part, ["uid"])["uid"].to_pylist(), -np.log(sizes[label + 1]), strict=True
            ):
                stream.write(f"{uid.hex()}\t{score:.9g}\n")


def write_retrieval(table: Path, folder: Path) -> None:
    """Write images and captions of a table as clip_benchmark's layout of a retrieval set."""
    (folder / "test").mkdir(parents=True)
    (folder / "dataset_type.txt").write_text("retrieval\n")
    (folder / "test" / "nshards.txt").write_text("1\n")
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for row in pq.read_table(table, columns=["key", "image", "caption"]).to_pylist():
            for suffix, data in (("jpg", row["image"]["bytes"]), ("txt", row["caption"].encode())):
                member = tarfile.TarInfo(f"{row['key']}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


NAMES = {"eval-rare": "rare", "eval-heads": "heads", "mean over sets": "overall", "top1": "top-1"}


def accuracies(run: Run, thirds: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Return top-1 in %: of each set, their mean, and each third of the rare classes.

    Of a single set: of all classes and of each group, and recall at 1 of retrieval sets.
    """
    tasks = {item["set"]: item["task"] for item in run["evaluations"]}
    if [*tasks.values()].count("classification") == 1:
        found = {
            name: value for name, values in figures(run).items() if name in tasks for name, value in values.items()
        }
        return {NAMES.get(name, name): 100 * value for name, value in found.items() if name != "mean_per_class"}
    sets = figures(run)
    found = {NAMES.get(name, name): 100 * values["top1"] for name, values in sets.items()}
    for name, members in thirds.items():
        rights = np.array(run["right"]["eval-rare"])[list(members)]
        images = next(item["images"] for item in run["evaluations"] if item["set"] == "eval-rare")
        found[name] = 100 * rights.sum() / (images / len(run["right"]["eval-rare"]) * len(members))
    return found


def thirds_of(path: Path | None) -> dict[str, Sequence[int]]:
    """Return the places, in eval-rare, of the three thirds of the rare classes, by falling frequency."""
    if path is None:
        return {}
    with path.open(newline="") as stream:
        rare = [row for row in csv.DictReader(stream, delimiter="\t") if row["source"] == "tinyimagenet"]
    order = np.argsort([-int(row["train_count"]) for row in rare], kind="stable")
    names = ("rare: frequent third", "middle third", "rarest third")
    return {name: part.tolist() for name, part in zip(names, np.array_split(order, 3), strict=True)}


def plot(found: Mapping[str, Mapping[str, Difference]], baseline: str, path: Path) -> None:
    """Draw the differences, with their intervals: a row of dots for each measure, without thirds and retrieval."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "study"
    names = [*found]
    measures = [name for name in found[names[0]] if "third" not in name and "@" not in name]
    figure = Figure((7.2, 0.42 * len(names) + 1.1), layout="constrained")
    axes = figure.subplots()
    for at, (measure, color) in enumerate(zip(measures, ("#0b7285", "#e8590c", "#868e96", "#5f3dc4"), strict=False)):
        each = [found[name][measure] for name in names]
        places = np.arange(len(names)) + 0.18 * (at - (len(measures) - 1) / 2)
        widths = [0 if item.high is None else item.high - item.mean for item in each]
        axes.errorbar(
            [item.mean for item in each], places, xerr=widths, fmt="o", ms=4, lw=1.4, color=color, label=measure
        )
    axes.axvline(0, color="#adb5bd", lw=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(f"points of top-1 less {baseline}, with 95 % intervals")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper right", ncols=len(measures), frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


def print_tables(runs: list[Run], baseline: str, counts: Path | None) -> dict[str, dict[str, Difference]]:
    thirds = thirds_of(counts)
    names = [*dict.fromkeys(run["row"] for run in sorted(runs, key=lambda run: run["row"] != baseline))]
    table = {name: {run["seed"]: accuracies(run, thirds) for run in runs if run["row"] == name} for name in names}
    metrics = [*next(iter(table[baseline].values()))]
    print(f"| row | seeds | {' | '.join(metrics)} | seconds |\n|{' --- |' * (len(metrics) + 3)}")
    for name in names:
        figures_ = [spread([run[metric] for run in table[name].values()]) for metric in metrics]
        cells = [f"{each.mean:.2f}" + (f" ± {each.sd:.2f}" if each.sd is not None else "") for each in figures_]
        seconds = statistics.median(run["trained"]["seconds"] for run in runs if run["row"] == name)
        print(f"| {name} | {len(table[name])} | {' | '.join(cells)} | {seconds:.0f} |")
    print(f"\nless {baseline}, paired by seed:\n")
    print(f"| row | {' | '.join(metrics)} |\n|{' --- |' * (len(metrics) + 1)}")
    found: dict[str, list[Difference]] = {}
    for name in (name for name in names if name != baseline):
        seeds = sorted(set(table[name]) & set(table[baseline]))
        found[name] = [
            paired([table[name][seed][metric] for seed in seeds], [table[baseline][seed][metric] for seed in seeds])
            for metric in metrics
        ]
    marks: dict[tuple[str, int], str] = {}
    for at in range(len(metrics)):
        tested = {name: each[at].p for name, each in found.items() if each[at].p is not None}
        for name, p in zip(tested, holm([p for p in tested.values() if p is not None]), strict=True):
            marks[name, at] = "†" if p < 0.05 else "*" if found[name][at].significant else ""
    for name, each in found.items():
        cells = [
            f"{item.mean:+.2f}{marks.get((name, at), '')}".replace("-", "−")
            + (f" ({item.low:+.2f} … {item.high:+.2f})".replace("-", "−") if item.high is not None else "")
            for at, item in enumerate(each)
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    powers = [[each[at].detectable for each in found.values()] for at in range(len(metrics))]
    least = [[value for value in values if value is not None] for values in powers]  # rows of one seed have none
    texts = [f"{statistics.median(values):.2f}" if values else "" for values in least]
    print(f"| least difference found with 80 % power | {' | '.join(texts)} |")
    hours = sum(run["trained"]["seconds"] * run["machine"]["threads"] for run in runs) / 3600
    print(f"\n{len(runs)} runs, {hours:.1f} core-hours of training. * excludes 0; † also after Holm over the rows")
    return {name: dict(zip(metrics, each, strict=True)) for name, each in found.items()}


if __name__ == "__main__":
    main()
