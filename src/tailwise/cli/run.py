"""A pool from import to exports in one command: run."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from tailwise.cli.app import AllowCode, AsJson, Workers, app, as_options
from tailwise.cli.printing import say
from tailwise.cli.requests import step_commands
from tailwise.errors import UserError


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name (see below), or a .yaml file.")],
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="[SOURCE...] [CATALOG]", help="In place of the recipe's own.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for exports.  [default: the recipe's]", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="STEP.OPTION=VALUE", help="Change an option of a step.", show_default=False),
    ] = None,
    workers: Workers = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print what would be done, and what it costs.")
    ] = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Take a pool from import to exports: all commands of a recipe, in order.

    Prints first what it will do. Steps that are done already are skipped, so that the same command goes on after an interruption.
    Recipes that come with tailwise: **dbp-laion**, **dbp-datacomp-medium**, **dynamics**, and **bootstrap**, which trains its encoder on
    the pool itself. A recipe of your own is a list of commands with their options, as on the command line.

    Examples:

      tailwise run dynamics shards/ embeddings/ my-catalog --output exports --dry-run

      tailwise run dbp-laion shards/ embeddings/ my-catalog --output exports --set cluster:main.k=100

      tailwise run my-recipe.yaml
    """
    from tailwise.cli.printing import print_json
    from tailwise.pipeline.costs import Pool
    from tailwise.pipeline.exports import run_job
    from tailwise.pipeline.run import Runner
    from tailwise.pipeline.steps import load_pipeline, with_settings

    pipeline = load_pipeline(recipe)
    *sources, catalog = paths or [*pipeline.sources, pipeline.catalog or ""]
    if not catalog:
        raise UserError(f"recipe {recipe!r} names no catalog: tailwise run {recipe} SOURCE... CATALOG")
    folder = output or (Path(pipeline.output) if pipeline.output is not None else None)
    runner = Runner(step_commands(), Path(catalog), sources or pipeline.sources, folder, workers, allow_code)
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
            if not run_job(runner, job):
                say("done already")
    if as_json:
        print_json({"name": pipeline.name, "dry_run": dry_run, "steps": listed})
