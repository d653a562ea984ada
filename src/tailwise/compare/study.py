"""The runs of a comparison. Each run leaves RUNS/ROW/seed-S/result.json, written last."""

from __future__ import annotations

import io
import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tailwise.catalog import Catalog
from tailwise.catalog.artifacts import find_manifest
from tailwise.catalog.files import digest, file_digest, read_json, write_json
from tailwise.catalog.kinds import CONCEPTS
from tailwise.catalog.outputs import check_output_folder
from tailwise.compare.gate import check_gate, gate_lines, gate_table, open_truth, treatment
from tailwise.compare.recipe import CompareRecipe, Row, choose
from tailwise.compare.summary import exposures, summarize, treatment_notes, write_summary
from tailwise.compare.trainers import TRAINERS, Trained, order_of
from tailwise.context import Context
from tailwise.encoders.open_clip import model_id
from tailwise.errors import ConflictError, UserError
from tailwise.evaluate.run import evaluate
from tailwise.export.plan_bundle import RECORD
from tailwise.extras import versions
from tailwise.pipeline.run import Runner
from tailwise.pipeline.steps import Step
from tailwise.plan.explain import explain
from tailwise.plan.plan import Plan
from tailwise.progress import Item
from tailwise.recipes.recipe import with_folder
from tailwise.report.study import PLANS
from tailwise.requests import FILES
from tailwise.steps.planning.plan import default_clustering
from tailwise.storage.local import locked, replacing
from tailwise.train.runs import changes

logger = logging.getLogger(__name__)
FORMAT = 1
SEED = "{seed}"  # in an option of a row: the seed of the run
RUNS, CACHE, SECONDS, RESULT, TRAINED = "runs", "cache", "seconds", "result.json", "trained.json"
NOT_DECIDING = {"workers", "max_rejected"}
PATHS = {"classes", "templates", "train_counts", "pool"}
FILE = "file "  # begins the names of their hashes
PACKAGES = ("torch", "open_clip_torch", "numpy", "timm")  # their versions decide a training


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    row: Row  # row of the table
    seed: int  # seed of weights, order, augmentation and draw
    folder: Path  # folder of all files of the run

    @property
    def label(self) -> str:
        """The name in messages."""
        return f"{self.row.name}, seed {self.seed}"

    @property
    def plans(self) -> list[Step]:
        """The commands that make the run's plan, which comes last, and the plans that it starts from (`of`)."""
        return self._plans(with_folder(dict(self.row.plan), str(self.seed), SEED), "")

    def _plans(self, options: dict[str, Any], suffix: str) -> list[Step]:
        before: list[Step] = []
        if isinstance(options.get("of"), Mapping):
            before = self._plans(options["of"], f"{suffix}-of")
            options = {**options, "of": before[-1].options["name"]}
        name = f"{PLANS}{self.row.slug}-{self.seed}{suffix}-{digest(options)[:6]}"  # other options, another plan
        return [*before, Step("plan", {"name": name, **options, "seed": self.seed})]

    @property
    def plan(self) -> Step:
        """The command that makes the run's plan itself."""
        return self.plans[-1]


