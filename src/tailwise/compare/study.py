"""The runs of a comparison: which there are, which are done, and doing one. Each leaves RUNS/ROW/seed-S/result.json, written last."""

from __future__ import annotations

import io
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tailwise.catalog import Catalog
from tailwise.catalog.artifacts import find_manifest
from tailwise.catalog.files import digest, read_json, write_json
from tailwise.catalog.outputs import check_output_folder
from tailwise.compare.inprocess import Trained, order_of
from tailwise.compare.recipe import CompareRecipe, Row, choose
from tailwise.compare.summary import summarize, write_summary
from tailwise.compare.trainers import find_trainer
from tailwise.compare.treatment import exposures
from tailwise.encoders.open_clip import model_id
from tailwise.errors import ConflictError, UserError
from tailwise.evaluate import evaluate
from tailwise.extras import versions
from tailwise.pipeline.run import Runner
from tailwise.pipeline.steps import Step
from tailwise.plan.explain import explain
from tailwise.plan.plan import Plan
from tailwise.progress import Track, silent
from tailwise.storage.local import locked, replacing

logger = logging.getLogger(__name__)
FORMAT = 1
RUNS, CACHE, RESULT, TRAINED = "runs", "cache", "result.json", "trained.json"
NOT_DECIDING = {"workers", "max_rejected"}
PATHS = {"classes", "templates", "train_counts", "pool"}
PACKAGES = ("torch", "open_clip_torch", "numpy", "timm")  # that decide a training


@dataclass(frozen=True)
class Run:
    """One training and its evaluation.

    Attributes:
        row: of the table.
        seed: of weights, order, augmentation and draw.
        folder: of all it leaves.
    """

    row: Row
    seed: int
    folder: Path

    @property
    def label(self) -> str:
        """As it is told."""
        return f"{self.row.name}, seed {self.seed}"

    @property
    def plan(self) -> Step:
        """The command that makes its plan, whose name tells its options."""
        name = f"compare-{self.row.slug}-{self.seed}-{digest(dict(self.row.plan))[:6]}"
        return Step("plan", {"name": name, **self.row.plan, "seed": self.seed})


class Study:
    """A recipe, and the folder of what came of it."""

    def __init__(self, recipe: CompareRecipe, output: Path) -> None:
        """Reads nothing yet.

        Args:
            recipe: what is compared.
            output: folder for runs, decoded images and summaries.
        """
        find_trainer(recipe.train.trainer)
        self.recipe, self.output = recipe, output

    def runs(self, only: Collection[str] = (), seeds: Collection[int] = ()) -> list[Run]:
        """The runs, seed after seed, so that whole comparisons come early.

        Raises:
            UserError: a row or seed that the recipe doesn't have.
        """
        rows, chosen = choose(self.recipe, only, seeds)
        return [Run(row, seed, self.output / RUNS / row.slug / f"seed-{seed}") for seed in chosen for row in rows]

    def result(self, run: Run) -> dict[str, Any] | None:
        """What a finished run found; None where it isn't, or was evaluated otherwise.

        Raises:
            UserError: the folder holds a run of other settings.
        """
        if not (run.folder / RESULT).exists():
            return None
        found: dict[str, Any] = read_json(run.folder / RESULT)
        self._check_same(run, found)
        return found if found["evaluated"] == self.evaluated else None

    def _check_same(self, run: Run, found: Mapping[str, Any]) -> None:
        mine = self.identity(run)
        if found.get("identity") != mine or found.get("format") != FORMAT:
            old = found.get("identity", {})
            changed = ", ".join(
                f"{name} {old.get(name)} → {mine.get(name)}"
                for name in sorted({*old, *mine})
                if old.get(name) != mine.get(name)
            )
            raise ConflictError(
                f"{run.folder} was made with other settings ({changed or 'format'}): give another `output`, or delete that folder"
            )

    @property
    def evaluated(self) -> dict[str, Any]:
        """What the evaluation depends on, as JSON values."""
        return {name: str(value) if name in {"data", *PATHS} else value for name, value in self.recipe.evaluate.items()}

    def identity(self, run: Run) -> dict[str, Any]:
        """All that decides a training, as JSON values."""
        catalog = Catalog.open(self.recipe.catalog)
        training = {name: value for name, value in asdict(self.recipe.train).items() if name not in NOT_DECIDING} | {
            "model": model_id(self.recipe.train.model)
        }
        without = run.row.plan.get("without") or []
        lists = [without] if isinstance(without, str) else without
        inputs = {f"list {name}": _id(catalog.drops_folder(name)) for name in lists}
        if run.row.plan.get("method") not in {"random", "top-score", None}:
            clusters = str(run.plan.options.get("clustering", "main"))
            inputs[f"clustering {clusters}"] = _id(catalog.clusters_folder(clusters))
        decides = {
            "plan": dict(run.row.plan),
            "compose": run.row.compose,
            "seed": run.seed,
            "train": training,
            "snapshot": catalog.snapshot().id,
            **inputs,
        }
        values: dict[str, Any] = json.loads(json.dumps(decides, default=str))
        return values

    def do(self, run: Run, runner: Runner, track: Track = silent) -> dict[str, Any] | None:
        """Trains and evaluates, unless that is done; a training that is whole isn't repeated for another evaluation.

        Returns:
            The result; None if another process is at this run.

        Raises:
            UserError: something in the recipe can't be.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(run.folder / ".lock", str(run.folder)))
            except UserError:
                return None
            return self.result(run) or self._do(run, runner, track)

    def _do(self, run: Run, runner: Runner, track: Track) -> dict[str, Any]:
        trained, about = self._trained(run, runner, track)
        start = time.perf_counter()
        request = self.recipe.evaluation(f"recipe {self.recipe.name!r}")
        evaluations = evaluate(trained.checkpoint, self.recipe.evaluate["data"], request, track=track)
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

    def _trained(self, run: Run, runner: Runner, track: Track) -> tuple[Trained, dict[str, Any]]:
        note = run.folder / TRAINED
        if note.exists():
            about = read_json(note)
            self._check_same(run, about)
            trained = Trained(**{**about["trained"], "checkpoint": run.folder / about["trained"]["checkpoint"]})
            if trained.checkpoint.exists():
                return trained, about
        _run_quietly(runner, run.plan)
        plan = Plan(Catalog.open(self.recipe.catalog), str(run.plan.options["name"]))
        order_of(plan, self.recipe.train, run.row.compose, run.seed)  # refuses what can't be, before time is spent
        train = find_trainer(self.recipe.train.trainer)
        trained = train(
            plan,
            self.recipe.train,
            seed=run.seed,
            compose=run.row.compose,
            folder=run.folder,
            cache=self.output / CACHE,
            name=run.label,
            track=track,
        )
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

    def results(self) -> Iterator[dict[str, Any]]:
        """The results of the recipe's runs that are done."""
        for run in self.runs():
            if (found := self.result(run)) is not None:
                yield found


