"""Who isn't drawn, and why: remove, excluded, why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from tailwise.cli.app import AsJson, CatalogPath, Overwrite, app, open_catalog, with_progress
from tailwise.cli.following import suggest
from tailwise.cli.printing import print_json, print_table, say

SHOWN = 10


@app.command()
def remove(
    catalog: CatalogPath,
    keys: Annotated[
        Path,
        Option(
            help=".txt: a key, uid, url or sha256 a line; .parquet, .csv, .tsv or .jsonl: uid, or key, or shard and key, or url, "
            "sha256 or md5."
        ),
    ],
    match: Annotated[
        str | None,
        Option(help="What --keys names samples by: uid, key, shard, url, sha256 or md5.  [default: what it has]"),
    ] = None,
    reason: Annotated[str, Option(help="Stored, and shown when a sample is looked up.")] = "on request",
    dry_run: Annotated[bool, Option("--dry-run", help="Only report what would be done.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove samples for good: takedowns, opt-outs.

    No plan or export draws them from now on, and training on a plan made before replaces them. Names that no sample has
    are remembered: a sample that is imported later under one of them is removed at once. Nothing is deleted from the shards.

    Examples:
      tailwise remove my-catalog --keys opted-out.txt --reason "opt-out of 2026-11"
      tailwise remove my-catalog --keys takedown.parquet --dry-run
      tailwise remove my-catalog --keys urls.csv --match url
    """
    from tailwise.steps.upkeep.remove import remove as run

    opened = open_catalog(catalog)
    report = run(opened, keys, reason=reason, match=match, dry_run=dry_run, context=with_progress())
    if as_json:
        print_json(report.as_json())
        return
    verb = "would be removed" if dry_run else "removed"
    before = f", {report.removed_before:,} had been" if report.removed_before else ""
    say(f"{report.removed:,} samples {verb}{before}; {report.removed_in_all:,} of the catalog are removed in all")
    if report.repeated:
        say(f"{report.repeated:,} of {report.names:,} lines repeat another")
    if report.known:
        say(f"{report.known:,} of {report.names:,} names were given before")
    if report.several:
        say(f"{report.several:,} names belong to several samples: all {report.of_several:,} of these {verb}")
    if report.ambiguous:
        say(
            f"{len(report.ambiguous):,} lines are the key of one sample and the uid of another: taken as keys (name uids in a "
            f".parquet): {', '.join(report.ambiguous[:SHOWN])}"
        )
    suggest("excluded", catalog, output="excluded.csv")
    if report.unknown:
        shown = ", ".join(report.unknown[:SHOWN]) + (", …" if len(report.unknown) > SHOWN else "")
        say(f"{len(report.unknown):,} names belong to no sample, and are remembered for later imports: {shown}")


