"""Grouping the pool: cluster."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

import typer

from tailwise.cli.app import (
    AsJson,
    CatalogPath,
    Without,
    app,
    open_catalog,
    parse_bytes,
    refuse_given,
    say_note,
    with_bars,
)
from tailwise.cli.printing import say
from tailwise.errors import UserError


@app.command()
def cluster(
    catalog: CatalogPath,
    k: Annotated[
        int | None,
        typer.Option(
            help="Number of clusters, before merging. DBP: 500 for 280M samples; DynamiCS: 50,000.", show_default=False
        ),
    ] = None,
    merge: Annotated[
        float | None,
        typer.Option(help="Merge centroids whose cosine is at least this. DynamiCS: 0.7.", show_default=False),
    ] = None,
    density: Annotated[
        str | None,
        typer.Option(
            help="Count the samples whose cosine to a centroid is at least this, for plans by --method density; "
            "auto: that which 95 % of the samples have to their own.",
            metavar="auto|COSINE",
            show_default=False,
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the clustering.")] = "main",
    column: Annotated[str, typer.Option(help="Embeddings to cluster: image or text.")] = "image",
    seed: Annotated[int, typer.Option(help="Decides the sample and the seeding.")] = 0,
    iterations: Annotated[int, typer.Option(help="Of k-means, at most.")] = 30,
    points_per_centroid: Annotated[
        int, typer.Option(help="Rows that k-means is fitted on, per centroid, at most.")
    ] = 1000,
    without: Without = None,
    extends: Annotated[
        str | None,
        typer.Option(help="Instead of --k: assign to the centroids of this clustering.", show_default=False),
    ] = None,
    max_memory: Annotated[str, typer.Option(help="Refuse what needs more.")] = "8GB",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; the result doesn't depend on it.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Accept a collapsed clustering.")] = False,
    as_json: AsJson = False,
) -> None:
    """Cluster the pool by spherical k-means.

    The result depends on the embeddings and the options alone: not on device, threads, or memory.

    Examples:

      tailwise cluster my-catalog --k 500

      tailwise cluster my-catalog --k 50000 --merge 0.7 --name fine

      tailwise cluster my-catalog --k 50000 --density auto --name dense  (for --method density: rates that follow rarity better)

      tailwise cluster my-catalog --k 500 --without duplicates

      tailwise cluster my-catalog --extends main --name main-2  (new shards were imported: their samples join the old clusters)
    """
    from tailwise.cli.printing import print_json, print_sizes
    from tailwise.stages import cluster as stage
    from tailwise.stages.unused_lists import unused_by_clustering

    opened = open_catalog(catalog)
    if (k is None) == (extends is None):
        raise UserError("give either --k K or --extends CLUSTERING")
    if extends is not None:
        unused: dict[str, object] = {
            "--merge": merge,
            "--density": density,
            "--column": column if column != "image" else None,
        }
        unused |= {"--seed": seed or None, "--iterations": iterations if iterations != stage.ITERATIONS else None}
        points = points_per_centroid if points_per_centroid != stage.POINTS_PER_CENTROID else None
        refuse_given({**unused, "--points-per-centroid": points}, "with --extends: the centroids are there already")
        made = with_bars(
            lambda track: stage.extend_clustering(
                opened, extends, name=name, without=without or (), device=device, force=force, track=track
            )
        )
    else:
        made = with_bars(
            lambda track: stage.cluster(
                opened,
                k=k or 0,
                merge=merge,
                density=_density(density),
                name=name,
                column=column,
                seed=seed,
                iterations=iterations,
                points_per_centroid=points_per_centroid,
                without=without or (),
                max_memory_bytes=parse_bytes(max_memory),
                device=device,
                force=force,
                track=track,
            )
        )
    ignored = unused_by_clustering(opened, name)
    if as_json:
        print_json({"name": name, **made.summary, "unused_drop_lists": [asdict(item) for item in ignored]})
        return
    summary = made.summary
    merged = f", merged from {summary['fitted']:,}" if merge is not None else ""
    say(f"clustering {name!r}: {summary['clusters']:,} clusters{merged}, of {summary['samples']:,} samples")
    say(f"mean cosine to the centroid {summary['mean_cosine']:.4f}, after {summary['iterations']} iterations")
    if summary["dropped"]:
        say(
            f"{summary['dropped']:,} samples are left out ({', '.join([*(without or ()), 'removed ones'])}) and belong to no cluster"
        )
    if summary["without_embedding"]:
        say(f"{summary['without_embedding']:,} samples have no embedding and belong to no cluster")
    if summary.get("radius") is not None:  # clusterings made before there was a density say nothing of it
        say(f"density: samples within a cosine of {summary['radius']:g} of each centroid, for --method density")
    print_sizes(made.table.column("size").to_numpy())
    for item in ignored:
        say_note(item.note("are in its clusters"))


def _density(text: str | None) -> float | Literal["auto"] | None:
    if text is None:
        return None
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--density {text!r}: must be auto, or a cosine in (0, 1]") from None
