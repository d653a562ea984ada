"""Reading of images and captions in worker processes, batch by batch: images from the tars, captions from the samples."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.captions import find_captions
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.schema import FINGERPRINT, PARQUET
from tailwise.encoders.encoder import Fault, Inputs, Tensors
from tailwise.errors import UserError
from tailwise.execution.base import Needs, Task, Worker
from tailwise.execution.local import LocalExecutor
from tailwise.shards.content import ParquetLayout
from tailwise.shards.fingerprint import blocks_of_stream, check_fingerprint, comparable_shards
from tailwise.shards.packed import plain
from tailwise.shards.parquet_images import GROUP_BYTES, RowGroups
from tailwise.storage.errors import RemoteError
from tailwise.storage.files import open_binary
from tailwise.storage.remote import forget_failures

AHEAD_BATCHES = 2  # of each worker
WASTE = 2  # a batch is one read if that is at most WASTE times its images: shards hold little else
COLUMNS = {"image": ["key", "image_offset", "image_bytes"], "text": ["key", "caption"]}


@dataclass(frozen=True)
class ShardRows:
    """Consecutive rows of one shard: the unit of work, and of resumption."""

    shard: int  # its id
    part: int  # number of its part
    first: int  # first row, counted from the first row of the part
    rows: int  # number of rows


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a shard that make one batch."""

    of: ShardRows  # rows that the batch belongs to
    start: int  # first row of the batch, counted from the first of these
    samples: dict[str, list[Any]]  # columns of COLUMNS

    @property
    def keys(self) -> list[str]:
        """Keys of all rows."""
        return self.samples["key"]


@dataclass
class Batch:
    """Result of a piece."""

    piece: Piece  # its rows
    tensors: Tensors  # [n, …] each, of the n rows that are fit
    fit: npt.NDArray[np.int64]  # int64 [n], rows counted from the start of the piece
    faults: dict[int, Fault]  # of all other rows, counted in the same way
    truncated: int  # number of captions that are longer than the model reads

    def pin_memory(self) -> Batch:
        """Move the tensors to where a GPU can fetch them; return the batch."""
        self.tensors = {name: value.pin_memory() for name, value in self.tensors.items()}
        return self


def pieces(
    catalog: Catalog, modality: str, rows: Iterable[ShardRows], batch_size: int, captions: str | None = None
) -> Iterator[Piece]:
    """Yield batches in order. None crosses shards, so that the content of a batch depends on nothing but its size.

    `captions` are joined ones, which go before samples' own.
    """
    parts, joined = catalog.parts(), find_captions(catalog, captions)
    for number, members in groupby(rows, key=lambda item: item.part):
        samples = catalog.samples(parts[number], COLUMNS[modality])
        for item in members:
            for start in range(0, item.rows, batch_size):
                mine = samples.slice(item.first + start, min(batch_size, item.rows - start))
                columns = mine.to_pydict()
                if joined is not None and modality == "text":
                    first = parts[number].first_row + item.first + start
                    found = joined.of(np.arange(first, first + len(mine)))
                    columns["caption"] = [new or own for new, own in zip(found, columns["caption"], strict=True)]
                yield Piece(item, start, columns)


@dataclass(frozen=True, eq=False)
class Read(Task[Piece, Batch]):
    """Read and decode a batch."""

    folder: Path  # of the catalog
    prepare: Callable[[Sequence[Any]], Inputs]  # of the encoder's side

    def label(self, item: Piece) -> str:
        """Return the first key."""
        return item.keys[0]

    def run(self, item: Piece, worker: Worker) -> Batch:
        """Return the batch, or raise a UserError if the shard cannot be read."""
        if (items := item.samples.get("caption")) is None:
            offsets, sizes = (np.array(item.samples[name], np.int64) for name in COLUMNS["image"][1:])
            items = worker.cached(self, self._shards).read(item.of.shard, offsets, sizes)
        inputs = self.prepare(items)
        fit = np.setdiff1d(np.arange(len(items)), np.fromiter(inputs.faults, np.int64, len(inputs.faults)))
        return Batch(item, inputs.tensors, fit, inputs.faults, inputs.truncated)

    def _shards(self) -> _Shards:
        catalog = Catalog.open(self.folder)
        return _Shards(comparable_shards(catalog, catalog.snapshot()))


