"""Grouping the pool by what is known of it: group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tailwise.cli.app import AsJson, CatalogPath, Without, Workers, app, open_catalog, refuse_given, say_note, with_bars
from tailwise.cli.printing import say
from tailwise.errors import UserError

if TYPE_CHECKING:
    from tailwise.catalog.clusterings import Clustering
    from tailwise.progress import Track


@app.command()
def group(
    catalog: CatalogPath,
    by: Annotated[
        str | None,
        typer.Option(help="Column of text, whole numbers or booleans; `shard` is one.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="A .parquet, .tsv or .csv that has the column, and uid, key or image_path.", show_default=False
        ),
    ] = None,
    max_rejected: Annotated[
        float | None,
        typer.Option(
            help="Of --file: refuse if greater shares of its rows and of the samples don't match.  [default: 0.1]",
            show_default=False,
        ),
    ] = None,
    entries: Annotated[
        Path | None,
        typer.Option(
            help="In place of --by: a list of words and phrases, one a line; a sample's group is the rarest one in its caption.",
            show_default=False,
        ),
    ] = None,
    ignore_case: Annotated[bool, typer.Option("--ignore-case", help="Of --entries: compare in lower case.")] = False,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the grouping.  [default: the column's, or entries]", show_default=False),
    ] = None,
    missing: Annotated[
        str, typer.Option(help="Samples without a value or an entry: leave-out (no plan draws them) or own-group.")
    ] = "leave-out",
    max_misses: Annotated[
        float | None,
        typer.Option(
            help="Of --entries: refuse if a greater share of samples has no entry.  [default: 0.5]", show_default=False
        ),
    ] = None,
    allow_misses: Annotated[
        bool, typer.Option("--allow-misses", help="Of --entries: accept any share of samples without an entry.")
    ] = False,
    without: Without = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Group the pool in place of clusters: by a column (language, domain, class, cluster numbers made elsewhere), or by what captions say.

    Each distinct value is a group; plans are made over them with `--clustering NAME`, by all methods that need no distances.

    Examples:

      tailwise group my-catalog --by language --file languages.parquet

      tailwise group my-catalog --entries wordnet.txt --name concepts

      tailwise plan my-catalog epochs --method dynamics --keep 0.5 --clustering concepts
    """
    from tailwise.cli.printing import print_json, print_sizes
    from tailwise.stages.group import group as group_by_column
    from tailwise.stages.group_entries import MAX_MISSES, group_by_entry
    from tailwise.stages.unused_lists import unused_by_clustering

    if (by is None) == (entries is None):
        raise UserError("give one of --by COLUMN and --entries FILE")
    if entries is None:
        of_entries = {
            "--ignore-case": ignore_case or None,
            "--max-misses": max_misses,
            "--allow-misses": allow_misses or None,
        }
        refuse_given({**of_entries, "--workers": workers}, "without --entries")
    else:
        refuse_given({"--file": file}, "with --entries")
        refuse_given({"--max-misses": max_misses if allow_misses else None}, "with --allow-misses")
    opened = open_catalog(catalog)
    left_out = without or ()
    bound = {} if max_rejected is None else {"max_rejected": max_rejected}
    refuse_given({"--max-rejected": max_rejected if file is None else None}, "without --file")

    def make(track: Track) -> Clustering:
        if entries is None:
            return group_by_column(
                opened, str(by), file=file, name=name, missing=missing, without=left_out, track=track, **bound
            )
        return group_by_entry(
            opened,
            entries,
            name=name or "entries",
            ignore_case=ignore_case,
            missing=missing,
            max_misses=1.0 if allow_misses else MAX_MISSES if max_misses is None else max_misses,
            without=left_out,
            workers=workers,
            track=track,
        )

    made = with_bars(make)
    unused = unused_by_clustering(opened, made.name)
    if as_json:
        print_json({"name": made.name, **made.summary, "unused_drop_lists": [asdict(item) for item in unused]})
        return
    summary = made.summary
    say(f"grouping {made.name!r}: {summary['clusters']:,} groups of {summary['samples']:,} samples")
    if summary["dropped"]:
        say(
            f"{summary['dropped']:,} samples are left out ({', '.join([*left_out, 'removed ones'])}) and belong to no group"
        )
    what = "value" if entries is None else "entry in their captions"
    if summary["without_value"]:
        say(f"{summary['without_value']:,} samples have no {what} and belong to no group")
    if "matched_as_given" in summary:
        _print_matches(summary)
    if summary.get("entries_without_group"):
        say(f"{summary['entries_without_group']:,} entries of the list are the rarest of no caption")
    if summary.get("values_without_sample"):
        say(f"{summary['values_without_sample']:,} values belong to no sample")
    print_sizes(made.table.column("size").to_numpy())
    for item in unused:
        say_note(item.note("are in its groups"))


def _print_matches(summary: Mapping[str, Any]) -> None:
    from tailwise.stages.group_entries import quoted

    given, ignoring = summary["matched_as_given"], summary["matched_ignoring_case"]
    say(f"of {summary['taking_part']:,} captions, {given:,} hold an entry as it is written, {ignoring:,} ignoring case")
    if summary["unmatched"]:
        say(f"frequent captions without an entry: {quoted(summary['unmatched_captions'])}")
        say(f"frequent words of these: {quoted(summary['unmatched_words'])}")
