"""Plans: plan, explain, draw, export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from tailwise.cli.app import (
    AsJson,
    CatalogPath,
    Overwrite,
    PlanName,
    app,
    open_catalog,
    open_plan,
    say_note,
    takes,
    with_progress,
)
from tailwise.cli.following import suggest, suggest_use
from tailwise.cli.printing import (
    budget_text,
    print_clusters,
    print_explanation,
    print_json,
    print_matched,
    print_passes,
    print_table,
    say,
)
from tailwise.errors import UserError
from tailwise.requests import ExportRequest, PlanRequest
from tailwise.text import command_line

if TYPE_CHECKING:
    from tailwise.catalog import Catalog
    from tailwise.plan.plan import Plan
    from tailwise.steps.planning.unused_lists import LeftOut


@app.command()
@takes(PlanRequest)
def plan(
    catalog: CatalogPath,
    name: PlanName,
    request: PlanRequest,
    methods: Annotated[Path | None, Option(help="A .py file that registers methods of your own; it is run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Decide how many samples each cluster gives, and which.

    Methods that draw again each epoch: **dynamics** (DynamiCS, ECCV 2026), **dbp-dynamic**, **soft-cap**, **flat**, **proportional**,
    **random**.
    Methods that pick once: **dbp** (Density-Based Pruning, ICLR 2024) and **ssp**, hardest samples first; **cap**, at most N of
    each cluster; **top-score**, highest score first. **scs**, **hcs**: copies in proportion to e^score, with a soft or a hard cap.
    **rates**: a file of rates made elsewhere. **bundle**: a plan that another catalog exported. **text-balance**: words that
    captions are balanced over (MetaCLIP), or lists of concepts. **mixture**: a given
    share of each epoch from each source, or from each group of a grouping. **between**, **within**: another plan
    taken apart, its rates averaged over each group, or rescaled so that all groups have the same mean rate.

    Examples:
      tailwise plan my-catalog subset --method dbp --keep 0.277
      tailwise plan my-catalog epochs --method dynamics --keep 0.5 --alpha 0.2 --without duplicates
      tailwise plan my-catalog as-published --method dynamics --keep 0.5 --above-one truncate
      tailwise plan my-catalog annealed --method dynamics --keep 0.5 --alpha 0 --alpha-end 1 --anneal-epochs 6
      tailwise plan my-catalog best --method top-score --score clip-score --keep 0.3
      tailwise plan my-catalog capped --method scs --score quality --score-file scores.parquet --logits --keep 1.0
      tailwise plan my-catalog theirs --method rates --rates sampling_probabilities.json --match sha256 --missing-rate 0
      tailwise plan my-catalog shared --from hf://datasets/user/plan --strict 0.9
      tailwise plan my-catalog balanced --method text-balance --entries entries.txt --per-entry 20000
      tailwise plan my-catalog mixed --method mixture --shares laion=0.6,cc12m=0.4 --keep 0.5
      tailwise plan my-catalog mixed-epochs --method mixture --of epochs --shares laion=0.6,cc12m=0.4 --max-repeats 4
      tailwise plan my-catalog by-concept --method between --of epochs --clustering concepts
    """
    from tailwise.plan.explain import first_epoch
    from tailwise.steps.planning.plan import make_plan
    from tailwise.steps.planning.unused_lists import left_out_of_plan, unused_by_plan

    opened = open_catalog(catalog)
    if methods is not None:
        from tailwise.plan.methods import load_methods

        load_methods(methods)
    made = make_plan(opened, name, request, with_progress())
    unused, left_out, total = unused_by_plan(made), left_out_of_plan(made), first_epoch(made).total
    if as_json:
        figures = {"name": name, "config": dict(made.config), **made.manifest["summary"], "pool": made.pool}
        figures |= {
            "budget": total,
            "budget_asked": made.config.get("budget"),
            "share_of_pool": total / made.pool,
            "left_out": left_out,
        }
        print_json({**figures, "unused_drop_lists": unused})
        return
    _print_plan(made, total, left_out)
    _print_notes(made, opened, catalog)
    for item in unused:
        say_note(item.note())
    suggest("explain", catalog, name)


def _print_plan(made: Plan, budget: float, left_out: LeftOut) -> None:
    about = "" if made.sizes_known else "about "
    kind = "each epoch" if made.changes else "the same every epoch"
    causes = f": {left_out}" if str(left_out) else ""
    say(
        f"plan {made.name!r}, {kind}: {budget_text(budget, made.pool, made.rows, made.config.get('budget'), about)}; "
        f"{made.manifest['summary']['eligible']:,} samples can be drawn{causes})"
    )


