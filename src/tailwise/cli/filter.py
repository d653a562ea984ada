"""Leaving out samples by a score: filter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tailwise.cli.app import AsJson, CatalogPath, app, open_catalog, with_progress
from tailwise.cli.printing import say
from tailwise.cli.requests import takes
from tailwise.requests import FilterRequest

if TYPE_CHECKING:
    from tailwise.steps.scoring.filter import Filtered


@app.command("filter")
@takes(FilterRequest)
def filter_(
    catalog: CatalogPath,
    request: FilterRequest,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the distribution, and what would be dropped.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Leave out samples by a score, as a drop list for --without.

    Scores from embeddings: **clip-score**, **cliploss**, **normsim**; from the samples: **caption-characters**, **caption-words**,
    **width**, **height**, **pixels**, **aspect-ratio**, **image-bytes**. A score is made once and kept: another bound costs little.

    Examples:

      tailwise filter my-catalog --by clip-score --dry-run

      tailwise filter my-catalog --by clip-score --keep 0.3

      tailwise filter my-catalog --by caption-words --min 3 --max 60 --name captions --without duplicates

      tailwise filter my-catalog --by normsim --target imagenet.npy --keep 0.5

      tailwise filter my-catalog --by clip_l14_similarity_score --file metadata.parquet --min 0.28
    """
    from tailwise.cli.printing import print_json
    from tailwise.steps.scoring.filter import filter_samples, try_filter

    opened = open_catalog(catalog)
    made = (try_filter if dry_run else filter_samples)(opened, request, with_progress())
    if as_json:
        print_json({"name": made.name, **made.summary})
    else:
        _print(made)


def _print(made: Filtered) -> None:
    from tailwise.cli.printing import print_table

    summary = made.summary
    marks = {f"{item['percent']} %": f"{item['score']:.6g}" for item in summary["quantiles"]}
    print_table(f"{summary['score']} of {summary['scored']:,} samples", tuple(marks), [tuple(marks.values())])
    if (absent := summary["samples"] - summary["scored"]) > 0:
        say(f"{absent:,} samples have no {summary['score']}")
    for reason, rows in summary.get("reasons", {}).items():
        say(f"{rows:,}: {reason}")
    if summary.get("keys_without_sample"):
        say(f"{summary['keys_without_sample']:,} of the file's {summary['keys']:,} keys match no sample")
    if "dropped" in summary:
        verb = "would drop" if made.name is None else f"drop list {made.name!r}: drops"
        share = (
            f"; {summary['kept']:,} stay, {summary['kept'] / summary['pool']:.1%} of the pool of {summary['pool']:,}"
        )
        say(f"{verb} {summary['dropped']:,} of {summary['samples']:,} samples{share * ('pool' in summary)}")
