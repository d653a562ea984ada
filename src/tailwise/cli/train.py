"""Training: train."""

from __future__ import annotations

from typing import Annotated

import typer

from tailwise.cli.app import AllowCode, CatalogPath, PlanName, app, open_plan, say_note, with_progress
from tailwise.cli.requests import takes
from tailwise.requests import TrainRequest


@app.command()
@takes(TrainRequest)
def train(
    catalog: CatalogPath,
    name: PlanName,
    open_clip: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- OPEN_CLIP_ARGUMENTS...]", help="Arguments of open_clip's trainer."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Settings by name, or a .yaml file of them; arguments given here go before it.")
    ] = None,
    request: TrainRequest = TrainRequest(),
    allow_code: AllowCode = False,
) -> None:
    """Train CLIP on a plan, with open_clip's own trainer.

    What stands after the -- is open_clip's (see `tailwise train CATALOG NAME -- --help`). On several GPUs, start the same command by
    `torchrun --nproc_per_node N -m tailwise train …`. Batches, learning rate and augmentations after --resume are those that
    would have come without the interruption.

    Examples:

      tailwise train my-catalog epochs --epochs 32 -- --model ViT-B-32 --batch-size 512 --warmup 2000 --precision amp_bf16

      tailwise train my-catalog epochs --recipe tiny-cpu
    """
    from tailwise.recipes import load_recipe
    from tailwise.train.arguments import refuse_code, require_model

    settings = load_recipe(recipe) if recipe is not None else None
    if settings is None:
        require_model(open_clip or [])  # before the seconds that the trainer takes to import

    from tailwise.steps.planning.unused_lists import unused_by_plan
    from tailwise.train.launch import train as run

    for phase in settings.phases if settings is not None else ():
        refuse_code(f"recipe {recipe}: open_clip", phase.open_clip, allowed=allow_code)
    plan = open_plan(catalog, name)
    for item in unused_by_plan(plan):
        say_note(item.note())
    run(plan, open_clip or [], request, settings, report=say_note, context=with_progress())
