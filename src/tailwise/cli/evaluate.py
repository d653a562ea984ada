"""Models: train, evaluate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from tailwise.cli.app import (
    AllowCode,
    AsJson,
    CatalogPath,
    PlanName,
    app,
    open_catalog,
    open_plan,
    say_note,
    takes,
    with_progress,
)
from tailwise.cli.following import suggest
from tailwise.cli.printing import print_json, print_table, say
from tailwise.errors import UserError
from tailwise.requests import EvaluateRequest, TrainRequest, refuse_given
from tailwise.text import command_line

if TYPE_CHECKING:
    from tailwise.evaluate.run import Evaluation
    from tailwise.plan.plan import Plan


@app.command()
@takes(EvaluateRequest)
def evaluate(
    checkpoint: Annotated[
        str, Argument(metavar="CHECKPOINT", help="A .pt file, a run's folder, or open_clip:MODEL/PRETRAINED.")
    ],
    data: Annotated[
        list[str] | None, Option(help="A set to evaluate on: folder, shards or URL; may be given again.")
    ] = None,
    suite: Annotated[
        tuple[str, Path] | None,
        Option(metavar="NAME FOLDER", help="datacomp, vtab or shifts, and the folder that holds its sets."),
    ] = None,
    request: EvaluateRequest = EvaluateRequest(),
    output: Annotated[Path | None, Option(help="Folder for summary.json, classes-SET.csv, curve-SET.svg.")] = None,
    png: Annotated[bool, Option("--png", help="Also write the curves as PNG, for slides.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace another evaluation in --output.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a checkpoint: zero-shot accuracy, head to tail, and retrieval.

    Head and tail: classes that were trained on often or rarely (--train-counts, --pool). Sets: clip_benchmark's webdataset
    layout, tars with `.cls`, a folder of images for each class. Retrieval sets say so in `dataset_type.txt`. A suite prints one
    table: the official metric of each set, the sets that are missing and how to get them, and macro averages of complete groups.

    Examples:
      tailwise evaluate logs/epochs-tiny-cpu --data tinyimagenet-val --train-counts classes.tsv --output evaluation
      tailwise evaluate epoch_32.pt --model ViT-B-32 --data wds_imagenet1k --data wds_imagenetv2 --pool my-catalog
      tailwise evaluate open_clip:ViT-B-32/laion2b_s34b_b79k --data wds_mscoco_captions --json
      tailwise evaluate epoch_32.pt --model ViT-B-32 --suite datacomp evaluation-sets
    """
    from tailwise.evaluate.output import as_json as to_json
    from tailwise.evaluate.output import check_output, write_output
    from tailwise.evaluate.run import evaluate as run
    from tailwise.evaluate.suites import as_table, find_suite

    if (data is None) == (suite is None):
        raise UserError("give the sets with --data, or --suite NAME FOLDER")
    if png and output is None:
        raise UserError("--png does nothing without --output")
    sets: list[Any] = data or []
    if suite is not None:
        refuse_given(request, {"classes", "templates", "train_counts"}, "with `suite`: its sets have their own")
        sets = find_suite(*suite)
    named = {"data": data} if suite is None else {"data": [], "suite": list(map(str, suite))}
    config = _config(checkpoint, named, request) if output is not None else {}
    if output is not None:
        check_output(output, config, overwrite=overwrite)
    made = run(checkpoint, sets, request, context=with_progress())
    table = None if suite is None else as_table(*suite, made)
    if output is not None:
        write_output(output, config, made, table, png=png)
    if as_json:
        print_json(to_json(made, table))
    else:
        if table is not None:
            _print_suite(table)
        _print(made)
        if output is not None:
            say(f"written to {output}")
        suggest("compare", "…", "--dry-run")


