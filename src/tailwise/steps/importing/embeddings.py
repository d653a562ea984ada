"""Import, second half: embeddings joined to the samples by key (a reduce that plans the reads), then gathered part by part (a map)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.embeddings import (
    ROW_FAULTS,
    column_dimension,
    normalise_rows,
    open_column,
    part_marker,
    write_part,
)
from tailwise.catalog.files import digest, read_json, read_record, write_json, write_record
from tailwise.catalog.rejections import Rejections, RejectionWriter
from tailwise.context import Context
from tailwise.errors import MAX_REJECTED, UserError, refuse_many
from tailwise.mapped import release_pages
from tailwise.sources.embedding_files import EmbeddingFile, common_dimension
from tailwise.steps.importing.joining import Join, Wording
from tailwise.steps.importing.rows import RowFinder
from tailwise.storage.local import scratch

CHUNK_ROWS = 65_536
FILL_ROWS = 8192
FILL_NUMBERS = 1 << 23  # bounds memory where rows are wide
ENCODER = "imported"


@dataclass
class ColumnImport:
    """Result of the import of one embedding column.

    Attributes:
        column: "image" or "text".
        dimension: width d of its rows.
        embedded: samples of the parts concerned that have an embedding now.
        samples: samples of the parts concerned.
    """

    column: str
    dimension: int
    embedded: int
    samples: int


def import_embeddings(
    catalog: Catalog,
    column: str,
    files: list[EmbeddingFile],
    given: frozenset[int] | None,
    rejections: Rejections,
    context: Context,
    max_rejected: float = MAX_REJECTED,
    modality: str | None = None,
) -> ColumnImport | None:
    """Fills an embedding column of the newest snapshot, where samples lack an embedding. Those that have one keep it.

    Args:
        catalog: where to; must hold samples.
        column: its name.
        files: of embeddings.
        given: shards that came with the files. Files that are joined for the first time belong to these alone, so that other shards may
            have the same keys; None if no shards came.
        rejections: takes what was left out.
        context: runs the tasks and shows progress.
        max_rejected: share of the files' rows that may be unusable. An embedding without a sample, or a second one, is not counted.
        modality: of the column, see `open_column`.

    Returns:
        What came of it, or None if nothing was lacking, or these files were joined before.

    Raises:
        UserError: not one embedding belongs to a sample, the column was made by an encoder, or too many rows are unusable. Then the
            join is not finished: the same import says so again, or resumes with a greater bound.
    """
    if (dimension := column_dimension(catalog, column)) is not None:
        open_column(catalog, column, dimension, ENCODER, modality)  # refuses a column that an encoder made
    joins = _Joins(catalog, column, files, given)
    parts = joins.parts_to_fill()
    if not parts:
        return None
    with scratch(catalog.embedding_folder(column) / layout.JOINING) as work:
        with rejections.writer(joins.listed(f"{joins.number:06d}")) as log:
            finder = RowFinder(catalog, parts, work, joins.given)
            wording = Wording(f"{column} embeddings", "embedding", f"joining {column} keys")
            join = Join(parts, finder, work, log, wording)
            for part in parts:
                if not joins.written(part):  # what this very join wrote before an interruption is joined again
                    _note_present(joins, join, part)
            dimension = dimension or common_dimension(files)
            join.plan(files, joins.own(), dimension, context)
            if not join.matched and not (join.known and all(joins.filled(part) for part in parts)):
                raise UserError(_nothing_matched(catalog, parts[0], files, join))
        example = f"; {join.log.example}" if join.log.example else ""
        bound = _Bound(join, f"{column} embeddings", max_rejected, rejections, f"{_widths(files)}{example}")
        bound.check()
        open_column(catalog, column, dimension or 0, ENCODER, modality)
        joins.begin(parts)
        fill = _Fill(joins, join, files, dimension or 0)
        embedded = sum(
            fill.part(part, rejections) for part in context.progress(parts, f"{column} embeddings", len(parts))
        )
        bound.check()
    joins.finish()
    return ColumnImport(column, dimension or 0, embedded, sum(part.rows for part in parts))


@dataclass(frozen=True)
class _Bound:
    """The share of rows of a join that may be unusable."""

    join: Join
    stage: str
    max_rejected: float
    rejections: Rejections
    details: str

    def check(self) -> None:
        """Refuse too many, as far as they are known now: faults of single rows are found when they are read."""
        counts = {reason: rows for (stage, reason), rows in self.rejections.counts.items() if stage == self.stage}
        rejected = self.join.faulty + sum(counts.get(reason, 0) for reason in ROW_FAULTS)
        reasons = ", ".join(f"{reason}: {rows:,}" for reason, rows in sorted(counts.items()))
        what = f"{{}} rows of {self.stage}{{}} can't be used"
        refuse_many(
            rejected, self.join.read, self.max_rejected, what, f"{reasons}; {self.details}; the samples are imported"
        )


def _widths(files: list[EmbeddingFile]) -> str:
    """Return how many numbers the rows of the files have."""
    counts = Counter(size[1] for file in files if (size := file.size()))
    return ", ".join(f"{width:,} numbers a row in {count:,} files" for width, count in counts.most_common())


class _Joins:
    """Which files were joined to a column so far, and which are being joined.

    Attributes:
        given: shards that files belong to, if any came with them.
    """

    def __init__(self, catalog: Catalog, column: str, files: list[EmbeddingFile], given: frozenset[int] | None) -> None:
        self.catalog, self.column = catalog, column
        self.folder = catalog.embedding_folder(column)
        self.done: list[list[str]] = self._joined() if self._path.exists() else []
        self._naming = [file.naming for file in files]
        self.files = [file.fingerprint for file in files]
        self.number = len(self.done) + 1
        self.id = digest([self.number, self.files])
        pending = read_json(self._pending) if self._pending.exists() else {}
        if pending.get("number", self.number) < self.number:  # of a join that was done when the process was killed
            self._pending.unlink()
            pending = {}
        self.resumed = pending.get("files") == self.files
        self.given = self._shards_for(given) if self.resumed else given

    def _shards_for(self, given: frozenset[int] | None) -> frozenset[int] | None:
        """Return the shards of a resumed join: those it started with, and those given now."""
        first: list[int] | None = read_json(self._pending).get("given")
        return None if first is None else frozenset(first) | (given or frozenset())

    def own(self) -> list[bool]:
        """For each file, whether it belongs to the given shards alone.

        A file of keys that was joined to other shards does not: a key may name several samples. A uid names one.
        """
        before = {name for names in self.done for name in names}
        return [
            self.given is not None and (naming == "uid" or file not in before)
            for file, naming in zip(self.files, self._naming, strict=True)
        ]

    def _joined(self) -> list[list[str]]:
        """The joins that are done."""
        return list(read_record(self._path)["joins"])

    @property
    def _path(self) -> Path:
        return self.folder / layout.JOINS

    @property
    def _pending(self) -> Path:
        return self.folder / layout.PENDING

    def filled(self, part: Part) -> bool:
        """Return True if the part has the column."""
        return part_marker(self.catalog, self.column, part).exists()

    def written(self, part: Part) -> dict[str, Any] | None:
        """The part's marker, if this very join has written it."""
        marker = part_marker(self.catalog, self.column, part)
        content: dict[str, Any] | None = read_record(marker) if marker.exists() else None
        return content if content and content.get("join") == self.id else None

    def parts_to_fill(self) -> list[Part]:
        """Parts without the column; with files not joined before, also those where samples lack an embedding.

        After an interruption, all that the same join was to fill: what is ambiguous, or left out, must not depend on it.
        """
        parts = self.catalog.parts()
        if self.resumed:
            started = set(read_json(self._pending)["parts"])
            return [part for part in parts if part.number in started or not self.filled(part)]
        fresh = not set(self.files) <= {name for names in self.done for name in names}
        return [part for part in parts if not self.filled(part) or (fresh and self._incomplete(part))]

    def _incomplete(self, part: Part) -> bool:
        return bool(read_record(part_marker(self.catalog, self.column, part))["embedded"] < part.rows)

    def begin(self, parts: list[Part]) -> None:
        """Notes what is being joined to which parts."""
        given = None if self.given is None else sorted(self.given)
        numbers = [part.number for part in parts]
        write_json(self._pending, {"number": self.number, "files": self.files, "parts": numbers, "given": given})

    def finish(self) -> None:
        """Notes that it is done."""
        write_record(self._path, {"joins": [*self.done, self.files]})
        self._pending.unlink()

    def listed(self, of: str) -> Path:
        """The list of what was left out, of one join or of one part."""
        return layout.rejected_log(self.catalog.folder, self.column, layout.JOIN_LOG, of)


