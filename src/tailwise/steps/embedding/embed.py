"""Embed (map): from the shards' images, and the captions, to columns of embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from tailwise.catalog import layout
from tailwise.catalog.captions import find_captions
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.embeddings import (
    MODALITIES,
    column_modality,
    column_settings,
    part_marker,
)
from tailwise.catalog.rejections import Rejections
from tailwise.context import Context
from tailwise.errors import UserError, check_share
from tailwise.execution.base import Needs
from tailwise.requests import EmbedRequest, refuse_given
from tailwise.shards.containers import no_bytes, without_bytes
from tailwise.steps.embedding.column import Column, ColumnReport
from tailwise.steps.embedding.joint import PREFIX, join_columns
from tailwise.steps.embedding.tasks import Describe
from tailwise.storage.local import in_part, locked

INSTEAD = "; or import their embeddings (DataComp's .npz files), or embed captions alone (`column` text)"


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
