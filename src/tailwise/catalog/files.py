"""Files that are either whole or absent: temporary name, fsync, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import resource
import threading
import tokenize
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tailwise.catalog import layout
from tailwise.errors import DamagedError, UserError
from tailwise.mapped import map_file
from tailwise.storage.local import name_full_disk, replacing
from tailwise.storage.store_path import settle, with_state

CHECKSUM = "checksum"  # in a record: the hash of all else in it
ROW_GROUP_ROWS = 65_536  # what must be read of a Parquet file to get one row
# What NumPy, and the Python parser that it calls, raise on damaged headers.
_FAULTS = (
    *(ValueError, TypeError, LookupError, AttributeError, NameError, ArithmeticError),
    *(SyntaxError, tokenize.TokenError, RecursionError, MemoryError),
)
# Python's parser, which reads the header, fails at times in several threads (CPython gh-106905).
_parsing = threading.Lock()
os.register_at_fork(before=_parsing.acquire, after_in_parent=_parsing.release, after_in_child=_parsing.release)
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def json_bytes(value: object) -> bytes:
    """Return a value as JSON with sorted keys."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def record_bytes(value: Mapping[str, Any]) -> bytes:
    """Return an object of the catalog as JSON with the hash of its content."""
    return json_bytes({**value, CHECKSUM: digest(value)})


def write_json(path: Path, value: object, *, unique: bool = False) -> None:
    """Write a value as JSON with sorted keys; see `writing`."""
    with writing(path, unique=unique) as stream:
        stream.write(json_bytes(value))


