"""Write a drop list: its table, then the mask of each part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Part
from tailwise.catalog.columns import PlainColumn
from tailwise.catalog.drops import DROPPED_SCHEMA, read_drops
from tailwise.catalog.files import ROW_GROUP_ROWS, writing
from tailwise.context import Context
from tailwise.execution.base import KERNEL, Fill, Worker


def _mask(folder: Path, part: Part, worker: Worker) -> npt.NDArray[np.bool_]:  # noqa: ARG001
    """Return which rows of a part the table drops."""
    mask = np.zeros(part.rows, np.bool_)
    mask[read_drops(folder, part.span, ["row"]).column(0).to_numpy() - part.first_row] = True
    return mask


def drop_table(columns: Mapping[str, Any], schema: pa.Schema = DROPPED_SCHEMA) -> pa.Table:
    """Return rows of a drop list, with nulls in the columns that are not given.

    Args:
        columns: columns of the schema, [n] each; "row" and "reason" are among them.
        schema: DROPPED_SCHEMA, or one that has more columns.
    """
    nulls = {item.name: pa.nulls(len(columns["row"]), item.type) for item in schema}
    return pa.table(nulls | dict(columns), schema=schema)


def write_drops(
    artifact: Artifact,
    parts: Sequence[Part],
    tables: Iterable[pa.Table],
    context: Context | None = None,
    schema: pa.Schema = DROPPED_SCHEMA,
) -> int:
    """Write table and mask of a drop list; return how many rows it drops.

    Args:
        artifact: whose identity has the kind "dedup" or "filter", and in its config "snapshot" (number) and "without" (names).
        parts: of the snapshot.
        tables: by ascending row over all tables, each row once.
        context: runs the tasks and shows progress.
        schema: of the tables: DROPPED_SCHEMA, or one that has more columns.
    """
    total = 0
    with (
        writing(artifact.path(layout.DROPPED_TABLE)) as stream,
        pq.ParquetWriter(stream, schema, compression="zstd") as writer,
    ):
        for table in tables:
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
            total += table.num_rows
    mark = Fill(PlainColumn(artifact.folder, layout.DROPPED), partial(_mask, artifact.folder))
    (context or Context()).run(mark, parts, "marking drops", KERNEL)
    return total
