"""Between import and plan: cluster, group, dedup, filter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from tailwise.cli.app import AsJson, CatalogPath, app, open_catalog, say_note, takes, with_progress
from tailwise.cli.following import suggest as suggest_next
from tailwise.cli.following import suggest_clusters, suggest_more, suggest_plan
from tailwise.cli.printing import print_json, print_matched, print_sizes, print_table, say
from tailwise.requests import ClusterRequest, DedupRequest, FilterRequest, GroupRequest, NamedScoreRequest
from tailwise.text import command_line

if TYPE_CHECKING:
    from tailwise.catalog import Catalog
    from tailwise.steps.dedup.dedup import Deduplication
    from tailwise.steps.dedup.suggest import Suggestion
    from tailwise.steps.planning.unused_lists import UnusedList
    from tailwise.steps.scoring.filter import Filtered


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
    from tailwise.steps.clustering.cluster import cluster as run
    from tailwise.steps.planning.unused_lists import unused_by_clustering

    opened, name = open_catalog(catalog), request.name
    made = run(opened, request, with_progress())
    unused, summary = unused_by_clustering(opened, name), made.summary
    if as_json:
        print_json({"name": name, **summary, "unused_drop_lists": unused})
        return
    merged = f", merged from {summary['fitted']:,}" if request.merge is not None else ""
    say(f"clustering {name!r}: {summary['clusters']:,} clusters{merged}, of {summary['samples']:,} samples")
    say(f"mean cosine to the centroid {summary['mean_cosine']:.4f}, after {summary['iterations']} iterations")
    _say_dropped(summary, request, "cluster")
    if summary["without_embedding"]:
        say(f"{summary['without_embedding']:,} samples have no embedding and belong to no cluster")
    if summary.get("radius") is not None:
        say(f"density: samples within a cosine of {summary['radius']:g} of each centroid, for --method density")
    print_sizes(made.table.column("size").to_numpy())
    for item in unused:
        say_note(item.note("are in its clusters"))
    method = "dynamics" if summary.get("radius") is None else "density"
    suggest_plan(opened, name, _left_out(request.without, unused), method)


@app.command()
@takes(GroupRequest)
def group(catalog: CatalogPath, request: GroupRequest, as_json: AsJson = False) -> None:
    """Group the pool by a column, by words in captions, or by lists of concepts, in place of clusters.

    Columns are a language, domain, class, or cluster numbers made elsewhere. Each distinct value is a group; plans are made over
    them with `--clustering NAME`, by all methods that need no distances. --suggest lists frequent words of the captions that end a
    phrase: delete what is no concept, and give the rest as --entries.

    Examples:
      tailwise group my-catalog --by language --file languages.parquet
      tailwise group my-catalog --suggest --ignore-case --output concepts.txt
      tailwise group my-catalog --entries concepts.txt --ignore-case --name concepts
      tailwise plan my-catalog epochs --method dynamics --keep 0.5 --clustering concepts
    """
    from tailwise.steps.grouping.group import group as run
    from tailwise.steps.planning.unused_lists import unused_by_clustering

    opened = open_catalog(catalog)
    if request.suggest:
        _suggest_entries(opened, request, as_json)
        return
    made = run(opened, request, with_progress())
    unused, summary = unused_by_clustering(opened, made.name), made.summary
    if as_json:
        print_json({"name": made.name, **summary, "unused_drop_lists": unused})
        return
    say(f"grouping {made.name!r}: {summary['clusters']:,} groups of {summary['samples']:,} samples")
    _say_dropped(summary, request, "group")
    what = "concept" if request.concepts else "value" if request.entries is None else "entry in their captions"
    if summary["without_value"]:
        say(f"{summary['without_value']:,} samples have no {what} and belong to no group")
    if "matched_as_given" in summary:
        _print_matches(summary)
    if summary.get("entries_without_group"):
        entries = (
            "concepts are the rarest of no sample"
            if request.concepts
            else "entries of the list are the rarest of no caption"
        )
        say(f"{summary['entries_without_group']:,} {entries}")
    if summary.get("values_without_sample"):
        say(f"{summary['values_without_sample']:,} values belong to no sample")
    print_sizes(made.table.column("size").to_numpy(), "groups")
    for item in unused:
        say_note(item.note("are in its groups"))
    suggest_plan(opened, made.name, _left_out(request.without, unused))


def _left_out(without: Sequence[str], unused: Sequence[UnusedList]) -> list[str]:
    """Return the drop lists that a plan over new clusters should leave out."""
    return [*without, *(item.name for item in unused if item.usable)]


def _suggest_entries(catalog: Catalog, request: GroupRequest, as_json: bool) -> None:
    from tailwise.steps.grouping.suggest import suggest_entries

    found = suggest_entries(catalog, request, with_progress())
    if as_json:
        print_json(found)
        return
    rows = [(item.entry, f"{item.captions:,}", f"{item.ends:,}") for item in found.entries]
    print_table(f"terms of {found.captions:,} captions", ("term", "captions", "at the end of a phrase"), rows)
    if len(rows) < request.terms:
        say(f"no other term ends a phrase in more than {found.least:,} captions")
    if request.output is not None:
        options = {"ignore_case": request.ignore_case, "plurals": request.plurals, "workers": request.workers}
        lists = [word for name in request.without for word in ("--without", name)]
        after = command_line("group", catalog.folder, *lists, entries=request.output, **options)
        say(f"next: delete lines of {request.output} that are no concepts, then {after}")


def _say_dropped(summary: Mapping[str, Any], request: ClusterRequest | GroupRequest, where: str) -> None:
    if summary["dropped"]:
        causes = ", ".join([*request.without, "removed ones"])
        say(f"{summary['dropped']:,} samples are left out ({causes}) and belong to no {where}")


def _print_matches(summary: Mapping[str, Any]) -> None:
    from tailwise.steps.grouping.entries import quoted

    given, ignoring = summary["matched_as_given"], summary["matched_ignoring_case"]
    say(f"of {summary['taking_part']:,} captions, {given:,} hold an entry as it is written, {ignoring:,} ignoring case")
    if summary["unmatched"]:
        say(f"frequent captions without an entry: {quoted(summary['unmatched_captions'])}")
        say(f"frequent words of these: {quoted(summary['unmatched_words'])}")


@app.command()
@takes(DedupRequest)
def dedup(
    catalog: CatalogPath,
    request: DedupRequest,
    suggest: Annotated[bool, Option("--suggest", help="Drop nothing; show what each epsilon does, and pairs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Leave out near-duplicates, identical images, or images of evaluation sets.

    Near-duplicates share a cluster and have nearly the same embedding (SemDeDup, 2023). Makes a drop list, which `cluster`,
    `filter` and others take with --without. The comparison is made once for a clustering and an order: another --epsilon or
    --rule takes seconds. --exact needs no embeddings: it compares hashes of files or pixels. --against leaves out images that
    evaluation sets hold (decontamination), wherever they are.

    Examples:
      tailwise dedup my-catalog --suggest
      tailwise dedup my-catalog --epsilon 0.05
      tailwise dedup my-catalog --target-share 0.63  (the epsilon that keeps 63 % of the pool)
      tailwise dedup my-catalog --epsilon 0.05 --clustering fine --order score --score clip-score --name fewer
      tailwise dedup my-catalog --epsilon 0.05 --clustering main-2 --extends duplicates --name duplicates-2
      tailwise dedup my-catalog --exact pixels
      tailwise dedup my-catalog --against imagenet1k-val --epsilon 0.05 --exact pixels
    """
    from tailwise.steps.dedup.dedup import dedup as run
    from tailwise.steps.dedup.suggest import suggest as make_guide

    opened = open_catalog(catalog)
    if suggest:
        found = make_guide(opened, request, with_progress())
        if as_json:
            print_json(found)
        else:
            _print_guide(found)
            suggest_more(epsilon=0.05)
        return
    made = run(opened, request, with_progress())
    if as_json:
        print_json({"name": made.name, **made.summary})
    else:
        _print_made(opened, made)