def _print_notes(made: Plan, opened: Catalog, folder: Path) -> None:
    from tailwise.catalog import layout
    from tailwise.catalog.clusterings import Clustering

    newest = opened.snapshot()
    if newest.number > made.snapshot.number:
        clustering = Clustering.find(opened, made.clustering)
        remedy = ""
        if clustering is not None and clustering.has_centroids:
            remedy = (
                f" (assign them to its clusters: {command_line('cluster', folder, extends=made.clustering, name='…')})"
            )
        elif clustering is not None:
            remedy = f" (make the groups of {made.clustering!r} again under another name, with `tailwise group`)"
        absent = f"{newest.rows - made.rows:,} newer samples are not included"
        say(f"note: the plan uses snapshot {made.snapshot.number}; {absent}{remedy}")
    summary = made.manifest["summary"]
    if "entries_thinned" in summary:
        thinned, unmatched = summary["entries_thinned"], summary["entries_without_match"]
        of_captions = "ignore_case" in made.config
        have = "captions hold an entry" if of_captions else "samples have a concept"
        entries, samples = ("entries", "captions") if of_captions else ("concepts", "samples")
        say(
            f"{summary['matched']:,} {have}; {thinned:,} of {summary['entries']:,} {entries} have more than "
            f"{summary['per_entry']:,.1f} {samples} and are thinned, {unmatched:,} have none"
        )
    if mixture := summary.get("mixture"):
        _print_mixture(mixture, int(made.config["max_repeats"]))
    if "names_matched" in summary:
        print_matched(f"{summary['names']:,} names of the file", summary, made.pool)
    if "missing" in summary:
        lost = f"{summary['missing']:,} samples of the bundle ({summary['missing_share']:.1%} of its draws) are missing"
        listed = f"; {made.folder / layout.MISSING} lists them, the other draws are those of the bundle"
        say(lost + listed if summary["missing"] else "no sample of the bundle is missing: all epochs are its epochs")
    if unknown := summary.get("rates_without_sample"):
        say(f"{unknown:,} rates belong to no sample")


def _print_mixture(mixture: Sequence[Mapping[str, Any]], most: int) -> None:
    total = sum(item["quota"] for item in mixture)
    columns = ("group", "samples", "share asked for", "share", "copies of a sample")
    rows = [
        (item["group"], f"{item['samples']:,}", f"{item['share']:.1%}", f"{item['quota'] / total:.1%}",
         f"{item['quota'] / max(item['samples'], 1):.3f}")
        for item in mixture
    ]  # fmt: skip
    print_table("mixture", columns, rows)
    full = [item["group"] for item in mixture if item["quota"] >= item["samples"] * most]
    if full:
        say(
            f"at their maximum of {most} a sample, so that others give what is above: {', '.join(full)}; see --max-repeats"
        )


