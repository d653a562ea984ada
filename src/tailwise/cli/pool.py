"""The pool: import, captions, concepts, embed, status, verify, unpack, relocate, delete, rename."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from tailwise.cli.app import AsJson, CatalogPath, app, open_catalog, say_note, takes, with_progress
from tailwise.cli.following import suggest, suggest_step
from tailwise.cli.printing import print_json, print_rejections, print_table, rejected_json, say
from tailwise.errors import NotFoundError, UserError
from tailwise.log import print_error
from tailwise.requests import CaptionsRequest, ConceptsRequest, EmbedRequest, ImportRequest

if TYPE_CHECKING:
    from tailwise.steps.importing.pool import ImportReport


@app.command("import")
@takes(ImportRequest)
def import_(
    paths: Annotated[list[str], Argument(metavar="SOURCE... CATALOG", help="What to import, and where to.")],
    request: ImportRequest,
    as_json: AsJson = False,
) -> None:
    """Import shards, metadata and embeddings into a catalog.

    A SOURCE is a folder, file, glob, {brace..pattern} or ::-joined list of .tar files, or Parquet files with a column of images
    (local or any fsspec URL); a folder of images and captions as files, or of such folders; a folder in clip-retrieval layout
    (img_emb/, text_emb/, metadata/), with DynamiCS's cluster ids or without; DataComp's metadata (.parquet and .npz) or lists of
    URLs and captions: alone a pool without images, beside tars the metadata's scores and embeddings; or Parquet files with a
    column of vectors. Shards are indexed where they lie; nothing is copied. Embeddings that come with tars belong to these alone.
    What can't be used is counted by reason and listed in CATALOG/rejected. Importing again adds what is new, as a new snapshot.
    Shards that have changed since then are left out and named (exit code 1); --update replaces their samples.

    Examples:
      tailwise import shards/ embeddings/ my-catalog
      tailwise import 's3://bucket/pool/{00000..00999}.tar' my-catalog
      tailwise import 'hf://datasets/NAMESPACE/NAME/data/*.parquet' my-catalog --image picture --caption alt_text
      tailwise import datacomp/metadata my-catalog --embedding b32
      tailwise import shards/ my-catalog --image input.jpg,png --caption outputs.txt,json:alt.text
    """
    from tailwise.steps.importing.pool import import_pool

    if len(paths) < 2:
        raise UserError("give at least one SOURCE, and the CATALOG last")
    report = import_pool(
        paths[:-1],
        paths[-1],
        format_name=request.format_name,
        options=request,
        workers=request.workers,
        max_rejected=request.max_rejected,
        update=request.update,
        context=with_progress(),
    )
    if as_json:
        figures = {
            "snapshot": report.snapshot,
            "new_shards": report.new_shards,
            "new_samples": report.new_samples,
            "embeddings": report.columns,
            "clusterings": [{"name": made.name, **made.summary} for made in report.clusterings],
            "notes": report.notes,
            "changed": report.changed,
        }
        print_json({**figures, **rejected_json(report.rejections)})
    else:
        _print_import(report)
    if report.changed:
        remedy = "restore them" if request.update else "restore them, or replace their samples with --update"
        why = "changed, and have no good samples now" if request.update else "changed since they were imported"
        print_error(f"tailwise: {len(report.changed):,} shards {why}, first {report.changed[0]}: {remedy}")
        raise typer.Exit(1)


def _print_import(report: ImportReport) -> None:
    new = f"{report.new_samples:,} samples in {report.new_shards:,} shards" if report.new_shards else "nothing new"
    now = f"snapshot {report.snapshot.number} has {report.snapshot.rows:,} samples"
    say(f"{report.catalog.folder}: imported {new}; {now}")
    for made in report.columns:
        say(f"{made.column} embeddings: {made.embedded:,} of {made.samples:,} samples, {made.dimension} dimensions")
    for joined in report.clusterings:
        counts = joined.summary
        say(f"clustering {joined.name!r}: {counts['samples']:,} samples in {counts['clusters']:,} clusters")
    for note in report.notes:
        say_note(note)
    print_rejections(report.rejections)
    suggest_step(report.catalog)


@app.command()
@takes(CaptionsRequest)
def captions(
    catalog: CatalogPath,
    tables: Annotated[list[str], Argument(metavar="TABLE...", help="Files, folders or patterns; or json:FIELD.")],
    request: CaptionsRequest,
    as_json: AsJson = False,
) -> None:
    """Join more captions to the samples, beside their own; the shards are not touched.

    They come from tables: .parquet, .csv, .tsv, .jsonl. With json:FIELD in place of tables, captions are those in a field of each
    sample's .json.

    Samples are named by uid, key, image_path, or by the sha256 or url that img2dataset notes in a tar's table or .json. Captions
    without a sample, ambiguous and second ones are counted by reason and listed in CATALOG/rejected.

    Examples:
      tailwise captions my-catalog recaptions.parquet --name recap
      tailwise captions my-catalog 'Recap-DataComp-1B/*.parquet' --name recap --by sha256 --column re_caption
      tailwise captions my-catalog json:blip.text --name blip
    """
    from tailwise.steps.importing.captions import join_captions

    opened = open_catalog(catalog)
    made = join_captions(opened, tables, request, with_progress())
    name, summary = made.captions.name, made.captions.summary
    if as_json:
        print_json({"name": name, **summary, **rejected_json(made.rejections)})
        return
    say(
        f"captions {name!r}: of {summary['captions']:,} of {summary['samples']:,} samples, from {summary['rows']:,} rows"
    )
    if made.rejections.counts:
        print_rejections(made.rejections)
    say(f"train with --captions {name}:0.7,original:0.3 draws them; embed and filter take --captions {name}")
    suggest_step(opened)


@app.command()
@takes(ConceptsRequest)
def concepts(
    catalog: CatalogPath,
    request: ConceptsRequest,
    tables: Annotated[
        list[str] | None, Argument(metavar="[TABLE...]", help="Files, folders or patterns; or json:FIELD.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Give each sample a list of concepts: tags, entities, words of its caption.

    The lists come from tables, .parquet, .csv, .tsv, .jsonl, whose column holds lists; from a field of each sample's .json; from
    captions, with --entries; or they are those that several other lists agree on, with --both.

    Lists feed `plan --method text-balance --concepts NAME`, `group --concepts NAME` (the rarest of each list), `train --compose
    diverse:NAME` (CABS-DM) and most-concepts:NAME (CABS-FM), and `evaluate --pool CATALOG --concepts NAME`.

    Examples:
      tailwise concepts my-catalog tags.parquet --name tags --column tags
      tailwise concepts my-catalog json:objects --name objects
      tailwise concepts my-catalog --name words --entries entries.txt --ignore-case
      tailwise concepts my-catalog --name agreed --both tags --both words
    """
    from tailwise.steps.grouping.concepts import make_concepts

    opened = open_catalog(catalog)
    made = make_concepts(opened, tables or [], request, with_progress())
    name, summary = made.concepts.name, made.concepts.summary
    if as_json:
        print_json({"name": name, **summary, **rejected_json(made.rejections)})
        return
    mean = summary["entries"] / summary["with_concepts"]
    say(
        f"concepts {name!r}: {summary['with_concepts']:,} of {summary['samples']:,} samples have some of the {summary['concepts']:,} "
        f"concepts, {mean:.1f} each on average"
    )
    if made.rejections.counts:
        print_rejections(made.rejections)
    suggest("plan", opened.folder, "balanced", method="text-balance", concepts=name, keep=0.5)


