"""Columns of an artifact: one `.npy` file a part, and rows of a snapshot that are read across its parts."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.catalog import Part
from tailwise.catalog.files import map_array, read_header, reading, write_array
from tailwise.errors import DamagedError
from tailwise.kernels.places import by_value
from tailwise.mapped import release_pages
from tailwise.storage.lru import LRUCache
from tailwise.storage.store_path import is_stored, stored, with_state

Rows = slice | npt.NDArray[np.int64]
Found = TypeVar("Found", "npt.NDArray[Any]", "RangedArray")
WHOLE_SHARE = 8  # a file in an object store is fetched whole for more than 1 / WHOLE_SHARE of its rows
HEADER_BYTES = 4096  # that are read to find the header
BLOCK_BYTES = 1 << 18  # that are read at least; neighbours come with one request
KEPT_BLOCKS = 64  # of each file, in memory


@dataclass(frozen=True)
class PartColumn:
    """A column of an artifact that has one `.npy` file a part."""

    folder: Path  # of the artifact
    name: str  # of the column, as in layout

    def path(self, part: Part) -> Path:
        """Return the file of one part."""
        return self.folder / f"{self.name}-{part.name}{layout.ARRAY}"

    def read(self, part: Part) -> npt.NDArray[Any]:
        """Return one part, mapped."""
        return map_array(self.path(part))

    def write(self, part: Part, values: npt.NDArray[Any]) -> None:
        """Write one part."""
        write_array(self.path(part), values)


class PlainColumn(PartColumn):
    """A column whose first file has the name of the column alone: a pool of one part has plain names."""

    def path(self, part: Part) -> Path:
        """Return the file of one part."""
        return self.folder / layout.plain_file(self.name, part.number)


class RowsByPart:
    """Rows of a snapshot, split by part.

    Attributes:
        parts: of the snapshot, in row order.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self._ends = [part.span.stop for part in parts]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def part_of(self, row: int) -> Part:
        """Return the part of a row."""
        return self.parts[bisect_right(self._ends, row)]

    def numbers_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the number of the part of each row: int64 [n]."""
        return np.searchsorted(self._ends, rows, side="right")

    def split(self, rows: npt.NDArray[np.int64]) -> Iterator[tuple[Part, slice | npt.NDArray[np.int64]]]:
        """Yield each part that has some of the rows, int64 [n] in any order, and the places of these in `rows`.

        Raises:
            IndexError: the snapshot does not have a row.
        """
        if not len(rows):
            return
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= len(self):
            raise IndexError(f"row {low if low < 0 else high} is not among 0 … {len(self) - 1}")
        first, last = self.part_of(low), self.part_of(high)
        if first is last:
            yield first, slice(None)
            return
        numbers = self.numbers_of(rows)
        if (numbers[1:] >= numbers[:-1]).all():
            present = np.unique(numbers)
            ends = np.searchsorted(numbers, present, side="right").tolist()
            for number, start, stop in zip(present.tolist(), [0, *ends], ends, strict=False):
                yield self.parts[number], slice(start, stop)
        else:
            for number, places in by_value(numbers.astype(np.min_scalar_type(last.number))):  # small ones sort faster
                yield self.parts[number], places


class RowColumn:
    """A column over the rows of all parts. The file of a part is mapped when one of its rows is first read, and closed again."""

    def __init__(
        self,
        path: Callable[[Part], Path],
        parts: Sequence[Part],
        dtype: npt.DTypeLike,
        shape: tuple[int, ...] = (),
        read: Callable[[Path], npt.NDArray[Any]] = map_array,
    ) -> None:
        """Map nothing yet.

        Args:
            path: part → its `.npy` file.
            parts: of the snapshot, in row order.
            dtype: of the column; a file may have a narrower type of its kind.
            shape: of one row.
            read: maps one file.
        """
        self.path, self.dtype, self.shape = path, np.dtype(dtype), shape
        self._rows, self._read = RowsByPart(parts), read
        self._mapped: dict[int, npt.NDArray[Any]] = {}
        self._ranged: dict[int, RangedArray] = {}
        self._touched: set[int] = set()  # parts that were read since pages were released

    def __len__(self) -> int:
        return len(self._rows)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Return all rows, for NumPy."""
        return np.array(self[:], dtype, copy=copy)

    def __getitem__(self, rows: Rows) -> npt.NDArray[Any]:
        """Return some rows: of a slice inside one part the mapped file, else a copy.

        `rows`: a slice, as of any sequence of N rows, or int64 [n] in any order, each in [0, N).

        Raises:
            IndexError: a row is outside [0, N).
            DamagedError: a file is missing or damaged, or does not hold the rows of its part.
        """
        if not isinstance(rows, slice):
            return self._take(rows)
        start, stop, step = rows.indices(len(self))
        if step != 1:
            return self._take(np.arange(start, stop, step))
        if start >= stop:
            return np.empty((0, *self.shape), self.dtype)
        first, last = self._rows.part_of(start).number, self._rows.part_of(stop - 1).number
        pieces = [
            self._at(part, slice(max(start - part.first_row, 0), min(stop - part.first_row, part.rows)))
            for part in self._rows.parts[first : last + 1]
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _take(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        values = np.empty((len(rows), *self.shape), self.dtype)
        for part, places in self._rows.split(rows):
            found = self._at(part, rows[places] - part.first_row)
            if len(found) == len(rows):
                return found
            values[places] = found
        return values

    def _at(self, part: Part, rows: Rows) -> npt.NDArray[Any]:
        """Return some rows of a part, counted from its first: of a slice the mapped file.

        In an object store, a few rows are fetched alone, until a share of all rows has been.
        """
        count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        whole = WHOLE_SHARE * count > part.rows or part.number in self._mapped or self._read is not map_array
        if whole or not is_stored(path := self.path(part)):
            return self.read(part)[rows]
        ranged = self._ranged.get(part.number)
        if ranged is None:
            with reading(path, whole=False) as checked:
                ranged = self._ranged[part.number] = RangedArray(checked)
            self._check(part, ranged)
        if WHOLE_SHARE * ranged.fetched > part.rows:
            del self._ranged[part.number]
            return self.read(part)[rows]
        return ranged[rows]

    def read(self, part: Part) -> npt.NDArray[Any]:
        """Return one part, mapped.

        Raises:
            DamagedError: its file is missing or damaged, or does not hold the rows of the part.
        """
        found = self._mapped.get(part.number)
        if found is None:
            found = self._mapped[part.number] = self._check(part, self._read(self.path(part)))
        self._touched.add(part.number)
        return found

    def _check(self, part: Part, found: Found) -> Found:
        path, shape = self.path(part), (part.rows, *self.shape)
        narrower = found.dtype.kind == self.dtype.kind and found.dtype.itemsize <= self.dtype.itemsize
        if not narrower or found.shape != shape:
            raise DamagedError(
                f"{path} holds {found.dtype} {list(found.shape)}, and its part needs {self.dtype} {list(shape)}: it is damaged, or of "
                f"an older version; delete {path.parent}, then make it again"
            )
        return found

    def file_of(self, row: int) -> Path:
        """Return the file of a row."""
        return self.path(self._rows.part_of(row))

    def release_pages(self) -> None:
        """Release the pages that were read: they stay in the system's cache, and no longer count as this process's memory."""
        touched = list(self._touched)  # other threads may be reading
        self._touched.difference_update(touched)
        for number in touched:
            release_pages(self._mapped[number])


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
