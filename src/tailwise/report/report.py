"""The report: what a catalog holds, and what plans do to it, on one page."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise import __version__
from tailwise.catalog.artifacts import finished_folder
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.comparisons import Neighbours
from tailwise.catalog.drops import DropList
from tailwise.catalog.files import read_record
from tailwise.catalog.kinds import CLUSTERING, COMPARISON, DROP_LIST, PLAN
from tailwise.catalog.outputs import check_output_folder
from tailwise.catalog.removals import Removals
from tailwise.context import Context
from tailwise.errors import DamagedError, NotFoundError, UserError
from tailwise.extras import require
from tailwise.plan.plan import Plan
from tailwise.report import charts as drawing
from tailwise.report.clusters import BINS, ClusterFigures, cluster_figures, similarity_bins
from tailwise.report.overview import facts_of, plans_table, rejected_table, tail_table
from tailwise.report.page import PAGE, SCRIPTS, script_json, write_page
from tailwise.report.samples import (
    Filtered,
    Group,
    cut,
    describe,
    duplicate_groups,
    nearest_to_threshold,
    shard_names,
)
from tailwise.report.study import PLANS, SUMMARY, read_summary, study_section
from tailwise.requests import ReportRequest
from tailwise.text import command_line, did_you_mean, plain

CHUNK_CLUSTERS = 16  # in one script: of similar size, since the gallery begins with the largest


@dataclass(frozen=True)
class Report:
    """A report that was written.

    Attributes:
        page: its first file.
        files: number of files.
        size_bytes: of all files.
        clusters: number of clusters shown.
        samples: number of samples with a thumbnail, or with the reason why there is none.
        without_image: number of these that have no thumbnail.
    """

    page: Path
    files: int
    size_bytes: int
    clusters: int
    samples: int
    without_image: int


def make_report(catalog: Catalog | str | Path, request: ReportRequest, context: Context | None = None) -> Report:
    """Write a report on a catalog: DIR/index.html, and scripts in DIR/data if it is large. The same catalog gives the same bytes.

    Raises:
        UserError: the folder holds something else, an artifact does not exist, or Bokeh is not installed.
    """
    require("report", "bokeh", "jinja2", purpose="a report")
    catalog, context = Catalog.open(catalog), context or Context()
    folder = check_output_folder(request.output, "`output`", {PAGE, *SCRIPTS})
    _check_ours(folder)
    study = None if request.study is None else _study(request.study)
    content = _collect(catalog, request, context)
    figures = content.figures
    columns = {} if figures is None else _columns(figures)
    blocks = {} if figures is None else _chunks(figures, columns, content.samples)
    if content.groups or content.filtered:
        blocks["lists"] = _lists(content)
    charts: list[drawing.Chart] = []
    if figures is not None:
        nearest = _nearest(catalog, content.lists)
        charts = drawing.make_charts(columns, figures, content.plans, request.epochs, nearest)
    text, ids = drawing.as_json(charts) if charts else ("", {})
    meta = {
        **_meta(content),
        "charts": ids,
        "columns": {name: _packed(values) for name, values in columns.items()},
        "places": {row: name for name, block in blocks.items() for row in block["samples"]},
    }
    page = {**_page(content, request), "charts": charts, "study": study}
    inline = {"meta": script_json(meta), **({"charts": text.replace("<", "\\u003c")} if text else {})}
    written = write_page(folder, page, inline, {name: script_json(block) for name, block in blocks.items()})
    size = sum(path.stat().st_size for path in written)
    clusters = 0 if figures is None else len(figures.sizes)
    without = sum(not sample["image"].startswith("data:") for sample in content.samples.values())
    return Report(folder / PAGE, len(written), size, clusters, len(content.samples), without)


# --- what is shown ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Content:
    catalog: Catalog
    plans: list[Plan]
    clustering: Clustering | None
    lists: list[DropList]
    figures: ClusterFigures | None  # None without a clustering
    groups: dict[str, list[Group]]  # of duplicates, by drop list
    filtered: dict[str, list[Filtered]]  # by drop list
    samples: dict[int, dict[str, Any]]  # by row


def _collect(catalog: Catalog, request: ReportRequest, context: Context) -> _Content:
    plans = _plans(catalog, request.plan)
    clustering = _clustering(catalog, request.clustering, plans)
    newest, removals = catalog.snapshot().number, Removals.of(catalog, track=context.progress)
    lists = [DropList(catalog, name) for name in DROP_LIST.finished(catalog.folder)]
    lists = [item for item in lists if item.snapshot.number == newest]
    figures = None
    if clustering is not None:
        bounds = (request.images, request.most_images)
        figures = cluster_figures(clustering, plans, *bounds, request.projection, context)
    found = {item.name: duplicate_groups(item, removals) for item in lists if item.kind == "dedup"}
    groups = {name: each for name, each in found.items() if each}
    dropped = {item.name: nearest_to_threshold(item, removals) for item in lists}
    filtered = {name: each for name, each in dropped.items() if each}
    rows = [] if figures is None else figures.picks["row"].tolist()
    rows += [row for each in groups.values() for group in each for row in (group.kept, *group.rows)]
    rows += [item.row for each in filtered.values() for item in each]
    samples = describe(catalog, np.unique(np.array(rows, np.int64)), clustering, plans, lists, context)
    return _Content(catalog, plans, clustering, lists, figures, groups, filtered, samples)


def _meta(content: _Content) -> dict[str, Any]:
    """Return what the page's script reads first, but for charts and columns."""
    catalog, clustering, figures = content.catalog, content.clustering, content.figures
    groups = {} if figures is None else {name: _values(Clustering.open(catalog, name)) for name in figures.groups}
    return {
        "catalog": shlex.quote(plain(catalog.folder)),
        "clustering": clustering.name if clustering else None,
        "clusters": 0 if figures is None else len(figures.sizes),
        "values": _values(clustering) if clustering else None,
        "words": [] if figures is None else figures.words,
        "groups": groups,
        "plans": [{"name": plan.name, "dynamic": plan.dynamic} for plan in content.plans],
        "scatter": drawing.SCATTER,
        "chunk": CHUNK_CLUSTERS,
        "shards": shard_names(catalog, content.samples),
    }