class Study:
    """A recipe and its output folder."""

    def __init__(self, recipe: CompareRecipe, output: Path) -> None:
        """Check the trainer's name. `output` is the folder for runs, decoded images and summaries."""
        if recipe.train.trainer not in TRAINERS:
            raise UserError(f"train.trainer is {recipe.train.trainer!r}: must be one of {', '.join(TRAINERS)}")
        self.recipe, self.output, self.train = recipe, output, TRAINERS[recipe.train.trainer]

    def runs(self, only: Collection[str] = (), seeds: Collection[int] = ()) -> list[Run]:
        """Return the chosen runs, all rows of a seed before the next seed, so that complete comparisons come early."""
        rows, chosen = choose(self.recipe, only, seeds)
        return [Run(row, seed, self.output / RUNS / row.slug / f"seed-{seed}") for seed in chosen for row in rows]

    def result(self, run: Run) -> dict[str, Any] | None:
        """Return the result of a run; None if it is unfinished, or was evaluated with other options. Refuse a run with other settings."""
        if not (run.folder / RESULT).exists():
            return None
        found: dict[str, Any] = read_json(run.folder / RESULT)
        self._check_same(run, found)
        return found if found["evaluated"] == _as_known(self.evaluated, found["evaluated"]) else None

    def _check_same(self, run: Run, found: Mapping[str, Any]) -> None:
        mine = _as_known(self.identity(run), found.get("identity", {}))
        if found.get("identity") != mine or found.get("format") != FORMAT:
            changed = ", ".join(changes(found.get("identity", {}), mine)) or "format"
            remedy = "give another `output`, or delete that folder"
            raise ConflictError(f"{run.folder} was made with other settings ({changed}): {remedy}")

    @property
    def evaluated(self) -> dict[str, Any]:
        """Options of the evaluation, as JSON values."""
        given = self.recipe.evaluate.items()
        return {name: str(value) if name in {"data", *PATHS} else value for name, value in given} | _hashes(given)

    def identity(self, run: Run) -> dict[str, Any]:
        """Return all that decides a training, as JSON values."""
        catalog = Catalog.open(self.recipe.catalog)
        training = asdict(self.recipe.training(run.row))
        training = {name: value for name, value in training.items() if name not in NOT_DECIDING}
        training["model"] = model_id(self.recipe.train.model)
        inputs: dict[str, str | None] = {}
        for options in (step.options for step in run.plans):
            inputs |= _hashes(options.items())
            without = options.get("without") or []
            lists = [without] if isinstance(without, str) else without
            inputs |= {f"list {name}": _id(catalog.drops_folder(name)) for name in lists}
            if options.get("method") not in {"random", "top-score", "scs", "hcs", None}:
                clusters = str(options.get("clustering") or default_clustering(str(options.get("method"))) or "main")
                inputs[f"clustering {clusters}"] = _id(catalog.clusters_folder(clusters))
        if isinstance(of := run.plans[0].options.get("of"), str):  # a plan that the catalog has
            inputs[f"plan {of}"] = _id(catalog.plan_folder(of))
        lists = {run.row.compose.partition(":")[2], *(step.options.get("concepts") for step in run.plans)} - {"", None}
        inputs |= {
            f"concepts {name}": _id(CONCEPTS.path(catalog.folder, str(name))) for name in sorted(map(str, lists))
        }
        decides: dict[str, Any] = {"plan": dict(run.row.plan), "compose": run.row.compose, "seed": run.seed}
        decides |= {"train": training, "snapshot": catalog.snapshot().id, **inputs}
        return dict(json.loads(json.dumps(decides, default=str)))

    def do(self, run: Run, runner: Runner, context: Context | None = None) -> dict[str, Any] | None:
        """Train and evaluate, where that is not done yet, and return the result; None if another process has this run.

        A complete training is kept for another evaluation.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(run.folder / ".lock", str(run.folder)))
            except UserError:
                return None
            return self.result(run) or self._do(run, runner, context or Context())

    def _do(self, run: Run, runner: Runner, context: Context) -> dict[str, Any]:
        trained, about = self._trained(run, runner, context)
        start = time.perf_counter()
        request = self.recipe.evaluation(f"recipe {self.recipe.name!r}")
        evaluations = evaluate(trained.checkpoint, self.recipe.evaluate["data"], request, context=context)
        for item in evaluations:
            if item.classes is not None:
                with replacing(run.folder / f"classes-{item.name.replace('/', '_')}.parquet") as path:
                    pq.write_table(item.classes, path)
        result = {
            **about,
            "evaluated": self.evaluated,
            "evaluate_seconds": time.perf_counter() - start,
            "evaluations": [{"set": item.name, "task": item.task, **item.summary} for item in evaluations],
        }
        write_json(run.folder / RESULT, result)
        return result

    def _trained(self, run: Run, runner: Runner, context: Context) -> tuple[Trained, dict[str, Any]]:
        note = run.folder / TRAINED
        if note.exists():
            about = read_json(note)
            self._check_same(run, about)
            trained = Trained(**{**about["trained"], "checkpoint": run.folder / about["trained"]["checkpoint"]})
            if trained.checkpoint.exists():
                return trained, about
        plan, training = self.make_plan(run, runner), self.recipe.training(run.row)
        order_of(plan, training, run.row.compose, run.seed)  # raises errors before time is spent
        how: dict[str, Any] = {"seed": run.seed, "compose": run.row.compose, "folder": run.folder, "name": run.label}
        trained = self.train(plan, training, **how, cache=self.output / CACHE, context=context)
        explained = explain(plan, 1)
        about = {
            "format": FORMAT,
            "row": run.row.name,
            "seed": run.seed,
            "identity": self.identity(run),
            "plan": {
                "name": plan.name,
                "config": dict(plan.config),
                "id": digest(plan.manifest["files"]),
                "draws": explained.epochs[0].total,
                "eligible": explained.eligible,
                "exposures": asdict(exposures(plan, trained.samples)),
            },
            "trained": {**asdict(trained), "checkpoint": str(trained.checkpoint.relative_to(run.folder))},
            "versions": versions(PACKAGES),
            "machine": machine(),
        }
        write_json(note, about)
        return trained, about

    def make_plan(self, run: Run, runner: Runner) -> Plan:
        """Make the plan of a run, or open it. Processes that share the output folder wait for each other."""
        folder = self.output / CACHE
        with locked(folder / ".plans", str(folder), wait=True) if folder.exists() else nullcontext():
            for step in run.plans:
                self.make(step, runner)
        return Plan(Catalog.open(self.recipe.catalog), str(run.plan.options["name"]))

    def make(self, step: Step, runner: Runner) -> None:
        """Run a command quietly. Note the seconds of what it makes, unless that is there already."""
        job = runner.job(step)
        notes = [self.output / SECONDS / f"{name}.json" for name in job.artifacts]
        if notes and runner.is_there(job):
            notes = []
        for note in notes:
            note.unlink(missing_ok=True)  # of one that was deleted since
        began = time.perf_counter()
        with redirect_stdout(io.StringIO()):
            job.run()
        for note in notes:
            if not note.exists():  # else another process has made it
                write_json(note, (time.perf_counter() - began) / len(notes))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of the steps that the comparison ran, by the artifact or the embedding column that they made."""
        folder = self.output / SECONDS
        return {str(note.relative_to(folder).with_suffix("")): read_json(note) for note in folder.glob("*/*.json")}

    def has_plan(self, run: Run) -> bool:
        """Return True if the plan of a run is made."""
        return find_manifest(Catalog.open(self.recipe.catalog).plan_folder(str(run.plan.options["name"]))) is not None

    def gate(self, runner: Runner, seed: int, only: Collection[str] = ()) -> dict[str, Any]:
        """Make the plans of rows (by default of all) for a seed, and return what they do to the samples, as JSON values."""
        base = self.recipe.row(self.recipe.baseline)
        rows: list[dict[str, Any]] = []
        with open_truth(Catalog.open(self.recipe.catalog), self.recipe.truth) as labels:
            for run in self.runs(only, [seed]):
                plan, samples = self.make_plan(run, runner), self.recipe.training(run.row).samples_seen
                about = {"row": run.row.name, "compose": run.row.compose, "samples_seen": samples}
                about |= {"cost": samples / self.recipe.training(base).samples_seen}
                about |= {"plan": {"exposures": asdict(exposures(plan, samples))}}
                order = order_of(plan, self.recipe.training(run.row), run.row.compose, seed)
                rows.append({**about, **asdict(treatment(order, samples, labels))})
        ratios = [row["ratio"] for row in rows]
        most = None if None in ratios else max(ratios)
        figures = {"seed": seed, "rows": rows, "most_ratio": most, "notes": treatment_notes(rows, base.name)}
        return {**figures, **gate_table(rows, base.name)}

    def results(self) -> list[dict[str, Any]]:
        """Return the results of all finished runs."""
        return [found for run in self.runs() if (found := self.result(run)) is not None]


