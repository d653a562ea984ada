"""Recipes: run, a pool from import to exports; compare, methods against each other. And DataComp's baselines."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from typer import Argument, Option
from typer.models import ArgumentInfo

from tailwise.cli.app import (
    AllowCode,
    AsJson,
    Overwrite,
    Workers,
    app,
    as_options,
    choose_executor,
    path_of,
    plain_type,
    takes,
    with_progress,
)
from tailwise.cli.following import suggest, suggest_step
from tailwise.cli.printing import print_json, print_table, say
from tailwise.errors import UserError
from tailwise.requests import BaselinesRequest

if TYPE_CHECKING:
    from tailwise.compare.study import Study
    from tailwise.pipeline.run import Runner
    from tailwise.pipeline.steps import Command


def step_commands() -> dict[str, Command]:
    """Return the commands that steps of recipes can be, by the signatures that Typer parses."""
    from pydantic import Field

    from tailwise.pipeline.steps import STEPS, Command, Option

    calls: Any = {item.name: item.callback for item in app.registered_commands}
    commands = {}
    for command in STEPS:
        options: dict[str, Option] = {}
        for item in inspect.signature(calls[command], eval_str=True).parameters.values():
            hint, shown = get_args(item.annotation)
            kind, spelt = plain_type(hint), shown.default  # the first argument of typer.Option
            names = (spelt if isinstance(spelt, str) else item.name).replace("_", "-").replace("--", "").split("/")
            bounded = kind if shown.min is None else Annotated[kind, Field(ge=shown.min)]
            argument = isinstance(shown, ArgumentInfo)
            mapping = getattr(calls[command], "mappings", {}).get(item.name)
            options |= dict.fromkeys(names, Option(item.name, names, bounded, item.default, argument, mapping))
        commands[command] = Command(options, getattr(calls[command], "ready", partial(partial, calls[command])))
    return commands


@app.command()
def run(
    recipe: Annotated[str, Argument(metavar="RECIPE", help="A name (see below), or a .yaml file.")],
    paths: Annotated[
        list[str] | None, Argument(metavar="[SOURCE...] [CATALOG]", help="Instead of the recipe's.")
    ] = None,
    output: Annotated[Path | None, Option(help="Folder for exports.  [default: the recipe's]")] = None,
    settings: Annotated[list[str] | None, Option("--set", metavar="STEP.OPTION=VALUE", help="Change a step.")] = None,
    workers: Workers = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Only print what would be done, and what it costs.")] = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Run all commands of a recipe, from import to exports.

    Prints first what it will do. Steps that are done already are skipped, so that the same command goes on after an interruption.
    Recipes that come with tailwise: **dbp-laion**, **dbp-datacomp-medium**, **dbp-images**, **dynamics**, and **bootstrap**,
    which trains its encoder on the pool itself. A recipe of your own is a list of commands with their options, as on the command
    line.

    Examples:
      tailwise run dynamics shards/ embeddings/ my-catalog --output exports --dry-run
      tailwise run dbp-laion shards/ embeddings/ my-catalog --output exports --set cluster:main.k=100
      tailwise run my-recipe.yaml
    """
    from tailwise.pipeline.costs import Pool
    from tailwise.pipeline.run import Runner
    from tailwise.pipeline.steps import load_pipeline, with_settings

    pipeline = load_pipeline(recipe)
    choose_executor(name=pipeline.executor, ray_address=pipeline.ray_address)
    *sources, catalog = paths or [*pipeline.sources, pipeline.catalog or ""]
    if not catalog:
        raise UserError(f"recipe {recipe!r} names no catalog: tailwise run {recipe} SOURCE... CATALOG")
    folder = output or (Path(pipeline.output) if pipeline.output is not None else None)
    runner = Runner(step_commands(), path_of(catalog), sources or pipeline.sources, folder, workers, allow_code)
    jobs = [runner.job(step) for step in with_settings(pipeline.steps, settings or [])]
    runner.check(jobs)
    listed = []
    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # which leaves standard output to the JSON
        pool = Pool.of(runner.open(), runner.sources, jobs)
        say(f"{pipeline.name}: {' '.join(pipeline.about.split())}")
        say(f"pool: {pool.about}{pool.samples:,} samples")
        for number, (job, (state, difference)) in enumerate(zip(jobs, runner.states(jobs, pool), strict=True), 1):
            other = as_options(difference, job.step.command)
            listed.append({"step": job.line, "before": f"{state}: {other}" if other else state})
            say(f"{number:3d}. {state.upper() if other else state:>14}  {job.line}")
            if other:
                say(f"{'':>20}refused: it exists with {state} ({other})")
        for number, job in enumerate(() if dry_run else jobs, 1):
            say()
            say(f"[{number}/{len(jobs)}] {job.line}")
            if not runner.run(job):
                say("done already")
        if not dry_run and (opened := runner.open()) is not None:
            suggest_step(opened)
    if as_json:
        print_json({"name": pipeline.name, "dry_run": dry_run, "steps": listed})