def _values(grouping: Clustering) -> list[str | None] | None:
    return None if grouping.values is None else [None if value is None else cut(value) for value in grouping.values]


def _page(content: _Content, request: ReportRequest) -> dict[str, Any]:
    """Return the values of the template, but for the charts and the study."""
    catalog, plans, figures = content.catalog, content.plans, content.figures
    sizes = None if figures is None else figures.sizes
    found = [plans_table(plans, request.samples_per_second) if plans else None, rejected_table(catalog)]
    if figures is not None:
        found.insert(1, tail_table(figures.sizes, figures.quotas, plans))
    return {
        "title": plain(catalog.folder.name),
        "about": _about(catalog, content.clustering),
        "facts": facts_of(catalog, sizes, content.lists),
        "tables": [table for table in found if table is not None],
        "notes": _notes(content),
        "plans": [plan.name for plan in plans],
        "gallery": figures is not None,
        "duplicates": bool(content.groups),
        "filtered": bool(content.filtered),
    }


def _study(folder: Path) -> Any:  # noqa: ANN401  (jinja2's)
    from jinja2 import UndefinedError  # noqa: PLC0415  (an extra)

    summary = read_summary(folder)
    try:
        return study_section(summary)
    except (LookupError, TypeError, ValueError, AttributeError, UndefinedError) as error:
        problem = f"{folder / SUMMARY} cannot be shown ({type(error).__name__}: {error})"
        raise DamagedError(f"{problem}: repeat `tailwise compare`, which trains nothing again") from error


def _check_ours(folder: Path) -> None:
    page = folder / PAGE
    if page.exists() and b'name="generator" content="tailwise' not in page.read_bytes()[:4096]:
        raise UserError(f"{page} is no report of tailwise: give `output` a new or an empty folder")


def _plans(catalog: Catalog, names: Sequence[str]) -> list[Plan]:
    """Return the plans that were asked for; or all of the newest snapshot, else all, but those of comparisons; dynamic ones first."""
    if names:
        return [Plan(catalog, name) for name in dict.fromkeys(names)]
    plans = [Plan(catalog, name) for name in PLAN.finished(catalog.folder) if not name.startswith(PLANS)]
    newest = [plan for plan in plans if plan.snapshot.number == catalog.snapshot().number]
    return sorted(newest or plans, key=lambda plan: not plan.dynamic)


def _clustering(catalog: Catalog, name: str | None, plans: Sequence[Plan]) -> Clustering | None:
    """Return the clustering that was asked for, or else that of a plan, "main", or any; None if there is none."""
    known = CLUSTERING.finished(catalog.folder)
    if name is not None:
        if name not in known:
            raise NotFoundError(f"`clustering` {name!r} is not in the catalog: {did_you_mean(name, known)}")
        return Clustering.open(catalog, name)
    wanted = [*(plan.clustering for plan in plans), "main", *known]
    return next((Clustering.open(catalog, each) for each in wanted if each in known), None)


