"""Files of embeddings: rows that can be read in any order, and their names; and rows of arrays in `.npy` and `.npz`, without unpickling.

Rows are read by ranges: a file that is cut while it is read gives an error, where a map would end the process.
Shape letters: n rows of a file, d dimensions.
"""

from __future__ import annotations

import os
import shutil
import struct
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.files import Header, read_array, read_header
from tailwise.shards.columns import DAMAGE, MAX_DIMENSION, count_rows
from tailwise.storage.local import replacing

FLOATS = (np.float16, np.float32, np.float64)
Naming = Literal["key", "uid", "sha256", "md5", "url"]  # "key": a key, or a path that ends in tar and key
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip: signature, …, length of the name, length of the extra field
_COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class BadPartition:
    """The reason why a whole file cannot be used, and its number of rows (0 if unknown)."""

    reason: str
    detail: str
    rows: int


@dataclass(frozen=True)
class Opened:
    """A file that can be used."""

    rows: npt.NDArray[Any] | StoredRows  # [n, d], not in memory
    names: Iterable[pa.Array]  # strings, n in all; can be read once
    unfit: npt.NDArray[np.bool_] | None = None  # [n], rows without a vector of d numbers; None if there is no such row


class NamedRows(ABC):
    """A file with a value for each of some samples, which it names."""

    path: Path  # the file with the values, for reports
    naming: Naming = "key"  # the kind of its names
    home: str | None = None  # the shard of a catalog that the rows belong to, if known

    @abstractmethod
    def names(self) -> Iterable[pa.Array]:
        """Return the names of its rows, strings; raise DAMAGE if they cannot be read."""

    @abstractmethod
    def rows(self, unpacked: Path) -> npt.NDArray[Any] | StoredRows:
        """Return the rows [n, d] of a file that was opened before."""