def _nothing_matched(catalog: Catalog, part: Part, files: list[EmbeddingFile], join: Join) -> str:
    reasons = ", ".join(f"{reason}: {rows:,}" for (_, reason), rows in sorted(join.log.counts.items()))
    sample = catalog.samples(part, ["key"]).column(0)[0].as_py()
    unmatched = join.first_unmatched_key
    keys = f"; the first embedding's key is {unmatched!r}, the first sample's {sample!r}" if unmatched else ""
    example = f"; {join.log.example}" if join.log.example else ""
    return f"none of the embeddings in {files[0].path.parent} belongs to a sample that lacks one ({reasons}{keys}{example})"


def _note_present(joins: _Joins, join: Join, part: Part) -> None:
    """Samples that have an embedding want none."""
    if joins.filled(part):
        block = joins.catalog.embedding(joins.column, part)
        present = join.present[join.span(part)]
        for start in range(0, part.rows, CHUNK_ROWS):
            present[start : start + CHUNK_ROWS] = block[start : start + CHUNK_ROWS].any(axis=1)
        release_pages(block)


class _Fill:
    """Gathers what a join planned, part by part."""

    def __init__(self, joins: _Joins, join: Join, files: list[EmbeddingFile], dimension: int) -> None:
        self._joins, self._join, self._files, self._dimension = joins, join, files, dimension
        self._shard_paths: list[str] = joins.catalog.shards().column("path").to_pylist()

    def part(self, part: Part, rejections: Rejections) -> int:
        """Writes the column for one part, whole or not at all; returns how many of its rows have an embedding."""
        joins = self._joins
        listed = joins.listed(part.name)
        if written := joins.written(part):
            if listed.exists():
                rejections.count(listed)
            return int(written["embedded"])
        # After an interruption the rows may be there already, and the marker not: then it has to be written.
        if not joins.resumed and joins.filled(part) and not self._join.sources(part, self._files):
            return int(read_record(part_marker(joins.catalog, joins.column, part))["embedded"])

        def chunks() -> Iterator[npt.NDArray[np.float16]]:
            with rejections.writer(listed) as log:  # on disk when the last chunk is taken: before the part's marker
                yield from self._chunks(part, log)

        return write_part(joins.catalog, joins.column, part, self._dimension, chunks(), join=joins.id)

    def _chunks(self, part: Part, log: RejectionWriter) -> Iterator[npt.NDArray[np.float16]]:
        """The rows of one part: those it had, those that are new, zeros where there is none."""
        join, catalog, column = self._join, self._joins.catalog, self._joins.column
        join.log = log
        sources = join.sources(part, self._files)
        keys = catalog.samples(part, ["key", "shard"])
        old = catalog.embedding(column, part) if self._joins.filled(part) else None
        span = join.span(part)
        file, position, present = (item[span] for item in (join.file, join.position, join.present))
        step = max(1, min(FILL_ROWS, FILL_NUMBERS // max(1, self._dimension)))
        for start in range(0, part.rows, step):
            chunk = slice(start, min(start + step, part.rows))
            rows = np.zeros((chunk.stop - start, self._dimension), np.float32)
            for number in np.unique(file[chunk]).tolist():
                if number >= 0:
                    mine = np.flatnonzero(file[chunk] == number)
                    with np.errstate(
                        over="ignore"
                    ):  # a float64 beyond float32's range becomes inf, and is rejected as such
                        rows[mine] = sources[number][position[chunk][mine]]
                    release_pages(sources[number])
            normalised, faults = normalise_rows(rows)
            if old is not None:
                normalised[present[chunk]] = old[chunk][present[chunk]]
            for at, fault in faults.items():
                if not present[start + at]:
                    self._reject_row(keys, start + at, int(file[start + at]), fault)
            yield normalised

    def _reject_row(self, keys: pa.Table, row: int, number: int, fault: str) -> None:
        key = keys.column("key")[row].as_py()
        if number >= 0:
            self._join.reject(fault, self._files[number].path, key, "the sample stays, without embedding")
        else:
            shard = self._shard_paths[keys.column("shard")[row].as_py()]
            self._join.reject("sample without embedding", shard, key)
