"""Evaluate a checkpoint on several sets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tailwise.context import Context
from tailwise.encoders.open_clip import LoadedModel, find_checkpoint, load_model
from tailwise.errors import UserError, check_share, refuse_many
from tailwise.evaluate.counts import count_concepts, count_in_pool, read_train_counts
from tailwise.evaluate.metrics import OF_GUESSES, Ints, bounded, classification, doublings, recall, tally, thirds
from tailwise.evaluate.sets import ImageSet, Task, find_set
from tailwise.evaluate.zero_shot import KS, classify, retrieve
from tailwise.requests import EvaluateRequest, refuse_given
from tailwise.shards.content import HARMLESS


@dataclass(frozen=True)
class Evaluation:
    """Result on one set.

    Attributes:
        name: name of the set.
        task: "classification" or "retrieval".
        summary: the figures, as JSON values.
        classes: a row for each class: class, name, train_count, group, images, right, right_top5, accuracy; None for retrieval.
    """

    name: str
    task: Task
    summary: Mapping[str, Any]
    classes: pa.Table | None


def evaluate(
    checkpoint: str | Path,
    data: str | Path | Sequence[str | Path | ImageSet],
    options: EvaluateRequest = EvaluateRequest(),
    *,
    context: Context | None = None,
) -> list[Evaluation]:
    """Evaluate a checkpoint of open_clip on one set or several, without training.

    Args:
        checkpoint: see `find_checkpoint`.
        data: see `find_set`; or sets, as of `suites.find_suite`.
        options: all other settings.
        context: runs the tasks and shows progress.

    Returns:
        One evaluation per set, in their order.

    Raises:
        UserError: an argument is not valid or cannot be read, or too many samples are left out.
    """
    context = context or Context()
    bounds = _check(options)
    places = [data] if isinstance(data, str | Path) else list(data)
    if not places:
        raise UserError("there is no set to evaluate on: give `data`")
    found = find_checkpoint(checkpoint, options.model)
    found_sets = (
        place if isinstance(place, ImageSet) else find_set(str(place), options.classes, options.templates)
        for place in places
    )
    sets = _renamed(list(found_sets))
    counts = [_train_counts(item, options, context) for item in sets]
    loaded = load_model(found, options.device, options.precision)
    evaluations = []
    for item, count in zip(sets, counts, strict=True):
        made = _on_set(loaded, item, count, bounds, options, context)
        skipped = {reason: count for reason, count in made.summary["skipped"].items() if reason != HARMLESS}
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in skipped.items())
        left_out, what = sum(skipped.values()), f"{{}} samples{{}} of {made.name} are left out"
        refuse_many(left_out, made.summary["images"] + left_out, options.max_rejected, what, reasons)
        evaluations.append(made)
    return evaluations


def mean_over_sets(evaluations: Sequence[Evaluation]) -> dict[str, float]:
    """Return the means over classification sets of top-1 and mean per class, and over retrieval sets of the mean recall at 1."""
    classified = [item.summary for item in evaluations if item.task == "classification"]
    retrieved = [item.summary for item in evaluations if item.task == "retrieval"]
    figures = {name: [found[name]["value"] for found in classified] for name in ("top1", "mean_per_class")}
    figures["mean_recall@1"] = [found["mean_recall"]["1"]["value"] for found in retrieved]
    return {name: float(np.mean(values)) for name, values in figures.items() if values}


def _check(options: EvaluateRequest) -> tuple[int, int] | None:
    """Return the bounds of the groups, None for thirds; refuse invalid options."""
    if options.train_counts is not None and options.pool is not None:
        raise UserError("`train_counts` and `pool` both say how often classes were trained on: give one")
    if options.pool is None:
        refuse_given(options, {"concepts"}, "without `pool`")
    check_share(options.max_rejected)
    if options.groups == "thirds":
        return None
    match = re.fullmatch(r"(\d+),(\d+)", options.groups)
    if match is None or int(match[1]) < int(match[2]):
        raise UserError(f"`groups` {options.groups!r}: give thirds, or two bounds, the greater first, such as 100,20")
    return int(match[1]), int(match[2])


def _renamed(sets: Sequence[ImageSet]) -> list[ImageSet]:
    """Return the sets; the second set of the same name gets "-2", and so on."""
    names = [item.name for item in sets]
    numbers = [names[: at + 1].count(name) for at, name in enumerate(names)]
    renamed = [name if number == 1 else f"{name}-{number}" for name, number in zip(names, numbers, strict=True)]
    return [replace(item, name=name) for item, name in zip(sets, renamed, strict=True)]


def _train_counts(images: ImageSet, options: EvaluateRequest, context: Context) -> Ints | None:
    if images.task == "retrieval":
        return None
    if options.train_counts is not None:
        return read_train_counts(options.train_counts, images.classes)
    if options.pool is not None:
        if options.concepts is not None:
            return count_concepts(options.pool, options.concepts, images.classes)
        return count_in_pool(options.pool, images.classes, workers=options.workers, context=context)
    return None


def _on_set(
    loaded: LoadedModel,
    images: ImageSet,
    counts: Ints | None,
    bounds: tuple[int, int] | None,
    options: EvaluateRequest,
    context: Context,
) -> Evaluation:
    if images.task == "retrieval":
        return _retrieval(loaded, images, options, context)
    labels, guesses, groups, skipped = classify(loaded, images, options, context)
    cells = tally(labels, guesses, len(images.classes))
    summary, group_of = _figures(cells, counts, bounds, options)
    about = {"set": images.name, "task": images.task, "images": len(labels), "classes": len(images.classes)}
    if images.metric is not None and images.metric in OF_GUESSES:
        how = {"replicates": options.bootstrap, "seed": options.seed}
        summary["official"] = OF_GUESSES[images.metric](labels, guesses, groups, **how)
    elif images.metric is not None:
        summary["official"] = summary[images.metric]
    table = _class_table(images, cells, counts, group_of)
    return Evaluation(images.name, images.task, {**about, "skipped": skipped, **summary}, table)


def _figures(
    cells: Ints, counts: Ints | None, bounds: tuple[int, int] | None, options: EvaluateRequest
) -> tuple[dict[str, Any], dict[int, str]]:
    """Return the figures of the summary, and the group of each class."""
    groups, bins = {}, []
    if counts is not None:
        groups = thirds(counts) if bounds is None else bounded(counts, *bounds)
        bins = doublings(counts)
    members = {**groups, **{f"bin {at}": classes for at, (_, _, classes) in enumerate(bins)}}
    found = classification(cells, members, counts, replicates=options.bootstrap, seed=options.seed)
    images = cells.sum(axis=1)
    summary = {
        "top1": found["top1"],
        "top5": found["top5"] if len(cells) >= 5 else dict.fromkeys(found["top5"]),
        "mean_per_class": found["mean_per_class"],
        "groups": {
            name: {
                "classes": len(classes),
                "classes_with_images": int((images[classes] > 0).sum()),
                "images": int(images[classes].sum()),
                "accuracy": found[name],
            }
            for name, classes in groups.items()
        },
        "trend": None
        if counts is None
        else {
            "slope_per_doubling": found["slope"],
            "correlation": found["correlation"],
            "classes": int((images > 0).sum()),
            "never_seen": int(((images > 0) & (counts == 0)).sum()),
        },
        "curve": [
            {"from": least, "to": greatest, "classes": len(classes), "accuracy": found[f"bin {at}"]["value"],
             "low": found[f"bin {at}"]["low"], "high": found[f"bin {at}"]["high"]}
            for at, (least, greatest, classes) in enumerate(bins)
        ],
    }  # fmt: skip
    return summary, {index: name for name, classes in groups.items() for index in classes.tolist()}


def _class_table(images: ImageSet, cells: Ints, counts: Ints | None, group_of: Mapping[int, str]) -> pa.Table:
    every, indices = cells.sum(axis=1), range(len(images.classes))
    shares = [right / all_ if all_ else None for right, all_ in zip(cells[:, 0].tolist(), every.tolist(), strict=True)]
    columns = {
        "class": pa.array(indices, pa.int32()),
        "name": pa.array(images.classes, pa.string()),
        "train_count": pa.nulls(len(cells), pa.int64()) if counts is None else pa.array(counts, pa.int64()),
        "group": pa.array([group_of.get(index) for index in indices], pa.string()),
        "images": pa.array(every, pa.int64()),
        "right": pa.array(cells[:, 0], pa.int64()),
        "right_top5": pa.array(cells[:, :2].sum(axis=1), pa.int64()),
        "accuracy": pa.array(shares, pa.float64()),
    }
    return pa.table(columns)


def _retrieval(loaded: LoadedModel, images: ImageSet, options: EvaluateRequest, context: Context) -> Evaluation:
    found_texts, found_images, texts, skipped = retrieve(loaded, images, options, context)
    figures = recall(found_texts, found_images, texts, KS, replicates=options.bootstrap, seed=options.seed)
    names = ("image_retrieval", "text_retrieval", "mean_recall")
    summary = {
        "set": images.name,
        "task": images.task,
        "images": len(texts),
        "texts": int(texts.sum()),
        "skipped": skipped,
        **{name: {str(k): figures[f"{name}@{k}"] for k in KS} for name in names},
    }
    if images.metric is not None:
        summary["official"] = figures[images.metric]
    return Evaluation(images.name, images.task, summary, None)
