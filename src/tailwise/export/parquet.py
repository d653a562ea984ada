"""Parquet export: the samples of an epoch as a table."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tailwise.catalog.catalog import Part
from tailwise.context import Context
from tailwise.export.drawn import DrawnEpoch, map_drawn
from tailwise.plan.plan import Plan

SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),  # path or URL of the tar
        pa.field("shard_id", pa.int32(), nullable=False),  # does not change when the tar is moved
        pa.field("key", pa.string(), nullable=False),
        pa.field("uid", pa.string(), nullable=False),  # 32 hexadecimal digits
        pa.field("cluster", pa.int32()),  # null in a plan by rate
        pa.field("rate", pa.float64(), nullable=False),  # expected copies per epoch
        pa.field("copies", pa.uint8(), nullable=False),  # in this epoch, ≥ 1
    ]
)


def write_parquet(plan: Plan, epoch: int, path: Path, context: Context) -> int:
    """Write one row per drawn sample, in catalog order (SCHEMA); return the number of copies."""
    total = 0
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for table in map_drawn(plan, epoch, _table, context):
            writer.write_table(table)
            total += pc.sum(table.column("copies"), min_count=0).as_py()
    return total


def _table(epoch: DrawnEpoch, part: Part) -> pa.Table:
    plan, drawn = epoch.plan, epoch.part(part, ["shard", "key", "uid"])
    shards = drawn.samples.column("shard")
    groups = plan.groups[drawn.rows] if plan.has_clusters else None
    clusters = pa.nulls(len(drawn.rows), pa.int32()) if groups is None else pa.array(groups, pa.int32())
    return pa.table(
        {
            "shard": plan.catalog.shards(plan.snapshot).column("path").take(shards),
            "shard_id": shards,
            "key": drawn.samples.column("key"),
            "uid": pa.array([uid.hex() for uid in drawn.samples.column("uid").to_pylist()], pa.string()),
            "cluster": clusters,
            "rate": pa.array(plan.rate(drawn.rows, epoch.number), pa.float64()),
            "copies": pa.array(drawn.copies, pa.uint8()),
        },
        schema=SCHEMA,
    )