def compare(
    recipe: CompareRecipe,
    output: Path,  # folder for all files
    runner: Runner,  # runs the steps that prepare the catalog and make the plans
    *,
    only: Collection[str] = (),  # names of the rows to run; all by default
    seeds: Collection[int] = (),  # all by default
    report: Callable[[str], None] = logger.info,  # takes a line for each run
    context: Context | None = None,  # runs the tasks and shows progress within a run
    png: bool = False,  # whether plots are written as PNG, too
    force: bool = False,  # whether rows are trained that hardly differ in what they train on
) -> dict[str, Any]:
    """Do the missing runs of a comparison, and return the summary of all finished ones, as in `summary.json`.

    Raise a UserError for a mistake in the recipe, a folder that holds runs of other settings or other files, or rows that hardly differ.
    """
    context = context or Context()
    study = Study(recipe, check_output_folder(output, "`output`", marks=[RUNS, CACHE, SECONDS]))
    prepare(study, runner)
    runs = study.runs(only, seeds)
    missing = sum(study.result(run) is None for run in runs)
    (output / CACHE).mkdir(parents=True, exist_ok=True)
    asked, seed = {run.row.name for run in runs}, runs[0].seed
    shown = [run.row.name for run in study.runs(seeds=[seed]) if run.row.name in asked or study.has_plan(run)]
    gate = study.gate(runner, seed, shown)
    for text in gate_lines(gate):
        report(text)
    if missing and not force:
        check_gate(gate)
    for number, run in enumerate(runs, 1):
        line = f"[{number}/{len(runs)}] {run.label}"
        if (found := study.result(run)) is not None:
            report(f"{line}: done already, {_describe(found)}")
            continue
        missing = max(missing - 1, 0)
        if (found := study.do(run, runner, _named(context, line, missing))) is None:
            report(f"{line}: another process is running it")
        else:
            report(f"{line}: {_describe(found)}")
            write_summary(output, summarize(recipe, study.results(), gate, study.seconds()), png=png)
    summary = summarize(recipe, study.results(), gate, study.seconds())
    write_summary(output, summary, png=png)
    return summary