@app.command()
def explain(
    catalog: CatalogPath,
    name: PlanName,
    epochs: Annotated[int, Option(min=1, help="How many epochs to look ahead.")] = 10,
    by_cluster: Annotated[bool, Option("--by-cluster", help="List every cluster.")] = False,
    samples_seen: Annotated[
        int | None, Option(min=1, help="Samples of a training: how often it passes over each kept sample.")
    ] = None,
    plot: Annotated[
        Path | None, Option(metavar="FILE.svg", help="Draw clusters, how often samples are seen, and coverage.")
    ] = None,
    png: Annotated[bool, Option("--png", help="Write --plot as PNG, too, for slides.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the file of --plot if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a plan will do: totals, coverage, and which clusters gain.

    Examples:
      tailwise explain my-catalog epochs --epochs 6 --plot epochs.svg
      tailwise explain my-catalog epochs --samples-seen 128000000
    """
    from tailwise.plan.explain import cluster_list, passes
    from tailwise.plan.explain import explain as figures
    from tailwise.steps.planning.unused_lists import unused_by_plan

    if plot is None and (overwrite or png):
        raise UserError(f"{'--overwrite' if overwrite else '--png'} does nothing without --plot")
    made = open_plan(catalog, name)
    explanation = figures(made, epochs)
    seen = None if samples_seen is None else passes(made, samples_seen)
    unused = unused_by_plan(made)
    if plot is not None:
        from tailwise.plan.explain import write_plot

        write_plot(made, epochs, plot, png=png, overwrite=overwrite)
    if as_json:
        listed: dict[str, Any] = {"cluster_list": cluster_list(made)} if by_cluster else {}
        listed |= {} if seen is None else {"passes": asdict(seen)}
        print_json({**explanation.as_json(), "unused_drop_lists": unused, **listed})
        return
    print_explanation(explanation)
    if seen is not None:
        print_passes(seen, exact=explanation.exact)
    for item in unused:
        say_note(item.note())
    if by_cluster:
        print_clusters(cluster_list(made))
    suggest_use(made, epochs)


Epoch = Annotated[int | None, Option(min=0, help="Which epoch, from 0; needed where epochs differ.")]


@app.command()
def draw(
    catalog: CatalogPath,
    name: PlanName,
    output: Annotated[Path, Option(help="Parquet file to write.")],
    epoch: Epoch = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the samples of one epoch to a Parquet file.

    Columns: shard, key, uid, cluster, rate, copies.

    Example:
      tailwise draw my-catalog epochs --epoch 3 --output epoch-3.parquet
    """
    _export(catalog, name, "parquet", output, as_json, epoch=epoch, overwrite=overwrite)


@app.command()
def prepare(
    catalog: CatalogPath,
    name: PlanName,
    epochs: Annotated[int, Option(min=1, help="Number of epochs.")] = 1,
    first: Annotated[int, Option(min=0, help="The first one.")] = 0,
) -> None:
    """Count and locate the samples of coming epochs before a training does.

    A training does it by itself. On many nodes, and with pools of billions of samples, do it before, once.

    Examples:
      tailwise prepare my-catalog epochs --epochs 30
      tailwise prepare my-catalog epochs --first 30 --epochs 10 --executor ray
    """
    from tailwise.loader.pool import require_bytes
    from tailwise.loader.sections import prepare_epochs
    from tailwise.shards.locations import ensure_locations

    opened, context = open_plan(catalog, name), with_progress()
    require_bytes(opened)
    prepare_epochs(opened, range(first, first + epochs), context)
    ensure_locations(opened.catalog, opened.snapshot, context)
    say(f"plan {name!r}: epochs {first} … {first + epochs - 1} are counted, and all samples located")
    suggest_use(opened, first + epochs)


@app.command()
@takes(ExportRequest)
def export(
    catalog: CatalogPath,
    name: PlanName,
    to: Annotated[
        str, Option(help="datacomp, rates-json, keys, parquet, urls, shards, embedding-atlas or plan-bundle.")
    ],
    output: Annotated[
        Path | None, Option(help="File to write; a folder for shards and plan-bundle.  [required]")
    ] = None,
    place: Annotated[Path | None, Argument(hidden=True)] = None,
    epoch: Epoch = None,
    overwrite: Overwrite = False,
    request: ExportRequest = ExportRequest(),
    as_json: AsJson = False,
) -> None:
    """Write a plan in another tool's format.

    **datacomp**: sorted uids (.npy), for DataComp's resharder. **rates-json**: {key: rate}, for DynamiCS's fork of open_clip.
    **keys**: one key a line. **parquet**: shard, key, uid, cluster, rate, copies. **urls**: url, caption, uid of all that the plan draws in
    any epoch, for img2dataset, of a pool of metadata. **shards**: a new webdataset, shuffled over the whole epoch; after an
    interruption the same command goes on. **embedding-atlas**: a map of samples with thumbnails, which Apple's Embedding Atlas opens.
    **plan-bundle**: a folder to share, from which `plan --from` makes the same epochs on another copy of the pool.

    Examples:
      tailwise export my-catalog subset --to datacomp --output subset.npy
      tailwise export my-catalog epochs --epoch 3 --to shards --output epoch-3
      tailwise export my-catalog epochs --to plan-bundle --output shared --licence cc-by-4.0
    """
    if (output is None) == (place is None):
        raise UserError("name the file or folder to write with --output")
    _export(catalog, name, to, output or place or Path(), as_json, epoch=epoch, overwrite=overwrite, request=request)


def _export(catalog: Path, name: str, to: str, output: Path, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    from tailwise.export import export as run
    from tailwise.export import export_figures
    from tailwise.export.shards import REJECTED, left_out
    from tailwise.steps.planning.unused_lists import unused_by_plan

    made, context = open_plan(catalog, name), with_progress()
    written = run(made, to, output, **options, context=context)
    rejected, unused = left_out(output), unused_by_plan(made)
    figures = export_figures(made, to, options["epoch"], context)
    if as_json:
        made_of = {"entries": written, "rejected": rejected, **figures}
        print_json({"output": str(output), **made_of, "unused_drop_lists": unused})
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
    suggest("excluded", catalog, name, output=f"{name}-excluded.csv")