class _Shards:
    """Images of tars, local or remote; holds one open."""

    def __init__(self, shards: pa.Table) -> None:
        self._paths: list[str] = shards.column("path").to_pylist()
        self._sizes: list[int] = shards.column("size_bytes").to_pylist()
        self._fingerprints: list[str | None] = shards.column(FINGERPRINT).to_pylist()
        self._layouts: list[ParquetLayout | None] = shards.column(PARQUET).to_pylist()
        self._decoded: tuple[int, memoryview] | None = None  # number and content of a row group of the open shard
        self._table: RowGroups | None = None  # the open shard, if it is a Parquet file
        self._shard = -1
        self._stream: BinaryIO | None = None

    def read(self, shard: int, offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> list[bytes]:
        """Return encoded images; raise a UserError if the shard can't be read, or is shorter than it was."""
        try:
            if shard != self._shard:
                self._open(shard)
            if self._table is not None:
                return [
                    self._of_group(self._table, at, size)
                    for at, size in zip(offsets.tolist(), sizes.tolist(), strict=True)
                ]
            start, stop = int(offsets.min()), int((offsets + sizes).max())
            places = list(zip(offsets.tolist(), sizes.tolist(), strict=True))
            if stop - start > WASTE * int(sizes.sum()):
                return [self._range(at, size) for at, size in places]
            whole = memoryview(self._range(start, stop - start))
            return [bytes(whole[at - start : at - start + size]) for at, size in places]
        except (OSError, EOFError) as error:
            self.close()
            cause = error.cause if isinstance(error, RemoteError) else str(error)
            raise UserError(
                f"the shard {self._paths[shard]} can't be read ({cause}): restore it, or, if it "
                "has moved, use `tailwise relocate`; then repeat this command"
            ) from error

    def _open(self, shard: int) -> None:
        self.close()
        path = self._paths[shard]
        self._stream = open_binary(path)
        found = self._stream.seek(0, 2)
        if found != self._sizes[shard]:  # a login page, for instance
            raise OSError(f"it has {found:,} bytes; {self._sizes[shard]:,} when it was imported")
        check_fingerprint(path, found, blocks_of_stream(path, self._stream), self._fingerprints[shard])
        if (stream := plain(path, self._stream)) is not self._stream:
            self._stream.close()
            self._stream = stream
        if (layout := self._layouts[shard]) is not None:
            self._table = RowGroups(path, found, layout)
        self._shard = shard

    def _of_group(self, table: RowGroups, offset: int, size: int) -> bytes:
        """Return a range of a Parquet file; keeps its row group."""
        number, start = divmod(offset, GROUP_BYTES)
        if self._decoded is None or self._decoded[0] != number:
            self._decoded = None  # not two in memory
            self._decoded = number, table.content(number)
        return bytes(self._decoded[1][start : start + size])

    def _range(self, start: int, size: int) -> bytes:
        stream = cast("BinaryIO", self._stream)
        stream.seek(start)
        content = stream.read(size)
        if len(content) < size:
            raise EOFError(f"it ends before byte {start + size:,}, which it had when it was imported")
        return content

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream, self._table, self._decoded, self._shard = None, None, None, -1


def read_batches(
    folder: Path,
    modality: str,
    prepare: Callable[[Sequence[Any]], Inputs],
    rows: Iterable[ShardRows],
    batch_size: int,
    *,
    workers: int,
    captions: str | None = None,
) -> Generator[Batch, None, None]:
    """Yield batches in order.

    Args:
        folder: of the catalog.
        modality: "image" or "text".
        prepare: of the encoder's side.
        rows: rows of shards; taken as they are needed.
        batch_size: rows; the last batch of an item may have fewer.
        workers: number of processes; 1 reads in this one. The batches don't depend on it.
        captions: joined captions, see `pieces`.

    Raises:
        UserError: a shard can't be read.
    """
    forget_failures()
    found = pieces(Catalog.open(folder), modality, rows, batch_size, captions)
    yield from LocalExecutor().map(Read(folder, prepare), found, Needs(workers=workers, results=AHEAD_BATCHES))
