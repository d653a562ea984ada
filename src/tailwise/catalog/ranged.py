"""Rows of a `.npy` file in an object store, read by ranges: a training needs the rows of its own shards, not the whole file."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog.npy import read_header
from tailwise.storage.lru import LRUCache
from tailwise.storage.store_path import stored, with_state

HEADER_BYTES = 4096  # that are read to find the header
BLOCK_BYTES = 1 << 18  # that are read at least; neighbours come with one request
KEPT_BLOCKS = 64  # of each file, in memory


class RangedArray:
    """Rows of a file that never changes. They are not hashed: that takes the whole file.

    Attributes:
        shape: of the array.
        dtype: of the array.
        fetched: number of rows that were fetched, each time they were.
    """

    def __init__(self, path: Path) -> None:
        """Read the header; raise an OSError or ValueError if that fails."""
        place = stored(with_state(path))
        if place is None:
            raise ValueError(f"{path} is a local file")
        (start,) = place.read_ranges([(0, HEADER_BYTES)])
        header = read_header(io.BytesIO(start), place.stat().st_size)
        if header.fortran:
            raise ValueError("its rows do not follow each other")
        self._path, self._offset, self.shape, self.dtype = place, header.offset, header.shape, header.dtype
        self._row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        self._rows = max(1, BLOCK_BYTES // self._row_bytes)  # of a block
        self._blocks: LRUCache[int, npt.NDArray[Any]] = LRUCache(KEPT_BLOCKS)
        self.fetched = 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def __getitem__(self, rows: slice | npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return some rows: of a slice, or int64 [n] in any order, each in [0, N)."""
        rows = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        numbers = rows // self._rows
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for number, block in self._read(np.unique(numbers).tolist()).items():
            here = numbers == number
            out[here] = block[rows[here] - number * self._rows]
        return out

    def _read(self, numbers: list[int]) -> dict[int, npt.NDArray[Any]]:
        """Return blocks by number."""
        blocks = {number: block for number in numbers if (block := self._blocks.find(number)) is not None}
        missing = [number for number in numbers if number not in blocks]
        spans = [(number * self._rows, min((number + 1) * self._rows, len(self))) for number in missing]
        size, offset = self._row_bytes, self._offset
        contents = self._path.read_ranges([(offset + start * size, offset + stop * size) for start, stop in spans])
        for number, (start, stop), content in zip(missing, spans, contents, strict=True):
            blocks[number] = np.frombuffer(content, self.dtype).reshape(stop - start, *self.shape[1:])
            self._blocks.get(number, partial(blocks.__getitem__, number))
            self.fetched += stop - start
        return blocks