@app.command()
def compare(
    recipe: Annotated[
        str,
        Argument(
            metavar="RECIPE",
            help="A .yaml file, or a name: demo, fashion-lt, tinyimagenet-lt, tinyimagenet-lt-rules, web-lt, web-lt-rules.",
        ),
    ],
    settings: Annotated[list[str] | None, Option("--set", metavar="KEY=VALUE", help="Change a KEY, with dots.")] = None,
    output: Annotated[Path | None, Option(help="Folder for all that comes of it.  [default: compare-NAME]")] = None,
    only: Annotated[list[str] | None, Option(metavar="ROW", help="Run these rows only.")] = None,
    seeds: Annotated[str | None, Option(metavar="0,1", help="Run these of the recipe's seeds only.")] = None,
    png: Annotated[bool, Option("--png", help="Also write the plots as PNG, for slides.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only print the runs, their state, and their time.")] = False,
    gate: Annotated[
        bool, Option("--gate", help="Only make the plans, and print what each row does to the samples.")
    ] = False,
    force: Annotated[
        bool, Option("--force", help="Train rows, too, that hardly differ in what they train on.")
    ] = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Train on several plans and seeds; report which differences are significant.

    All trainings see as many samples, unless a row gives its own number. What each row does to the samples is printed first. Every
    run leaves its result in OUTPUT/runs; a repeated command does what is missing, and several processes may share the work. The
    summaries (summary.md, summary.html, summary.json, results.csv, plots) hold all runs that are done, and are written after
    each.

    Examples:
      tailwise compare demo
      tailwise compare tinyimagenet-lt --set catalog=my-catalog --set evaluate.data=val --dry-run
      tailwise compare my-recipe.yaml --gate
      tailwise compare my-recipe.yaml --only "random dynamic" --only dynamics --seeds 0,1
    """
    from tailwise.compare.recipe import load_compare_recipe

    loaded = load_compare_recipe(recipe, settings or [])
    if loaded.needs and not path_of(loaded.catalog).is_dir():
        raise UserError(f"recipe {loaded.name!r} needs the catalog {loaded.catalog}: make it with `{loaded.needs}`")

    from tailwise.compare.study import Study
    from tailwise.compare.study import compare as run_all
    from tailwise.pipeline.run import Runner
    from tailwise.train.arguments import refuse_code

    folder = output or Path(f"compare-{loaded.name.replace('/', '-')}")
    try:
        chosen = [int(text) for text in seeds.split(",")] if seeds else []
    except ValueError as error:
        raise UserError(f"--seeds {seeds!r}: give whole numbers with commas, such as 0,1") from error
    refuse_code(f"recipe {loaded.name!r}, train.open_clip", loaded.train.open_clip, allowed=allow_code)
    runner = Runner(step_commands(), path_of(loaded.catalog), loaded.sources, allow_code=allow_code)
    if dry_run:
        study = Study(loaded, folder)
        for step in (step for run in study.runs() for step in run.plans):
            runner.job(step)  # refuses options that mean nothing
        _print_runs(study, only or [], chosen)
        return
    if gate:
        _print_gate(Study(loaded, folder), runner, chosen, only or [], as_json)
        return

    def report(line: str) -> None:
        say(line, error=as_json)

    chosen_runs: dict[str, Any] = {"only": only or (), "seeds": chosen}
    summary = run_all(
        loaded, folder, runner, **chosen_runs, report=report, context=with_progress(), png=png, force=force
    )
    if as_json:
        print_json(summary)
        return
    _print_results(summary)
    say(f"plans, costs and settings: {folder / 'summary.html'}")
    suggest("report", path_of(loaded.catalog), output="report", study=folder)


def _print_results(summary: Mapping[str, Any]) -> None:
    from tailwise.report.study import METRICS, percent, points

    runs, baseline = summary["runs"], summary["baseline"]
    ends = sorted({summary["rests_on"][end] or 0 for end in ("samples_seen", "most_samples_seen")})
    say(
        f"{runs['done']} of {runs['all']} runs are done; each has seen {' to '.join(f'{end:,}' for end in ends)} samples"
    )
    for name, metrics in summary["sets"].items():
        measures = tuple(METRICS[metric] for metric in metrics)
        found = [
            (row["row"], [row["sets"][name][metric] for metric in metrics])
            for row in summary["rows"]
            if name in row["sets"]
        ]
        rows = [
            (row, measures, tuple(map(percent, figures)), tuple(points(figure["difference"]) for figure in figures))
            for row, figures in found
        ]
        print_table(f"{name}, in %: mean ± deviation over seeds", ("row", "measure", "mean", f"minus {baseline}"), rows)
    say("differences have 95 % intervals; * excludes 0, ** does so after Holm's correction, too")
    ledger = summary["ledger"]
    print_table("ledger: hours of one run", ledger["columns"], ledger["cells"])
    for note in ledger["notes"]:
        say(note)
    for note in summary["treatments"]:
        say(note)
    if not summary["retrieval"]:
        say("no retrieval set is among the evaluation: give one in evaluate.data, such as Flickr30k or MSCOCO")


def _print_gate(study: Study, runner: Runner, seeds: list[int], only: list[str], as_json: bool) -> None:
    from tailwise.compare.study import prepare

    prepare(study, runner)
    found = study.gate(runner, study.runs(only, seeds)[0].seed, only)
    if as_json:
        print_json(found)
        return
    print_table(
        f"{study.recipe.name}: what each row does to the samples, seed {found['seed']}",
        found["columns"],
        found["cells"],
    )
    for note in found["notes"]:
        say(note)


def _print_runs(study: Study, only: list[str], seeds: list[int]) -> None:
    from tailwise.compare.trainers import seconds_per_step
    from tailwise.pipeline.costs import duration
    from tailwise.report.study import in_words

    training = study.recipe.train
    runs = study.runs(only, seeds)
    found = [study.result(run) for run in runs]
    done = [result for result in found if result is not None]
    pace: float | None = None  # seconds per sample
    if done:
        seconds = sum(result["trained"]["seconds"] + result["evaluate_seconds"] for result in done)
        pace = seconds / sum(result["trained"]["samples"] for result in done)
        source = f"as the {len(done)} that are done took"
    elif training.trainer == "in-process":
        pace = seconds_per_step(training) / training.global_batch
        source = "by some steps timed here; decoding and evaluation not counted"
    else:
        source = "unknown until one is done"
    seen = [study.recipe.training(run.row).samples_seen for run in runs]
    for number, (run, result, samples) in enumerate(zip(runs, found, seen, strict=True), 1):
        state = "done" if result is not None else "to do" if pace is None else f"about {duration(pace * samples)}"
        say(f"{number:3d}. {state:>12}  {run.label}: {in_words(run.row.plan)}, compose {run.row.compose}")
    left = [samples for samples, result in zip(seen, found, strict=True) if result is None]
    time_left = "" if pace is None else f", about {duration(pace * sum(left))}"
    each = " to ".join(f"{samples:,}" for samples in sorted({min(seen), max(seen)}))
    say(f"{len(left)} of {len(runs)} runs to do, {each} samples each{time_left} ({source})")


@app.command()
@takes(BaselinesRequest)
def baselines(
    metadata: Annotated[Path, Argument(metavar="METADATA", help="Folder of DataComp's metadata: .parquet and .npz.")],
    output: Annotated[Path, Argument(metavar="OUTPUT", help="Folder of the subsets: NAME.npy.")],
    request: BaselinesRequest,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the subsets of DataComp's six baselines, from its metadata.

    **basic_filter**: English, three words, six characters, a smaller side of 200 pixels, an aspect ratio of 3 at most. **clip_score**: the
    top 30 % by L/14 score. **laion2b**: English, and a B/32 score of 0.28. **text_based**: English, and a word of --entities.
    **image_based**: English, two tokens, six characters, and the nearest centroid is also that of an image of --target.
    **image_based_intersect_clip_score**: both. The uids are those that the toolkit's own functions choose. No catalog is needed.

    Examples:
      tailwise baselines metadata/ subsets --only clip_score
      tailwise baselines metadata/ subsets --only basic_filter --language languages.parquet
      tailwise baselines metadata/ subsets --language lang --entities words.txt --centroids centroids.npy --target imagenet.npy
    """
    from tailwise.steps.baselines import write_baselines

    made = write_baselines(metadata, output, request, with_progress(), overwrite=overwrite)
    if as_json:
        print_json(made)
        return
    rows = [(name, f"{kept:,}", f"{kept / max(made.samples, 1):.1%}") for name, kept in made.kept.items()]
    print_table(f"subsets of {made.samples:,} samples, in {output}", ("baseline", "uids", "of all"), rows)
    if made.threshold is not None:
        say(f"clip_score: L/14 scores of {made.threshold:.6g} or more")
    for path, count in made.unknown.items():
        if count:
            say(f"{path} does not name {count:,} samples: they count as not English")
    suggest("filter", "my-catalog", only=output / f"{next(iter(made.kept))}.npy")
