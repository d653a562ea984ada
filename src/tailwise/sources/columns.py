"""Columns of users' Parquet files as text, numbers or vectors, whatever their Arrow type; or an error that names column and type."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tailwise.catalog.schema import SAMPLE_SCHEMA

# What Arrow, NumPy and zipfile with its decompressors raise on a bad file.
DAMAGE = (
    *(OSError, ValueError, EOFError, TypeError, MemoryError, pa.ArrowException),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(KeyError, NotImplementedError, RuntimeError, OverflowError),
)
EXACT_INTEGERS = 1 << 53  # a float64 holds all whole numbers up to here
# img2dataset's own columns, which are no scores; `url` and `caption` are strings and drop out by type.
_BOOKKEEPING = frozenset(
    {"key", "status", "error_message", "width", "height", "original_width", "original_height", "exif", "sha256", "uid"}
    | {"source_shard", "source_key", "copy"}  # of our own exports
    | set(SAMPLE_SCHEMA.names)
)


def _is(kind: pa.DataType, *names: str) -> bool:
    """Return whether a type is one of those named, some of which older releases of Arrow do not know."""
    return any(getattr(pa.types, f"is_{name}", lambda _: False)(kind) for name in names)


def open_table(source: Path | str | IO[bytes], columns: Sequence[str] = ()) -> pq.ParquetFile:
    """Return an opened Parquet file that has each of `columns` exactly once.

    Raises:
        ValueError: it lacks one, or has several of the same name.
        DAMAGE: it can't be read.
    """
    file = pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20)  # holds no more of a row group than its pages
    names = file.schema_arrow.names
    for column in columns:
        if names.count(column) != 1:
            file.close()
            many = names.count(column)
            raise ValueError(f"it has {many} columns called {column!r}" if many else f"it has no column {column!r}")
    return file


def count_rows(path: Path | str) -> int:
    """Return the number of rows of a Parquet file; 0 if it can't be read."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except DAMAGE:
        return 0


def value_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of a column's values: without extension, dictionary and run-end encoding."""
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif _is(kind, "dictionary", "run_end_encoded"):
            kind = kind.value_type
        else:
            return kind


def unwrapped(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return values in a plain layout: without extension, dictionary and run-end encoding, and no views."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    while True:
        kind = values.type
        if isinstance(values, pa.ExtensionArray):
            values = values.storage
        elif _is(kind, "dictionary"):
            values = values.dictionary_decode()
        elif _is(kind, "run_end_encoded"):
            values = pc.run_end_decode(values)
        elif _is(kind, "string_view"):
            return values.cast(pa.large_string())
        elif _is(kind, "binary_view", "fixed_size_binary"):
            return values.cast(pa.large_binary())
        elif _is(kind, "list_view", "large_list_view"):
            return _lists(values)
        else:
            return values


def _lists(views: pa.Array) -> pa.Array:
    """Return views of lists as lists. Arrow's own cast (26.0) loses the last list."""
    ends = np.cumsum(pc.list_value_length(views).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64))
    return pa.LargeListArray.from_arrays(pa.array([0, *ends], pa.int64()), views.flatten(), mask=views.is_null())


def is_vectors(kind: pa.DataType) -> bool:
    """Return whether the values of a type are lists of floats."""
    kind = value_type(kind)
    lists = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
    return _is(kind, *lists) and pa.types.is_floating(kind.value_type)


def texts(values: pa.Array | pa.ChunkedArray, name: str, *, check: bool = True) -> pa.Array:
    """Return a column as UTF-8 strings, null where there is none; whole numbers as their decimal digits.

    Args:
        values: of the column.
        name: of the column, for errors.
        check: refuse bytes that are not UTF-8.

    Raises:
        ValueError: they are neither strings, UTF-8 bytes nor whole numbers.
    """
    plain = unwrapped(values)
    if not _is(plain.type, "string", "large_string", "binary", "large_binary", "integer", "floating", "null"):
        raise ValueError(f"column {name!r} has type {values.type}, not text")
    try:
        if _is(plain.type, "floating"):  # whole numbers beside a missing one, as pandas writes them
            plain = pc.if_else(pc.is_nan(plain), pa.scalar(None, plain.type), plain).cast(pa.int64())
        text = plain.cast(pa.string(), safe=check)
        text.validate(full=check)  # Parquet doesn't promise UTF-8
    except pa.ArrowException as error:
        raise ValueError(f"column {name!r} ({values.type}) is not text: {error}") from error
    return text


def uid_texts(values: pa.Array | pa.ChunkedArray, name: str = "uid") -> pa.Array:
    """Return uids as strings: 16 bytes become 32 hexadecimal digits.

    Raises:
        ValueError: as `texts`.
    """
    plain = unwrapped(values)
    if _is(plain.type, "binary", "large_binary") and pc.all(pc.equal(pc.binary_length(plain), 16)).as_py() is not False:
        return pa.array([None if value is None else value.hex() for value in plain.to_pylist()], pa.string())
    return texts(values, name)


def numbers(values: pa.Array | pa.ChunkedArray, name: str) -> pa.Array:
    """Return a column of numbers, booleans, or decimal digits as float64.

    Raises:
        ValueError: it holds something else, or whole numbers that a float64 can't hold.
    """
    plain = unwrapped(values)
    if not _is(plain.type, "integer", "floating", "decimal", "boolean", "null", "string", "large_string"):
        raise ValueError(f"column {name!r} has type {values.type}, not numbers")
    if _is(plain.type, "integer", "decimal"):
        ends = [end for end in pc.min_max(plain).as_py().values() if end is not None]
        if any(abs(end) > EXACT_INTEGERS for end in ends):
            raise ValueError(
                f"column {name!r} ({values.type}) has whole numbers beyond 2^53, such as {max(ends, key=abs)}"
            )
    try:
        return plain.cast(pa.float64())
    except pa.ArrowException as error:
        raise ValueError(f"column {name!r} ({values.type}) is not numbers: {error}") from error


def whole_sides(values: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Tell which values are a number of pixels: whole, positive, below 2³¹."""
    good: npt.NDArray[np.bool_] = (values > 0) & (values < 2**31) & (values == np.floor(values))
    return good


def score_columns(file: pq.ParquetFile) -> tuple[list[str], dict[str, str]]:
    """Return the numeric columns that are the user's own, in order of name, and why some of them can't be used, by name."""
    names = file.schema_arrow.names
    found, unfit = [], {}
    for name, kind in zip(names, map(value_type, file.schema_arrow.types), strict=True):
        if name in _BOOKKEEPING or not _is(kind, "integer", "floating", "decimal"):
            continue
        try:
            if names.count(name) > 1:
                raise ValueError(f"it has {names.count(name)} columns called {name!r}")
            if _is(kind, "int64", "uint64", "decimal"):
                for batch in file.iter_batches(columns=[name]):
                    numbers(batch.column(0), name)
            found.append(name)
        except ValueError as error:
            unfit[name] = str(error)
    return sorted(found), unfit
