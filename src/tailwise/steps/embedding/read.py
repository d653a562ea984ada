"""Reading of images and captions in worker processes, batch by batch: images from the tars, captions from the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, Dataset

from tailwise.catalog.catalog import Catalog
from tailwise.catalog.files import check_file
from tailwise.catalog.schema import FINGERPRINT
from tailwise.encoders.encoder import Fault, Inputs, Tensors
from tailwise.errors import UserError
from tailwise.execution.local import as_it_is, begin_worker, default_workers, starting_workers
from tailwise.shards.fingerprint import blocks_of_stream, check_fingerprint, comparable_shards
from tailwise.storage.errors import RemoteError
from tailwise.storage.files import open_binary
from tailwise.storage.remote import forget_failures

MAX_WORKERS = 16  # by default, for one device
AHEAD_BATCHES = 2  # of each worker
WASTE = 2  # a batch is one read if that is at most WASTE times its images: shards hold little else


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard: the unit of resumption, and of work where there are several devices.

    Attributes:
        shard: its id.
        part: number of its part.
        first: its first row in the part.
        rows: how many.
    """

    shard: int
    part: int
    first: int
    rows: int


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a shard that make one batch.

    Attributes:
        of: the shard.
        start: first row in the shard.
        rows: how many.
    """

    of: ShardRows
    start: int
    rows: int

    @property
    def last(self) -> bool:
        """True if the shard ends with the piece."""
        return self.start + self.rows == self.of.rows


@dataclass
class Batch:
    """Result of a piece.

    Attributes:
        piece: which rows.
        tensors: [n, …] each, of the n rows that are fit.
        keys: of all rows.
        fit: int64 [n], rows counted from the start of the piece.
        faults: of all other rows, counted in the same way.
        truncated: how many captions are longer than the model reads.
    """

    piece: Piece
    tensors: Tensors
    keys: list[str]
    fit: npt.NDArray[np.int64]
    faults: dict[int, Fault]
    truncated: int

    def pin_memory(self) -> Batch:
        """Called by the DataLoader, where a GPU will fetch the tensors."""
        self.tensors = {name: value.pin_memory() for name, value in self.tensors.items()}
        return self


def pieces(shards: Iterable[ShardRows], batch_size: int) -> Iterator[Piece]:
    """The batches of all shards, in order. None crosses shards: so what a batch holds depends on nothing but its size."""
    for shard in shards:
        for start in range(0, shard.rows, batch_size):
            yield Piece(shard, start, min(batch_size, shard.rows - start))


class _Pieces(Dataset["Batch | UserError"]):
    """Batches by piece. Picklable; opens what it needs in the process that reads."""

    def __init__(self, folder: Path, modality: str, prepare: Callable[[Sequence[Any]], Inputs]) -> None:
        self._folder, self._modality, self._prepare = folder, modality, prepare
        self._rows: _RowGroups | None = None
        self._shards: _Shards | None = None

    def __getitem__(self, piece: Piece) -> Batch | UserError:
        """One batch. A user's mistake is given back, not raised: it would arrive as a traceback."""
        try:
            return self._batch(piece)
        except UserError as error:
            return error

    def _batch(self, piece: Piece) -> Batch:
        if self._rows is None or self._shards is None:
            catalog = Catalog.open(self._folder)
            self._rows, self._shards = _RowGroups(catalog), _Shards(comparable_shards(catalog, catalog.snapshot()))
        columns = ["key", "caption"] if self._modality == "text" else ["key", "image_offset", "image_bytes"]
        table = self._rows.read(piece.of.part, piece.of.first + piece.start, piece.rows, columns)
        if self._modality == "text":
            items: Sequence[Any] = table.column("caption").to_pylist()
        else:
            offsets, sizes = (table.column(name).to_numpy() for name in ("image_offset", "image_bytes"))
            items = self._shards.read(piece.of.shard, offsets, sizes)
        inputs = self._prepare(items)
        fit = np.setdiff1d(np.arange(piece.rows), np.fromiter(inputs.faults, np.int64, len(inputs.faults)))
        return Batch(piece, inputs.tensors, table.column("key").to_pylist(), fit, inputs.faults, inputs.truncated)