def compare(
    recipe: CompareRecipe,
    output: Path,
    runner: Runner,
    *,
    only: Collection[str] = (),
    seeds: Collection[int] = (),
    tell: Callable[[str], None] = logger.info,
    track: Track = silent,
) -> dict[str, Any]:
    """Does what isn't done of a comparison, and sums up all that is.

    Args:
        recipe: what is compared.
        output: folder for all that comes of it.
        runner: runs the steps that prepare the catalog and make the plans.
        only: names of rows; all by default.
        seeds: of the recipe's; all by default.
        tell: takes a line for each run; by default the log.
        track: shows progress within a run.

    Returns:
        What `summary.json` holds.

    Raises:
        UserError: a mistake in the recipe, or runs of other settings or other files in the folder.
    """
    study = Study(recipe, check_output_folder(output, "`output`", marks=[RUNS, CACHE]))
    for step in [*recipe.prepare, *(run.plan for run in study.runs())]:
        if step.command == "import" and not recipe.sources:
            raise UserError(
                "the recipe imports a pool: give it with --set sources=[SHARDS,EMBEDDINGS], or --set prepare=[] for a catalog that is ready"
            )
        runner.job(step)  # refuses options that mean nothing
    for step in recipe.prepare:
        _run_quietly(runner, step)
    runs = study.runs(only, seeds)
    for number, run in enumerate(runs, 1):
        line = f"[{number}/{len(runs)}] {run.label}"
        if (found := study.result(run)) is not None:
            tell(f"{line}: done already, {_told(found)}")
            continue
        if (found := study.do(run, runner, track)) is None:
            tell(f"{line}: another process is at it")
            continue
        tell(f"{line}: {_told(found)}")
        write_summary(output, summarize(recipe, study.results()), plots=False)
    summary = summarize(recipe, study.results())
    write_summary(output, summary)
    return summary


def _run_quietly(runner: Runner, step: Step) -> None:
    job = runner.job(step)
    with redirect_stdout(io.StringIO()):
        job.run()


def _told(result: Mapping[str, Any]) -> str:
    trained = result["trained"]
    rate = trained["samples"] / trained["seconds"]
    scores = [
        f"{item['set']} {100 * item['top1']['value']:.2f} %"
        for item in result["evaluations"]
        if item["task"] == "classification"
    ]
    return f"{trained['samples']:,} samples in {trained['seconds']:,.0f} s ({rate:,.0f}/s), top-1 {', '.join(scores) or '–'}"


def _id(folder: Path) -> str | None:
    """The hash of what an artifact holds; None if it isn't there."""
    manifest = find_manifest(folder)
    return digest(manifest["files"]) if manifest else None


def machine() -> dict[str, Any]:
    """What it ran on."""
    import torch  # noqa: PLC0415  (heavy)

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": platform.system(),
    }