def _print_made(catalog: Catalog, made: Deduplication) -> None:
    figures, in_clusters = made.summary, "clusters" in made.summary
    judged, near = figures["judged"], figures.get("dropped_near", 0)
    now = figures["dropped_identical"] + near
    say(
        f"drop list {made.name!r}: {now:,} of {judged:,} samples ({now / max(judged, 1):.1%}) are left out, "
        f"{figures['dropped_identical']:,} as identical{f', {near:,} as near-duplicates' * bool(near or in_clusters)}"
    )
    if in_clusters:
        _print_clustered(figures)
    else:
        _print_compared(figures)
        say(f"each one is listed in {made.table}")
    suggest_clusters(catalog, [made.name])


def _print_clustered(figures: Mapping[str, Any]) -> None:
    if "epsilon" in figures:
        pool = figures["pool"]
        say(
            f"ε = {figures['epsilon']:.6f}: {figures['kept']:,} of {pool:,} samples stay, {figures['kept'] / pool:.2%} of the pool"
        )
    if figures["dropped_before"]:
        say(f"{figures['dropped_before']:,} more were left out before")
    say(f"{figures['clusters']:,} clusters, the largest of {figures['largest_cluster']:,}")


def _print_compared(figures: Mapping[str, Any]) -> None:
    """Print figures of hashes or evaluation sets."""
    if figures.get("not_decoded"):
        say(f"{figures['not_decoded']:,} images cannot be decoded, and are not compared")
    if sets := figures.get("sets"):
        counts = ("images", "images_found", "dropped_identical", "dropped_near")
        rows = [(item["set"], *(f"{item[name]:,}" for name in counts)) for item in sets]
        columns = ("set", "images", "of these found", "dropped: identical", "dropped: similar")
        print_table("by evaluation set", columns, rows)
        if figures.get("set_images_not_compared"):
            say(f"{figures['set_images_not_compared']:,} images of the sets cannot be read, and are not compared")
        if figures["epsilons"]:
            near_at = [(f"{item['epsilon']:g}", f"{item['near']:,}") for item in figures["epsilons"]]
            print_table("at other values of epsilon", ("epsilon", "near-duplicates"), near_at)


