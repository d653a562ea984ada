"""Grouping the pool by what is known of it: group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tailwise.cli.app import AsJson, CatalogPath, app, open_catalog, say_note, with_progress
from tailwise.cli.printing import say
from tailwise.cli.requests import takes
from tailwise.requests import GroupRequest


@app.command()
@takes(GroupRequest)
def group(catalog: CatalogPath, request: GroupRequest, as_json: AsJson = False) -> None:
    """Group the pool in place of clusters: by a column (language, domain, class, cluster numbers made elsewhere), or by what captions say.

    Each distinct value is a group; plans are made over them with `--clustering NAME`, by all methods that need no distances.

    Examples:

      tailwise group my-catalog --by language --file languages.parquet

      tailwise group my-catalog --entries wordnet.txt --name concepts

      tailwise plan my-catalog epochs --method dynamics --keep 0.5 --clustering concepts
    """
    from tailwise.cli.printing import print_json, print_sizes
    from tailwise.steps.grouping.group import group as run
    from tailwise.steps.planning.unused_lists import unused_by_clustering

    opened = open_catalog(catalog)
    made = run(opened, request, with_progress())
    unused = unused_by_clustering(opened, made.name)
    if as_json:
        print_json({"name": made.name, **made.summary, "unused_drop_lists": [asdict(item) for item in unused]})
        return
    summary = made.summary
    say(f"grouping {made.name!r}: {summary['clusters']:,} groups of {summary['samples']:,} samples")
    if summary["dropped"]:
        say(
            f"{summary['dropped']:,} samples are left out ({', '.join([*request.without, 'removed ones'])}) and belong to no group"
        )
    what = "value" if request.entries is None else "entry in their captions"
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
    from tailwise.steps.grouping.entries import quoted

    given, ignoring = summary["matched_as_given"], summary["matched_ignoring_case"]
    say(f"of {summary['taking_part']:,} captions, {given:,} hold an entry as it is written, {ignoring:,} ignoring case")
    if summary["unmatched"]:
        say(f"frequent captions without an entry: {quoted(summary['unmatched_captions'])}")
        say(f"frequent words of these: {quoted(summary['unmatched_words'])}")
