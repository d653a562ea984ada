"""What goes out: draw, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailwise.cli.app import CatalogPath, Overwrite, PlanName, app, open_plan, with_bars


@app.command()
def draw(
    catalog: CatalogPath,
    name: PlanName,
    output: Annotated[Path, typer.Option(help="Parquet file to write.")],
    epoch: Annotated[int, typer.Option(min=0, help="Which epoch, from 0.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write the samples of one epoch: shard, key, uid, cluster, rate, copies.

    Example:

      tailwise draw my-catalog epochs --epoch 3 --output epoch-3.parquet
    """
    _export(catalog, name, "parquet", output, epoch, overwrite)


@app.command()
def export(
    catalog: CatalogPath,
    name: PlanName,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="File to write.")],
    to: Annotated[str, typer.Option(help="datacomp, rates-json, keys or parquet.")],
    epoch: Annotated[int, typer.Option(min=0, help="Which epoch, from 0, for formats that hold one.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write a plan in another tool's format.

    **datacomp**: sorted uids (.npy), for DataComp's resharder. **rates-json**: {key: rate}, for DynamiCS's fork of open_clip.
    **keys**: one key a line. **parquet**: shard, key, uid, cluster, rate, copies.

    Example:

      tailwise export my-catalog subset --to datacomp subset.npy
    """
    _export(catalog, name, to, output, epoch, overwrite)


def _export(catalog: Path, name: str, to: str, output: Path, epoch: int, overwrite: bool) -> None:
    from tailwise.export import export as run

    made = open_plan(catalog, name)
    written = with_bars(lambda track: run(made, to, output, epoch=epoch, overwrite=overwrite, track=track))
    print(f"{output}: {written:,} entries")
