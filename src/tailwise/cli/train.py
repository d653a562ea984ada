"""Training: train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailwise.cli.app import AllowCode, CatalogPath, PlanName, app, open_plan, parse_bytes, say_note, with_bars


@app.command()
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
    epochs: Annotated[int | None, typer.Option(min=1, help="Of the plan.", show_default=False)] = None,
    samples_seen: Annotated[int | None, typer.Option(min=1, help="In place of epochs.", show_default=False)] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            min=1, help="Batches, at most.  [default: a twentieth of all, at most 1000 steps]", show_default=False
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last checkpoint, if there is one.")] = False,
    seed: Annotated[
        int | None, typer.Option(help="Of order, augmentations and weights.  [default: the plan's]", show_default=False)
    ] = None,
    lanes: Annotated[
        int | None, typer.Option(min=1, help="Places of the pool that a batch is taken from.  [default: about 64]")
    ] = None,
    block: Annotated[
        int | None, typer.Option(min=1, help="Samples of a lane that are shuffled together.", show_default=False)
    ] = None,
    compose: Annotated[
        str | None, typer.Option(help="shuffle, spread or diverse.  [default: shuffle]", show_default=False)
    ] = None,
    check: Annotated[str, typer.Option(help="Of the shards, before starting: none, size or index.")] = "size",
    damaged: Annotated[str, typer.Option(help="Tars that are missing, changed or fail: error or replace.")] = "error",
    max_replaced: Annotated[float, typer.Option(help="Share of samples that may be replaced.")] = 0.01,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for what is fetched from remote shards.", show_default=False)
    ] = None,
    cache_size: Annotated[str, typer.Option(help="Bound of the cache.")] = "32GB",
    record: Annotated[
        Path | None, typer.Option(help="Folder for a record of the rows and pixels of each batch.", show_default=False)
    ] = None,
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

    from tailwise.stages.unused_lists import unused_by_plan
    from tailwise.train.launch import train as run
    from tailwise.train.options import TrainOptions

    for phase in settings.phases if settings is not None else ():
        refuse_code(f"recipe {recipe}: open_clip", phase.open_clip, allowed=allow_code)
    options = TrainOptions(
        epochs=epochs,
        samples_seen=samples_seen,
        checkpoint_every=checkpoint_every,
        resume=resume,
        seed=seed,
        lanes=lanes,
        block=block,
        compose=compose,
        check=check,
        damaged=damaged,
        max_replaced=max_replaced,
        cache=cache,
        cache_bytes=parse_bytes(cache_size, "--cache-size"),
        record=record,
    )
    plan = open_plan(catalog, name)
    for item in unused_by_plan(plan):
        say_note(item.note())
    with_bars(lambda track: run(plan, open_clip or [], options, settings, tell=say_note, track=track))
