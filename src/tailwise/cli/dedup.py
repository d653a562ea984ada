"""Leaving duplicates out: dedup."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tailwise.cli.app import AsJson, CatalogPath, app, open_catalog, with_progress
from tailwise.cli.printing import say
from tailwise.cli.requests import takes
from tailwise.requests import DedupRequest

if TYPE_CHECKING:
    from tailwise.catalog import Catalog
    from tailwise.steps.dedup.dedup import Deduplication
    from tailwise.steps.dedup.suggest import Suggestion


@app.command()
@takes(DedupRequest)
def dedup(
    catalog: CatalogPath,
    request: DedupRequest,
    suggest: Annotated[
        bool, typer.Option("--suggest", help="Drop nothing; show what each epsilon would do, and sampled pairs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Leave out near-duplicates: samples of one cluster whose embeddings are nearly the same (SemDeDup, 2023).

    Makes a drop list, which `cluster`, `filter` and others take with --without. The comparison is made once for a clustering
    and an order: another --epsilon or --rule takes seconds.

    Examples:

      tailwise dedup my-catalog --suggest

      tailwise dedup my-catalog --epsilon 0.05

      tailwise dedup my-catalog --epsilon 0.05 --clustering fine --order score --score clip-score --name fewer

      tailwise dedup my-catalog --epsilon 0.05 --clustering main-2 --extends duplicates --name duplicates-2
    """
    from tailwise.cli.printing import print_json
    from tailwise.steps.dedup.dedup import dedup as run
    from tailwise.steps.dedup.suggest import suggest as make_guide

    opened = open_catalog(catalog)
    if suggest:
        found = make_guide(opened, request, with_progress())
        if as_json:
            from dataclasses import asdict

            print_json(asdict(found))
        else:
            _print_guide(found)
        return
    made = run(opened, request, with_progress())
    if as_json:
        print_json({"name": made.name, **made.summary})
    else:
        _print_made(opened, made)


def _print_made(catalog: Catalog, made: Deduplication) -> None:
    figures = made.summary
    judged, now = figures["judged"], figures["dropped_identical"] + figures["dropped_near"]
    say(
        f"drop list {made.name!r}: {now:,} of {judged:,} samples ({now / max(judged, 1):.1%}) are left out, "
        f"{figures['dropped_identical']:,} as identical, {figures['dropped_near']:,} as near-duplicates"
    )
    if figures["dropped_before"]:
        say(f"{figures['dropped_before']:,} more were left out before")
    say(f"{figures['clusters']:,} clusters, the largest of {figures['largest_cluster']:,}")
    say(f"next: tailwise cluster {catalog.folder} --k K --without {made.name} --name …")


def _print_guide(found: Suggestion) -> None:
    from pathlib import PurePath

    from tailwise.cli.printing import print_table

    def share(part: int, whole: int) -> str:
        return f"{part / whole:.1%}" if whole else "–"

    say(f"{found.samples:,} samples, {found.compared:,} pairs inside the clusters of {found.clusters!r}")
    rows = [
        (f"{item.epsilon:g}", f"{item.dropped:,}", f"{item.share:.2%}", f"{item.pairs:,}",
         share(item.pairs_inside, item.pairs), f"{item.queries:,}", share(item.queries_inside, item.queries))
        for item in found.epsilons
    ]  # fmt: skip
    columns = ("epsilon", "dropped", "of samples", "pairs", "in one cluster", "with a duplicate", "in its cluster")
    print_table("what would go (any-earlier; greedy drops as many or fewer), and what clusters hide", columns, rows)
    say(
        f"the last four columns: {found.queries:,} samples drawn at random, compared with {found.pool:,}; "
        "where the shares are low, another number of clusters, or a second dedup inside other clusters, finds more"
    )
    pairs = [
        (f"{pair.epsilon:g}", f"{pair.similarity:.5f}", *(
            (f"{PurePath(sample.shard).name} {sample.key}", sample.caption[:60]) for sample in (pair.sample, pair.earlier)
        ))
        for pair in found.pairs
    ]  # fmt: skip
    print_table("pairs to look at", ("from epsilon", "similarity", "sample", "most similar earlier one"), pairs)
