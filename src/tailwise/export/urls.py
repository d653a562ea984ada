"""URLs and captions of the samples that a plan draws, for img2dataset: a subset of a pool of metadata is downloaded without the rest."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tailwise.catalog.catalog import Part
from tailwise.context import Context
from tailwise.errors import DamagedError, UnsupportedError
from tailwise.export.drawn import DrawnEpoch, map_epoch
from tailwise.loader.captions import CaptionMix
from tailwise.plan.plan import Plan
from tailwise.requests import ExportRequest, caption_weights
from tailwise.shards.columns import DAMAGE
from tailwise.shards.containers import with_bytes
from tailwise.shards.metadata import read_urls

SCHEMA = pa.schema(
    [
        pa.field("url", pa.string()),  # null where the metadata have none
        pa.field("caption", pa.string(), nullable=False),
        pa.field("uid", pa.string(), nullable=False),  # 32 hexadecimal digits; img2dataset can write it to the .json
    ]
)


def write_urls(plan: Plan, epoch: int, path: Path, context: Context, request: ExportRequest) -> int:
    """Write one row per sample that the plan may draw, in any epoch, in catalog order (SCHEMA); return the number of rows.

    The epoch matters for `request.captions` alone.

    Raises:
        UnsupportedError: a shard has images.
        DamagedError: the metadata have changed since they were imported.
    """
    if (images := with_bytes(plan.catalog.shards(plan.snapshot))).num_rows:
        raise UnsupportedError(f"{images['path'][0]} holds images already: `to` urls is for pools of metadata")
    captions = caption_weights(request.captions)
    total, mix = 0, CaptionMix(plan.catalog, captions, plan.config["seed"]) if captions else None
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for table in map_epoch(plan, epoch, partial(_table, mix=mix), plan.catalog.parts(plan.snapshot), context):
            writer.write_table(table)
            total += table.num_rows
    return total


def _table(epoch: DrawnEpoch, part: Part, *, mix: CaptionMix | None) -> pa.Table:
    plan, known = epoch.plan, epoch.plan.catalog.shards(epoch.plan.snapshot)
    places = np.flatnonzero((plan.rate(part.span) > 0) & epoch.removals.keeps(part.span))
    samples = plan.catalog.samples_at(part.number, places, ["shard", "caption", "uid"])
    shards, rows = samples["shard"].to_numpy(), places + part.first_row
    urls = [pa.array([], pa.string())]
    for shard in np.unique(shards).tolist():  # ascending, as rows are
        path = known["path"][shard].as_py()
        try:
            checksum, there = read_urls(path, rows[shards == shard] - plan.rows_of(shard).start)
        except DAMAGE as error:
            raise DamagedError(f"{path} can't be read ({error}): restore it") from error
        if checksum != known["index_checksum"][shard].as_py():
            raise DamagedError(f"{path} has changed since it was imported: put the old file back")
        urls += there.chunks
    uids = pa.array([uid.hex() for uid in samples["uid"].to_pylist()], pa.string())
    captions = samples["caption"].combine_chunks()
    if mix is not None:
        chosen = mix.of(rows, np.full(len(rows), epoch.number, np.int32))
        captions = pc.coalesce(pa.array(chosen.texts, pa.string()), captions)
    return pa.table([pa.chunked_array(urls), captions, uids], schema=SCHEMA)