def read_json(path: Path) -> Any:  # noqa: ANN401  (whatever was written)
    """The value of a JSON file.

    Raises:
        UserError: it isn't JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(
            f"{path} is damaged ({error}): restore it, or delete and rebuild what it belongs to"
        ) from error


def write_record(path: Path, value: Mapping[str, Any], *, unique: bool = False) -> None:
    """Write an object of the catalog as JSON with the hash of its content; see `writing`."""
    write_json(path, {**value, CHECKSUM: digest(value)}, unique=unique)


def read_record(path: Path) -> dict[str, Any]:
    """Return what `write_record` wrote.

    Raises:
        UserError: it is damaged.
    """
    return checked_record(path, read_json(path))


def checked_record(path: Path, value: Any) -> dict[str, Any]:  # noqa: ANN401  (whatever was written)
    """Return a value that was read of a file, less its checksum.

    Raises:
        UserError: the checksum is missing or wrong.
    """
    noted = value.pop(CHECKSUM, None) if isinstance(value, dict) else None
    if noted != digest(value):
        raise DamagedError(f"{path} is damaged (its checksum is wrong): restore it, or rebuild what it belongs to")
    record: dict[str, Any] = value
    return record


# --- files whose hash was noted when they were written --------------------------------------------------------------------

FileStamp = tuple[Path, int, int, int, int]  # path, device, inode, size, time: another file has another stamp
_digests: dict[tuple[int, ...], str] = {}  # of the files that this process has written or hashed


def file_stamp(path: Path) -> FileStamp:
    """Return what changes whenever a file is replaced."""
    status = path.stat()
    return path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=256)
def _known(stamp: FileStamp) -> Mapping[str, Any]:
    return read_record(stamp[0])


def known_record(path: Path) -> Mapping[str, Any]:
    """Return the same as `read_record`. A process reads each version of the file once."""
    return _known(file_stamp(path))


def noted_digests(path: Path) -> tuple[str, ...]:
    """Return the hashes that a file of a catalog may have: from its artifact's manifest, or from the marker beside it.

    Several while a file is being replaced, none where nothing was noted.
    """
    for record in layout.records_of(path):
        with suppress(FileNotFoundError, NotADirectoryError):
            noted = known_record(record)
            if record.name != layout.MANIFEST:
                found = [noted.get("digest"), noted.get("replaced_by")]
            else:
                found = [noted["files"].get(path.name)]
                settle(record)  # files of a finished artifact never change
                settle(path)
            return tuple(str(value) for value in found if value is not None)
    return ()


def refuse_many_files(error: Exception) -> None:
    """Refuse to go on where a file could not be opened for the number of those that are open: the file itself is sound.

    Raises:
        UserError: that is why.
    """
    if isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise UserError(
            f"this process may open {limit:,} files, and needs more: allow more with `ulimit -n 4096`, then repeat this command"
        ) from error


def check_file(path: Path) -> Path:
    """Return `path`, if its bytes are those that were written (see `known_digest`); one in an object store knows its state.

    Raises:
        UserError: it is missing or damaged.
    """
    noted = noted_digests(path)
    path = with_state(path)
    if not noted:
        return path
    try:
        if known_digest(path) not in noted:
            raise DamagedError(f"{path} is damaged (its checksum is wrong): restore it, or rebuild what it belongs to")
    except OSError as error:
        refuse_many_files(error)
        raise DamagedError(
            f"{path} is missing or unreadable ({error.strerror}): restore it, or rebuild what it belongs to"
        ) from error
    return path


@contextmanager
def reading(path: Path, *, whole: bool = True) -> Iterator[Path]:
    """Yield the path of a checked file (see `check_file`; not checked unless `whole`), and name it where it cannot be read within.

    Raises:
        UserError: it is missing or damaged.
    """
    checked = check_file(path) if whole else path
    try:
        yield checked
    except (OSError, ValueError, LookupError, EOFError, pa.ArrowException) as error:
        refuse_many_files(error)
        raise DamagedError(
            f"{path} is missing or damaged ({error}): restore it, or rebuild what it belongs to"
        ) from error


def write_array(path: Path, array: npt.NDArray[Any], *, unique: bool = False) -> None:
    """Write one `.npy` file, without pickle; see `writing`."""
    with writing(path, unique=unique) as stream:
        np.lib.format.write_array(stream, array, allow_pickle=False)


def create_array(path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return a new zeroed `.npy` file, mapped for writing, for arrays that are filled row by row.

    It is not atomic: give it a path from `replacing`, or one that is thrown away afterwards. Rows may come in any order, so that the file
    is hashed when it is complete, by reading it again (see `known_digest`).

    Raises:
        OSError: there is no room for it on the disk; names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if 0 in shape:  # an empty file can't be mapped
        write_array(path, empty := np.zeros(shape, dtype))
        return empty
    try:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
    except OSError as error:
        name_full_disk(error, path)
        raise
    if hasattr(os, "posix_fallocate"):  # a full disk is an OSError now, where writing to a map would end the process
        try:
            with path.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                path.unlink()
                name_full_disk(error, path)
                raise  # others: this file system can't promise room
    return array


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a Parquet file of a catalog; see `reading`."""
    with reading(path) as checked, pq.ParquetFile(checked) as file:
        table = file.read(columns)  # pq.read_table would import pyarrow.dataset: a tenth of a second
        return table if columns is None else table.select(columns)


def map_array(path: Path) -> npt.NDArray[Any]:
    """Map a `.npy` file of a catalog; see `reading`."""
    with reading(path) as checked:
        return read_array(checked)


def read_array(path: Path) -> npt.NDArray[Any]:
    """Maps a `.npy` file for reading; never unpickles.

    Raises:
        OSError, ValueError: it can't be read; see `read_header`.
    """
    path = Path(os.fspath(path))  # of a copy, if it is in an object store
    with path.open("rb") as stream:
        header = read_header(stream, os.fstat(stream.fileno()).st_size)
    if 0 in header.shape:  # empty arrays can't be mapped
        return np.zeros(header.shape, header.dtype)
    return map_file(path, header.dtype, header.offset, header.shape, "F" if header.fortran else "C")


