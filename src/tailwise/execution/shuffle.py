"""Regroup: the one spill to disk. Each task writes its records sorted by bucket, with an index; a reader takes a bucket from all files.

Records of a bucket keep the order of the files and, within a file, of the rows: with files by part, they come by row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog.files import create_array, read_array, write_array
from tailwise.catalog.layout import SPILL
from tailwise.kernels.ranks import value_ranks
from tailwise.storage.local import replacing, scratch

BUCKET_ROWS = 16_000_000
RUN_BYTES = 64 << 20  # records that are sorted at a time
_VALUE = np.dtype([("row", "<i8"), ("label", "<i4"), ("value", "<f4")])
Records = npt.NDArray[Any]


@dataclass(frozen=True)
class Shuffle:
    """Records by bucket."""

    folder: Path  # of the files; the caller that makes it removes it
    dtype: np.dtype[Any]  # of a record
    buckets: int  # number of buckets
    resumed: bool = False  # True if a later run uses the files: they are flushed to disk

    def index(self, name: str) -> Path:
        """Return the index of a file, which is written last: int64 [runs, buckets + 1], first record of each bucket in each run."""
        return self.folder / f"{name}.npy"

    def write(self, name: str, chunks: Iterable[tuple[npt.NDArray[np.int64], Records]]) -> None:
        """Write the records of one task.

        Args:
            name: of the file; files are read in the order of their names as given to `read`.
            chunks: bucket int64 [n] and record [n] of consecutive rows. Memory: a chunk, and three times RUN_BYTES.
        """
        bounds, position = [], 0
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self._records(name)
        with replacing(place) if self.resumed else nullcontext(place) as path, path.open("wb") as stream:
            for buckets, records in _runs(chunks, max(1, RUN_BYTES // self.dtype.itemsize)):
                order = np.argsort(buckets, kind="stable")
                stream.write(np.ascontiguousarray(records[order]).data)
                bounds.append(position + np.searchsorted(buckets[order], np.arange(self.buckets + 1)))
                position += len(records)
        index = np.array(bounds, np.int64).reshape(-1, self.buckets + 1)
        (write_array if self.resumed else np.save)(self.index(name), index)

    def rows(self, names: Sequence[str], bucket: int) -> int:
        """Return the number of records of a bucket."""
        return sum(stop - start for _, start, stop in self._ranges(names, bucket))

    def read(self, names: Sequence[str], bucket: int) -> Records:
        """Return the records of a bucket."""
        ranges = list(self._ranges(names, bucket))
        records, first = np.empty(sum(stop - start for _, start, stop in ranges), self.dtype), 0
        for path, start, stop in ranges:
            records[first : first + stop - start] = self._load(path, start, stop)
            first += stop - start
        return records

    def chunks(self, names: Sequence[str], bucket: int, rows: int = BUCKET_ROWS) -> Iterator[Records]:
        """Yield the records of a bucket, at most `rows` at a time."""
        for path, start, stop in self._ranges(names, bucket):
            for first in range(start, stop, rows):
                yield self._load(path, first, min(first + rows, stop))

    def _load(self, path: Path, start: int, stop: int) -> Records:
        return np.fromfile(path, self.dtype, stop - start, offset=start * self.dtype.itemsize)

    def _records(self, name: str) -> Path:
        return self.folder / f"{name}.records"

    def _ranges(self, names: Sequence[str], bucket: int) -> Iterator[tuple[Path, int, int]]:
        for name in names:
            for start, stop in read_array(self.index(name))[:, bucket : bucket + 2].tolist():
                if start < stop:
                    yield self._records(name), start, stop


def _runs(
    chunks: Iterable[tuple[npt.NDArray[np.int64], Records]], rows: int
) -> Iterator[tuple[npt.NDArray[np.int64], Records]]:
    """Yield chunks, small ones joined to about `rows` rows."""
    held: list[tuple[npt.NDArray[np.int64], Records]] = []
    for chunk in chunks:
        held.append(chunk)
        if sum(len(records) for _, records in held) >= rows:
            yield _joined(held)
            held.clear()
    if held:
        yield _joined(held)


def _joined(chunks: Sequence[tuple[npt.NDArray[np.int64], Records]]) -> tuple[npt.NDArray[np.int64], Records]:
    if len(chunks) == 1:
        return chunks[0]
    return np.concatenate([buckets for buckets, _ in chunks]), np.concatenate([records for _, records in chunks])


def cluster_buckets(sizes: npt.NDArray[np.int64], bucket_rows: int) -> npt.NDArray[np.int64]:
    """Return the bucket of each cluster: consecutive clusters, at most `bucket_rows` rows unless a single cluster has more."""
    buckets = np.zeros(len(sizes), np.int64)
    bucket = filled = 0
    for cluster, size in enumerate(sizes.tolist()):
        if filled and filled + size > bucket_rows:
            bucket, filled = bucket + 1, 0
        buckets[cluster] = bucket
        filled += size
    return buckets


def write_value_ranks(
    path: Path,
    sizes: npt.NDArray[np.int64],
    columns: Iterable[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]],
    *,
    bucket_rows: int = BUCKET_ROWS,
) -> None:
    """Write the in-cluster rank of every row by ascending value, ties by row: uint32 [N], a `.npy` file.

    Rows are regrouped by cluster, those of a cluster of more than `bucket_rows` again by value. Memory is bounded by `bucket_rows`, at
    about 60 bytes a row.

    Args:
        path: of the file.
        sizes: int64 [K], members of each cluster.
        columns: labels int32 [n] (negative: no cluster, rank 0) and values float32 [n], part by part.
        bucket_rows: rows ranked at a time; the result doesn't depend on it.
    """
    buckets, total = cluster_buckets(sizes, bucket_rows), 0

    def chunks() -> Iterator[tuple[npt.NDArray[np.int64], Records]]:
        nonlocal total
        for labels, values in columns:
            members = np.flatnonzero(labels >= 0)
            records = np.empty(len(members), _VALUE)
            records["row"], records["label"], records["value"] = total + members, labels[members], values[members]
            total += len(labels)
            yield buckets[records["label"]], records

    with scratch(path.with_name(path.name + SPILL)) as folder:
        shuffle = Shuffle(folder, _VALUE, int(buckets.max(initial=0)) + 1)
        shuffle.write("rows", chunks())
        ranks = create_array(path, (total,), np.uint32)
        for bucket in range(shuffle.buckets):
            _rank(shuffle, bucket, ranks, bucket_rows)


def _rank(
    shuffle: Shuffle, bucket: int, ranks: npt.NDArray[np.uint32], bucket_rows: int, first: int = 0, shift: int = 16
) -> None:
    """Rank the records of a bucket, from rank `first` on; split a cluster that is too large by 16 bits of its values, from `shift` on."""
    names = ("rows",)
    if shuffle.rows(names, bucket) <= bucket_rows:
        records = shuffle.read(names, bucket)
        ranks[records["row"]] = first + value_ranks(records["label"], records["value"])
        return
    if shift < 0:  # equal values, which come by row
        for chunk in shuffle.chunks(names, bucket, bucket_rows):
            ranks[chunk["row"]] = first + np.arange(len(chunk), dtype=np.uint32)
            first += len(chunk)
        return
    sizes = np.zeros(1 << 16, np.int64)
    for chunk in shuffle.chunks(names, bucket, bucket_rows):
        sizes += np.bincount(_digits(chunk["value"], shift), minlength=len(sizes))
    pieces = cluster_buckets(sizes, bucket_rows)
    finer = Shuffle(shuffle.folder / str(bucket), _VALUE, int(pieces[-1]) + 1)
    chunks = shuffle.chunks(names, bucket, bucket_rows)
    finer.write("rows", ((pieces[_digits(chunk["value"], shift)], chunk) for chunk in chunks))
    for piece in range(finer.buckets):
        several = np.count_nonzero(sizes[pieces == piece]) > 1  # then it isn't too large
        _rank(finer, piece, ranks, bucket_rows, first, shift if several else shift - 16)
        first += int(sizes[pieces == piece].sum())


def _digits(values: npt.NDArray[np.float32], shift: int) -> npt.NDArray[np.int64]:
    """Return 16 bits of each value, from `shift` on, of the number that orders floats as they are: int64 [n]."""
    bits = (values + np.float32(0)).view(np.uint32)  # −0 is 0
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    digits: npt.NDArray[np.int64] = ((ordered >> shift) & 0xFFFF).astype(np.int64)
    return digits
