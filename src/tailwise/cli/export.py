"""Outputs of a plan: draw, export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tailwise.cli.app import AsJson, CatalogPath, Overwrite, PlanName, app, open_plan, say_note, with_progress
from tailwise.cli.printing import say
from tailwise.cli.requests import takes
from tailwise.errors import UserError
from tailwise.requests import ShardsRequest

Epoch = Annotated[int | None, typer.Option(min=0, help="Which epoch, from 0; needed where epochs differ.")]


@app.command()
def draw(
    catalog: CatalogPath,
    name: PlanName,
    output: Annotated[Path, typer.Option(help="Parquet file to write.")],
    epoch: Epoch = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the samples of one epoch: shard, key, uid, cluster, rate, copies.

    Example:

      tailwise draw my-catalog epochs --epoch 3 --output epoch-3.parquet
    """
    _export(catalog, name, "parquet", output, epoch, overwrite, as_json=as_json)


@app.command()
@takes(ShardsRequest)
def export(
    catalog: CatalogPath,
    name: PlanName,
    to: Annotated[str, typer.Option(help="datacomp, rates-json, keys, parquet or shards.")],
    output: Annotated[Path | None, typer.Option(help="File to write; a folder for shards.  [required]")] = None,
    place: Annotated[Path | None, typer.Argument(hidden=True)] = None,
    epoch: Epoch = None,
    overwrite: Overwrite = False,
    request: ShardsRequest = ShardsRequest(),
    as_json: AsJson = False,
) -> None:
    """Write a plan in another tool's format.

    **datacomp**: sorted uids (.npy), for DataComp's resharder. **rates-json**: {key: rate}, for DynamiCS's fork of open_clip.
    **keys**: one key a line. **parquet**: shard, key, uid, cluster, rate, copies. **shards**: a new webdataset, shuffled over the whole
    epoch; after an interruption the same command goes on.

    Examples:

      tailwise export my-catalog subset --to datacomp --output subset.npy

      tailwise export my-catalog epochs --epoch 3 --to shards --output epoch-3
    """
    if (output is None) == (place is None):
        raise UserError("name the file or folder to write with --output")
    output = output or place or Path()
    _export(catalog, name, to, output, epoch, overwrite, request if request != ShardsRequest() else None, as_json)


def _export(
    catalog: Path,
    name: str,
    to: str,
    output: Path,
    epoch: int | None,
    overwrite: bool,
    sharding: ShardsRequest | None = None,
    as_json: bool = False,
) -> None:
    from tailwise.cli.printing import print_json
    from tailwise.export import export as run
    from tailwise.export import export_figures
    from tailwise.export.shards import REJECTED, left_out
    from tailwise.steps.planning.unused_lists import unused_by_plan

    made, context = open_plan(catalog, name), with_progress()
    written = run(made, to, output, epoch=epoch, overwrite=overwrite, sharding=sharding, context=context)
    rejected, unused = left_out(output), unused_by_plan(made)
    figures = export_figures(made, to, epoch, context)
    if as_json:
        lists = [asdict(item) for item in unused]
        print_json(
            {"output": str(output), "entries": written, "rejected": rejected, **figures, "unused_drop_lists": lists}
        )
        return
    say(f"{output}: {written:,} entries")
    if figures.get("rates_above_one"):
        say(
            f"warning: {figures['rates_above_one']:,} samples have a rate above 1, and the authors' trainer draws a sample once at most: "
            f"it will draw {figures['short_share']:.1%} too few samples (plan with --max-repeats 1 for it)"
        )
    for item in unused:
        say_note(item.note())
    for reason, samples in rejected.items():
        say(f"left out, {reason}: {samples:,} (see {output / REJECTED})")
