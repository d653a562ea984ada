"""Grouping the pool: cluster."""

from __future__ import annotations

from dataclasses import asdict

from tailwise.cli.app import AsJson, CatalogPath, app, open_catalog, say_note, with_progress
from tailwise.cli.printing import say
from tailwise.cli.requests import takes
from tailwise.requests import ClusterRequest


@app.command()
@takes(ClusterRequest)
def cluster(catalog: CatalogPath, request: ClusterRequest, as_json: AsJson = False) -> None:
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
    from tailwise.steps.clustering.cluster import cluster as run
    from tailwise.steps.planning.unused_lists import unused_by_clustering

    opened, name = open_catalog(catalog), request.name
    made = run(opened, request, with_progress())
    ignored = unused_by_clustering(opened, name)
    if as_json:
        print_json({"name": name, **made.summary, "unused_drop_lists": [asdict(item) for item in ignored]})
        return
    summary = made.summary
    merged = f", merged from {summary['fitted']:,}" if request.merge is not None else ""
    say(f"clustering {name!r}: {summary['clusters']:,} clusters{merged}, of {summary['samples']:,} samples")
    say(f"mean cosine to the centroid {summary['mean_cosine']:.4f}, after {summary['iterations']} iterations")
    if summary["dropped"]:
        say(
            f"{summary['dropped']:,} samples are left out ({', '.join([*request.without, 'removed ones'])}) and belong to no cluster"
        )
    if summary["without_embedding"]:
        say(f"{summary['without_embedding']:,} samples have no embedding and belong to no cluster")
    if summary.get("radius") is not None:
        say(f"density: samples within a cosine of {summary['radius']:g} of each centroid, for --method density")
    print_sizes(made.table.column("size").to_numpy())
    for item in ignored:
        say_note(item.note("are in its clusters"))