def prepare(study: Study, runner: Runner) -> None:
    """Check all commands of a comparison, and run those that prepare the catalog."""
    for step in [*study.recipe.prepare, *(step for run in study.runs() for step in run.plans)]:
        if step.command == "import" and not study.recipe.sources:
            raise UserError(
                "the recipe imports a pool: give it with `set` sources=[SHARDS,EMBEDDINGS], or `set` prepare=[] for a catalog that is ready"
            )
        runner.job(step)  # refuses options that mean nothing
    for step in study.recipe.prepare:
        study.make(step, runner)


def _named(context: Context, line: str, later: int) -> Context:
    """Return the context of one run: lines of its training name the run, and the time left for those that come later."""

    def track(items: Iterable[Item], description: str, total: int | None = None, **options: Any) -> Iterable[Item]:  # noqa: ANN401
        if options:  # a training
            return context.progress(items, line, total, **options, later=later)
        return context.progress(items, description, total)

    return replace(context, progress=track)


def _describe(result: Mapping[str, Any]) -> str:
    samples, seconds = result["trained"]["samples"], result["trained"]["seconds"]
    classified = [item for item in result["evaluations"] if item["task"] == "classification"]
    scores = ", ".join(f"{item['set']} {100 * item['top1']['value']:.2f} %" for item in classified) or "–"
    return f"{samples:,} samples in {seconds:,.0f} s ({samples / seconds:,.0f}/s), top-1 {scores}"


def _hashes(options: Iterable[tuple[str, Any]]) -> dict[str, str | None]:
    """Return the hash of each file that options name; of a plan bundle, that of its record."""
    given = ((name, value) for name, value in options if isinstance(value, str | Path))
    named = ((name, Path(value).expanduser()) for name, value in given if name.replace("-", "_") in FILES)
    places = ((name, path / RECORD if path.is_dir() else path) for name, path in named)
    return {f"{FILE}{name}": _hash(path, path.stat().st_mtime_ns) for name, path in places if path.is_file()}


@cache
def _hash(path: Path, _changed_ns: int) -> str:
    return file_digest(path)


def _as_known(mine: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without the hashes of files that others lack: older versions noted none."""
    return {name: value for name, value in mine.items() if name in found or not name.startswith(FILE)}


def _id(folder: Path) -> str | None:
    """Return the hash of an artifact's files; None if there is no artifact."""
    manifest = find_manifest(folder)
    return digest(manifest["files"]) if manifest else None


def machine() -> dict[str, Any]:
    """Return the hardware and the system that a run uses."""
    import torch  # noqa: PLC0415  (heavy)

    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: *(.*)", info.read_text(), re.MULTILINE) if info.exists() else []
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
    }
