"""Leaving out samples by a score: filter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailwise.cli.app import AsJson, CatalogPath, Without, app, open_catalog, refuse_given, with_bars
from tailwise.cli.printing import say

if TYPE_CHECKING:
    from tailwise.stages.filter import Filtered


@app.command("filter")
def filter_(
    catalog: CatalogPath,
    by: Annotated[str, typer.Option(help="A score (listed above), or a numeric column of the samples or of --file.")],
    minimum: Annotated[float | None, typer.Option("--min", help="Least score that stays.", show_default=False)] = None,
    maximum: Annotated[
        float | None, typer.Option("--max", help="Greatest score that stays.", show_default=False)
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Samples of highest score that stay, as a share of the pool.", show_default=False),
    ] = None,
    keep_lowest: Annotated[
        float | None,
        typer.Option(help="Samples of lowest score that stay, as a share of the pool.", show_default=False),
    ] = None,
    missing: Annotated[
        str | None, typer.Option(help="Samples without the score: drop or keep.  [default: drop]", show_default=False)
    ] = None,
    without: Without = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the drop list.  [default: that of the score]", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help=".parquet, .tsv or .csv file with the column --by, and uid, key or image_path.", show_default=False
        ),
    ] = None,
    max_rejected: Annotated[
        float | None,
        typer.Option(
            help="Of --file: refuse if greater shares of its rows and of the samples don't match.  [default: 0.1]",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(
            help="normsim: image embeddings (.npy), a clip-retrieval folder, or another catalog.", show_default=False
        ),
    ] = None,
    norm: Annotated[str | None, typer.Option(help="normsim: 2 or inf.  [default: 2]", show_default=False)] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="cliploss: samples of a batch.  [default: 32768]", show_default=False)
    ] = None,
    repetitions: Annotated[
        int | None, typer.Option(help="cliploss: batches that a sample is in.  [default: 5]", show_default=False)
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="cliploss.  [default: 0.01]", show_default=False)] = None,
    seed: Annotated[
        int | None, typer.Option(help="cliploss: decides the batches.  [default: 0]", show_default=False)
    ] = None,
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
    from tailwise.requests import ScoreRequest
    from tailwise.stages.filter import FilterRule, filter_samples, try_filter

    given = {
        "file": str(file) if file else None,
        "max_rejected": max_rejected,
        "target": str(target) if target else None,
        "norm": norm,
        "batch_size": batch_size,
        "repetitions": repetitions,
        "temperature": temperature,
        "seed": seed,
    }
    request = ScoreRequest(by, {option: value for option, value in given.items() if value is not None})
    opened = open_catalog(catalog)
    unruled = (minimum, maximum, keep, keep_lowest) == (None,) * 4
    rule = None if dry_run and unruled else FilterRule(minimum, maximum, keep, keep_lowest, missing or "drop")
    if dry_run:
        refuse_given({"--name": name}, "with --dry-run: no drop list is made")
        refuse_given({"--missing": missing if rule is None else None}, "without --min, --max, --keep or --keep-lowest")
        made = with_bars(lambda track: try_filter(opened, request, rule, without=without or (), track=track))
    else:
        made = with_bars(
            lambda track: filter_samples(
                opened, request, rule or FilterRule(), name=name, without=without or (), track=track
            )
        )
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