class EmbeddingFile(NamedRows):
    """One file of embeddings, with the file of its names."""

    metadata: Path  # the file with the names; may be the same
    kind: ClassVar[str] = "embeddings"  # name of the numbers, for reports

    @property
    def fingerprint(self) -> str:
        """Text that changes when the files change, to recognize a file that was joined before."""
        return fingerprint(self.path, self.metadata)

    @abstractmethod
    def header(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and dtype of its rows; raise DAMAGE if they cannot be read."""

    def unpack(self, unpacked: Path, shape: tuple[int, ...]) -> npt.NDArray[np.bool_] | None:  # noqa: ARG002  (most stay)
        """Write the rows to a file if they cannot be read in place; return `unfit` of Opened."""
        return None

    def fault(self, shape: tuple[int, ...], dtype: np.dtype[Any], dimension: int | None) -> BadPartition | None:
        """Return the reason why rows of this shape cannot be used, or None."""
        return matrix_fault(shape, dtype, dimension)

    def size(self) -> tuple[int, int] | None:
        """Return (n, d), or None if it cannot be read."""
        try:
            shape, dtype = self.header()
        except DAMAGE:
            return None
        return None if self.fault(shape, dtype, None) else (shape[0], shape[1])

    def open(self, dimension: int | None, unpacked: Path) -> Opened | BadPartition:
        """Check the file and its width d (None accepts any), and open it for one join.

        `unpacked` names a file for a copy of the rows, if they cannot be read in place.
        """
        try:
            shape, dtype = self.header()
        except DAMAGE as error:
            return BadPartition(f"unreadable {self.kind}", str(error), count_rows(self.metadata))
        if fault := self.fault(shape, dtype, dimension):
            return fault
        try:
            names = self.names()
            named = sum(map(len, names))
        except DAMAGE as error:
            return BadPartition("unreadable metadata", str(error), shape[0])
        if named != shape[0]:
            detail = f"{shape[0]} rows, {named} {self.naming}s"
            return BadPartition("rows differ from metadata", detail, shape[0])
        try:
            unfit = self.unpack(unpacked, shape)
            return Opened(self.rows(unpacked), names if isinstance(names, list) else self.names(), unfit)
        except DAMAGE as error:
            return BadPartition(f"unreadable {self.kind}", str(error), shape[0])


def fingerprint(*paths: Path) -> str:
    """Return path, size and time of files."""
    found = [(path, path.stat() if path.exists() else None) for path in paths]
    return " ".join(f"{path}:{stat.st_size}:{stat.st_mtime_ns}" if stat else f"{path}:absent" for path, stat in found)


def matrix_fault(shape: tuple[int, ...], dtype: np.dtype[Any], dimension: int | None) -> BadPartition | None:
    """Return the reason why an array is not rows of d numbers, or None."""
    rows = shape[0] if shape else 1
    if len(shape) != 2 or not shape[1] or dtype.newbyteorder("=") not in FLOATS:
        return BadPartition("not an embedding matrix", f"{dtype} {list(shape)}", rows)
    if shape[1] > MAX_DIMENSION:
        many = f"{list(shape)}: more than {MAX_DIMENSION:,} numbers a row"
        return BadPartition("not an embedding matrix", many, rows)
    if dimension is not None and shape[1] != dimension:
        return BadPartition("wrong dimension", f"{shape[1]}, not {dimension}", rows)
    return None


def common_dimension(files: Sequence[EmbeddingFile]) -> int | None:
    """Return the width d of most rows, so that one bad file does not decide; None if no file is readable."""
    rows: Counter[int] = Counter()
    for file in files:
        if (size := file.size()) is not None:
            rows[size[1]] += size[0]
    return rows.most_common(1)[0][0] if rows else None


class StoredRows:
    """An array [n] or [n, d] in a file; `offset` of its header counts from the first byte of the file."""

    def __init__(self, path: Path, header: Header) -> None:
        self.shape, self.dtype = header.shape, header.dtype
        self._path, self._offset = path, header.offset
        width = int(np.prod(header.shape[1:]))
        # A file holds strips of n items each: whole rows, or the columns of an array in column order.
        self._strips, self._numbers = (width, 1) if header.fortran else (1, width)

    @classmethod
    def of_file(cls, path: Path) -> StoredRows:
        """Return the array of a `.npy` file; raise an OSError or ValueError if it cannot be read (see `read_header`)."""
        with path.open("rb") as stream:
            return cls(path, read_header(stream, os.fstat(stream.fileno()).st_size))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: slice | npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return some rows, by a slice or by their numbers; raise an OSError if the file cannot be read, or ends before them."""
        from tailwise.storage.pread import pread_many  # noqa: PLC0415  (imports numba: a third of a second)

        rows = np.arange(*at.indices(len(self))) if isinstance(at, slice) else at
        item_bytes = self._numbers * self.dtype.itemsize
        runs = np.flatnonzero(np.diff(rows, prepend=-2) != 1)  # of consecutive rows
        lengths = np.diff(runs, append=len(rows)) * item_bytes
        strips = np.arange(self._strips)[:, None] * len(self)
        starts = (self._offset + (strips + rows[runs]) * item_bytes).ravel()
        found = np.empty((self._strips, len(rows), self._numbers), self.dtype)
        with self._path.open("rb", buffering=0) as stream:
            handles = np.full(len(starts), stream.fileno(), np.int32)
            stops = starts + np.tile(lengths, self._strips)
            if pread_many(handles, starts, stops, found.reshape(-1).view(np.uint8)) < len(starts):
                raise OSError(f"{self._path} ended while it was read")
        wanted: npt.NDArray[Any] = found.transpose(1, 0, 2).reshape(len(rows), *self.shape[1:])
        return wanted


@contextmanager
def reading_member(path: Path, name: str) -> Iterator[tuple[Header, IO[bytes]]]:
    """Open the array `name` of an `.npz` file: its header, and its data as a stream; DAMAGE if it cannot be read."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
        try:
            header = read_header(stream, archive.getinfo(f"{name}.npy").file_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        yield header, stream


def read_member(path: Path, name: str) -> Header:
    """Return the header of the array `name` of an `.npz` file; or raise DAMAGE, such as a KeyError if there is none."""
    with reading_member(path, name) as (header, _):
        return header


def open_member(path: Path, name: str, unpacked: Path) -> npt.NDArray[Any] | StoredRows:
    """Open the array `name` of an `.npz` file: in place if it is stored, else mapped from `unpacked`, to which it is decompressed first.

    An existing `unpacked` is used as it is. Memory does not grow with the array. DataComp's own files are compressed.
    """
    member = read_member(path, name)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            if not unpacked.exists():
                with replacing(unpacked) as temporary, archive.open(info) as source, temporary.open("wb") as target:
                    shutil.copyfileobj(source, target, _COPY_BYTES)
            return read_array(unpacked)
    with path.open("rb") as stream:
        stream.seek(info.header_offset)
        signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no member at byte {info.header_offset}")
    offset = info.header_offset + _LOCAL_HEADER.size + int(name_bytes) + int(extra_bytes) + member.offset
    return StoredRows(path, replace(member, offset=offset))
