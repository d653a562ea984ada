"""Files that are either whole or absent: temporary name, fsync, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tailwise.catalog.npy import read_header
from tailwise.errors import UserError

TEMPORARY_SUFFIX = ".writing"
ROW_GROUP_ROWS = 65_536  # what must be read of a Parquet file to get one row


@contextmanager
def replacing(path: Path, *, unique: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and takes the name `path`, on an error it is removed.

    Args:
        path: the file to write.
        unique: for files outside a catalog, where no lock keeps other writers away: the temporary name is this process's own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f".{uuid.uuid4().hex}" if unique else ""
    temporary = path.with_name(f"{path.name}{own}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """An empty folder for intermediate files; gone afterwards, and what an earlier process left in it, gone before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: object, *, unique: bool = False) -> None:
    """Writes `value` as JSON with sorted keys, atomically; `unique` as in `replacing`."""
    with replacing(path, unique=unique) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:  # noqa: ANN401  (whatever was written)
    """The value of a JSON file.

    Raises:
        UserError: it isn't JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}): restore it, or delete what it belongs to and make that anew"
        ) from error


def write_array(path: Path, array: npt.NDArray[Any], *, unique: bool = False) -> None:
    """Writes one `.npy` file, atomically and without pickle; `unique` as in `replacing`."""
    with replacing(path, unique=unique) as temporary, temporary.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)


def create_array(path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A new zeroed `.npy` file, mapped for writing, for arrays that are filled row by row.

    It is not atomic: give it a path from `replacing`, or one that is thrown away afterwards.

    Raises:
        OSError: there is no room for it on the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if 0 in shape:  # an empty file can't be mapped
        with path.open("wb") as stream:
            np.save(stream, np.zeros(shape, dtype), allow_pickle=False)
        return np.zeros(shape, dtype)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
    if hasattr(os, "posix_fallocate"):  # a full disk is an OSError now, where writing to a map would end the process
        try:
            with path.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                path.unlink()
                raise  # others: this file system can't promise room
    return array


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file of a catalog.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{path} is missing or damaged ({error}): restore it, or make what it belongs to anew"
        ) from error


def map_array(path: Path) -> npt.NDArray[Any]:
    """Maps a `.npy` file of a catalog.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return read_array(path)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} is missing or damaged ({error}): restore it, or make what it belongs to anew"
        ) from error


def read_array(path: Path) -> npt.NDArray[Any]:
    """Maps a `.npy` file for reading; never unpickles.

    Raises:
        OSError, ValueError: it can't be read; see `read_header`.
    """
    with path.open("rb") as stream:
        header = read_header(stream, os.fstat(stream.fileno()).st_size)
    if 0 in header.shape:  # empty arrays can't be mapped
        return np.zeros(header.shape, header.dtype)
    return np.memmap(path, header.dtype, "r", header.offset, header.shape, "F" if header.fortran else "C")


def release_pages(array: npt.NDArray[Any] | None) -> None:
    """Lets go of the pages that were read of an array that `read_array` or `map_array` mapped; does nothing to other arrays."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)


def write_table(path: Path, table: pa.Table) -> None:
    """Writes one Parquet file, atomically, in row groups of ROW_GROUP_ROWS."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=ROW_GROUP_ROWS)


def digest(value: object) -> str:
    """A 128-bit hexadecimal hash of a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """A 128-bit hexadecimal hash of a file's bytes."""
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            state.update(block)
    return state.hexdigest()