def _config(checkpoint: str, sets: Mapping[str, Any], options: EvaluateRequest) -> dict[str, Any]:
    """Return the settings that decide the figures, without workers and the bound on rejects; files also by content, sets by name."""
    from dataclasses import asdict

    from tailwise.catalog.concepts import Concepts
    from tailwise.catalog.files import file_digest
    from tailwise.devices import find_device
    from tailwise.encoders.open_clip import find_checkpoint

    found = find_checkpoint(checkpoint, options.model)
    given = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    del given["workers"], given["max_rejected"]
    if options.concepts is None:  # as earlier versions wrote it
        del given["concepts"]
    read = {name: getattr(options, name) for name in ("classes", "templates", "train_counts")}
    read["weights"] = found.weights
    digests = {name: file_digest(path) for name, path in read.items() if path is not None and path.is_file()}
    if options.pool is not None:
        digests["pool"] = open_catalog(options.pool).snapshot().id
        if options.concepts is not None:
            digests["concepts"] = Concepts(open_catalog(options.pool), options.concepts).id
    device = find_device(options.device, any_kind=True).type
    resolved = {"model": found.model, "pretrained": found.pretrained, "device": device}
    return {"checkpoint": checkpoint, **sets, **given, **resolved, "digests": digests}


def _print_suite(table: Mapping[str, Any]) -> None:
    from tailwise.evaluate.suites import METRICS

    rows = [(item["set"], METRICS[item["metric"]], _percent(item)) for item in table["sets"]]
    for name, item in table["averages"].items():
        if item["sets"] > 1:
            value = (
                f"{100 * item['value']:.2f}" if item["value"] is not None else f"{item['found']} of {item['sets']} sets"
            )
            rows.append(("average" if name == table["suite"] else f"average, {name}", f"of {item['sets']} sets", value))
    print_table(f"suite {table['suite']}: official metrics in %, with 95 % intervals", ("set", "metric", "value"), rows)
    for item in table["sets"]:
        if item["missing"] is not None:
            say(f"missing: {item['set']}; {item['missing']}")


def _print(evaluations: Sequence[Evaluation]) -> None:
    from tailwise.evaluate.run import mean_over_sets

    measures = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class"}
    arrows = {"image_retrieval": "text → image", "text_retrieval": "image → text"}
    rows: list[tuple[str, str, str]] = []
    for item in evaluations:
        summary, classified = item.summary, item.task == "classification"
        count = f"{summary['classes']:,} classes" if classified else f"{summary['texts']:,} captions"
        say(f"{item.name}: {summary['images']:,} images, {count}")
        if classified:
            found = [(shown, summary[name]) for name, shown in measures.items()]
            found += [(_group(name, group), group["accuracy"]) for name, group in (summary["groups"] or {}).items()]
        else:
            found = [(f"{arrow} R@{k}", summary[name][k]) for name, arrow in arrows.items() for k in ("1", "5", "10")]
        rows += [(item.name * (at == 0), shown, _percent(figure)) for at, (shown, figure) in enumerate(found)]
    if sum(item.task == "classification" for item in evaluations) > 1:
        mean = mean_over_sets(evaluations)
        rows += [("mean", shown, f"{100 * mean[name]:.2f}") for name, shown in measures.items() if name in mean]
    print_table("zero-shot, in %, with 95 % intervals", ("set", "measure", "value"), rows)
    for item in evaluations:
        if (trend := item.summary.get("trend")) is not None and trend["slope_per_doubling"]["value"] is not None:
            never = f", {trend['never_seen']:,} of them never seen" * (trend["never_seen"] > 0)
            say(
                f"{item.name}: {_percent(trend['slope_per_doubling'])} points of accuracy with each doubling of the training frequency; "
                f"correlation with its logarithm {_number(trend['correlation'])}; over {trend['classes']:,} classes{never}"
            )
        for reason, count in item.summary["skipped"].items():
            say(f"{item.name}: {count:,} left out: {reason}")


def _group(name: str, group: Mapping[str, Any]) -> str:
    tested = f"{group['classes_with_images']:,} of " * (group["classes_with_images"] < group["classes"])
    return f"{name}: {tested}{group['classes']:,} classes"


def _percent(figure: dict[str, float | None]) -> str:
    return _number(figure, 100)


