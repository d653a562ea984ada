"""Samples that the report shows: where they are, what dropped them, when plans draw them, and a thumbnail of each.

Images are decoded and encoded again: no byte of a file from the web gets into the page.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.columns import RowsByPart
from tailwise.catalog.drops import DropList
from tailwise.catalog.removals import Removals
from tailwise.context import Context
from tailwise.execution.base import KERNEL, Task, Worker
from tailwise.kernels.keyed import hash_each, stream_key
from tailwise.loader.thumbnails import PLACES, Thumbnails
from tailwise.plan.plan import Plan

TEXT_LETTERS = 300  # of a caption, a key or a value of a grouping
BANDS = 6  # of similarity, from which groups of duplicates are chosen
GROUPS = 8  # of each band
MEMBERS = 5  # of a group, besides the one that is kept
NEAREST = 48  # to the threshold of a filter
HISTORY_EPOCHS = 10
COLUMNS = ["key", "uid", "caption", *PLACES]


@dataclass(frozen=True)
class Group:
    """Duplicates of one sample, the most similar first."""

    kept: int  # row
    rows: list[int]
    similarities: list[float]
    more: int  # duplicates that are not among `rows`


def duplicate_groups(found: DropList, removals: Removals) -> list[Group]:
    """Return groups of duplicates of all similarities, from least to most similar; none where a list names no kept samples."""
    low = min(
        (float(pc.min(batch.column("similarity")).as_py() or 1) for batch in _drops(found, removals)), default=1.0
    )
    edges = np.linspace(low, 1, BANDS)[1:-1]
    best = np.empty(0, np.dtype([("band", "<i8"), ("hash", "<u8"), ("kept", "<i8")]))
    for batch in _drops(found, removals):
        new = np.empty(len(batch), best.dtype)
        new["kept"] = batch.column("kept_row")
        new["band"] = np.searchsorted(edges, batch.column("similarity").to_numpy(zero_copy_only=False))
        new["hash"] = hash_each(stream_key(0, "report"), new["kept"])
        merged = np.unique(np.concatenate([best, new]))
        starts = np.searchsorted(merged["band"], merged["band"])
        best = merged[np.arange(len(merged)) - starts < GROUPS]
    members = _members(_drops(found, removals), best["kept"])
    groups = []
    for kept in dict.fromkeys(best["kept"].tolist()):
        rows, near = members[kept]
        order = sorted(range(len(rows)), key=lambda at: (-near[at], rows[at]))[:MEMBERS]
        groups.append(Group(kept, [rows[at] for at in order], [near[at] for at in order], len(rows) - len(order)))
    return groups


def _drops(found: DropList, removals: Removals) -> Iterator[pa.RecordBatch]:
    """Yield the dropped rows of a list that name the sample they duplicate, without removed samples."""
    for batch in found.batches(["row", "kept_row", "similarity"]):
        named = batch.filter(pc.is_valid(batch.column("kept_row")))
        there = [removals.keeps(named.column(name).to_numpy()) for name in ("row", "kept_row")]
        if len(left := named.filter(pa.array(there[0] & there[1]))):
            yield left


def _members(drops: Iterator[pa.RecordBatch], kept: npt.NDArray[np.int64]) -> dict[int, tuple[list[int], list[float]]]:
    """Return rows and similarities of all duplicates of some rows."""
    groups: dict[int, tuple[list[int], list[float]]] = {row: ([], []) for row in kept.tolist()}
    wanted = pa.array(np.unique(kept))
    for batch in drops:
        mine = batch.filter(pc.is_in(batch.column("kept_row"), wanted))
        for row, of, near in zip(
            *(mine.column(name).to_pylist() for name in ("row", "kept_row", "similarity")), strict=True
        ):
            groups[of][0].append(row)
            groups[of][1].append(1.0 if near is None else near)
    return groups


@dataclass(frozen=True)
class Filtered:
    """A sample that a filter dropped."""

    row: int
    reason: str
    value: float


def nearest_to_threshold(found: DropList, removals: Removals) -> list[Filtered]:
    """Return samples that a list dropped by a score or a similarity, nearest to the threshold first; for each reason."""
    rule = found.config["rule"] if found.kind == "filter" else {}
    least, low_side = rule.get("minimum"), rule.get("keep") is not None
    best: dict[str, list[tuple[float, int, float]]] = {}
    for batch in found.batches(["row", "reason", "value", "kept_row", "similarity"]):
        value = pc.coalesce(batch.column("value"), batch.column("similarity").cast(pa.float64()))
        judged = pc.and_(pc.is_finite(value), pc.is_null(batch.column("kept_row")))
        valued = batch.set_column(2, "value", value).filter(judged)
        valued = valued.filter(pa.array(removals.keeps(valued.column("row").to_numpy())))
        for reason in pc.unique(valued.column("reason")).to_pylist():
            mine = valued.filter(pc.equal(valued.column("reason"), reason))
            values, rows = mine.column("value").to_numpy(), mine.column("row").to_numpy()
            low = low_side or (least is not None and values[0] < least)
            keys = -values if low else values
            first = np.lexsort((rows, keys))[:NEAREST]
            new = zip(keys[first].tolist(), rows[first].tolist(), values[first].tolist(), strict=True)
            best[reason] = sorted([*best.get(reason, []), *new])[:NEAREST]
    return [Filtered(row, reason, value) for reason, items in best.items() for _, row, value in items]


def describe(
    catalog: Catalog,
    rows: npt.NDArray[np.int64],
    clustering: Clustering | None,
    plans: Sequence[Plan],
    lists: Sequence[DropList],
    context: Context,
) -> dict[int, dict[str, Any]]:
    """Return what the page shows of samples, by row: names, caption, thumbnail (data URI) or why there is none, and history.

    Args:
        catalog: of the samples.
        rows: int64 [n], ascending, of the newest snapshot.
        clustering: whose clusters the samples belong to.
        plans: that draw them.
        lists: that may have dropped them.
        context: runs the tasks.
    """
    snapshot = catalog.snapshot()
    by_part = RowsByPart(catalog.parts(snapshot))
    items = [(part, rows[where]) for part, where in by_part.split(rows)]
    shown: dict[int, dict[str, Any]] = {}
    name = None if clustering is None else clustering.name
    for found in context.map(_Describe(catalog.folder, name), items, "making thumbnails", KERNEL):
        shown |= found
    for item in lists:
        for row, reason in _reasons(item, rows):
            shown[row].setdefault("dropped", []).append([item.name, reason])
    for number, plan in enumerate(plans):
        mine = rows[rows < plan.rows]
        rates = plan.rate(mine).tolist()
        copies = np.stack([plan.draw(epoch, mine) for epoch in range(HISTORY_EPOCHS)], axis=1).tolist()
        for row, rate, counts in zip(mine.tolist(), rates, copies, strict=True):
            shown[row].setdefault("plans", {})[number] = [round(rate, 6), counts]
    return shown


def _reasons(found: DropList, rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, str]]:
    """Yield those of some rows that a list drops, with its reason."""
    wanted = pa.array(rows)
    for batch in found.batches(["row", "reason", "similarity"]):
        mine = batch.filter(pc.is_in(batch.column("row"), wanted))
        for row, reason, near in zip(*(mine.column(at).to_pylist() for at in range(3)), strict=True):
            yield row, reason if near is None else f"{reason}, similarity {near:.3f}"


@dataclass(frozen=True, eq=False)
class _Describe(Task[tuple[Part, npt.NDArray[np.int64]], dict[int, dict[str, Any]]]):
    folder: Path  # of the catalog
    clustering: str | None

    def label(self, item: tuple[Part, npt.NDArray[np.int64]]) -> str:
        return item[0].name

    def run(self, item: tuple[Part, npt.NDArray[np.int64]], worker: Worker) -> dict[int, dict[str, Any]]:
        part, rows = item
        catalog, clustering, images = worker.cached(self, self._open)
        table = catalog.samples_at(part.number, rows - part.first_row, COLUMNS)
        columns = {name: table.column(name).to_pylist() for name in ("key", "uid", "caption", "shard")}
        shown = {
            row: {"key": cut(key), "uid": uid.hex(), "caption": cut(caption or ""), "shard": shard}
            for row, key, uid, caption, shard in zip(rows.tolist(), *columns.values(), strict=True)
        }
        for row, thumbnail in zip(rows.tolist(), images.of(table, worker.cpus), strict=True):
            shown[row]["image"] = _shown(thumbnail)
        if clustering is not None and part.number < clustering.snapshot.parts:
            labels = clustering.labels.read(part)[rows - part.first_row].tolist()
            near = clustering.similarities.read(part)[rows - part.first_row] if clustering.has_centroids else None
            for at, (row, label) in enumerate(zip(rows.tolist(), labels, strict=True)):
                shown[row]["cluster"] = label
                if near is not None and label >= 0:
                    shown[row]["similarity"] = round(float(near[at]), 4)
        return shown

    def _open(self) -> tuple[Catalog, Clustering | None, Thumbnails]:
        catalog = Catalog.open(self.folder)
        return catalog, Clustering.find(catalog, self.clustering), Thumbnails(catalog)


def _shown(thumbnail: bytes | str) -> str:
    """Return a thumbnail in a data URI; a reason why there is none stays."""
    if isinstance(thumbnail, str):
        return thumbnail
    return f"data:image/webp;base64,{base64.b64encode(thumbnail).decode()}"


def cut(text: str) -> str:
    """Return text with at most TEXT_LETTERS characters."""
    return text if len(text) <= TEXT_LETTERS else f"{text[: TEXT_LETTERS - 1]}…"


def shard_names(catalog: Catalog, shown: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    """Return the paths of the shards of some samples, by id."""
    paths = catalog.shards().column("path")
    return {shard: paths[shard].as_py() for shard in sorted({item["shard"] for item in shown.values()})}