@app.command()
@takes(EmbedRequest)
def embed(catalog: CatalogPath, request: EmbedRequest, as_json: AsJson = False) -> None:
    """Make embeddings of images and captions with an encoder.

    The shards are read, with the encoder's own preprocessing. Goes on where it stopped: finished rows, and parts of the catalog
    that have embeddings, are skipped. Images that can't be decoded and empty captions are counted by reason and listed in
    CATALOG/rejected; their samples stay, without embedding.

    Examples:
      tailwise embed my-catalog --encoder open_clip:ViT-B-32/datacomp_xl_s13b_b90k --column both
      tailwise embed my-catalog --encoder transformers:facebook/dinov2-base
      tailwise embed my-catalog --encoder checkpoint:logs/my-run --column text
      tailwise embed my-catalog --encoder open_clip:ViT-B-32/openai --column recap --of text --captions recap
      tailwise embed my-catalog --encoder transformers:facebook/dinov2-base --column dino --of image  (a second column of images)
      tailwise embed my-catalog --encoder joint:image=0.5,text=0.5 --column joint  (images and captions together)
    """
    from tailwise.steps.embedding.embed import embed as run

    opened = open_catalog(catalog)
    report = run(opened, request, with_progress())
    if as_json:
        totals = {"embedded": report.embedded, "lacking": report.lacking}
        totals |= {"without_captions": report.without_captions} if request.captions else {}
        print_json({**totals, "columns": report.columns, **rejected_json(report.rejections)})
        return
    for made in report.columns:
        speed = f", {made.samples / made.seconds:,.0f} samples/s" if made.samples else ""
        say(
            f"{made.column} embeddings: {made.embedded:,} of {made.lacking:,} samples that had none, by {request.encoder} "
            f"({made.dimension} dimensions, {made.precision}, {made.backend}{speed})"
        )
        if made.truncated:
            say(f"{made.truncated:,} captions are longer than the model reads, and were truncated")
    if report.without_captions:
        say(f"{report.without_captions:,} samples have no caption in {request.captions!r}: their own was embedded")
    print_rejections(report.rejections)
    suggest_step(opened)


