"""The table that Apple's Embedding Atlas opens: a map of samples with their clusters, rates, captions and thumbnails."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tailwise.catalog.catalog import Part
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.columns import RowsByPart
from tailwise.catalog.embeddings import column_names, embeddings_of
from tailwise.catalog.removals import Removals
from tailwise.context import Context
from tailwise.execution.base import KERNEL, Task, Worker
from tailwise.kernels.keyed import hash_range, stream_key
from tailwise.kernels.projection import principal_axes, umap_plane
from tailwise.loader.thumbnails import PLACES, Thumbnails
from tailwise.plan.plan import Plan
from tailwise.requests import ExportRequest

logger = logging.getLogger(__name__)
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("cluster", pa.string()),  # of the plan: its number, or the value of a grouping; null: in none
        pa.field("rate", pa.float64(), nullable=False),  # expected copies per epoch
        pa.field("x", pa.float32()),  # place on the map; null without an embedding
        pa.field("y", pa.float32()),
        pa.field("thumbnail", pa.struct({"bytes": pa.binary(), "path": pa.string()})),  # JPEG; null: cannot be read
    ]
)
CHUNK_ROWS = 8192
FIT_ROWS = 65_536  # that decide the axes of the map

Chunk = tuple[Part, npt.NDArray[np.int64], npt.NDArray[np.float32]]  # rows and places


def write_embedding_atlas(plan: Plan, epoch: int, path: Path, context: Context, request: ExportRequest) -> int:
    """Write one row per sample that is not removed, or of `request.limit` chosen ones, in catalog order (SCHEMA); return the number.

    Raise a UserError if the pool has no embeddings.
    """
    rows = _chosen_rows(plan, request.limit)
    places = _places(plan, rows, request.projection)
    chunks: list[Chunk] = []
    for part, where in RowsByPart(plan.catalog.parts(plan.snapshot)).split(rows):
        starts = range(0, len(rows[where]), CHUNK_ROWS)
        chunks += [(part, rows[where][at : at + CHUNK_ROWS], places[where][at : at + CHUNK_ROWS]) for at in starts]
    missing = 0
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for table in context.map(_Describe(plan, epoch), chunks, "making thumbnails", KERNEL):
            writer.write_table(table)
            missing += table.column("thumbnail").null_count
    if missing:
        logger.warning(
            "%s of %s samples have no thumbnail: their images cannot be read", f"{missing:,}", f"{len(rows):,}"
        )
    return len(rows)


def _chosen_rows(plan: Plan, limit: int) -> npt.NDArray[np.int64]:
    """Return rows that are not removed or replaced, int64 [n] ascending: all, or those of the `limit` smallest hashes."""
    removals, key = Removals.of(plan.catalog, plan.snapshot), stream_key(plan.config["seed"], "embedding-atlas")
    chosen = np.empty(0, [("hash", "<u8"), ("row", "<i8")])
    for span in plan.spans():
        rows = np.arange(span.start, span.stop)[removals.keeps(span)]
        new = np.empty(len(rows), chosen.dtype)
        new["row"], new["hash"] = rows, hash_range(key, span.start, span.stop - span.start)[rows - span.start]
        chosen = np.concatenate([chosen, new])
        if len(chosen) > limit:
            chosen = chosen[np.argpartition(chosen["hash"], limit)[:limit]]
    return np.sort(chosen["row"])


def _places(plan: Plan, rows: npt.NDArray[np.int64], projection: str) -> npt.NDArray[np.float32]:
    """Return the place of each row on the map: float32 [n, 2]; NaN without an embedding."""
    vectors = embeddings_of(plan.catalog, _column(plan), plan.snapshot)
    places = np.full((len(rows), 2), np.nan, np.float32)
    if projection == "umap":
        found = vectors[rows].astype(np.float32)
        embedded = found.any(axis=1)
        places[embedded] = umap_plane(found[embedded])
        return places
    fitted = vectors[rows[:: max(-(-len(rows) // FIT_ROWS), 1)]]
    mean, axes = (each.astype(np.float64) for each in principal_axes(fitted[fitted.any(axis=1)]))
    for start in range(0, len(rows), CHUNK_ROWS):
        found = vectors[rows[start : start + CHUNK_ROWS]]
        there = start + np.flatnonzero(found.any(axis=1))
        places[there] = (found[there - start] - mean) @ axes.T
        vectors.release_pages()
    return places


def _column(plan: Plan) -> str:
    """Return the embedding column of the map: that of the plan's clustering, else "image", else the first."""
    clustering, names = Clustering.find(plan.catalog, plan.clustering), column_names(plan.catalog)
    column = (clustering and clustering.column) or ("image" if "image" in names or not names else names[0])
    plan.catalog.require_embeddings(column, plan.snapshot)
    return column


@dataclass(frozen=True, eq=False)
class _Describe(Task[Chunk, pa.Table]):
    plan: Plan
    epoch: int

    def label(self, item: Chunk) -> str:
        return item[0].name

    def run(self, item: Chunk, worker: Worker) -> pa.Table:
        """Return the samples: SCHEMA."""
        (part, rows, places), plan = item, self.plan
        thumbnails, values = worker.cached((plan.folder, plan.id, "thumbnails"), self._open)
        samples = plan.catalog.samples_at(part.number, rows - part.first_row, ["key", "caption", *PLACES])
        groups = np.full(len(rows), -1) if not (plan.has_clusters and plan.clustering) else plan.groups[rows]
        images = [
            {"bytes": found, "path": "thumbnail.jpg"} if isinstance(found, bytes) else None
            for found in thumbnails.of(samples, worker.cpus)
        ]
        columns = {
            "key": samples.column("key"),
            "caption": samples.column("caption"),
            "cluster": [None if at < 0 else values[at] if values else str(at) for at in groups.tolist()],
            "rate": plan.rate(rows, self.epoch),
            **{name: pa.array(place, from_pandas=True) for name, place in zip("xy", places.T, strict=True)},
            "thumbnail": images,
        }
        return pa.table(columns, schema=SCHEMA)

    def _open(self) -> tuple[Thumbnails, list[str | None] | None]:
        clustering = Clustering.find(self.plan.catalog, self.plan.clustering)
        return Thumbnails(self.plan.catalog, self.plan.snapshot, "JPEG"), clustering.values if clustering else None
