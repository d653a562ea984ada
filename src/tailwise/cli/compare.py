"""Methods against each other: compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailwise.cli.app import AllowCode, AsJson, app, with_progress
from tailwise.cli.printing import say
from tailwise.cli.run import step_commands
from tailwise.errors import UserError

if TYPE_CHECKING:
    from tailwise.compare.study import Study


@app.command()
def compare(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A .yaml file, or a name: demo, tinyimagenet-lt.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe; KEY with dots.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for all that comes of it.  [default: compare-NAME]")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="ROW", help="Run these rows only.")] = None,
    seeds: Annotated[str | None, typer.Option(metavar="0,1", help="Run these of the recipe's seeds only.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the runs, which are done, and the time they take.")
    ] = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Train on several plans, each with several seeds, all on as many samples, and report which differences are significant.

    Every run leaves its result in OUTPUT/runs; a repeated command does what is missing, and several processes may share the work. The
    summaries (summary.md, summary.html, summary.json, results.csv, plots) speak of all runs that are done, and are written after each.

    Examples:

      tailwise compare demo

      tailwise compare tinyimagenet-lt --set catalog=my-catalog --set evaluate.data=val --dry-run

      tailwise compare my-recipe.yaml --only "random dynamic" --only dynamics --seeds 0,1
    """
    from tailwise.compare.recipe import load_compare_recipe

    loaded = load_compare_recipe(recipe, settings or [])
    if loaded.needs and not Path(loaded.catalog).exists():
        raise UserError(f"recipe {loaded.name!r} needs the catalog {loaded.catalog}: make it with `{loaded.needs}`")

    from tailwise.cli.printing import print_json
    from tailwise.compare.study import Study
    from tailwise.compare.study import compare as run_all
    from tailwise.compare.summary import summary_text
    from tailwise.pipeline.run import Runner
    from tailwise.train.arguments import refuse_code

    folder = output or Path(f"compare-{loaded.name.replace('/', '-')}")
    chosen = _numbers(seeds)
    refuse_code(f"recipe {loaded.name!r}, train.open_clip", loaded.train.open_clip, allowed=allow_code)
    runner = Runner(step_commands(), Path(loaded.catalog), loaded.sources, allow_code=allow_code)
    if dry_run:
        study = Study(loaded, folder)
        for run in study.runs():
            runner.job(run.plan)  # refuses options that mean nothing
        _print_runs(study, only or [], chosen)
        return

    def report(line: str) -> None:
        say(line, error=as_json)

    summary = run_all(loaded, folder, runner, only=only or (), seeds=chosen, report=report, context=with_progress())
    if as_json:
        print_json(summary)
        return
    for line in ["", *summary_text(summary).splitlines()]:
        say(line)
    say(f"see {folder / 'summary.html'}")


def _numbers(seeds: str | None) -> list[int]:
    try:
        return [int(text) for text in seeds.split(",")] if seeds else []
    except ValueError as error:
        raise UserError(f"--seeds {seeds!r}: give whole numbers with commas, such as 0,1") from error


def _print_runs(study: Study, only: list[str], seeds: list[int]) -> None:
    from tailwise.compare.inprocess import seconds_per_step
    from tailwise.pipeline.costs import duration

    training = study.recipe.train
    runs = study.runs(only, seeds)
    found = [study.result(run) for run in runs]
    done = [result for result in found if result is not None]
    if done:
        each = sum(result["trained"]["seconds"] + result["evaluate_seconds"] for result in done) / len(done)
        source = f"as the {len(done)} that are done took"
    elif training.trainer == "in-process":
        each = seconds_per_step(training) * (training.samples_seen // training.global_batch)
        source = "by some steps timed here; decoding and evaluation not counted"
    else:
        each, source = None, "unknown until one is done"
    for number, (run, result) in enumerate(zip(runs, found, strict=True), 1):
        options = " ".join(f"{name}={value}" for name, value in run.row.plan.items())
        state = "done" if result is not None else "to do" if each is None else f"about {duration(each)}"
        say(f"{number:3d}. {state:>12}  {run.label}: {options} compose={run.row.compose}")
    left = len(runs) - len(done)
    time_left = "" if each is None else f", about {duration(each * left)}"
    say(f"{left} of {len(runs)} runs to do, {training.samples_seen:,} samples each{time_left} ({source})")