class _RowGroups:
    """Rows of the catalog's Parquet files; holds one group of rows."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._part = -1
        self._group = -1

    def read(self, part: int, first: int, rows: int, columns: list[str]) -> pa.Table:
        """Some columns of consecutive rows of a part."""
        if part != self._part:
            self._file = pq.ParquetFile(check_file(self._catalog.samples_path(part)))
            counts = [self._file.metadata.row_group(at).num_rows for at in range(self._file.num_row_groups)]
            self._ends = np.cumsum(counts)
            self._part, self._group = part, -1
        found = []
        while rows:
            group = int(np.searchsorted(self._ends, first, "right"))
            if group != self._group:
                self._table, self._group = self._file.read_row_group(group, columns), group
            start = int(first - (self._ends[group] - self._table.num_rows))
            slice_ = self._table.slice(start, rows)
            found.append(slice_)
            first, rows = first + slice_.num_rows, rows - slice_.num_rows
        return pa.concat_tables(found)


class _Shards:
    """Images of tars, local or remote; holds one open."""

    def __init__(self, shards: pa.Table) -> None:
        self._paths: list[str] = shards.column("path").to_pylist()
        self._sizes: list[int] = shards.column("size_bytes").to_pylist()
        self._fingerprints: list[str | None] = shards.column(FINGERPRINT).to_pylist()
        self._shard = -1
        self._stream: BinaryIO | None = None

    def read(self, shard: int, offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> list[bytes]:
        """The encoded images at these offsets.

        Raises:
            UserError: the shard can't be read, or is shorter than it was.
        """
        try:
            if shard != self._shard or self._stream is None:
                self._open(shard)
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
        self._stream, self._shard = open_binary(path), shard
        found = self._stream.seek(0, 2)
        if found != self._sizes[shard]:  # a login page, for instance
            raise OSError(f"it has {found:,} bytes; {self._sizes[shard]:,} when it was imported")
        check_fingerprint(path, found, blocks_of_stream(path, self._stream), self._fingerprints[shard])

    def _range(self, start: int, size: int) -> bytes:
        stream = cast("BinaryIO", self._stream)
        stream.seek(start)
        content = stream.read(size)
        if len(content) < size:
            raise EOFError(f"it ends before byte {start + size:,}, which it had when it was imported")
        return content

    def close(self) -> None:
        """Lets go of the open file."""
        if self._stream is not None:
            self._stream.close()
        self._stream, self._shard = None, -1


def read_batches(
    folder: Path,
    modality: str,
    prepare: Callable[[Sequence[Any]], Inputs],
    shards: Sequence[ShardRows],
    batch_size: int,
    *,
    workers: int | None,
    pin: bool,
) -> Iterator[Batch]:
    """The batches of these shards, in order.

    Args:
        folder: of the catalog.
        modality: "image" or "text".
        prepare: of the encoder's side.
        shards: which.
        batch_size: rows; the last batch of a shard may have fewer.
        workers: processes; 1 reads in this one. None for one a processor, at most MAX_WORKERS. The batches don't depend on it.
        pin: into memory that a GPU can fetch from.

    Raises:
        UserError: a shard can't be read.
        BrokenProcessPool: a worker was killed.
    """
    forget_failures()
    total = sum(-(-shard.rows // batch_size) for shard in shards)
    workers = min(workers or min(default_workers(), MAX_WORKERS), total)
    in_workers = workers if workers > 1 else 0
    loader = DataLoader(
        _Pieces(folder, modality, prepare),
        batch_size=None,
        sampler=cast("Any", _Lazy(shards, batch_size)),
        num_workers=in_workers,
        prefetch_factor=AHEAD_BATCHES if in_workers else None,
        multiprocessing_context="spawn"
        if in_workers
        else None,  # a fork of a process that holds CUDA, or threads, may hang
        collate_fn=as_it_is,
        worker_init_fn=begin_worker,
        pin_memory=pin,
        generator=torch.Generator(),  # else the process's own would lose a number
    )
    try:
        with starting_workers() if in_workers else nullcontext():  # it starts the workers
            batches = iter(cast("Iterable[Batch | UserError]", loader))
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker (pid"):  # what a worker itself raised is something else
            raise BrokenProcessPool(str(error)) from error
        raise


@dataclass(frozen=True)
class _Lazy:
    """The order of the batches, which for a billion samples is too long to be a list."""

    shards: Sequence[ShardRows]
    batch_size: int

    def __iter__(self) -> Iterator[Piece]:
        return pieces(self.shards, self.batch_size)