def _columns(figures: ClusterFigures) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of the clusters: float32 or int32 [K] each."""
    sizes = figures.sizes
    rank = np.empty(len(sizes), np.int32)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(1, len(sizes) + 1)
    kind = np.int32 if sizes.max(initial=0) < 1 << 31 else np.float32
    columns: dict[str, npt.NDArray[Any]] = {"size": sizes.astype(kind), "rank": rank}
    table = figures.clustering.table
    if figures.clustering.has_centroids:
        intra, inter = (table.column(name).to_numpy(zero_copy_only=False) for name in ("d_intra", "d_inter"))
        columns |= {"d_intra": intra, "d_inter": inter, "complexity": intra * inter}
    if figures.places is not None:
        columns |= {"x": figures.places[:, 0], "y": figures.places[:, 1]}
    for number, quota in enumerate(figures.quotas):
        columns |= {f"quota:{number}": quota, f"rate:{number}": quota / np.maximum(sizes, 1)}
    for name, (group, share) in figures.groups.items():
        columns |= {f"group:{name}": group, f"share:{name}": share}
    return {name: values if values.dtype == np.int32 else values.astype(np.float32) for name, values in columns.items()}


def _nearest(catalog: Catalog, lists: Sequence[DropList]) -> dict[str, tuple[npt.NDArray[np.int64], float]]:
    """Return, by list of near-duplicates, counts of the similarity to the most similar earlier sample, int64 [BINS], and ε."""
    found = {}
    for item in lists:
        epsilon = item.config.get("epsilon")
        if epsilon is None:
            continue
        for path in COMPARISON.manifests(catalog.folder):
            near = Neighbours(catalog, finished_folder(path.parent, read_record(path)["identity"]))
            if near.config.items() <= item.config.items() and near.inputs.items() <= item.inputs.items():
                counts = np.zeros(BINS, np.int64)
                for part in catalog.parts(near.snapshot):
                    values = near.similarity[part.span]
                    values = values[(values >= -1) & (values <= 1)]
                    counts += np.bincount(similarity_bins(values), minlength=BINS)
                found[item.name] = counts, float(epsilon)
                break
    return found


def _chunks(
    figures: ClusterFigures, columns: Mapping[str, npt.NDArray[Any]], samples: Mapping[int, Any]
) -> dict[str, dict[str, Any]]:
    """Return the samples that stand for clusters, in chunks of clusters of similar size."""
    chunks: dict[str, dict[str, Any]] = {
        f"chunk-{number}": {"clusters": {}, "samples": {}} for number in range(-(-len(figures.sizes) // CHUNK_CLUSTERS))
    }
    numbers = ((columns["rank"] - 1) // CHUNK_CLUSTERS).tolist()
    for cluster, kind, row in figures.picks[["cluster", "kind", "row"]].tolist():
        chunk = chunks[f"chunk-{numbers[cluster]}"]
        chunk["clusters"].setdefault(cluster, []).append([kind, row])
        chunk["samples"][row] = samples[row]
    return chunks


def _lists(content: _Content) -> dict[str, Any]:
    """Return groups of duplicates, and samples that lists dropped by a value."""
    shown: list[dict[str, Any]] = []
    dropped: dict[str, list[list[Any]]] = {}
    for name, each in content.groups.items():
        shown += [
            {"list": name, "kept": group.kept, "rows": group.rows, "near": group.similarities, "more": group.more}
            for group in each
        ]
    for name, items in content.filtered.items():
        for item in items:
            dropped.setdefault(f"{name}: {item.reason}", []).append([item.row, item.value])
    rows = [row for group in shown for row in (group["kept"], *group["rows"])]
    rows += [row for each in dropped.values() for row, _ in each]
    return {"groups": shown, "filtered": dropped, "samples": {row: content.samples[row] for row in rows}}


def _about(catalog: Catalog, clustering: Clustering | None) -> str:
    shown = f"clustering {clustering.name}" if clustering else "no clustering yet"
    return plain(
        f"Catalog {catalog.folder}, snapshot {catalog.snapshot().number}, {shown}. Made by tailwise {__version__}."
    )


def _notes(content: _Content) -> list[str]:
    """Return what the page does not show, and why."""
    catalog, plans, clustering = content.catalog, content.plans, content.clustering
    newest, notes = catalog.snapshot(), []
    if clustering is None:
        notes.append(f"There are no clusters to show yet. Make them with {command_line('cluster', catalog.folder)}.")
    elif not plans:
        making = command_line("plan", catalog.folder, "epochs", method="dynamics", keep=0.5)
        notes.append(f"There is no plan yet. Make one with {making}.")
    compared = {name for name in PLAN.finished(catalog.folder) if name.startswith(PLANS)} - {
        plan.name for plan in plans
    }
    if compared:
        notes.append(
            f"{len(compared):,} plans of comparisons are not shown. Name those to show: `--plan {min(compared)}`."
        )
    older = [(f"Plan {plan.name}", plan.snapshot, "not in it") for plan in plans]
    if clustering is not None:
        older.insert(0, (f"Clustering {clustering.name}", clustering.snapshot, "in no cluster"))
    for name, snapshot, where in older:
        if absent := newest.rows - snapshot.rows:
            notes.append(f"{name} was made for snapshot {snapshot.number}: {absent:,} newer samples are {where}.")
    if others := sorted({*DROP_LIST.finished(catalog.folder)} - {item.name for item in content.lists}):
        notes.append(f"Not shown, since made for earlier snapshots: drop lists {', '.join(others)}.")
    return [plain(note) for note in notes]


def _packed(values: npt.NDArray[Any]) -> list[str]:
    kind = "i4" if values.dtype == np.int32 else "f4"
    return [kind, base64.b64encode(values.astype(f"<{kind}").tobytes()).decode()]
