"""Rows of arrays in users' files, `.npy` and `.npz`, without unpickling.

They are read by ranges: a file that is cut while it is read gives an error, where a map would end the process.
"""

from __future__ import annotations

import os
import shutil
import struct
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog.files import read_array
from tailwise.catalog.npy import Header, read_header
from tailwise.storage.local import replacing
from tailwise.storage.pread import pread_many

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip: signature, …, length of the name, length of the extra field
_COPY_BYTES = 1 << 22


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


def read_member(path: Path, name: str) -> Header:
    """Return the header of the array `name` of an `.npz` file; or raise DAMAGE, such as a KeyError if there is none."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
        try:
            return read_header(stream, archive.getinfo(f"{name}.npy").file_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


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
