"""Leaving duplicates out: dedup."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tailwise.cli.app import AsJson, CatalogPath, Without, app, open_catalog, parse_bytes, refuse_given, with_bars
from tailwise.cli.printing import say
from tailwise.errors import UserError

if TYPE_CHECKING:
    from tailwise.catalog import Catalog
    from tailwise.progress import Track
    from tailwise.stages.dedup import Deduplication
    from tailwise.stages.suggest import Suggestion


@app.command()
def dedup(
    catalog: CatalogPath,
    epsilon: Annotated[
        float | None,
        typer.Option(help="Duplicates have a cosine above 1 − epsilon; 0: identical embeddings.", show_default=False),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the drop list.  [default: duplicates]", show_default=False)
    ] = None,
    clustering: Annotated[str, typer.Option(help="Clustering inside which samples are compared.")] = "main",
    rule: Annotated[
        str | None,
        typer.Option(
            help="greedy: a duplicate of a kept one goes; any-earlier: of any earlier one.  [default: greedy]",
            show_default=False,
        ),
    ] = None,
    order: Annotated[
        str, typer.Option(help="What comes first and is kept: farthest from the centroid, nearest, random, or score.")
    ] = "farthest",
    score: Annotated[
        str | None, typer.Option(help="With --order score: which one, highest first.", show_default=False)
    ] = None,
    without: Without = None,
    extends: Annotated[
        str | None,
        typer.Option(help="A dedup of an earlier snapshot: judge new samples only.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides the random order, and what --suggest samples.")] = 0,
    max_memory: Annotated[str, typer.Option(help="Refuse what needs more.")] = "4GB",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; the result doesn't depend on it.")] = "auto",
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
    from tailwise.stages import dedup as stage
    from tailwise.stages.neighbours import Comparison
    from tailwise.stages.suggest import suggest as make_guide

    opened = open_catalog(catalog)
    memory = parse_bytes(max_memory)
    if suggest:
        refuse_given({"--epsilon": epsilon, "--name": name, "--rule": rule}, "with --suggest")

        def guide(track: Track) -> Suggestion:
            compared = Comparison(
                opened,
                clustering=clustering,
                order=order,
                score=score,
                without=without or (),
                extends=extends,
                seed=seed,
                track=track,
            )
            return make_guide(compared, max_memory_bytes=memory, device=device)

        found = with_bars(guide)
        if as_json:
            from dataclasses import asdict

            print_json(asdict(found))
        else:
            _print_guide(found)
        return
    if epsilon is None:
        raise UserError("--epsilon is missing: `--suggest` shows what each value would drop; SemDeDup uses 0.01 to 0.1")
    made = with_bars(
        lambda track: stage.dedup(
            opened,
            epsilon=epsilon,
            name=name or "duplicates",
            clustering=clustering,
            rule=rule or "greedy",
            order=order,
            score=score,
            without=without or (),
            extends=extends,
            seed=seed,
            max_memory_bytes=memory,
            device=device,
            track=track,
        )
    )
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
