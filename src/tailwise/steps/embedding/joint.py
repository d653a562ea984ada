"""Joint columns: two or more columns of the same samples, weighted and concatenated.

A row is √w₁·x₁, √w₂·x₂, …, where the weights are scaled to the sum 1 and each x is of unit norm. So the cosine of two joint rows is the
weighted mean of the cosines in the columns. A sample that lacks one of the embeddings has no joint one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt

from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.embeddings import (
    JOINT,
    check_column,
    column_record,
    normalise_rows,
    open_column,
    part_marker,
    present,
    write_part,
)
from tailwise.catalog.files import digest, read_record
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, Task, Worker
from tailwise.mapped import release_pages
from tailwise.requests import EmbedRequest, refuse_idle
from tailwise.steps.embedding.column import ColumnReport
from tailwise.storage.local import in_part

PREFIX = "joint:"
CHUNK_ROWS = 8192


def weights_of(encoder: str) -> dict[str, float]:
    """Return the weight of each column in a name such as joint:image=0.5,text=0.5, scaled to the sum 1; a UserError if it is none."""
    pairs = [pair.partition("=") for pair in encoder.removeprefix(PREFIX).split(",")]
    try:
        weights = {name: float(value) for name, _, value in pairs}
    except ValueError:
        weights = {}
    total = sum(weights.values())
    if len(weights) < 2 or len(weights) < len(pairs) or not all(0 < weight < np.inf for weight in weights.values()):
        raise UserError(
            f"`encoder` {encoder}: give at least two columns, each once, with weights above 0, such as joint:image=0.5,text=0.5"
        )
    return {name: weight / total for name, weight in weights.items()}


@dataclass(frozen=True)
class _Join(Task[Part, int]):
    """Write a part of a joint column; return how many of its rows have an embedding."""

    catalog: Path  # its folder
    column: str
    weights: Mapping[str, float]
    dimension: int

    def made_of(self, item: Part) -> list[str]:
        """Return the hash of the part in each column: an import may fill a part again."""
        catalog = Catalog.open(self.catalog)
        return [read_record(part_marker(catalog, name, item))["digest"] for name in self.weights]

    def is_done(self, item: Part) -> bool:
        marker = part_marker(Catalog.open(self.catalog), self.column, item)
        return marker.exists() and read_record(marker)["made_of"] == self.made_of(item)

    def run(self, item: Part, worker: Worker) -> int:  # noqa: ARG002
        catalog = Catalog.open(self.catalog)
        columns = [catalog.embedding(name, item) for name in self.weights]

        def chunks() -> Iterator[npt.NDArray[np.float16]]:
            for start in range(0, item.rows, CHUNK_ROWS):
                some = [np.asarray(column[start : start + CHUNK_ROWS]) for column in columns]
                pairs = zip(self.weights.values(), some, strict=True)
                joined = np.concatenate([np.sqrt(weight) * _unit(rows) for weight, rows in pairs], axis=1)
                joined[~np.logical_and.reduce([present(rows) for rows in some])] = 0
                yield normalise_rows(joined.astype(np.float32))[0]
                for column in columns:
                    release_pages(column)

        return write_part(catalog, self.column, item, self.dimension, chunks(), made_of=self.made_of(item))


def _unit(rows: npt.NDArray[np.float16]) -> npt.NDArray[np.float64]:
    """Return rows of unit norm, or of zeros: float64 [n, d]."""
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    np.divide(wide, norms, out=wide, where=norms > 0)
    return wide


def join_columns(catalog: Catalog, request: EmbedRequest, context: Context) -> list[ColumnReport]:
    """Fill a joint column where its parts lack one; see `embed`. The caller holds the catalog's lock.

    Raises:
        UserError: the name is wrong, a column is missing or incomplete, or another encoder made the joint column.
    """
    refuse_idle(request, {"encoder", "column"}, f"with {request.encoder}")
    if in_part():
        raise UserError("`part`: a joint column is made at once: run it without `part`")
    weights, snapshot, started = weights_of(request.encoder), catalog.snapshot(), perf_counter()
    if request.column in {"image", "text", "both", *weights}:
        raise UserError(f"`column` {request.column}: give the joint column another name, such as joint")
    for name in weights:
        catalog.require_embeddings(check_column(catalog, name), snapshot)
    records = {name: column_record(catalog, name) for name in weights}
    made_of = {
        name: {"weight": weights[name], "encoder": record["encoder"], "hash": digest(record)}
        for name, record in records.items()
    }
    dimension = sum(record["dimension"] for record in records.values())
    open_column(catalog, request.column, dimension, request.encoder, JOINT, made_of)
    task = _Join(catalog.folder, request.column, weights, dimension)
    parts = [part for part in catalog.parts() if not task.is_done(part)]
    embedded = sum(context.map(task, parts, f"joining {', '.join(weights)}", KERNEL))
    rows, seconds = sum(part.rows for part in parts), perf_counter() - started
    return [ColumnReport(request.column, dimension, "fp16", "numpy", embedded, rows, 0, seconds, rows)]
