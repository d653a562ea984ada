"""Import, second half: embeddings joined to the samples by key (a reduce that plans the reads), then gathered part by part (a map)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.embeddings import column_dimension, normalise_rows, open_column, part_marker, write_part
from tailwise.catalog.files import create_array, digest, read_array, read_json, scratch, write_json
from tailwise.catalog.keys import ABSENT, AMBIGUOUS, KeyIndex
from tailwise.errors import UserError
from tailwise.progress import Track
from tailwise.sources.clip_retrieval import BadPartition, Partition, common_dimension, open_partition
from tailwise.stages.report import Rejections, RejectionWriter

CHUNK_ROWS = 65_536
ENCODER = "imported"

Source = tuple[Partition, npt.NDArray[Any]]


@dataclass
class ColumnImport:
    """What an import of one embedding column came to.

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
    catalog: Catalog, column: str, partitions: list[Partition], rejections: Rejections, track: Track
) -> ColumnImport | None:
    """Fills an embedding column of the newest snapshot, where samples lack an embedding. Those that have one keep it.

    Args:
        catalog: where to; must hold samples.
        column: "image" or "text".
        partitions: files of embeddings and keys.
        rejections: takes what was left out.
        track: shows progress.

    Returns:
        What came of it, or None if nothing was lacking, or these files were joined before.

    Raises:
        UserError: not one embedding belongs to a sample, or the column was made by an encoder.
    """
    if (dimension := column_dimension(catalog, column)) is not None:
        open_column(catalog, column, dimension, ENCODER)  # refuses a column that an encoder made
    joins = _Joins(catalog, column, partitions)
    parts = joins.parts_to_fill()
    if not parts:
        return None
    with scratch(catalog.embedding_folder(column) / "joining") as work:
        with rejections.writer(joins.listed(f"{joins.number:06d}")) as log:
            join = _Join(joins, parts, work, log)
            join.plan_reads(partitions, track)
            if not join.matched and not (join.known and all(joins.filled(part) for part in parts)):
                raise UserError(_nothing_matched(catalog, parts[0], partitions, join))
        open_column(catalog, column, join.dimension or 0, ENCODER)
        joins.begin(parts)
        embedded = sum(
            _fill(joins, join, part, partitions, rejections)
            for part in track(parts, f"{column} embeddings", len(parts))
        )
    joins.finish()
    return ColumnImport(column, join.dimension or 0, embedded, sum(part.rows for part in parts))


class _Joins:
    """Which files were joined to a column so far, and which are being joined."""

    def __init__(self, catalog: Catalog, column: str, partitions: list[Partition]) -> None:
        self.catalog, self.column = catalog, column
        self.folder = catalog.embedding_folder(column)
        self.done: list[list[str]] = read_json(self._path) if self._path.exists() else []
        self.files = [_fingerprint(partition) for partition in partitions]
        self.number = len(self.done) + 1
        self.id = digest([self.number, self.files])
        self.resumed = self._pending.exists() and read_json(self._pending)["files"] == self.files

    @property
    def _path(self) -> Path:
        return self.folder / "joins.json"

    @property
    def _pending(self) -> Path:
        return self.folder / "pending.json"

    def filled(self, part: Part) -> bool:
        """Whether the part has the column."""
        return part_marker(self.catalog, self.column, part).exists()

    def written(self, part: Part) -> dict[str, Any] | None:
        """The part's marker, if this very join has written it."""
        marker = part_marker(self.catalog, self.column, part)
        content: dict[str, Any] | None = read_json(marker) if marker.exists() else None
        return content if content and content.get("join") == self.id else None

    def parts_to_fill(self) -> list[Part]:
        """Parts without the column; with files not joined before, also those where samples lack an embedding.

        After an interruption, all that the same join was to fill: what is ambiguous, or left out, must not depend on it.
        """
        parts = self.catalog.parts()
        if self.resumed:
            begun = set(read_json(self._pending)["parts"])
            return [part for part in parts if part.number in begun or not self.filled(part)]
        fresh = not set(self.files) <= {name for names in self.done for name in names}
        return [part for part in parts if not self.filled(part) or (fresh and self._incomplete(part))]

    def _incomplete(self, part: Part) -> bool:
        return bool(read_json(part_marker(self.catalog, self.column, part))["embedded"] < part.rows)

    def begin(self, parts: list[Part]) -> None:
        """Notes what is being joined to which parts."""
        write_json(self._pending, {"files": self.files, "parts": [part.number for part in parts]})

    def finish(self) -> None:
        """Notes that it is done."""
        write_json(self._path, [*self.done, self.files])
        self._pending.unlink()

    def listed(self, of: str) -> Path:
        """The list of what was left out, of one join or of one part."""
        return self.catalog.folder / "rejected" / f"{self.column}-embeddings-{of}.parquet"


