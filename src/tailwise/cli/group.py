"""Grouping the pool by what is known of it: group."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailwise.cli.app import AsJson, CatalogPath, Without, app, open_catalog, with_bars


@app.command()
def group(
    catalog: CatalogPath,
    by: Annotated[str, typer.Option(help="Column of text, whole numbers or booleans; `shard` is one.")],
    file: Annotated[
        Path | None,
        typer.Option(
            help="A .parquet, .tsv or .csv that has the column, and uid, key or image_path.", show_default=False
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the grouping.  [default: the column's]", show_default=False)
    ] = None,
    missing: Annotated[
        str, typer.Option(help="Samples without a value: leave-out (no plan draws them) or own-group.")
    ] = "leave-out",
    without: Without = None,
    as_json: AsJson = False,
) -> None:
    """Group the pool by a column in place of clusters: by language, domain, class, or cluster numbers made elsewhere.

    Each distinct value is a group; plans are made over them with `--clusters NAME`, by all methods that need no distances.

    Examples:

      tailwise group my-catalog --by language --file languages.parquet

      tailwise plan my-catalog epochs --method dynamics --keep 0.5 --clusters language
    """
    from tailwise.printing import print_json, print_sizes
    from tailwise.stages import group as stage

    opened = open_catalog(catalog)
    made = with_bars(
        lambda track: stage.group(opened, by, file=file, name=name, missing=missing, without=without or (), track=track)
    )
    if as_json:
        print_json({"name": made.name, **made.summary})
        return
    summary = made.summary
    print(f"grouping {made.name!r}: {summary['clusters']:,} groups of {summary['samples']:,} samples")
    if summary["dropped"]:
        print(
            f"{summary['dropped']:,} samples are left out ({', '.join([*(without or ()), 'removed ones'])}) and belong to no group"
        )
    if summary["without_value"]:
        print(f"{summary['without_value']:,} samples have no value and belong to no group")
    if summary.get("values_without_sample"):
        print(f"{summary['values_without_sample']:,} values belong to no sample")
    print_sizes(made.table.column("size").to_numpy())
