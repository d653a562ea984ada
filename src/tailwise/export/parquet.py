"""Parquet export: the samples of an epoch as a table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tailwise.context import Context
from tailwise.export.drawn import DrawnPart, drawn_parts
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
    shards = np.array(plan.catalog.shards(plan.snapshot).column("path").to_pylist(), dtype=object)
    total = 0
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for part in drawn_parts(plan, epoch, ["shard", "key", "uid"], context):
            writer.write_table(_table(plan, part, shards, epoch))
            total += int(part.copies.sum())
    return total


def _table(plan: Plan, part: DrawnPart, shards: object, epoch: int) -> pa.Table:
    clusters = pa.nulls(len(part.rows), pa.int32()) if plan.by_rate else pa.array(plan.groups[part.rows], pa.int32())
    return pa.table(
        {
            "shard": pa.array(shards[part.samples.column("shard").to_numpy()], pa.string()),  # type: ignore[index]
            "shard_id": part.samples.column("shard"),
            "key": part.samples.column("key"),
            "uid": pa.array([uid.hex() for uid in part.samples.column("uid").to_pylist()], pa.string()),
            "cluster": clusters,
            "rate": pa.array(plan.rate(part.rows, epoch), pa.float64()),
            "copies": pa.array(part.copies, pa.uint8()),
        },
        schema=SCHEMA,
    )