def _fingerprint(partition: Partition) -> str:
    """Path, size and time of both files: what tells whether they were joined before."""
    times = [
        f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}" if path.exists() else f"{path}:absent"
        for path in (partition.array, partition.metadata)
    ]
    return " ".join(times)


def _fill(joins: _Joins, join: _Join, part: Part, partitions: list[Partition], rejections: Rejections) -> int:
    """Writes the column for one part, whole or not at all; returns how many of its rows have an embedding."""
    listed = joins.listed(part.name)
    if written := joins.written(part):
        if listed.exists():
            rejections.count(listed)
        return int(written["embedded"])
    # After an interruption the rows may be there already, and the marker not: then it has to be written.
    if not joins.resumed and joins.filled(part) and not join.sources(part, partitions):
        return int(read_json(part_marker(joins.catalog, joins.column, part))["embedded"])

    def chunks() -> Iterator[npt.NDArray[np.float16]]:
        with rejections.writer(listed) as log:  # on disk when the last chunk is taken: before the part's marker
            yield from join.chunks(part, partitions, log)

    return write_part(joins.catalog, joins.column, part, join.dimension or 0, chunks(), join=joins.id)


def _nothing_matched(catalog: Catalog, part: Part, partitions: list[Partition], join: _Join) -> str:
    reasons = ", ".join(f"{reason}: {rows:,}" for (_, reason), rows in sorted(join.log.counts.items()))
    sample = catalog.samples(part, ["key"]).column(0)[0].as_py()
    keys = f"; the first embedding's key is {join.stranger!r}, the first sample's {sample!r}" if join.stranger else ""
    example = f"; {join.log.example}" if join.log.example else ""
    folder = partitions[0].array.parent
    return f"none of the embeddings in {folder} belongs to a sample that lacks one ({reasons}{keys}{example})"