def note_digest(path: Path) -> None:
    """Note the hash of a file in the marker beside it, which keeps what else it notes. Without one, `map_cache` takes no file."""
    marker, notes = layout.marker(path), dict[str, Any]()
    with suppress(UserError):  # a damaged marker of a cache
        notes = read_record(marker) if marker.exists() else {}
    write_record(marker, {**notes, "digest": known_digest(path)}, unique=True)


def map_cache(path: Path) -> npt.NDArray[Any] | None:
    """Map a `.npy` file that can be made again; None where it, or its marker, is missing or damaged."""
    with suppress(UserError):
        return map_array(path) if noted_digests(path) else None
    return None


def write_table(path: Path, table: pa.Table) -> None:
    """Write one Parquet file, in row groups of ROW_GROUP_ROWS; see `writing`."""
    with writing(path) as stream:
        pq.write_table(table, stream, compression="zstd", row_group_size=ROW_GROUP_ROWS)


def digest(value: object) -> str:
    """A 128-bit hexadecimal hash of a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """Return a 128-bit hexadecimal hash of a file's bytes."""
    state, buffer = hashlib.blake2b(digest_size=16), memoryview(bytearray(1 << 16))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            state.update(buffer[:count])
    return state.hexdigest()


def known_digest(path: Path) -> str:
    """Return the same as `file_digest`. A process hashes each file once: while it writes it (`writing`), else by reading it."""
    copy = Path(os.fspath(path))  # of one in an object store
    stamp = file_stamp(copy)[1:]  # the folder of an artifact gets another path when it is finished
    if stamp not in _digests:
        _digests[stamp] = file_digest(copy)
    return _digests[stamp]


class HashedStream:
    """A file that is hashed while it is written front to back: `state` is the hash of `file_digest`, so far."""

    closed = False  # PyArrow asks

    def __init__(self, file: IO[bytes]) -> None:
        """Take an empty file, which stays open."""
        self._file, self.state = file, hashlib.blake2b(digest_size=16)

    def write(self, content: Any) -> int:  # noqa: ANN401  (bytes, or an array)
        """Write and hash all bytes; return their number."""
        self.state.update(content)
        return self._file.write(content)


@contextmanager
def writing(path: Path, *, unique: bool = False) -> Iterator[HashedStream]:
    """Yield a stream to a file that appears when all is written, as by `replacing`; its hash is known then (`known_digest`)."""
    with replacing(path, unique=unique) as temporary:
        with temporary.open("wb") as file:
            stream = HashedStream(file)
            yield stream
        stamp = file_stamp(temporary)[1:]
    _digests[stamp] = stream.state.hexdigest()


@dataclass(frozen=True)
class Header:
    """The header of one array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # never object
    fortran: bool  # True if the array is stored column by column
    offset: int  # bytes before the data


def read_header(stream: IO[bytes], size_bytes: int) -> Header:
    """Return the header of the `.npy` file that `stream` begins with.

    Args:
        stream: at the first byte of the file.
        size_bytes: size of the file, which must be that of header and data together.

    Raises:
        ValueError: it is no `.npy`, its header is damaged, it is pickled, or its data has another size than its header states.
        OSError: it can't be read.
    """
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _READERS:
            raise ValueError(f".npy version {version} is not supported")
        with _parsing, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about the text of a damaged header
            shape, fortran, dtype = _READERS[version](stream)
    except _FAULTS as error:
        raise ValueError(f"its .npy header is damaged: {' '.join(str(error).split())[:200]}") from error
    if dtype.hasobject:
        raise ValueError("it is a pickled array; unpickling a file would run its code")
    if not dtype.itemsize or dtype.subdtype or not all(0 <= length < 1 << 63 for length in shape):
        raise ValueError(f"its .npy header states {dtype} {list(shape)}")
    offset = stream.tell()
    stated = math.prod(shape) * dtype.itemsize
    if size_bytes - offset != stated:
        raise ValueError(f"it has {size_bytes - offset:,} bytes of data, its header states {stated:,}")
    return Header(tuple(map(int, shape)), dtype, fortran, offset)