@app.command()
def status(catalog: CatalogPath, as_json: AsJson = False) -> None:
    """Show what a catalog holds, and what was left unfinished.

    Example:
      tailwise status my-catalog
    """
    from tailwise.steps.upkeep.status import status as figures

    opened = open_catalog(catalog)
    found = figures(opened)
    if as_json:
        print_json(found)
        return
    for section, items in found.items():
        if items:
            say(section)
        for item in items:
            say(f"  {_in_words(item)}")
    if absent := [section for section, items in found.items() if not items]:
        say(f"none: {', '.join(absent)}")
    suggest_step(opened)


# Facts of `status` in words. Other values stand after their label.
_FACTS = {
    **{label: f"{{:,}} {label}" for label in ("shards", "parts", "samples", "rows")},
    **{f"{label} 1": f"1 {label[:-1]}" for label in ("shards", "parts", "samples", "rows")},
    **dict.fromkeys(("reason", "state"), "{}"),
    "dimension": "{:,} dimensions",
    "embedded": "{:,} samples embedded",
    "merge": "merged at cosine {}",
    "names": "{:,} keys and uids",
    "date": "on {}",
    "k": "k {:,}",
    "budget": "budget {:,} samples",
    "dynamic True": "another draw in each epoch",
    "dynamic False": "the same samples in each epoch",
    "score": "",  # the name says it
}


def _in_words(item: Mapping[str, Any]) -> str:
    """Return an item of `status`: its name, and what is known of it."""
    (_, name), *facts = item.items()
    known = [
        _FACTS.get(f"{label} {value}", _FACTS.get(label, f"{label.replace('_', ' ')} {{}}")).format(
            int(value) if label in {"k", "budget"} else value
        )
        for label, value in facts
        if value not in ("", None)
    ]
    return f"{name}: {', '.join(filter(None, known))}"


@app.command()
def verify(catalog: CatalogPath, as_json: AsJson = False) -> None:
    """Check that a catalog's files are as written, and none is missing.

    Files are compared by their hashes. What was made from files that are gone is named, too.

    Example:
      tailwise verify my-catalog
    """
    from tailwise.steps.upkeep.verify import broken_inputs
    from tailwise.steps.upkeep.verify import verify as run

    opened = open_catalog(catalog)
    count, bad = run(opened, with_progress())
    broken = broken_inputs(opened)
    if as_json:
        print_json({"files": count, "changed_or_missing": [str(path) for path in bad], "broken_inputs": broken})
    else:
        for path in bad:
            say(f"changed or missing: {path}")
        for line in broken:
            say(line)
        say(f"{count - len(bad):,} of {count:,} files are what was written")
        suggest("status", catalog)
    if bad or broken:
        raise typer.Exit(1)


