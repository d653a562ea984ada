"""The command that a user most likely runs next: one line after the results of a command, which can be typed as it stands."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from tailwise.cli.printing import say
from tailwise.text import command_line, option_words

if TYPE_CHECKING:
    from tailwise.catalog import Catalog
    from tailwise.catalog.kinds import Kind
    from tailwise.plan.plan import Plan

MOST_CLUSTERS, SAMPLES_A_CLUSTER = 500, 50  # as the README and the demo have them
LARGEST_BATCH, LONGEST_WARMUP = 512, 2000  # of trainings

_following: list[str] = []  # of this command, one at most
_final: list[bool] = []  # not empty if no other one may take its place


def suggest(command: str, *words: object, **options: object) -> None:
    """Take the command to name at the end, instead of one taken before; paths below this folder are shown from here."""
    if _final:
        return
    shown = list(words)
    with suppress(OSError):  # this folder may be gone
        here = Path.cwd()
        shown = [
            each.relative_to(here) if isinstance(each, Path) and each.is_relative_to(here) else each for each in words
        ]
    _following[:] = [command_line(command, *shown, **options).strip("`")]


def suggest_typed(command: str, *words: str) -> None:
    """Take a command that was tried, as it was typed; no other one takes its place."""
    suggest(command, *words)
    _final.append(True)


def suggest_more(**options: object) -> None:
    """Add options to the command that was taken, if any."""
    _following[:] = [" ".join([line, *option_words(options)]) for line in _following]


def say_following(*, drop: bool = False) -> None:
    """Print the command that was taken, if any; with `drop`, only forget it."""
    _final.clear()
    while _following:
        line = _following.pop()
        if not drop:
            say(f"next: {line}")


def suggest_step(catalog: Catalog) -> None:
    """Suggest what a catalog lacks: embeddings, clusters, a plan; or a look at its first plan."""
    from tailwise.catalog.embeddings import column_records
    from tailwise.catalog.kinds import CLUSTERING, PLAN
    from tailwise.shards.containers import without_bytes

    plans, clusterings = PLAN.finished(catalog.folder), CLUSTERING.finished(catalog.folder)
    if plans:
        suggest("explain", catalog.folder, plans[0])
    elif clusterings:
        suggest_plan(catalog, "main" if "main" in clusterings else clusterings[0])
    elif column_records(catalog):
        suggest_clusters(catalog)
    elif without_bytes(catalog.shards()).num_rows:
        suggest("filter", catalog.folder, "--by", "caption-words", "--dry-run")
    else:
        suggest("embed", catalog.folder, encoder="lite0")


def suggest_clusters(catalog: Catalog, without: Sequence[str] = ()) -> None:
    """Suggest to cluster the first column of embeddings, without drop lists."""
    from tailwise.catalog.embeddings import column_records
    from tailwise.catalog.kinds import CLUSTERING

    columns = [path.parent.name for path in column_records(catalog)]
    clusters = min(MOST_CLUSTERS, max(catalog.snapshot().rows // SAMPLES_A_CLUSTER, 2))
    options = {"k": clusters, "column": columns[0] if "image" not in columns and columns else None}
    name = _free(CLUSTERING, catalog, "main")
    suggest("cluster", catalog.folder, *_without(without), **options, name=None if name == "main" else name)


def suggest_plan(catalog: Catalog, clustering: str, without: Sequence[str] = (), method: str = "dynamics") -> None:
    """Suggest a plan over a clustering or grouping, without drop lists."""
    from tailwise.catalog.kinds import PLAN

    options = {"method": method, "keep": 0.5, "clustering": None if clustering == "main" else clustering}
    suggest("plan", catalog.folder, _free(PLAN, catalog, "epochs"), *_without(without), **options)


def suggest_use(plan: Plan, epochs: int) -> None:
    """Suggest a training on a plan; an export where it is one subset, or where the samples have no images."""
    from tailwise.plan.explain import first_epoch
    from tailwise.shards.containers import without_bytes

    if plan.dynamic and not without_bytes(plan.catalog.shards(plan.snapshot)).num_rows:
        samples = int(first_epoch(plan).total) * epochs
        batch = min(LARGEST_BATCH, max(samples // 100, 1))
        warmup = min(samples // batch // 10, LONGEST_WARMUP)
        trainer = option_words({"model": "ViT-B-32", "batch-size": batch, "warmup": warmup})
        suggest("train", plan.catalog.folder, plan.name, "--epochs", epochs, "--", *trainer)
    else:
        options = {"epoch": 0 if plan.dynamic else None, "to": "parquet", "output": f"{plan.name}.parquet"}
        suggest("export", plan.catalog.folder, plan.name, **options)


def _without(lists: Sequence[str]) -> list[str]:
    return [word for name in dict.fromkeys(lists) for word in ("--without", name)]


def _free(kind: Kind, catalog: Catalog, name: str) -> str:
    """Return the name, with a number if the catalog has such an artifact."""
    taken = kind.finished(catalog.folder)
    return next(each for number in count(1) if (each := name if number == 1 else f"{name}-{number}") not in taken)
