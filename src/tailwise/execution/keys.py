"""From keys to rows, for joins: a hash index on disk, so that memory doesn't grow with the pool."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.files import read_array, write_array
from tailwise.catalog.noted import text_hash
from tailwise.execution.base import KERNEL, Apply, Executor
from tailwise.execution.local import LocalExecutor
from tailwise.execution.shuffle import Shuffle
from tailwise.storage.local import remove_folder

ABSENT = -1
AMBIGUOUS = -2
BUCKET_ROWS = 4_000_000  # sorted at a time, at about 100 bytes each
HASH = np.dtype([("high", "<u8"), ("low", "<u8")])
ENTRY = np.dtype([*HASH.descr, ("row", "<i8")])


def hash_keys(keys: Iterable[str]) -> npt.NDArray[Any]:
    """128-bit hashes of keys: structured [n] with "high" and "low", uint64."""
    return np.frombuffer(b"".join(map(text_hash, keys)), HASH)


def _hashes(keys: Iterable[str] | npt.NDArray[Any]) -> npt.NDArray[Any]:
    return keys if isinstance(keys, np.ndarray) else hash_keys(keys)


def as_hashes(values: pa.Array | pa.ChunkedArray) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Return a column of 16 bytes [n] as hashes (see `hash_keys`), HASH [n], and which there are: bool [n]."""
    filled = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    there = filled.is_valid().to_numpy(zero_copy_only=False)
    filled = filled.fill_null(bytes(16))
    return np.frombuffer(filled.buffers()[1] or b"", HASH, len(filled), 16 * filled.offset), there


def bits_of_buckets(rows: int, bucket_rows: int) -> int:
    """Return the number of leading bits by which about `rows` hashes are split into buckets of about `bucket_rows`."""
    return max(0, int(np.ceil(np.log2(max(rows, 1) / bucket_rows))))


def buckets_of(hashes: npt.NDArray[Any], bits: int) -> npt.NDArray[np.int64]:
    """Return the bucket of each hash, int64 [n]: its leading bits; see `bits_of_buckets`."""
    buckets: npt.NDArray[np.int64] = (hashes["high"] >> np.uint64(64 - bits)).astype(np.int64)
    return buckets


class KeyIndex:
    """Sorted buckets of (hash, row), split by the leading bits of the hash; 32 bytes a row on disk, one bucket in memory at a time."""

    def __init__(self, folder: Path, rows: int, *, bucket_rows: int = BUCKET_ROWS) -> None:
        """Make an empty index in `folder`, which should not exist yet, for about `rows` rows, in buckets of about `bucket_rows`."""
        self.folder = folder
        self.bits = bits_of_buckets(rows, bucket_rows)
        self._shuffle = Shuffle(folder / "entries", ENTRY, 1 << self.bits)
        folder.mkdir(parents=True)

    def add(self, keys: Iterable[str] | npt.NDArray[Any], rows: npt.NDArray[np.int64]) -> None:
        """Add keys, or their hashes, and their rows, which no other call adds: tasks may add theirs. `seal` when all are in."""
        if not len(rows):
            return
        hashes = _hashes(keys)
        entries = np.empty(len(hashes), ENTRY)
        entries["high"], entries["low"], entries["row"] = hashes["high"], hashes["low"], rows
        self._shuffle.write(str(rows[0]), [(buckets_of(hashes, self.bits), entries)])

    def seal(self, executor: Executor | None = None, *, count_only: bool = False) -> int:
        """Sort the buckets; return the number of rows that share their key with another row. Then `find` works, if not `count_only`."""
        task = Apply(self._twins if count_only else self._sort)
        clashing = sum((executor or LocalExecutor()).map(task, range(self._shuffle.buckets), KERNEL))
        remove_folder(self._shuffle.folder)
        return clashing

    def _sorted(self, bucket: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Return the entries of a bucket, sorted by hash and row, and which share their hash with another."""
        entries = self._shuffle.read([path.stem for path in self._shuffle.folder.glob("*.npy")], bucket)
        entries = entries[np.argsort(entries["high"])]
        close = np.flatnonzero(_twins(entries["high"]))  # few
        entries[close] = entries[close][np.lexsort([entries[name][close] for name in ("row", "low", "high")])]
        twin = np.zeros(len(entries), np.bool_)
        twin[close] = _twins(entries[["high", "low"]][close])
        return entries, twin

    def _twins(self, bucket: int) -> int:
        return int(self._sorted(bucket)[1].sum())

    def _sort(self, bucket: int) -> int:
        entries, twin = self._sorted(bucket)
        entries["row"][twin] = AMBIGUOUS
        self._write(bucket, entries)
        return int(twin.sum())

    def _write(self, bucket: int, entries: npt.NDArray[Any]) -> None:
        """Write sorted entries; their leading halves lie apart, so that a search touches only the pages it needs."""
        write_array(self.folder / f"{bucket}.high.npy", np.ascontiguousarray(entries["high"]))
        write_array(self.folder / f"{bucket}.npy", entries)

    def find(self, keys: Iterable[str] | npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """The row of each key, or hash, int64 [n]: ABSENT if no row has it, AMBIGUOUS if several have."""
        hashes = _hashes(keys)
        rows = np.full(len(hashes), ABSENT, np.int64)
        buckets = buckets_of(hashes, self.bits)
        for bucket in np.unique(buckets):
            entries, high = (read_array(self.folder / f"{bucket}{ending}.npy") for ending in ("", ".high"))
            asked = np.flatnonzero(buckets == bucket)
            rows[asked] = find_sorted(entries, high, hashes[asked])
        return rows


def _twins(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which of some sorted values are equal to their neighbour, bool [n]."""
    twin = np.zeros(len(values), np.bool_)
    same = values[1:] == values[:-1]
    twin[1:] |= same
    twin[:-1] |= same
    return twin


def find_sorted(
    entries: npt.NDArray[Any], high: npt.NDArray[np.uint64], hashes: npt.NDArray[Any]
) -> npt.NDArray[np.int64]:
    """Return the "row" of the first entry of each hash, int64 [n], ABSENT where there is none.

    Args:
        entries: structured [m] with "high", "low" and "row", sorted by "high" and "low".
        high: uint64 [m], those of the entries.
        hashes: structured [n] with "high" and "low".
    """
    position = np.searchsorted(high, hashes["high"])
    rows = np.full(len(hashes), ABSENT, np.int64)
    open_ = np.arange(len(hashes))
    while open_.size:  # more than one round only where the leading 64 bits of different keys agree
        position, open_ = position[position < len(entries)], open_[position < len(entries)]
        hit = entries[position]
        near = hit["high"] == hashes["high"][open_]
        found = near & (hit["low"] == hashes["low"][open_])
        rows[open_[found]] = hit["row"][found]
        position, open_ = position[near & ~found] + 1, open_[near & ~found]
    return rows