@app.command()
def excluded(
    catalog: CatalogPath,
    output: Annotated[Path, Option(help="File to write: .csv for people, else Parquet.")],
    plan: Annotated[str | None, Argument(metavar="[PLAN]", help="Name of a plan; all drop lists without one.")] = None,
    epochs: Annotated[
        int | None, Option(help="Of PLAN: list what the first N epochs leave out.  [default: what every epoch does]")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """List every sample that is never drawn, and why.

    Columns: shard, key, caption, group, the reason in words, and for programs. With PLAN: all that this plan never draws, or does
    not draw in the first N epochs (--epochs N). Without: what was removed, and what the drop lists of the newest snapshot drop.

    Examples:
      tailwise excluded my-catalog subset --output never-drawn.parquet
      tailwise excluded my-catalog epochs --epochs 6 --output not-in-training.parquet
      tailwise excluded my-catalog --output dropped.csv
    """
    from tailwise.plan.plan import Plan
    from tailwise.steps.upkeep.excluded import write_excluded

    opened = open_catalog(catalog)
    made = None if plan is None else Plan(opened, plan)
    counts = write_excluded(opened, output, made, epochs=epochs, overwrite=overwrite, context=with_progress())
    if as_json:
        print_json([{"stage": stage, "reason": why, "samples": samples} for (stage, why), samples in counts.items()])
        return
    say(f"{output}: {sum(counts.values()):,} samples")
    if made is not None and made.dynamic and epochs is None:
        say("these are in no epoch; --epochs N also lists what a training of N epochs does not reach")
    if counts:
        rows = [(stage, why, f"{samples:,}") for (stage, why), samples in counts.items()]
        print_table("never drawn", ("stage", "reason", "samples"), rows)
    suggest("report", catalog, output="report")


@app.command()
def why(
    catalog: CatalogPath,
    key: Annotated[str, Argument(metavar="KEY", help="Key or uid of a sample.")],
    plan: Annotated[list[str] | None, Option(help="Report this plan only; may be given again.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the history of one sample: what dropped it, which epochs draw it.

    Example:
      tailwise why my-catalog 000001234 --plan epochs
    """
    from tailwise.steps.upkeep.why import why as run

    story = run(open_catalog(catalog), key, plan)
    if as_json:
        print_json(story)
        return
    if len(story["samples"]) > 1:
        say(f"{len(story['samples']):,} samples have the key or uid {key}")
    for sample in story["samples"]:
        _print_sample(sample)
    for case in story["rejected"]:
        detail = f" ({case['detail']})" if case["detail"] else ""
        say(f"left out by {case['stage']}: {case['reason']}{detail}, of {case['file']}")
    suggest("report", catalog, output="report")


def _print_sample(sample: Mapping[str, Any]) -> None:
    from tailwise.catalog.schema import NO_OFFSET
    from tailwise.shards.parquet_images import GROUP_BYTES

    say(f"sample {sample['key']} (uid {sample['uid']}, row {sample['row']:,})")
    group, at = divmod(sample["image_offset"], GROUP_BYTES)
    place = f"at byte {at:,}{f' of row group {group:,}' if sample['shard'].endswith('.parquet') else ''}"
    image = f"{sample['image_bytes']:,} bytes of .{sample['image_extension']} {place}"
    if sample["image_offset"] == NO_OFFSET:
        image = "metadata only"
    size = f", {sample['width']} × {sample['height']} pixels" if sample["width"] and sample["height"] else ""
    say(f"  shard       {sample['shard']}: {image}{size}")
    say(f"  caption     {sample['caption']}")
    for name, caption in sample["captions"].items():
        say(f"  captions    {name}: {'none' if caption is None else caption}")
    if sample["scores"]:
        say(f"  scores      {', '.join(f'{name} {value}' for name, value in sample['scores'].items())}")
    say(f"  embeddings  {', '.join(name for name, there in sample['embeddings'].items() if there) or 'none'}")
    for item in sample["clusterings"]:
        say(f"  clustering  {item['name']}: {_clustering(item)}")
    for item in sample["drop_lists"]:
        say(f"  {item['kind']:<10}  {item['name']}: {_verdict(item)}")
    if sample["removed"]:
        date, reason = sample["removed"]["date"], sample["removed"]["reason"]
        say(f"  removed     {f'on {date}: ' if date else ''}{reason}")
    for item in sample["plans"]:
        say(f"  plan        {item['name']}: {_plan(item)}")


def _clustering(item: Mapping[str, Any]) -> str:
    if item["why_none"]:
        return str(item["why_none"])
    near = "" if item["similarity"] is None else f", cosine {item['similarity']:.4f} to its centroid"
    return f"cluster {item['cluster']}, number {item['rank'] + 1:,} of {item['size']:,} in catalog order{near}"


def _verdict(item: Mapping[str, Any]) -> str:
    if item["verdict"] != "dropped":
        return f"{item['verdict']}{': ' + item['reason'] if 'reason' in item else ''}"
    value = f", value {item['value']:.6g}" if "value" in item else ""
    kept = f", kept {item['kept_key']} of {item['kept_shard']}" if "kept_key" in item else ""
    if "file" in item:
        image = item.get("key", f"image {item.get('number')}")
        kept = f", {'the mirror image of ' * item['mirrored']}{image} of {item['file']}"
    near = f", cosine {item['similarity']:.4f}" if "similarity" in item else ""
    return f"dropped: {item['reason']}{value}{kept}{near}"


def _plan(item: Mapping[str, Any]) -> str:
    if item["never"]:
        rank = ""
        if item["never"]["reason"].startswith("not picked"):
            rank = f", rank {item['rank'] + 1:,} of its group, whose quota is {item['quota']:,.0f}"
        return f"never drawn: {item['never']['stage']}, {item['never']['reason']}{rank}"
    copies = " ".join(map(str, item["copies"]))
    first = "not in the first 100 epochs" if item["first_epoch"] is None else f"first in epoch {item['first_epoch']}"
    return f"rate {item['rate']:.4g}, {first}; copies in the first {len(item['copies'])} epochs: {copies}"