class _Join:
    """The read plan of one column: for each row, which partition and which position in it.

    Attributes:
        matched: rows that lacked an embedding, and get one.
        known: embeddings of samples that have one already.
        stranger: the first key of an embedding that no sample has.
    """

    def __init__(self, joins: _Joins, parts: list[Part], work: Path, log: RejectionWriter) -> None:
        self.catalog, self.column, self.work, self.log = joins.catalog, joins.column, work, log
        self.dimension = column_dimension(self.catalog, self.column)
        self.shard_paths: list[str] = self.catalog.shards().column("path").to_pylist()
        self.first_row = parts[0].first_row
        rows = parts[-1].first_row + parts[-1].rows - self.first_row
        self.partition = create_array(work / "partition.npy", (rows,), np.int32)
        self.position = create_array(work / "position.npy", (rows,), np.int64)
        self.present = create_array(work / "present.npy", (rows,), np.bool_)
        self.partition[:] = -1
        for part in parts:
            if not joins.written(part):  # what this very join wrote before an interruption is joined again
                self._note_present(part)
        wanted = {part.number for part in parts}
        earlier = [part for part in self.catalog.parts() if part.number not in wanted]
        self.index = self._build_index("keys", parts)
        self.earlier = self._build_index("earlier", earlier) if earlier else None
        self.matched = self.known = 0
        self.stranger: str | None = None

    def _span(self, part: Part) -> slice:
        begin = part.first_row - self.first_row
        return slice(begin, begin + part.rows)

    def _note_present(self, part: Part) -> None:
        if part_marker(self.catalog, self.column, part).exists():
            block = self.catalog.embedding(self.column, part)
            present = self.present[self._span(part)]
            for start in range(0, part.rows, CHUNK_ROWS):
                present[start : start + CHUNK_ROWS] = block[start : start + CHUNK_ROWS].any(axis=1)

    def _build_index(self, name: str, parts: list[Part]) -> KeyIndex:
        index = KeyIndex(self.work / name, sum(part.rows for part in parts))
        for part in parts:
            keys = self.catalog.samples(part, ["key"]).column(0).to_pylist()
            index.add(keys, np.arange(part.first_row, part.first_row + part.rows))
        index.seal()
        return index

    def _reject(self, reason: str, file: str, key: str | None, detail: str | None = None, rows: int = 1) -> None:
        self.log.add(f"{self.column} embeddings", reason, file, key, detail, rows)

    def plan_reads(self, partitions: list[Partition], track: Track) -> None:
        """Notes for every row where its embedding lies."""
        self.dimension = self.dimension or common_dimension(partitions)
        for number, partition in enumerate(track(partitions, f"joining {self.column} keys", len(partitions))):
            opened = open_partition(partition, self.dimension)
            if isinstance(opened, BadPartition):
                self._reject(opened.reason, str(partition.array), None, opened.detail, opened.rows)
                continue
            _, keys = opened
            for start in range(0, len(keys), CHUNK_ROWS):
                self._plan_chunk(number, str(partition.array), start, keys.slice(start, CHUNK_ROWS))

    def _plan_chunk(self, number: int, file: str, start: int, keys: pa.Array) -> None:
        names = [key if key is not None else "" for key in keys.to_pylist()]
        rows = self.index.find(names)
        absent = rows == ABSENT
        if self.earlier is not None:
            known = self.earlier.find(names) != ABSENT
            rows[known & ~absent] = AMBIGUOUS
            self.known += int((known & absent).sum())
            absent &= ~known
        for at in np.flatnonzero(rows == AMBIGUOUS):
            self._reject("ambiguous key", file, names[at], "several samples have it")
        for at in np.flatnonzero(absent):
            self._reject("embedding without sample", file, names[at])
            self.stranger = self.stranger or names[at]
        hits = np.flatnonzero(rows >= 0)
        there = self.present[rows[hits] - self.first_row]
        self.known += int(there.sum())
        hits = hits[~there]
        _, first = np.unique(rows[hits], return_index=True)
        keep = np.zeros(len(rows), np.bool_)
        keep[hits[first]] = True
        keep[hits] &= self.partition[rows[hits] - self.first_row] < 0
        for at in hits[~keep[hits]]:
            self._reject("duplicate embedding", file, names[at], "the first one is kept")
        self.partition[rows[keep] - self.first_row] = number
        self.position[rows[keep] - self.first_row] = start + np.flatnonzero(keep)
        self.matched += int(keep.sum())

    def sources(self, part: Part, partitions: list[Partition]) -> dict[int, Source]:
        """The partitions that rows of a part are read from, mapped."""
        used = np.unique(self.partition[self._span(part)])
        return {int(at): (partitions[at], read_array(partitions[at].array)) for at in used if at >= 0}

    def chunks(
        self, part: Part, partitions: list[Partition], log: RejectionWriter
    ) -> Iterator[npt.NDArray[np.float16]]:
        """The rows of one part: those it had, those that are new, zeros where there is none."""
        self.log = log
        sources = self.sources(part, partitions)
        keys = self.catalog.samples(part, ["key", "shard"])
        filled = part_marker(self.catalog, self.column, part).exists()
        old = self.catalog.embedding(self.column, part) if filled else None
        span = self._span(part)
        partition, position, present = (item[span] for item in (self.partition, self.position, self.present))
        for start in range(0, part.rows, CHUNK_ROWS):
            chunk = slice(start, min(start + CHUNK_ROWS, part.rows))
            rows = np.zeros((chunk.stop - start, self.dimension or 0), np.float32)
            for number, (_, source) in sources.items():
                mine = np.flatnonzero(partition[chunk] == number)
                with np.errstate(
                    over="ignore"
                ):  # a float64 beyond float32's range becomes inf, and is rejected as such
                    rows[mine] = source[position[chunk][mine]]
            normalised, faults = normalise_rows(rows)
            if old is not None:
                normalised[present[chunk]] = old[chunk][present[chunk]]
            for at, fault in faults.items():
                if not present[start + at]:
                    self._reject_row(keys, start + at, int(partition[start + at]), fault, sources)
            yield normalised

    def _reject_row(self, keys: pa.Table, row: int, number: int, fault: str, sources: dict[int, Source]) -> None:
        key = keys.column("key")[row].as_py()
        if number >= 0:
            self._reject(fault, str(sources[number][0].array), key, "the sample stays, without embedding")
        else:
            self._reject("sample without embedding", self.shard_paths[keys.column("shard")[row].as_py()], key)
