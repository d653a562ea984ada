"""The command line: parse, call, print. Everything heavy is imported inside the commands, so that --help answers at once."""

from __future__ import annotations

import io
import math
import signal
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from tailwise import __version__
from tailwise.errors import UserError

if TYPE_CHECKING:
    from tailwise.catalog import Catalog
    from tailwise.plan.plan import Plan

app = typer.Typer(
    help="Decide which image-text samples to train CLIP on, and in which epoch.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
Result = TypeVar("Result")


class Format(str, Enum):
    """What `import` reads."""

    auto = "auto"
    webdataset = "webdataset"
    clip_retrieval = "clip-retrieval"


CatalogPath = Annotated[Path, typer.Argument(metavar="CATALOG", help="Folder of the catalog.")]
PlanName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the plan.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print figures as JSON.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; one a processor by default.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"tailwise {__version__}")
        raise typer.Exit


@app.command("import")
def import_(
    paths: Annotated[list[str], typer.Argument(metavar="SOURCE... CATALOG", help="What to import, and where to.")],
    format_name: Annotated[Format, typer.Option("--format", help="What the sources are.")] = Format.auto,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Import webdataset shards and embeddings into a catalog.

    A SOURCE is a folder, file, glob or {brace..pattern} of .tar files (local or any fsspec URL), or a folder in clip-retrieval
    layout (img_emb/, text_emb/, metadata/), joined by key. The tars are indexed where they lie; nothing is copied. What can't be
    used is counted by reason and listed in CATALOG/rejected. Importing again adds what is new, as a new snapshot.

    Examples:

      tailwise import shards/ embeddings/ my-catalog

      tailwise import 's3://bucket/pool/{00000..00999}.tar' my-catalog
    """
    from tailwise.printing import print_json, print_rejections, rejected_json
    from tailwise.stages.import_pool import import_pool

    if len(paths) < 2:
        raise UserError("give at least one SOURCE, and the CATALOG last")
    report = _with_bars(
        lambda track: import_pool(paths[:-1], paths[-1], format_name=format_name.value, workers=workers, track=track)
    )
    columns = [column.__dict__ for column in report.columns]
    if as_json:
        figures = {"snapshot": report.snapshot.__dict__, "new_shards": report.new_shards}
        print_json(
            {**figures, "new_samples": report.new_samples, "embeddings": columns, **rejected_json(report.rejections)}
        )
        return
    new = f"{report.new_samples:,} samples in {report.new_shards:,} shards" if report.new_shards else "nothing new"
    print(
        f"{report.catalog.folder}: imported {new}; snapshot {report.snapshot.number} has {report.snapshot.rows:,} samples"
    )
    for column in report.columns:
        print(
            f"{column.column} embeddings: {column.embedded:,} of {column.samples:,} samples, {column.dimension} dimensions"
        )
    print_rejections(report.rejections)


@app.command()
def embed(
    catalog: CatalogPath,
    encoder: Annotated[str, typer.Option(help="pixels: colours and edges, without weights; for demos and tests only.")],
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Make image embeddings from the shards themselves.

    Parts of the catalog that have embeddings are skipped, so that a rerun goes on where it stopped.

    Example:

      tailwise embed my-catalog --encoder pixels
    """
    from tailwise.printing import print_json, print_rejections, rejected_json
    from tailwise.stages.embed import embed as run

    opened = _open(catalog)
    report = _with_bars(lambda track: run(opened, encoder, workers=workers, track=track))
    if as_json:
        print_json({"embedded": report.embedded, "lacking": report.lacking, **rejected_json(report.rejections)})
        return
    print(f"image embeddings: {report.embedded:,} of {report.lacking:,} samples that had none, by {encoder}")
    print_rejections(report.rejections)


@app.command()
def cluster(
    catalog: CatalogPath,
    clusters: Annotated[int, typer.Option(help="K, before merging. DBP: 500 for 280M samples; DynamiCS: 50,000.")],
    merge: Annotated[
        float | None,
        typer.Option(help="Merge centroids whose cosine is at least this. DynamiCS: 0.7.", show_default=False),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the clustering.")] = "main",
    column: Annotated[str, typer.Option(help="Embeddings to cluster: image or text.")] = "image",
    seed: Annotated[int, typer.Option(help="Decides the sample and the seeding.")] = 0,
    iterations: Annotated[int, typer.Option(help="Of k-means, at most.")] = 20,
    points_per_centroid: Annotated[
        int, typer.Option(help="Rows that k-means is fitted on, per centroid, at most.")
    ] = 1000,
    max_memory: Annotated[str, typer.Option(help="Refuse what needs more.")] = "8GB",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; the result doesn't depend on it.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Accept a collapsed clustering.")] = False,
    as_json: AsJson = False,
) -> None:
    """Cluster the pool by spherical k-means.

    The result depends on the embeddings and the options alone: not on device, threads, or memory.

    Examples:

      tailwise cluster my-catalog --clusters 500

      tailwise cluster my-catalog --clusters 50000 --merge 0.7 --name fine
    """
    from tailwise.printing import print_json, print_sizes
    from tailwise.stages.cluster import cluster as run

    opened = _open(catalog)
    made = _with_bars(
        lambda track: run(
            opened,
            clusters=clusters,
            merge=merge,
            name=name,
            column=column,
            seed=seed,
            iterations=iterations,
            points_per_centroid=points_per_centroid,
            max_memory_bytes=_parse_bytes(max_memory),
            device=device,
            force=force,
            track=track,
        )
    )
    if as_json:
        print_json({"name": name, **made.summary})
        return
    summary = made.summary
    merged = f", merged from {summary['fitted']:,}" if merge is not None else ""
    print(f"clustering {name!r}: {summary['clusters']:,} clusters{merged}, of {summary['samples']:,} samples")
    print(f"mean cosine to the centroid {summary['mean_cosine']:.4f}, after {summary['iterations']} iterations")
    if summary["without_embedding"]:
        print(f"{summary['without_embedding']:,} samples have no embedding and belong to no cluster")
    print_sizes(made.table.column("size").to_numpy())


@app.command()
def plan(
    catalog: CatalogPath,
    name: PlanName,
    method: Annotated[
        str | None, typer.Option(help="dbp, ssp, dynamics, flat, proportional, random.", show_default=False)
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Budget, as a share of the samples that the method can draw.", show_default=False),
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="Budget, in samples: per epoch, or in all if static.", show_default=False)
    ] = None,
    clusters: Annotated[
        str | None, typer.Option(help="Name of the clustering.  [default: main]", show_default=False)
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="dynamics: quota in proportion to size^alpha.  [default: 0.2]")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="dbp: of the softmax over complexity.  [default: 0.1]")
    ] = None,
    max_repeats: Annotated[int, typer.Option(help="Copies of a sample per epoch, at most (1 to 255).")] = 1,
    min_per_cluster: Annotated[
        int | None, typer.Option(help="dbp: least quota of a cluster.  [default: 1]", show_default=False)
    ] = None,
    pick: Annotated[
        str | None, typer.Option(help="Members of a cluster: random, hardest or easiest first.", show_default=False)
    ] = None,
    dynamic: Annotated[
        bool | None, typer.Option("--dynamic/--static", help="Draw anew each epoch, or once.", show_default=False)
    ] = None,
    draw: Annotated[str | None, typer.Option(help="stream (exact counts) or bernoulli.  [default: stream]")] = None,
    seed: Annotated[int, typer.Option(help="Decides the draw.")] = 0,
    rates: Annotated[
        Path | None,
        typer.Option(help="In place of a method: .json {key: rate} or .parquet of rates.", show_default=False),
    ] = None,
    rate_column: Annotated[
        str | None, typer.Option(help="Column of the .parquet of rates.  [default: rate]", show_default=False)
    ] = None,
    missing_rate: Annotated[
        float | None, typer.Option(help="Rate of samples that the file doesn't name; without it, an error.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Decide how many samples each cluster gives, and which.

    Methods: **dbp** (Density-Based Pruning, ICLR 2024) and **ssp** pick once, hardest samples first; **dynamics** (DynamiCS,
    ECCV 2026), **flat**, **proportional** and **random** draw anew each epoch.

    Examples:

      tailwise plan my-catalog subset --method dbp --keep 0.277

      tailwise plan my-catalog epochs --method dynamics --keep 0.5 --alpha 0.2

      tailwise plan my-catalog theirs --rates sampling_probabilities.json
    """
    from tailwise.plan.explain import explain as figures
    from tailwise.plan.methods import find_method
    from tailwise.printing import print_json
    from tailwise.stages.plan import PlanRequest, make_plan
    from tailwise.stages.plan_rates import make_rate_plan

    opened = _open(catalog)
    if (method is None) == (rates is None):
        raise UserError("give either --method or --rates")
    if rates is not None:
        unused: dict[str, object] = {"--keep": keep, "--budget": budget, "--alpha": alpha, "--temperature": temperature}
        unused |= {
            "--min-per-cluster": min_per_cluster,
            "--pick": pick,
            "--draw": draw if draw != "bernoulli" else None,
        }
        unused |= {"--clusters": clusters, "--max-repeats": max_repeats if max_repeats != 1 else None}
        _refuse_given(unused, "with --rates: the rates say it all, and are drawn by bernoulli")
        made = _with_bars(
            lambda track: make_rate_plan(
                opened,
                name,
                rates,
                column=rate_column or "rate",
                missing_rate=missing_rate,
                dynamic=dynamic is not False,
                seed=seed,
                track=track,
            )
        )
    else:
        _refuse_given({"--missing-rate": missing_rate, "--rate-column": rate_column}, "without --rates")
        if find_method(method or "").grouping == "pool":
            _refuse_given({"--clusters": clusters}, f"with method {method!r}, which needs no clusters")
        request = PlanRequest(
            method=method or "",
            keep=keep,
            budget=budget,
            clusters=clusters or "main",
            options={"alpha": alpha, "temperature": temperature},
            max_repeats=max_repeats,
            min_per_cluster=min_per_cluster,
            pick=pick,
            dynamic=dynamic,
            draw=draw,
            seed=seed,
        )
        made = _with_bars(lambda track: make_plan(opened, name, request, track))
    if as_json:
        print_json({"name": name, "config": dict(made.config), **made.manifest["summary"]})
        return
    first = figures(made, 1).epochs[0]
    kind = "each epoch draws" if made.dynamic else "draws, the same every epoch,"
    print(f"plan {name!r}: {kind} {first.total:,.0f} of {made.manifest['summary']['eligible']:,} samples")
    newest = opened.snapshot()
    if newest.number > made.snapshot.number:
        print(
            f"note: it speaks of snapshot {made.snapshot.number}; {newest.rows - made.rows:,} newer samples are not in it "
            "(cluster the newest snapshot under another name to have them)"
        )
    unknown = made.manifest["summary"].get("rates_without_sample")
    if unknown:
        print(f"{unknown:,} rates belong to no sample")
    print(f"see more: tailwise explain {catalog} {name}")


@app.command()
def explain(
    catalog: CatalogPath,
    name: PlanName,
    epochs: Annotated[int, typer.Option(min=1, help="How many epochs to look ahead.")] = 10,
    clusters: Annotated[bool, typer.Option("--clusters", help="List every cluster.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what a plan will do: totals, coverage, and who gains, before anything is drawn.

    Example:

      tailwise explain my-catalog epochs --epochs 6
    """
    from tailwise.plan.explain import cluster_list
    from tailwise.plan.explain import explain as figures
    from tailwise.printing import print_clusters, print_explanation, print_json

    made = _open_plan(catalog, name)
    explanation = figures(made, epochs)
    if as_json:
        listed = {"cluster_list": cluster_list(made)} if clusters else {}
        print_json({**explanation.as_json(), **listed})
        return
    print_explanation(explanation)
    if clusters:
        print_clusters(cluster_list(made))


@app.command()
def draw(
    catalog: CatalogPath,
    name: PlanName,
    output: Annotated[Path, typer.Option(help="Parquet file to write.")],
    epoch: Annotated[int, typer.Option(min=0, help="Which epoch, from 0.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write the samples of one epoch: shard, key, uid, cluster, rate, copies.

    Example:

      tailwise draw my-catalog epochs --epoch 3 --output epoch-3.parquet
    """
    _export(catalog, name, "parquet", output, epoch, overwrite)


@app.command()
def export(
    catalog: CatalogPath,
    name: PlanName,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="File to write.")],
    to: Annotated[str, typer.Option(help="datacomp, rates-json, keys or parquet.")],
    epoch: Annotated[int, typer.Option(min=0, help="Which epoch, from 0, for formats that hold one.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write a plan in another tool's format.

    **datacomp**: sorted uids (.npy), for DataComp's resharder. **rates-json**: {key: rate}, for DynamiCS's fork of open_clip.
    **keys**: one key a line. **parquet**: shard, key, uid, cluster, rate, copies.

    Example:

      tailwise export my-catalog subset --to datacomp subset.npy
    """
    _export(catalog, name, to, output, epoch, overwrite)


@app.command()
def status(catalog: CatalogPath, as_json: AsJson = False) -> None:
    """Show what a catalog holds: snapshots, embeddings, clusterings, plans, and what was left unfinished.

    Example:

      tailwise status my-catalog
    """
    from tailwise.printing import print_json, print_table
    from tailwise.stages.status import status as figures

    found = figures(_open(catalog))
    if as_json:
        print_json(found)
        return
    for section, items in found.items():
        columns = tuple(items[0]) if items else ()
        rows = [
            tuple(f"{value:,}" if isinstance(value, int) else str(value) for value in item.values()) for item in items
        ]
        if items:
            print_table(section, columns, rows)
        else:
            print(f"{section}: none")


@app.command()
def verify(catalog: CatalogPath, as_json: AsJson = False) -> None:
    """Check that a catalog's files are still what was written, by their hashes.

    Example:

      tailwise verify my-catalog
    """
    from tailwise.printing import print_json
    from tailwise.stages.verify import verify as run

    opened = _open(catalog)
    count, bad = _with_bars(lambda track: run(opened, track))
    if as_json:
        print_json({"files": count, "changed_or_missing": [str(path) for path in bad]})
    else:
        for path in bad:
            print(f"changed or missing: {path}")
        print(f"{count - len(bad):,} of {count:,} files are what was written")
    if bad:
        raise typer.Exit(1)


@app.command()
def relocate(
    catalog: CatalogPath,
    old: Annotated[str, typer.Argument(metavar="OLD", help="Leading part of the shards' paths.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="What takes its place.")],
) -> None:
    """Tell a catalog that its shards have moved.

    Example:

      tailwise relocate my-catalog /data/pool s3://bucket/pool
    """
    if not old.strip("/") or not new.strip("/") or old == new:
        raise UserError(f"relocate {old!r} {new!r}: give the old leading folder and another new one")
    if "://" not in new:
        new = str(Path(new).expanduser().absolute())
        if not Path(new).exists():
            raise UserError(f"{new} doesn't exist: move the shards there first")
    changed = _open(catalog).relocate(old, new)
    print(f"{changed:,} paths now begin with {new}")


@app.command()
def train(
    catalog: CatalogPath,
    name: PlanName,
    open_clip: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- OPEN_CLIP_ARGUMENTS...]", help="Arguments of open_clip's trainer."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Settings by name, or a .yaml file of them; arguments given here go before it.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of the plan.", show_default=False)] = None,
    samples_seen: Annotated[int | None, typer.Option(min=1, help="In place of epochs.", show_default=False)] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            min=1, help="Batches, at most.  [default: a twentieth of all, at most 1000 steps]", show_default=False
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last checkpoint, if there is one.")] = False,
    seed: Annotated[
        int | None, typer.Option(help="Of order, augmentations and weights.  [default: the plan's]", show_default=False)
    ] = None,
    lanes: Annotated[
        int | None, typer.Option(min=1, help="Places of the pool that a batch is taken from.  [default: about 64]")
    ] = None,
    block: Annotated[
        int | None, typer.Option(min=1, help="Samples of a lane that are shuffled together.", show_default=False)
    ] = None,
    compose: Annotated[
        str | None, typer.Option(help="shuffle, spread or diverse.  [default: shuffle]", show_default=False)
    ] = None,
    check: Annotated[str, typer.Option(help="Of the shards, before starting: none, size or index.")] = "size",
    damaged: Annotated[str, typer.Option(help="Tars that are missing, changed or fail: error or replace.")] = "error",
    max_replaced: Annotated[float, typer.Option(help="Share of samples that may be replaced.")] = 0.01,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for what is fetched from remote shards.", show_default=False)
    ] = None,
    cache_size: Annotated[str, typer.Option(help="Bound of the cache.")] = "32GB",
    record: Annotated[
        Path | None, typer.Option(help="Folder for a record of the rows and pixels of each batch.", show_default=False)
    ] = None,
) -> None:
    """Train CLIP on a plan, with open_clip's own trainer.

    What stands after the -- is open_clip's (see `tailwise train CATALOG NAME -- --help`). On several GPUs, start the same command by
    `torchrun --nproc_per_node N -m tailwise train …`. Batches, learning rate and augmentations after --resume are those that
    would have come without the interruption.

    Examples:

      tailwise train my-catalog epochs --epochs 32 -- --model ViT-B-32 --batch-size 512 --warmup 2000 --precision amp_bf16

      tailwise train my-catalog epochs --recipe tiny-cpu
    """
    from tailwise.recipes import load_recipe
    from tailwise.train.launch import train as run
    from tailwise.train.options import TrainOptions

    settings = load_recipe(recipe) if recipe is not None else None
    options = TrainOptions(
        epochs=epochs,
        samples_seen=samples_seen,
        checkpoint_every=checkpoint_every,
        resume=resume,
        seed=seed,
        lanes=lanes,
        block=block,
        compose=compose,
        check=check,
        damaged=damaged,
        max_replaced=max_replaced,
        cache=cache,
        cache_bytes=_parse_bytes(cache_size, "--cache-size"),
        record=record,
    )
    run(_open_plan(catalog, name), open_clip or [], options, settings)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder for pool and catalog.")] = Path("demo"),
    images: Annotated[int, typer.Option(min=500, help="Images in the pool.")] = 6400,
) -> None:
    """Make a long-tailed pool of drawings, plan it with both methods, and show who gains.

    Example:

      tailwise demo
    """
    from tailwise.demo.run import run
    from tailwise.printing import print_demo

    result = _with_bars(lambda track: run(folder, images, track))
    print_demo(result)


def _open(path: Path) -> Catalog:
    from tailwise.catalog import Catalog

    return Catalog.open(path)


def _open_plan(path: Path, name: str) -> Plan:
    from tailwise.plan.plan import Plan

    return Plan(_open(path), name)


def _export(catalog: Path, name: str, to: str, output: Path, epoch: int, overwrite: bool) -> None:
    from tailwise.export import export as run

    made = _open_plan(catalog, name)
    written = _with_bars(lambda track: run(made, to, output, epoch=epoch, overwrite=overwrite, track=track))
    print(f"{output}: {written:,} entries")


def _with_bars(task: Callable[[Any], Result]) -> Result:
    from tailwise.progress import bars

    return task(bars)


def _parse_bytes(text: str, option: str = "--max-memory") -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    try:
        size = float(text[:-2]) * units[text[-2:].upper()]
    except (KeyError, ValueError):
        size = math.nan
    if not 0 < size < math.inf:
        raise UserError(f"{option} {text!r}: give a number above 0 and one of {', '.join(units)}, such as 8GB")
    return int(size)


def _refuse_given(options: dict[str, object], why: str) -> None:
    for option, value in options.items():
        if value is not None:
            raise UserError(f"{option} does nothing {why}")


class _InterruptedError(BaseException):
    """Ctrl-C, or SIGTERM; not a KeyboardInterrupt, which Typer would end the process on without a word."""


def _interrupt(*_: object) -> None:
    raise _InterruptedError


def main() -> None:
    """Runs the command line: exit code 0 ok, 1 failed, 2 the user's mistake."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows only ASCII gets "?" for the rest
    try:
        app()
    except UserError as error:
        print(f"tailwise: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenExecutor:
        print("tailwise: a worker process was killed (out of memory?); try fewer --workers", file=sys.stderr)
        sys.exit(1)
    except (OSError, ArithmeticError) as error:
        print(f"tailwise: {error}", file=sys.stderr)
        sys.exit(1)
    except _InterruptedError:
        print("tailwise: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
