"""A pool from import to exports in one command: run."""

from __future__ import annotations

import inspect
import sys
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer.models import ArgumentInfo

from tailwise.cli.app import AllowCode, AsJson, Workers, app, as_options
from tailwise.cli.printing import say
from tailwise.cli.requests import plain_type
from tailwise.errors import UserError

if TYPE_CHECKING:
    from tailwise.pipeline.steps import Command


def step_commands() -> dict[str, Command]:
    """Return the commands that steps of recipes can be, by the signatures that Typer parses."""
    from pydantic import Field

    from tailwise.pipeline.steps import STEPS, Command, Option

    calls: Any = {
        item.name or getattr(item.callback, "__name__", ""): item.callback for item in app.registered_commands
    }
    commands = {}
    for command in STEPS:
        options: dict[str, Option] = {}
        for item in inspect.signature(calls[command], eval_str=True).parameters.values():
            hint, shown = get_args(item.annotation)
            kind, spelt = plain_type(hint), shown.default  # the first argument of typer.Option
            names = (spelt if isinstance(spelt, str) else item.name).replace("_", "-").replace("--", "").split("/")
            bounded = kind if shown.min is None else Annotated[kind, Field(ge=shown.min)]
            argument = isinstance(shown, ArgumentInfo)
            options |= dict.fromkeys(names, Option(item.name, names, bounded, item.default, argument))
        commands[command] = Command(options, getattr(calls[command], "ready", partial(partial, calls[command])))
    return commands


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name (see below), or a .yaml file.")],
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="[SOURCE...] [CATALOG]", help="In place of the recipe's own.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for exports.  [default: the recipe's]")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="STEP.OPTION=VALUE", help="Change an option of a step.")
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