@app.command()
def unpack(
    catalog: CatalogPath,
    folder: Annotated[Path, Argument(metavar="FOLDER", help="Where the plain tars go.")],
) -> None:
    """Unpack a catalog's compressed tars into a folder, and read them there.

    The loader, training and exports need plain tars. Embeddings and plans stay as they are.

    Example:
      tailwise unpack my-catalog plain-shards
    """
    from tailwise.steps.upkeep.unpack import unpack as run

    opened = open_catalog(catalog)
    count = run(opened, folder, with_progress())
    suggest_step(opened)
    say(f"{count:,} tars unpacked into {folder}" if count else "no tar of the catalog is compressed")


@app.command()
def relocate(
    catalog: CatalogPath,
    old: Annotated[str, Argument(metavar="OLD", help="Leading part of the shards' paths.")],
    new: Annotated[str, Argument(metavar="NEW", help="What takes its place.")],
) -> None:
    """Update the paths of shards that have moved.

    Refused unless each of these shards is there, with the size that it had (the members of 16 are compared, too).

    Example:
      tailwise relocate my-catalog /data/pool s3://bucket/pool
    """
    from tailwise.steps.upkeep.relocate import relocate as run

    if not old.strip("/") or not new.strip("/") or old == new:
        raise UserError(f"relocate {old!r} {new!r}: give the old leading folder and another new one")
    if "://" not in new:
        new = str(Path(new).expanduser().absolute())
        if not Path(new).exists():
            raise NotFoundError(f"{new} doesn't exist: move the shards there first")
    opened = open_catalog(catalog)
    changed = run(opened, old, new, with_progress())
    suggest("verify", catalog)
    say(f"{changed:,} paths now begin with {new}" if changed else f"no path changed: paths begin with {new} already")


@app.command()
def delete(
    catalog: CatalogPath,
    names: Annotated[
        list[str], Argument(metavar="KIND/NAME...", help="Such as plans/epochs, clusters/main or embeddings/text.")
    ],
    with_dependants: Annotated[
        bool, Option("--with-dependants", help="Delete all that was made from them, too.")
    ] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only report what would be deleted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete artifacts and embedding columns of a catalog.

    KIND is a folder of the catalog: embeddings, captions, concepts, clusters, named-scores, drops, plans, scores, hashes,
    neighbours or matches. Refused where others were made from it, unless these are deleted too. Scores, hashes, neighbours and
    matches go with what they were made from. Samples and snapshots stay.

    Examples:
      tailwise delete my-catalog plans/epochs
      tailwise delete my-catalog clusters/main --with-dependants --dry-run
    """
    from tailwise.steps.upkeep.delete import delete as run

    found = run(open_catalog(catalog), names, with_dependants=with_dependants, dry_run=dry_run)
    total = sum(item.size_bytes for item in found)
    if as_json:
        print_json({"deleted": found, "size_bytes": total, "dry_run": dry_run})
        return
    print_table(
        "would be deleted" if dry_run else "deleted", ("name", "bytes"), [(i.name, f"{i.size_bytes:,}") for i in found]
    )
    say(f"{total:,} bytes {'would be ' * dry_run}deleted")
    suggest("status", catalog)


@app.command()
def rename(
    catalog: CatalogPath,
    name: Annotated[str, Argument(metavar="KIND/NAME", help="Such as plans/epochs.")],
    new: Annotated[str, Argument(metavar="NEW", help="Its new name, without KIND.")],
) -> None:
    """Rename an artifact or an embedding column.

    Others know by name what they were made from: where there are any, this is refused. Plans can always be renamed, but a
    training that was started on a plan is resumed under the old name only.

    Example:
      tailwise rename my-catalog plans/epochs epochs-2026-11
    """
    from tailwise.steps.upkeep.delete import rename as run

    say(f"{name} is now {run(open_catalog(catalog), name, new)}")
    suggest("status", catalog)