def _print_guide(found: Suggestion) -> None:
    def share(part: int, whole: int) -> str:
        return f"{part / whole:.1%}" if whole else "–"

    say(f"{found.samples:,} samples, {found.compared:,} pairs that share a cluster of {found.clusters!r}")
    rows = [
        (f"{item.epsilon:g}", f"{item.dropped:,}", f"{item.share:.2%}", f"{item.pairs:,}",
         share(item.pairs_inside, item.pairs), f"{item.queries:,}", share(item.queries_inside, item.queries))
        for item in found.epsilons
    ]  # fmt: skip
    columns = (
        "epsilon",
        "dropped",
        "of all",
        "pairs",
        "of these in a cluster",
        "samples in pairs",
        "of these in a cluster",
    )
    print_table("what would go, and what clusters hide", columns, rows)
    say(
        "dropped: by --rule any-earlier; greedy drops as many or fewer. The last four columns: "
        f"{found.queries:,} samples drawn at random, compared with {found.pool:,}; where the shares are low, a higher --probe, "
        "another number of clusters, or a second dedup inside other clusters, finds more"
    )
    pairs = [
        (f"{pair.epsilon:g}", f"{pair.similarity:.5f}", tuple(
            line for sample in (pair.sample, pair.earlier)
            for line in (f"{PurePath(sample.shard).name} {sample.key}", sample.caption[:60])
        ))
        for pair in found.pairs
    ]  # fmt: skip
    print_table(
        "pairs to look at: a sample, and the most similar earlier one", ("from epsilon", "similarity", "pair"), pairs
    )


@app.command()
@takes(NamedScoreRequest)
def score(catalog: CatalogPath, request: NamedScoreRequest, as_json: AsJson = False) -> None:
    """Give each sample a score under a name of your own.

    It comes from a file of scores made elsewhere, from linear layers on embeddings (LAION's aesthetic predictors, NSFW), or is a mix
    of other scores. `filter --by NAME`, `plan --score NAME`, `dedup --score NAME` and other mixes take it.

    Examples:
      tailwise score my-catalog --name quality --file quality.parquet --strict 0.9
      tailwise score my-catalog --name flyt --file scores.csv --match url --column score
      tailwise score my-catalog --name aesthetic --head sac+logos+ava1-l14-linearMSE.pth
      tailwise score my-catalog --name nsfw --head nsfw.safetensors --activation relu --image clip
      tailwise score my-catalog --name mixed --mix "0.7*z(cliploss) + 0.3*z(normsim)" --target imagenet.npy
    """
    from tailwise.steps.scoring.named import make_named_score

    opened, name = open_catalog(catalog), request.name
    summary = make_named_score(opened, request, with_progress())
    if as_json:
        print_json({"name": name, **summary})
        return
    _print_file_matched(summary)
    say(f"score {name!r}: of {summary['scored']:,} of {summary['samples']:,} samples")
    suggest_next("filter", catalog, "--dry-run", by=name)


