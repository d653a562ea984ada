"""Arrays of an `.npz` file, without reading it whole, and without unpickling."""

from __future__ import annotations

import shutil
import struct
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from tailwise.catalog.files import read_array
from tailwise.catalog.npy import Header, read_header
from tailwise.sources.stored_rows import StoredRows
from tailwise.storage.local import replacing

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, …, length of the name, length of the extra field
_COPY_BYTES = 1 << 22


def read_member(path: Path, name: str) -> Header:
    """Return the header of the array `name` of an `.npz` file.

    Raises:
        KeyError: there is no such array.
        ValueError: it is pickled, damaged or cut off.
        OSError, zipfile.BadZipFile: the file cannot be read.
    """
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
        try:
            return read_header(stream, archive.getinfo(f"{name}.npy").file_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def open_member(path: Path, name: str, unpacked: Path) -> npt.NDArray[Any] | StoredRows:
    """Open the array `name` of an `.npz` file: in place if it is stored, else mapped from `unpacked`, to which it is decompressed first.

    An existing `unpacked` is used as it is. Memory does not grow with the array. DataComp's own files are compressed.

    Raises:
        As `read_member`, and the errors of `zipfile` for damaged compressed data.
    """
    member = read_member(path, name)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            if not unpacked.exists():
                with replacing(unpacked) as temporary, archive.open(info) as source, temporary.open("wb") as target:
                    shutil.copyfileobj(source, target, _COPY_BYTES)
            return read_array(unpacked)
    offset = _data_offset(path, info.header_offset) + member.offset
    return StoredRows(path, replace(member, offset=offset))


def _data_offset(path: Path, header_offset: int) -> int:
    with path.open("rb") as stream:
        stream.seek(header_offset)
        signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no member at byte {header_offset}")
    return header_offset + _LOCAL_HEADER.size + int(name_bytes) + int(extra_bytes)
