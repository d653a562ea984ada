"""Import, second half: embeddings joined to the samples by key (a reduce that plans the reads), then gathered part by part (a map)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.embeddings import (
    ENCODER,
    ROW_FAULTS,
    column_dimension,
    normalise_rows,
    open_column,
    part_marker,
    write_part,
)
from tailwise.catalog.files import digest, read_json, read_record, write_json, write_record
from tailwise.catalog.rejections import Rejections, RejectionWriter
from tailwise.errors import UserError, refuse_many
from tailwise.execution.base import Apply, Needs, Task, Worker
from tailwise.sources.embedding_files import EmbeddingFile, common_dimension
from tailwise.steps.importing.joining import CHUNK_ROWS, INDEX, Join, Joining, JoinPlan, PartFiles, Wording
from tailwise.steps.importing.rows import RowFinder
from tailwise.storage.local import remove_temporary_files, scratch

Item = TypeVar("Item")
_END = object()


@dataclass
class ColumnImport:
    """Result of the import of one embedding column."""

    column: str  # "image" or "text"
    dimension: int  # width d of its rows
    embedded: int  # samples of the parts concerned that have an embedding now
    samples: int  # samples of the parts concerned


def import_embeddings(
    joining: Joining, column: str, files: list[EmbeddingFile], modality: str | None = None
) -> ColumnImport | None:
    """Fill an embedding column of the newest snapshot, where samples lack an embedding. Those that have one keep it.

    `joining`: with a catalog that holds samples. Files that are joined for the first time belong to the given shards alone, so that other
    shards may have the same keys.

    Returns:
        What came of it, or None if nothing was lacking, or these files were joined before.

    Raises:
        UserError: not one embedding belongs to a sample, the column was made by an encoder, or too many rows are unusable. Then the
            join is not finished: the same import says so again, or resumes with a greater bound.
    """
    catalog, rejections, executor = joining.catalog, joining.rejections, joining.context.executor
    if (dimension := column_dimension(catalog, column)) is not None:
        open_column(catalog, column, dimension, ENCODER, modality)  # refuses a column that an encoder made
    joins = _Joins(catalog, column, files, joining.given)
    parts = joins.parts_to_fill()
    if not parts:
        return None
    needs = Needs(workers=joining.workers)
    with scratch(catalog.embedding_folder(column) / layout.JOINING) as work:
        with rejections.writer(joins.listed(f"{joins.number:06d}")) as log, scratch(work / INDEX, own=True) as index:
            finder = RowFinder(catalog, parts, index, joins.given)
            wording = Wording(f"{column} embeddings", "embedding", f"joining {column} keys")
            join = Join(parts, finder, work, log, wording)
            # Rows that this very join wrote before an interruption are joined again.
            older = [part for part in parts if joins.filled(part) and not joins.written(part)]
            found = executor.map(Apply(partial(_present, catalog.folder, column)), older, needs)
            for part, present in zip(older, found, strict=True):
                join.note_present(part, present)
            dimension = dimension or common_dimension(files)
            join.read_names(files, joins.own(), dimension, joining.context)
            if not join.matched and not (join.known and all(joins.filled(part) for part in parts)):
                raise UserError(_nothing_matched(catalog, parts[0], files, join))
        example = f"; {join.log.example}" if join.log.example else ""
        _refuse_many(joining, join, wording.stage, f"{_widths(files)}{example}")
        open_column(catalog, column, dimension or 0, ENCODER, modality)
        joins.begin(parts)
        items = join.part_files(parts, files)
        # After an interruption the rows may be there already, and the marker not: then it has to be written.
        items = [(part, mine) for part, mine in items if mine or joins.resumed or not joins.filled(part)]
        gather = _Gather(catalog.folder, column, join.plan, joins.id, dimension or 0)
        joining.context.run(gather, items, f"{column} embeddings", needs)
        for part in parts:
            if joins.written(part):
                rejections.count(joins.listed(part.name))
        _refuse_many(joining, join, wording.stage, f"{_widths(files)}{example}")
    for folder in (catalog.embedding_folder(column), catalog.folder / layout.REJECTED):
        remove_temporary_files(folder)
    joins.finish()
    embedded = sum(_notes(catalog, column, part)["embedded"] for part in parts)
    return ColumnImport(column, dimension or 0, embedded, sum(part.rows for part in parts))


def _refuse_many(joining: Joining, join: Join, stage: str, details: str) -> None:
    """Refuse too many unusable rows, as far as they are known now: faults of single rows are found when they are read."""
    counts = {reason: rows for (of, reason), rows in joining.rejections.counts.items() if of == stage}
    rejected = join.faulty + sum(counts.get(reason, 0) for reason in ROW_FAULTS)
    reasons = ", ".join(f"{reason}: {rows:,}" for reason, rows in sorted(counts.items()))
    causes = f"{reasons}; {details}; the samples are imported"
    refuse_many(rejected, join.read, joining.max_rejected, f"{{}} rows of {stage}{{}} can't be used", causes)


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
        self._path, self._pending = (catalog.embedding_folder(column) / name for name in (layout.JOINS, layout.PENDING))
        self._done: list[list[str]] = list(read_record(self._path)["joins"]) if self._path.exists() else []
        self._joined = {name for names in self._done for name in names}
        self._naming = [file.naming for file in files]
        self._files = [file.fingerprint for file in files]
        self.number = len(self._done) + 1
        self.id = digest([self.number, self._files])
        started = read_json(self._pending) if self._pending.exists() else {}
        if started.get("number", self.number) < self.number:  # of a join that was done when the process was killed
            self._pending.unlink()
            started = {}
        self.resumed, self.given = started.get("files") == self._files, given
        if self.resumed:  # a resumed join has the shards that it started with, and those given now
            first = started.get("given")
            self.given = None if first is None else frozenset(first) | (given or frozenset())
        self._parts = set(started["parts"]) if self.resumed else set()

    def own(self) -> list[bool]:
        """Return for each file whether it belongs to the given shards alone.

        A file of keys that was joined to other shards does not: a key may name several samples. A uid names one.
        """
        return [
            self.given is not None and (naming == "uid" or file not in self._joined)
            for file, naming in zip(self._files, self._naming, strict=True)
        ]

    def filled(self, part: Part) -> bool:
        """Return True if the part has the column."""
        return bool(_notes(self.catalog, self.column, part))

    def written(self, part: Part) -> bool:
        """Return True if this very join has written the part."""
        return _notes(self.catalog, self.column, part).get("join") == self.id

    def parts_to_fill(self) -> list[Part]:
        """Return parts without the column; with files not joined before, also those where samples lack an embedding.

        After an interruption, all that the same join was to fill: what is ambiguous, or left out, must not depend on it.
        """
        fresh = not self.resumed and not set(self._files) <= self._joined
        embedded = {part: _notes(self.catalog, self.column, part).get("embedded") for part in self.catalog.parts()}
        return [
            part
            for part, rows in embedded.items()
            if rows is None or part.number in self._parts or (fresh and rows < part.rows)
        ]

    def begin(self, parts: list[Part]) -> None:
        given = None if self.given is None else sorted(self.given)
        numbers = [part.number for part in parts]
        write_json(self._pending, {"number": self.number, "files": self._files, "parts": numbers, "given": given})

    def finish(self) -> None:
        write_record(self._path, {"joins": [*self._done, self._files]})
        self._pending.unlink()

    def listed(self, of: str) -> Path:
        """Return the list of what was left out, of one join or of one part."""
        return layout.rejected_log(self.catalog.folder, self.column, layout.JOIN_LOG, of)


def _nothing_matched(catalog: Catalog, part: Part, files: list[EmbeddingFile], join: Join) -> str:
    reasons = ", ".join(f"{reason}: {rows:,}" for (_, reason), rows in sorted(join.log.counts.items()))
    sample = catalog.samples(part, ["key"]).column(0)[0].as_py()
    unmatched = join.first_unmatched_key
    keys = f"; the first embedding's key is {unmatched!r}, the first sample's {sample!r}" if unmatched else ""
    example = f"; {join.log.example}" if join.log.example else ""
    return f"none of the embeddings in {files[0].path.parent} belongs to a sample that lacks one ({reasons}{keys}{example})"


def _notes(catalog: Catalog, column: str, part: Part) -> dict[str, Any]:
    """Return the marker of a part of the column; empty if the part has none."""
    with suppress(FileNotFoundError):
        return read_record(part_marker(catalog, column, part))
    return {}


def _present(catalog: Path, column: str, part: Part) -> npt.NDArray[np.bool_]:
    """Return True for rows of a part that have an embedding: bool [rows]."""
    from tailwise.kernels.grid import row_chunks  # noqa: PLC0415  (imports numba: a third of a second)

    present = np.zeros(part.rows, np.bool_)
    for start, chunk in row_chunks([Catalog.open(catalog).embedding(column, part)], CHUNK_ROWS):
        present[start : start + len(chunk)] = chunk.any(axis=1)
    return present


@dataclass(frozen=True)
class _Gather(Task[PartFiles, None]):
    """Write the column of a part: rows that it had, rows that are new, zeros where there is none."""

    catalog: Path  # its folder
    column: str  # its name
    plan: JoinPlan  # of the reads
    join: str  # id of the join; a part that it wrote is done
    dimension: int  # width d

    def label(self, item: PartFiles) -> str:
        return item[0].name

    def is_done(self, item: PartFiles) -> bool:
        return _notes(Catalog.open(self.catalog), self.column, item[0]).get("join") == self.join

    def run(self, item: PartFiles, worker: Worker) -> None:  # noqa: ARG002
        catalog = Catalog.open(self.catalog)

        def chunks() -> Generator[npt.NDArray[np.float16], None, None]:
            listed = layout.rejected_log(self.catalog, self.column, layout.JOIN_LOG, item[0].name)
            with Rejections().writer(listed) as log:  # on disk when the last chunk is taken: before the part's marker
                yield from self._chunks(catalog, item, log)

        write_part(catalog, self.column, item[0], self.dimension, ahead(chunks()), join=self.join)

    def _chunks(
        self, catalog: Catalog, item: PartFiles, log: RejectionWriter
    ) -> Generator[npt.NDArray[np.float16], None, None]:
        part, files = item
        samples = catalog.samples(part, ["key", "shard"])
        shards: list[str] = catalog.shards().column("path").to_pylist()
        old = catalog.embedding(self.column, part) if _notes(catalog, self.column, part) else None
        plan = self.plan.rows(part)
        for chunk, rows in ahead(self.plan.values(item, self.dimension, np.float32)):
            normalised, faults = normalise_rows(rows)
            if old is not None:
                present = plan[chunk]["present"]
                normalised[present] = old[chunk][present]
            for at, fault in faults.items():
                row = chunk.start + at
                key, shard = (samples.column(name)[row].as_py() for name in ("key", "shard"))
                if (number := int(plan[row]["file"])) >= 0:
                    detail = "the sample stays, without embedding"
                    log.add(f"{self.column} embeddings", fault, str(files[number].path), key, detail)
                elif not plan[row]["present"]:
                    log.add(f"{self.column} embeddings", "sample without embedding", shards[shard], key)
            yield normalised


def ahead(items: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """Yield items; a thread makes the next one meanwhile. What making an item raises is raised in its place."""
    with closing(items), ThreadPoolExecutor(1) as thread:  # the thread ends first
        coming = thread.submit(next, items, _END)
        while (item := coming.result()) is not _END:
            coming = thread.submit(next, items, _END)
            yield item  # type: ignore[misc]  # of `items`
