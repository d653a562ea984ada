"""Import, second half: embeddings joined to the samples by key (a reduce that plans the reads), then gathered part by part (a map)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.embeddings import normalise_rows, open_column, write_part
from tailwise.catalog.files import create_array, read_array, read_json, write_json
from tailwise.catalog.keys import ABSENT, AMBIGUOUS, KeyIndex
from tailwise.errors import UserError
from tailwise.progress import Track
from tailwise.sources.clip_retrieval import BadPartition, Partition, common_dimension, open_partition
from tailwise.stages.report import Rejections, RejectionWriter

CHUNK_ROWS = 65_536
ENCODER = "imported"


@dataclass
class ColumnImport:
    """What an import of one embedding column came to.

    Attributes:
        column: "image" or "text".
        dimension: width d of its rows.
        embedded: samples that got an embedding.
        samples: samples that had none before.
    """

    column: str
    dimension: int
    embedded: int
    samples: int


def import_embeddings(
    catalog: Catalog, column: str, partitions: list[Partition], rejections: Rejections, track: Track
) -> ColumnImport | None:
    """Fills an embedding column for those parts of the newest snapshot that lack it.

    Args:
        catalog: where to; must hold samples.
        column: "image" or "text".
        partitions: files of embeddings and keys.
        rejections: takes what was left out.
        track: shows progress.

    Returns:
        What came of it, or None if no part lacked the column.

    Raises:
        UserError: not one embedding belongs to a sample, or the column was made by an encoder.
    """
    snapshot = catalog.snapshot()
    pending = catalog.embedding_folder(column) / "pending.json"
    parts = _parts_to_fill(catalog, column, partitions, pending)
    if not parts:
        return None
    work = catalog.embedding_folder(column) / "joining"
    shutil.rmtree(work, ignore_errors=True)
    try:
        with rejections.writer(_listed(catalog, column, f"{snapshot.number:06d}")) as log:
            join = _Join(catalog, column, parts, work, log)
            join.plan_reads(partitions, track)
            if not join.matched:
                raise UserError(_nothing_matched(catalog, parts[0], partitions, join))
            open_column(catalog, column, join.dimension or 0, ENCODER)
            write_json(pending, {"first_part": parts[0].number, "partitions": _addresses(partitions)})
            embedded = sum(
                join.gather(part, partitions, rejections) for part in track(parts, f"{column} embeddings", len(parts))
            )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    pending.unlink()
    return ColumnImport(column, join.dimension or 0, embedded, sum(part.rows for part in parts))


def _parts_to_fill(catalog: Catalog, column: str, partitions: list[Partition], pending: Path) -> list[Part]:
    """The parts that lack the column; after an interruption, with those that the same import had filled by then.

    The latter are joined again, so that what is ambiguous, or left out, doesn't depend on the interruption.
    """
    parts = catalog.parts()
    if pending.exists() and (begun := read_json(pending))["partitions"] == _addresses(partitions):
        return parts[begun["first_part"] :]
    return [part for part in parts if not _marker(catalog, column, part).exists()]


def _addresses(partitions: list[Partition]) -> list[str]:
    return [str(partition.array) for partition in partitions]


def _listed(catalog: Catalog, column: str, of: str) -> Path:
    return catalog.folder / "rejected" / f"{column}-embeddings-{of}.parquet"


def _marker(catalog: Catalog, column: str, part: Part) -> Path:
    return catalog.embedding_folder(column) / f"{part.name}.json"


def _nothing_matched(catalog: Catalog, part: Part, partitions: list[Partition], join: _Join) -> str:
    reasons = ", ".join(f"{reason}: {rows:,}" for (_, reason), rows in sorted(join.log.counts.items()))
    sample = catalog.samples(part, ["key"]).column(0)[0].as_py()
    keys = f"; the first embedding's key is {join.stranger!r}, the first sample's {sample!r}" if join.stranger else ""
    return f"none of the embeddings in {partitions[0].array.parent} belongs to a sample ({reasons}{keys})"


class _Join:
    """The read plan of one column: for each row, which partition and which position in it."""

    def __init__(self, catalog: Catalog, column: str, parts: list[Part], work: Path, log: RejectionWriter) -> None:
        self.catalog, self.column, self.parts, self.work, self.log = catalog, column, parts, work, log
        self.first_row = parts[0].first_row
        rows = parts[-1].first_row + parts[-1].rows - self.first_row
        self.partition = create_array(work / "partition.npy", (rows,), np.int32)
        self.position = create_array(work / "position.npy", (rows,), np.int64)
        self.partition[:] = -1
        self.index = self._build_index("keys", parts)
        first = catalog.embedding_folder(column) / f"part-{0:06d}.npy"
        self.dimension: int | None = read_array(first).shape[1] if first.exists() else None
        self.earlier = self._earlier_index()
        self.matched = 0
        self.stranger: str | None = None  # the first key of an embedding that no sample has

    def _build_index(self, name: str, parts: list[Part]) -> KeyIndex:
        index = KeyIndex(self.work / name, sum(part.rows for part in parts))
        for part in parts:
            keys = self.catalog.samples(part, ["key"]).column(0).to_pylist()
            index.add(keys, np.arange(part.first_row, part.first_row + part.rows))
        index.seal()
        return index

    def _earlier_index(self) -> KeyIndex | None:
        """Keys of the parts that have the column already: their embeddings are no news, and no fault either."""
        lacking = {part.number for part in self.parts}
        earlier = [part for part in self.catalog.parts() if part.number not in lacking]
        return self._build_index("earlier", earlier) if earlier else None

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
        positions = start + np.arange(len(rows))
        absent = rows == ABSENT
        if self.earlier is not None:
            known = self.earlier.find(names) != ABSENT
            rows[known & ~absent] = AMBIGUOUS
            absent &= ~known
        for at in np.flatnonzero(rows == AMBIGUOUS):
            self._reject("ambiguous key", file, names[at], "several samples have it")
        for at in np.flatnonzero(absent):
            self._reject("embedding without sample", file, names[at])
            self.stranger = self.stranger or names[at]
        hits = np.flatnonzero(rows >= 0)
        _, first = np.unique(rows[hits], return_index=True)
        keep = np.zeros(len(rows), np.bool_)
        keep[hits[first]] = True
        keep[hits] &= self.partition[rows[hits] - self.first_row] < 0
        for at in hits[~keep[hits]]:
            self._reject("duplicate embedding", file, names[at], "the first one is kept")
        self.partition[rows[keep] - self.first_row] = number
        self.position[rows[keep] - self.first_row] = positions[keep]
        self.matched += int(keep.sum())

    def gather(self, part: Part, partitions: list[Partition], rejections: Rejections) -> int:
        """Writes the column for one part, whole or not at all; returns how many of its rows have an embedding."""
        marker = _marker(self.catalog, self.column, part)
        if marker.exists():
            if (listed := _listed(self.catalog, self.column, part.name)).exists():
                rejections.count(listed)
            return int(read_json(marker)["embedded"])
        sources = {number: read_array(partitions[number].array) for number in self._used(part)}
        return write_part(
            self.catalog, self.column, part, self.dimension or 0, self._logged(part, partitions, sources, rejections)
        )

    def _used(self, part: Part) -> list[int]:
        used = np.unique(self.partition[part.first_row - self.first_row :][: part.rows])
        return [int(number) for number in used if number >= 0]

    def _logged(
        self, part: Part, partitions: list[Partition], sources: dict[int, npt.NDArray[Any]], rejections: Rejections
    ) -> Iterator[npt.NDArray[np.float16]]:
        """The chunks of one part; what they leave out is on disk when the last is taken, before the part's marker."""
        with rejections.writer(_listed(self.catalog, self.column, part.name)) as self.log:
            yield from self._chunks(part, partitions, sources)

    def _chunks(
        self, part: Part, partitions: list[Partition], sources: dict[int, npt.NDArray[Any]]
    ) -> Iterator[npt.NDArray[np.float16]]:
        keys = self.catalog.samples(part, ["key", "shard"])
        paths = self.catalog.shards().column("path").to_pylist()
        begin = part.first_row - self.first_row
        for start in range(0, part.rows, CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, part.rows)
            partition, position = (
                self.partition[begin + start : begin + stop],
                self.position[begin + start : begin + stop],
            )
            rows = np.zeros((stop - start, self.dimension or 0), np.float32)
            for number, source in sources.items():
                mine = np.flatnonzero(partition == number)
                with np.errstate(
                    over="ignore"
                ):  # a float64 beyond float32's range becomes inf, and is rejected as such
                    rows[mine] = source[position[mine]]
            normalised, faults = normalise_rows(rows)
            for at, fault in faults.items():
                key = keys.column("key")[start + at].as_py()
                if partition[at] >= 0:
                    self._reject(
                        fault, str(partitions[int(partition[at])].array), key, "the sample stays, without embedding"
                    )
                else:
                    self._reject("sample without embedding", paths[keys.column("shard")[start + at].as_py()], key)
            yield normalised
