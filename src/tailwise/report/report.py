"""The report: a page of its own, which opens without a server and asks nothing of any other address.

While it is small, all of it is in index.html. Else the samples are in scripts beside it, which the page loads when it shows them: a page
opened from a disk may load scripts and images, but may not fetch files.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise import __version__
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.comparisons import Neighbours
from tailwise.catalog.drops import DropList
from tailwise.catalog.kinds import CLUSTERING, COMPARISON, DROP_LIST, PLAN
from tailwise.catalog.outputs import check_output_folder
from tailwise.context import Context
from tailwise.errors import NotFoundError, UserError
from tailwise.extras import require
from tailwise.plan.plan import Plan
from tailwise.report import charts as drawing
from tailwise.report.clusters import BINS, ClusterFigures, cluster_figures
from tailwise.report.overview import facts_of, plans_table, rejected_table, tail_table
from tailwise.report.samples import describe, duplicate_groups, nearest_to_threshold, shard_names
from tailwise.requests import ReportRequest
from tailwise.storage.local import replacing
from tailwise.text import command_line, did_you_mean, plain

ONE_FILE_BYTES = 12_000_000  # of data; a larger report is a folder
CHUNK_CLUSTERS = 16  # in one script: of similar size, since the gallery begins with the largest
PAGE, DATA = "index.html", "data"


@dataclass(frozen=True)
class Report:
    """A report that was written.

    Attributes:
        page: its first file.
        files: number of files.
        size_bytes: of all files.
        clusters: number of clusters shown.
        samples: number of samples with a thumbnail, or with the reason why there is none.
    """

    page: Path
    files: int
    size_bytes: int
    clusters: int
    samples: int


def make_report(catalog: Catalog | str | Path, request: ReportRequest, context: Context | None = None) -> Report:
    """Write a report on a catalog: DIR/index.html, and scripts in DIR/data if it is large. The same catalog gives the same bytes.

    Raises:
        UserError: the folder holds something else, an artifact does not exist, or Bokeh is not installed.
    """
    require("report", "bokeh", "jinja2", purpose="a report")
    catalog, context = Catalog.open(catalog), context or Context()
    folder = check_output_folder(request.output, "`output`", {PAGE})
    _check_ours(folder)
    snapshot = catalog.snapshot()
    plans = _plans(catalog, request.plan)
    clustering = _clustering(catalog, request.clustering, plans)
    lists = [DropList(catalog, name) for name in DROP_LIST.finished(catalog.folder)]
    lists = [item for item in lists if item.snapshot.number == snapshot.number]
    figures = None
    if clustering is not None:
        bounds = (request.images, request.most_images)
        figures = cluster_figures(clustering, plans, *bounds, request.projection, context)
    groups = {item.name: duplicate_groups(item) for item in lists if item.kind == "dedup"}
    filtered = {item.name: nearest_to_threshold(item) for item in lists if item.kind != "dedup"}
    rows = [] if figures is None else figures.picks["row"].tolist()
    rows += [row for each in groups.values() for group in each for row in (group.kept, *group.rows)]
    rows += [item.row for each in filtered.values() for item in each]
    samples = describe(catalog, np.unique(np.array(rows, np.int64)), clustering, plans, lists, context)
    columns = {} if figures is None else _columns(figures)
    blocks = _chunks(figures, columns, samples) if figures is not None else {}
    if any(groups.values()) or any(filtered.values()):
        blocks["lists"] = _lists(groups, filtered, samples)
    charts = [] if figures is None else drawing.make_charts(columns, figures, plans, request.epochs, _nearest(catalog, lists))
    places = {row: name for name, block in blocks.items() for row in block["samples"]}
    text, ids = drawing.as_json(charts) if charts else ("", {})
    meta = {
        "catalog": plain(catalog.folder),
        "clustering": clustering.name if clustering else None,
        "clusters": 0 if figures is None else len(figures.sizes),
        "values": clustering.values if clustering else None,
        "words": [] if figures is None else figures.words,
        "groups": {} if figures is None else {name: Clustering.open(catalog, name).values for name in figures.groups},
        "plans": [{"name": plan.name, "dynamic": plan.dynamic} for plan in plans],
        "charts": ids,
        "scatter": drawing.SCATTER,
        "chunk": CHUNK_CLUSTERS,
        "columns": {name: _packed(values) for name, values in columns.items()},
        "shards": shard_names(catalog, samples),
        "places": places,
    }
    tables = [plans_table(plans, request.samples_per_second)] if plans else []
    tables += [found for found in (tail_table(figures.sizes, figures.quotas, plans) if figures else None, rejected_table(catalog)) if found]
    page = {
        "title": plain(catalog.folder.name),
        "about": _about(catalog, clustering),
        "facts": facts_of(catalog, None if figures is None else figures.sizes, lists),
        "tables": tables,
        "notes": _notes(catalog, plans, clustering),
        "plans": [plain(plan.name) for plan in plans],
        "charts": charts,
        "gallery": figures is not None,
        "duplicates": any(groups.values()),
        "filtered": any(filtered.values()),
        "study": None,
    }
    inline = {"meta": _script_json(meta), **({"charts": text.replace("<", "\\u003c")} if text else {})}
    written = write_page(folder, page, inline, {name: _script_json(block) for name, block in blocks.items()})
    size = sum(path.stat().st_size for path in written)
    return Report(folder / PAGE, len(written), size, meta["clusters"], len(samples))


# --- what is shown ------------------------------------------------------------------------------------------------------


def _check_ours(folder: Path) -> None:
    page = folder / PAGE
    if page.exists() and b'name="generator" content="tailwise' not in page.read_bytes()[:4096]:
        raise UserError(f"{page} is no report of tailwise: give `output` a new or an empty folder")


def _plans(catalog: Catalog, names: Sequence[str]) -> list[Plan]:
    """Return the plans that were asked for, or all of the newest snapshot, dynamic ones first."""
    if names:
        return [Plan(catalog, name) for name in dict.fromkeys(names)]
    plans = [Plan(catalog, name) for name in PLAN.finished(catalog.folder)]
    newest = catalog.snapshot().number
    return sorted((plan for plan in plans if plan.snapshot.number == newest), key=lambda plan: not plan.dynamic)


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
    columns: dict[str, npt.NDArray[Any]] = {"size": sizes.astype(np.int32), "rank": rank}
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
        for path in COMPARISON.manifests(catalog.folder) if epsilon is not None else ():
            near = Neighbours(catalog, path.parent)
            same = all(near.config.get(key) == item.config.get(key) for key in ("clustering", "order", "snapshot", "extends"))
            if same and near.inputs.get("clustering") == item.inputs.get("clustering"):
                counts = np.zeros(BINS, np.int64)
                for part in catalog.parts(near.snapshot):
                    values = near.similarity[part.span]
                    values = values[(values >= -1) & (values <= 1)]
                    places = np.clip((values + 1) * (BINS / 2), 0, BINS - 1).astype(np.int64)
                    counts += np.bincount(places, minlength=BINS)
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


def _lists(groups: Mapping[str, Any], filtered: Mapping[str, Any], samples: Mapping[int, Any]) -> dict[str, Any]:
    shown, dropped = [], {}
    for name, each in groups.items():
        shown += [
            {"list": name, "kept": group.kept, "rows": group.rows, "near": group.similarities, "more": group.more}
            for group in each
        ]
    for name, items in filtered.items():
        for item in items:
            dropped.setdefault(f"{name}: {item.reason}", []).append([item.row, item.value])
    rows = [row for group in shown for row in (group["kept"], *group["rows"])]
    rows += [row for items in dropped.values() for row, _ in items]
    return {"groups": shown, "filtered": dropped, "samples": {row: samples[row] for row in rows}}


def _about(catalog: Catalog, clustering: Clustering | None) -> str:
    shown = f"clustering {clustering.name}" if clustering else "no clustering yet"
    return plain(f"Catalog {catalog.folder}, snapshot {catalog.snapshot().number}, {shown}. Made by tailwise {__version__}.")


def _notes(catalog: Catalog, plans: Sequence[Plan], clustering: Clustering | None) -> list[str]:
    newest, notes = catalog.snapshot(), []
    if clustering is None:
        notes.append(f"There are no clusters to show yet. Make them with {command_line('cluster', catalog.folder)}.")
    elif not plans:
        making = command_line("plan", catalog.folder, "epochs", method="dynamics", keep=0.5)
        notes.append(f"There is no plan of this snapshot yet. Make one with {making}.")
    for plan in plans:
        if plan.snapshot.number != newest.number:
            absent = newest.rows - plan.rows
            notes.append(f"Plan {plan.name} was made for snapshot {plan.snapshot.number}: {absent:,} newer samples are not in it.")
    return [plain(note) for note in notes]


# --- the page -----------------------------------------------------------------------------------------------------------


def write_page(folder: Path, page: Mapping[str, Any], inline: Mapping[str, str], blocks: Mapping[str, str]) -> list[Path]:
    """Write the page; return its files.

    Args:
        folder: made if it does not exist. Scripts of an earlier report are deleted.
        page: values of the template.
        inline: JSON that is in the page, by name.
        blocks: JSON that is in the page too while it is small, else in scripts beside it.
    """
    import jinja2  # noqa: PLC0415  (an extra)

    source = files("tailwise.report") / "page"
    apart = sum(map(len, blocks.values())) > ONE_FILE_BYTES
    scripts = [_bokeh(), (source / "report.js").read_text(encoding="utf-8")] if page["gallery"] else []
    hashes = " ".join(f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'" for text in scripts)
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes or chr(39) + 'none' + chr(39)}"
    policy += " 'self' file:" if apart else ""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tailwise.report", "page"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    css = (source / "report.css").read_text(encoding="utf-8")
    held = [*inline.items(), *(() if apart else blocks.items())]
    text = environment.get_template("report.html.j2").render(
        **page, version=__version__, policy=policy, css=_safe(css), scripts=[_safe(text) for text in scripts],
        blocks=[(name, _safe(text)) for name, text in held],
        sections=[(name, title) for name, title in SECTIONS.items() if _has(page, name)],
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / DATA
    for old in data.glob("*.js"):
        old.unlink()
    written = [folder / PAGE]
    if apart:
        data.mkdir(exist_ok=True)
        for name, block in blocks.items():
            (data / f"{name}.js").write_text(f"tailwiseData({json.dumps(name)}, {block});\n", encoding="utf-8")
            written.append(data / f"{name}.js")
    with replacing(folder / PAGE, unique=True) as temporary:  # last: with it, the report is whole
        temporary.write_text(text, encoding="utf-8")
    return written


SECTIONS = {
    "overview": "Overview", "charts": "Charts", "two-plans": "Two plans", "gallery": "Gallery", "duplicates": "Duplicates",
    "filtered": "Filters", "study": "Study",
}  # fmt: skip


def _has(page: Mapping[str, Any], section: str) -> bool:
    if section == "two-plans":
        return len(page["plans"]) > 1 and page["gallery"]
    return section == "overview" or bool(page[section])


def _bokeh() -> str:
    text = (files("bokeh") / "server" / "static" / "js" / "bokeh.min.js").read_text(encoding="utf-8")
    return text.replace("</script", r"<\/script")


def _safe(text: str) -> Any:  # noqa: ANN401  (jinja2's)
    """Return text that the template does not escape: our own, or JSON without a "<"."""
    from markupsafe import Markup  # noqa: PLC0415  (comes with jinja2)

    return Markup(text)


def _script_json(value: Any) -> str:  # noqa: ANN401  (JSON values)
    """Return JSON in ASCII without "<", so that no text ends the script that holds it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _packed(values: npt.NDArray[Any]) -> list[str]:
    kind = "i4" if values.dtype == np.int32 else "f4"
    return [kind, base64.b64encode(values.astype(f"<{kind}").tobytes()).decode()]
