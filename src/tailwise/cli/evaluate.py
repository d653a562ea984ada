"""Evaluation of checkpoints: evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tailwise.cli.app import AsJson, Workers, app, open_catalog, with_bars
from tailwise.cli.printing import say

if TYPE_CHECKING:
    from tailwise.evaluate import EvaluateOptions, Evaluation


@app.command()
def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A .pt file, a run's folder, or open_clip:MODEL/PRETRAINED.")
    ],
    data: Annotated[list[str], typer.Option(help="A set to evaluate on: folder, tars or URL; may be given again.")],
    model: Annotated[
        str | None,
        typer.Option(help="open_clip's name, or local-dir:FOLDER.  [default: the run's]", show_default=False),
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Names of the classes, one a line.  [default: the set's]", show_default=False)
    ] = None,
    templates: Annotated[
        Path | None,
        typer.Option(help="Prompts with {c}, one a line.  [default: the set's, else OpenAI's 80]", show_default=False),
    ] = None,
    train_counts: Annotated[
        Path | None, typer.Option(help="CSV, TSV or JSON: how often each class was trained on.", show_default=False)
    ] = None,
    pool: Annotated[
        Path | None, typer.Option(help="A catalog, in whose captions to count the classes instead.", show_default=False)
    ] = None,
    groups: Annotated[str, typer.Option(help="Head, medium, few: thirds, or bounds such as 100,20.")] = "thirds",
    output: Annotated[
        Path | None, typer.Option(help="Folder for summary.json, classes-SET.csv, curve-SET.svg.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another evaluation in --output.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images.")] = 256,
    workers: Workers = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ….")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    bootstrap: Annotated[int, typer.Option(min=1, help="Replicates, for the intervals.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    max_rejected: Annotated[
        float, typer.Option(help="Stop when a greater share of a set's samples can't be read.")
    ] = 0.1,
    as_json: AsJson = False,
) -> None:
    """Measure a checkpoint: zero-shot accuracy, by how often classes were trained on, and retrieval.

    Sets: clip_benchmark's webdataset layout, tars with `.cls`, a folder of images for each class. Retrieval sets say so in
    `dataset_type.txt`.

    Examples:

      tailwise evaluate logs/epochs-tiny-cpu --data tinyimagenet-val --train-counts classes.tsv --output evaluation

      tailwise evaluate epoch_32.pt --model ViT-B-32 --data wds_imagenet1k --data wds_imagenetv2 --pool my-catalog

      tailwise evaluate open_clip:ViT-B-32/laion2b_s34b_b79k --data wds_mscoco_captions --json
    """
    from tailwise.cli.printing import print_json
    from tailwise.evaluate import EvaluateOptions
    from tailwise.evaluate import evaluate as run
    from tailwise.evaluate.output import as_json as to_json
    from tailwise.evaluate.output import check_output, write_output

    options = EvaluateOptions(
        model=model,
        classes=classes,
        templates=templates,
        train_counts=train_counts,
        pool=pool,
        groups=groups,
        batch_size=batch_size,
        workers=workers,
        device=device,
        precision=precision,
        bootstrap=bootstrap,
        seed=seed,
        max_rejected=max_rejected,
    )
    config = _config(checkpoint, data, options) if output is not None else {}
    if output is not None:
        check_output(output, config, overwrite=overwrite)
    made = with_bars(lambda track: run(checkpoint, data, options, track=track))
    if output is not None:
        write_output(output, config, made)
    if as_json:
        print_json(to_json(made))
    else:
        _print(made)
        if output is not None:
            say(f"written to {output}")


def _config(checkpoint: str, data: Sequence[str], options: EvaluateOptions) -> dict[str, Any]:
    """What decides the figures: not workers, nor the bound on rejects. Files by their content too, as runs write theirs anew; not sets."""
    from dataclasses import asdict

    from tailwise.catalog.files import file_digest
    from tailwise.devices import find_device
    from tailwise.evaluate.models import find_checkpoint

    found = find_checkpoint(checkpoint, options.model)
    given = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    del given["workers"], given["max_rejected"]
    read = {
        "weights": found.weights,
        **{name: getattr(options, name) for name in ("classes", "templates", "train_counts")},
    }
    digests = {name: file_digest(path) for name, path in read.items() if path is not None and path.is_file()}
    if options.pool is not None:
        digests["pool"] = open_catalog(options.pool).snapshot().id
    device = find_device(options.device, any_kind=True).type
    resolved = {"model": found.model, "pretrained": found.pretrained, "device": device}
    return {"checkpoint": checkpoint, "data": list(data), **given, **resolved, "digests": digests}


def _print(evaluations: Sequence[Evaluation]) -> None:
    from tailwise.cli.printing import print_table

    classified = [item for item in evaluations if item.task == "classification"]
    retrieved = [item for item in evaluations if item.task == "retrieval"]
    if classified:
        columns = ("set", "images", "classes", "top-1", "top-5", "mean per class")
        print_table("zero-shot accuracy in %, with 95 % intervals", columns, _accuracy_rows(classified))
    if grouped := [item for item in classified if item.summary["groups"]]:
        names = tuple(grouped[0].summary["groups"])
        rows = [(item.name, *map(_group, item.summary["groups"].values())) for item in grouped]
        print_table("by training frequency: mean per class, of groups of classes", ("set", *names), rows)
    if retrieved:
        ks = [(name, k) for name in ("image_retrieval", "text_retrieval") for k in ("1", "5", "10")]
        arrows = {"image_retrieval": "text → image", "text_retrieval": "image → text"}
        rows = [
            (item.name, f"{item.summary['images']:,}", f"{item.summary['texts']:,}", *(_percent(item.summary[name][k]) for name, k in ks))
            for item in retrieved
        ]  # fmt: skip
        titles = (f"{arrows[name]} R@{k}" for name, k in ks)
        print_table("recall in %, with 95 % intervals", ("set", "images", "texts", *titles), rows)
    for item in evaluations:
        for reason, count in item.summary["skipped"].items():
            say(f"{item.name}: {count:,} left out: {reason}")


def _accuracy_rows(evaluations: Sequence[Evaluation]) -> list[tuple[str, ...]]:
    from tailwise.evaluate import mean_over_sets

    names = ("top1", "top5", "mean_per_class")
    rows = [
        (
            item.name,
            f"{item.summary['images']:,}",
            f"{item.summary['classes']:,}",
            *(_percent(item.summary[name]) for name in names),
        )
        for item in evaluations
    ]
    if len(evaluations) > 1:
        mean = mean_over_sets(evaluations)
        rows.append(("mean over sets", "", "", *(f"{100 * mean[name]:.2f}" if name in mean else "" for name in names)))
    return rows


def _group(group: dict[str, Any]) -> str:
    tested = f"{group['classes_with_images']:,} of " * (group["classes_with_images"] < group["classes"])
    return f"{_percent(group['accuracy'])}: {tested}{group['classes']:,} classes, {group['images']:,} images"


def _percent(figure: dict[str, float | None]) -> str:
    value, low, high = (figure[name] for name in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return "–"
    return f"{100 * value:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