def _number(figure: dict[str, float | None], unit: int = 1) -> str:
    value, low, high = (figure[name] for name in ("value", "low", "high"))
    if value is None:
        return "–"
    ends = f" [{unit * low:.2f}, {unit * high:.2f}]" if low is not None and high is not None else ""
    return f"{unit * value:.2f}{ends}"


@app.command()
@takes(TrainRequest)
def train(
    catalog: CatalogPath,
    name: PlanName,
    open_clip: Annotated[
        list[str] | None, Argument(metavar="[-- OPEN_CLIP_ARGUMENTS...]", help="Arguments of open_clip's trainer.")
    ] = None,
    recipe: Annotated[str | None, Option(help="A name or a .yaml file of settings; arguments here go first.")] = None,
    request: TrainRequest = TrainRequest(),
    dry_run: Annotated[
        bool, Option("--dry-run", help="Check and print what would be done; start and write nothing.")
    ] = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Train CLIP on a plan, with open_clip's own trainer.

    What stands after the -- is open_clip's (see `tailwise train CATALOG NAME -- --help`). On several GPUs, start the same command
    by `torchrun --nproc_per_node N -m tailwise train …`. Batches, learning rate and augmentations after --resume are those that
    would have come without the interruption.

    Examples:
      tailwise train my-catalog epochs --epochs 32 -- --model ViT-B-32 --batch-size 512 --warmup 2000 --precision amp_bf16
      tailwise train my-catalog epochs --recipe tiny-cpu
      tailwise train my-catalog epochs --recipe dynamics-vit-b16 --samples-seen 2560000000,128000000 --dry-run
    """
    if as_json and not dry_run:
        raise UserError("`as_json` does nothing without `dry_run`")

    from tailwise.recipes import load_recipe
    from tailwise.train.arguments import refuse_code, require_model, take_factors

    settings = load_recipe(recipe) if recipe is not None else None
    if settings is None:
        require_model(open_clip or [])  # before the seconds that the trainer takes to import

    from tailwise.steps.planning.unused_lists import unused_by_plan
    from tailwise.train.launch import train as run
    from tailwise.train.outline import outline

    report = partial(say_note, error=as_json)
    for phase in settings.phases if settings is not None else ():
        refuse_code(f"recipe {recipe}: open_clip", phase.open_clip, allowed=allow_code)
    plan = open_plan(catalog, name)
    words, factors, train_data = take_factors(open_clip or [])
    if factors is not None:
        plan = _mixed(plan, train_data, factors, report, dry_run=dry_run)
    for item in unused_by_plan(plan):
        report(item.note())
    runs = run(plan, words, request, settings, report=report, context=with_progress(), dry_run=dry_run)
    if as_json and runs[0].rank == 0:
        phases = [outline(plan, each, request, last=each is runs[-1]) for each in runs]
        print_json({"plan": plan.name, "dry_run": dry_run, "phases": phases})


def _mixed(plan: Plan, train_data: str | None, factors: str, report: Callable[[str], None], *, dry_run: bool) -> Plan:
    """Return the mixture of a plan that open_clip's factors stand for; made if it isn't there, unless nothing may be written."""
    from tailwise.steps.planning.factors import mixture_of_factors
    from tailwise.train.guard import find_trainer

    mixture, (rank, ranks) = mixture_of_factors(plan, train_data, factors), find_trainer().ranks()
    if rank == 0:
        shares: Any = mixture.request.shares
        for name, share in shares.items():
            report(f"source {name}: factor {mixture.factors[name]:g}, {share:.1%} of an epoch")
        report(f"these factors are plan {mixture.name!r}: {mixture.command}")
    if not mixture.finished and dry_run:
        report(
            f"plan {mixture.name!r} isn't made by a dry run: what follows is of plan {plan.name!r}, which is as large"
        )
        return plan
    if not mixture.finished and ranks > 1:
        group = command_line("group", plan.catalog.folder, by="source", name=mixture.request.clustering)
        raise UserError(
            f"plan {mixture.name!r} isn't there: make it before several ranks start, with {group} and {mixture.command}"
        )
    return mixture.make(with_progress())
