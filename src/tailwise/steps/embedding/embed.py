"""Embed (map): from the shards' images, and the captions, to columns of embeddings; and joint columns of several columns.

A joint row is √w₁·x₁, √w₂·x₂, …, where the weights are scaled to the sum 1 and each x is of unit norm. So the cosine of two joint rows is
the weighted mean of the cosines in the columns. A sample that lacks one of the embeddings has no joint one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tailwise.catalog import layout
from tailwise.catalog.captions import find_captions
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.embeddings import (
    JOINT,
    MODALITIES,
    check_column,
    column_modality,
    column_record,
    column_settings,
    normalise_rows,
    open_column,
    part_marker,
    present,
    write_part,
)
from tailwise.catalog.files import digest, read_record
from tailwise.catalog.rejections import Rejections
from tailwise.context import Context
from tailwise.errors import UserError, check_share
from tailwise.execution.base import KERNEL, Needs, Task, Worker
from tailwise.mapped import release_pages
from tailwise.requests import EmbedRequest, refuse_given, refuse_idle
from tailwise.shards.containers import no_bytes, without_bytes
from tailwise.steps.embedding.column import Column, ColumnReport
from tailwise.steps.embedding.tasks import Describe
from tailwise.storage.local import in_part, locked

PREFIX = "joint:"
CHUNK_ROWS = 8192
INSTEAD = "; or import their embeddings (DataComp's .npz files), or embed captions alone (`column` text)"


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


@dataclass
class EmbedReport:
    """Result of an embedding.

    Attributes:
        columns: one report each.
        rejections: what could not be embedded.
        without_captions: samples that lack the joined captions that were asked for: their own were embedded.
    """

    columns: list[ColumnReport] = field(default_factory=list)
    rejections: Rejections = field(default_factory=Rejections)
    without_captions: int = 0

    @property
    def embedded(self) -> int:
        """Samples that got an embedding, over all columns."""
        return sum(column.embedded for column in self.columns)

    @property
    def lacking(self) -> int:
        """Samples that had none before, over all columns."""
        return sum(column.lacking for column in self.columns)


def embed(catalog: Catalog | str | Path, request: EmbedRequest, context: Context | None = None) -> EmbedReport:
    """Fill the embeddings of those parts of the newest snapshot that have none yet.

    Args:
        catalog: or its path; with samples.
        request: what is asked for. The result doesn't depend on its workers.
        context: runs the tasks and shows progress, in samples.

    Raises:
        UserError: there is no such encoder, a column was made by another one, a shard can't be read, too many samples were rejected, or
            none at all got an embedding.
    """
    context = context or Context()
    catalog = Catalog.open(catalog)
    check_share(request.max_rejected)
    if request.encoder.startswith(PREFIX):
        with locked(catalog.folder / layout.LOCK, str(catalog.folder)):
            return EmbedReport(join_columns(catalog, request, context))
    columns = _columns(catalog, request)
    if in_part() and len(columns) > 1:
        raise UserError("`part`: one column at a time can be embedded in parts: give `column` image or text")
    report = EmbedReport()
    with locked(catalog.folder / layout.LOCK, str(catalog.folder)):
        lacking = {
            column: [part for part in catalog.parts() if not part_marker(catalog, column, part).exists()]
            for column in columns
        }
        needs = Needs(device=request.device)
        context.executor.slots(needs)  # refuses unknown devices
        for column, modality in columns.items():
            if modality == "image":
                require_bytes(catalog, lacking[column])
        loading, captions = _loading(catalog, columns, request), find_captions(catalog, request.captions)
        try:
            (described,) = context.executor.map(Describe(loading), [tuple(columns.values())], needs)
            if captions is not None:
                about = {"name": captions.name, "id": captions.id}
                described["text"] = replace(
                    described["text"], settings={**described["text"].settings, "captions": about}
                )
            made = {
                column: Column(catalog, column, modality, loading, described[modality])
                for column, modality in columns.items()
            }
            for new in made.values():  # refuses a column of another encoder before hours go into the other column
                new.open()
            report.columns += [new.fill(lacking[column], report.rejections, context) for column, new in made.items()]
            if captions is not None:
                report.without_captions = sum(
                    captions.lacking(part) for column, of in columns.items() if of == "text" for part in lacking[column]
                )
        finally:
            context.executor.forget()
    return report


def _columns(catalog: Catalog, request: EmbedRequest) -> dict[str, str]:
    """Return the modality of each column that is asked for."""
    if request.column == "both":
        refuse_given(request, {"of"}, "with `column` both")
        columns = dict(zip(MODALITIES, MODALITIES, strict=True))
    else:
        columns = {request.column: column_modality(catalog, request.column, request.of)}
    if request.captions is not None and "text" not in columns.values():
        raise UserError(
            f"`captions` {request.captions} does nothing without a column of text: give `column` text, or `of` text"
        )
    if request.backend == "openvino" and "image" not in columns.values():
        raise UserError("`backend` openvino is for images: leave it out where captions are embedded")
    return columns


def _loading(catalog: Catalog, columns: Mapping[str, str], asked: EmbedRequest) -> EmbedRequest:
    """Return the options, with "auto" replaced by the settings that an existing column started with."""
    started = {column: column_settings(catalog, column, asked.encoder) for column in columns}
    precisions = {str(settings["precision"]) for settings in started.values() if settings}
    precision = precisions.pop() if asked.precision == "auto" and len(precisions) == 1 else asked.precision
    images = [started[column] for column, modality in columns.items() if modality == "image"]
    auto = images[0].get("backend", "auto") if images else "torch"
    return replace(asked, precision=precision, backend=auto if asked.backend == "auto" else asked.backend)


def require_bytes(catalog: Catalog, parts: list[Part], instead: str = INSTEAD) -> None:
    """Refuse parts with samples that have no image; the message says what to do `instead`."""
    tables = without_bytes(catalog.shards())
    tables = tables.filter(pc.is_in(tables["part"], pa.array([part.number for part in parts], pa.int32())))
    if tables.num_rows:
        raise no_bytes(tables["path"].to_pylist(), pc.sum(tables["rows"]).as_py(), instead=instead)