@app.command("filter")
@takes(FilterRequest)
def filter_(
    catalog: CatalogPath,
    request: FilterRequest,
    dry_run: Annotated[bool, Option("--dry-run", help="Only print the distribution and what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Leave out samples by a score, or by a list made elsewhere, as a drop list for --without.

    Scores from embeddings: **clip-score**, **cliploss**, **normsim**, **near-target** (keeps the clusters that are the
    nearest to a target image); from the samples: **caption-characters**,
    **caption-words**, **width**, **height**, **pixels**, **aspect-ratio**, **image-bytes**. A score is made once and kept:
    another bound costs little.
    --only FILE keeps the samples that a file names, --not FILE drops them.

    Examples:
      tailwise filter my-catalog --by clip-score --dry-run
      tailwise filter my-catalog --by clip-score --keep 0.3
      tailwise filter my-catalog --by caption-words --min 3 --max 60 --name captions --without duplicates
      tailwise filter my-catalog --by normsim --target imagenet.npy --keep 0.5
      tailwise filter my-catalog --by near-target --clustering fine --target imagenet.npy
      tailwise filter my-catalog --by clip_l14_similarity_score --file metadata.parquet --min 0.28
      tailwise filter my-catalog --only dfn_2b_inds.npy --strict 0.9 --refill random
      tailwise filter my-catalog --not opted-out.csv --match url --name opted-out
    """
    from tailwise.catalog.kinds import CLUSTERING
    from tailwise.steps.scoring.filter import filter_samples, try_filter

    opened = open_catalog(catalog)
    made = (try_filter if dry_run else filter_samples)(opened, request, with_progress())
    if as_json:
        print_json({"name": made.name, **made.summary})
    else:
        if request.by is None:
            _print_listed(made, request)
        else:
            _print_filtered(made)
        if "dropped" not in made.summary:
            suggest_more(keep=0.5)
        elif made.name is not None and (clusterings := CLUSTERING.finished(opened.folder)):
            suggest_plan(opened, "main" if "main" in clusterings else clusterings[0], [made.name])
        elif made.name is not None:
            suggest_clusters(opened, [made.name])


def _print_listed(made: Filtered, request: FilterRequest) -> None:
    found, path = made.summary, request.only or request.exclude
    print_matched(f"{found['names']:,} names in {path}", found, found["pool"])
    if repeated := found["entries"] - found["names"]:
        use = f"; `tailwise plan … --rates {path}` draws them as often" if request.only is not None else ""
        say(f"{repeated:,} entries repeat a name: a drop list keeps a sample once{use}")
    if found.get("filled"):
        say(f"{found['filled']:,} other samples take the place of missing ones ({request.refill})")
    _print_dropped(made)


def _print_file_matched(summary: Mapping[str, Any]) -> None:
    if "names" in summary:
        print_matched(f"{summary['names']:,} names in the file", summary, summary.get("pool", summary["samples"]))


def _print_filtered(made: Filtered) -> None:
    summary = made.summary
    marks = [(f"{item['percent']} %", f"{item['score']:.6g}") for item in summary["quantiles"]]
    print_table(f"{summary['score']} of {summary['scored']:,} samples", ("share of samples", "have at most"), marks)
    if (absent := summary["samples"] - summary["scored"]) > 0:
        say(f"{absent:,} samples have no {summary['score']}")
    for reason, rows in summary.get("reasons", {}).items():
        say(f"{rows:,}: {reason}")
    if "clusters_near" in summary:
        say(f"{summary['clusters_near']:,} of {summary['clusters']:,} clusters are the nearest of a target image")
    _print_file_matched(summary)
    if "dropped" in summary:
        _print_dropped(made)


def _print_dropped(made: Filtered) -> None:
    summary, share = made.summary, ""
    if "pool" in summary:  # older lists lack it
        kept, pool = summary["kept"], summary["pool"]
        share = f"; {kept:,} stay, {kept / pool:.1%} of the pool of {pool:,}"
    verb = "would drop" if made.name is None else f"drop list {made.name!r}: drops"
    say(f"{verb} {summary['dropped']:,} of {summary['samples']:,} samples{share}")
