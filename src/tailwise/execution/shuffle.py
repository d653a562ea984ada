"""Regroup: the one spill to disk. Each task writes its records sorted by bucket, with an index; a reader takes a bucket from all files.

Records of a bucket keep the order of the files and, within a file, of the rows: with files by part, they come by row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog.files import read_array, write_array
from tailwise.storage.local import in_place, replacing
from tailwise.storage.store import THREADS
from tailwise.storage.store_path import is_stored, looked_up, stored

BUCKET_ROWS = 16_000_000
RUN_BYTES = 64 << 20  # records that are sorted at a time
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
        """Write the records of one task: chunks of bucket int64 [n] and record [n] of consecutive rows.

        Memory: a chunk, and three times RUN_BYTES.
        """
        bounds, position = [], 0
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self._records(name)
        with (replacing if self.resumed else in_place)(place) as path, path.open("wb") as stream:
            for buckets, records in _runs(chunks, max(1, RUN_BYTES // self.dtype.itemsize)):
                order = np.argsort(buckets, kind="stable")
                stream.write(np.ascontiguousarray(records[order]).data)
                bounds.append(position + np.searchsorted(buckets[order], np.arange(self.buckets + 1)))
                position += len(records)
        index = np.array(bounds, np.int64).reshape(-1, self.buckets + 1)
        (write_array if self.resumed or is_stored(place) else np.save)(self.index(name), index)

    def rows(self, names: Sequence[str], bucket: int) -> int:
        """Return the number of records of a bucket."""
        return sum(stop - start for _, start, stop in self._ranges(names, bucket))

    def read(self, names: Sequence[str], bucket: int) -> Records:
        """Return the records of a bucket."""
        ranges = list(self._ranges(names, bucket))
        ends = np.cumsum([0, *(stop - start for _, start, stop in ranges)]).tolist()
        records = np.empty(ends[-1], self.dtype)

        def load(number: int) -> None:
            records[ends[number] : ends[number + 1]] = self._load(*ranges[number])

        if is_stored(self.folder):
            with ThreadPoolExecutor(THREADS) as pool:
                for _ in pool.map(load, range(len(ranges))):
                    pass
        else:
            for number in range(len(ranges)):
                load(number)
        return records

    def chunks(self, names: Sequence[str], bucket: int, rows: int = BUCKET_ROWS) -> Iterator[Records]:
        """Yield the records of a bucket, at most `rows` at a time."""
        for path, start, stop in self._ranges(names, bucket):
            for first in range(start, stop, rows):
                yield self._load(path, first, min(first + rows, stop))

    def _load(self, path: Path, start: int, stop: int) -> Records:
        if (place := stored(path)) is not None:
            found = place.read_ranges([(start * self.dtype.itemsize, stop * self.dtype.itemsize)])[0]
            return np.frombuffer(found, self.dtype)
        return np.fromfile(path, self.dtype, stop - start, offset=start * self.dtype.itemsize)

    def _records(self, name: str) -> Path:
        return self.folder / f"{name}.records"

    def _ranges(self, names: Sequence[str], bucket: int) -> Iterator[tuple[Path, int, int]]:
        paths = looked_up([path for name in names for path in (self.index(name), self._records(name))])
        for index, records in zip(paths[::2], paths[1::2], strict=True):
            for start, stop in read_array(index)[:, bucket : bucket + 2].tolist():
                if start < stop:
                    yield records, start, stop


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
