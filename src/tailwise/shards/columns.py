"""Columns of users' Parquet files as text, numbers or vectors, whatever their Arrow type; errors name column and type."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tailwise.catalog.noted import HASH_COLUMNS
from tailwise.catalog.schema import SAMPLE_SCHEMA
from tailwise.storage.files import open_binary

# Errors that Arrow, NumPy and zipfile with its decompressors raise for a damaged file.
DAMAGE = (
    *(OSError, ValueError, EOFError, TypeError, MemoryError, pa.ArrowException),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(KeyError, NotImplementedError, RuntimeError, OverflowError),
)
BATCH_ROWS = 65_536
MAX_DIMENSION = 65_536  # numbers of a row; a longer list is no embedding, and would take this memory for every sample
BATCH_BYTES = 1 << 26  # of one column
MAX_TEXT_BYTES = 1_000_000  # of one value; a longer text is not a caption, key or path
MAX_COLUMN_BYTES, MAX_MEAN_BYTES = 1 << 28, 4_096  # bytes of columns that are read whole, in total or on average a row
TOO_LONG = "\0"  # replaces a text of more than MAX_TEXT_BYTES
EXACT_INTEGERS = 1 << 53  # a float64 holds all whole numbers up to this one
# img2dataset's own columns are not scores; `url` and `caption` are strings, which are excluded by type.
_BOOKKEEPING = frozenset(
    {"key", "status", "error_message", "width", "height", "original_width", "original_height", "exif", "sha256", "uid"}
    | {"source_shard", "source_key", "copy"}  # of our own exports
    | set(SAMPLE_SCHEMA.names)
    | set(HASH_COLUMNS.values())
)


_TEXT = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


def _is(kind: pa.DataType, *names: str) -> bool:
    """Return whether a type is one of those named; older releases of Arrow do not know all of them."""
    return any(getattr(pa.types, f"is_{name}", lambda _: False)(kind) for name in names)


class UserTable(pq.ParquetFile):  # type: ignore[misc]  # pyarrow has no types
    """A Parquet file, read in batches of bounded memory. A small file may be huge: one long text of a dictionary may stand in every row."""

    def __init__(self, source: Path | str | IO[bytes], footer: pq.FileMetaData | None = None) -> None:
        # a row group's pages in memory, not the whole group
        super().__init__(source, metadata=footer, pre_buffer=False, buffer_size=1 << 20)
        self._source = source

    def iter_batches(
        self, batch_size: int, columns: Sequence[str], lenient: Collection[str] = ()
    ) -> Iterator[pa.RecordBatch]:
        """Yield batches of up to `batch_size` rows, fewer if they are long; text in a plain layout. DAMAGE if they cannot be read.

        TOO_LONG replaces each text of more than MAX_TEXT_BYTES in `lenient` columns; in others, it is a ValueError.
        """
        rows = 0
        for group in range(self.num_row_groups):
            # Reading a row raises where the metadata is damaged; looking at such metadata would end the process.
            next(super().iter_batches(1, row_groups=[group], columns=list(columns)), None)
            widest = max(self._row_bytes(group, name, name in lenient) for name in columns)
            for batch in super().iter_batches(
                max(1, min(batch_size, BATCH_BYTES // widest)), row_groups=[group], columns=list(columns)
            ):
                pairs = zip(batch.schema.names, batch.columns, strict=True)
                values = [_bounded(column, name, name in lenient) for name, column in pairs]
                rows += len(batch)
                yield pa.RecordBatch.from_arrays(values, names=batch.schema.names)
        if rows != self.metadata.num_rows:
            raise pa.ArrowInvalid(f"it has {rows:,} rows, its footer states {self.metadata.num_rows:,}")

    def read(self, columns: Sequence[str], lenient: Collection[str] = ()) -> pa.Table:
        """Return whole columns; see `iter_batches`. More than MAX_COLUMN_BYTES, and than MAX_MEAN_BYTES a row, is a ValueError."""
        batches, rows, size = [], 0, 0
        for batch in self.iter_batches(BATCH_ROWS, columns, lenient):
            batches.append(batch)
            rows, size = rows + len(batch), size + batch.nbytes
            if size > max(MAX_COLUMN_BYTES, MAX_MEAN_BYTES * rows):
                raise ValueError(f"{rows:,} of its rows take {size:,} bytes, more than {MAX_MEAN_BYTES:,} each")
        empty = self.schema_arrow.empty_table().select(list(columns))
        return pa.Table.from_batches(batches) if batches else empty

    def read_group(self, number: int, columns: Sequence[str], most_bytes: int | None = None) -> pa.Table:
        """Return columns of a row group, values of any length; DAMAGE if they cannot be read, or take more than `most_bytes`.

        Without this bound, the file is not doubted: it was read before.
        """
        if most_bytes is not None:
            next(super().iter_batches(1, row_groups=[number], columns=list(columns)), None)  # see `iter_batches`
        about, size = self.metadata.row_group(number), 0
        for leaf in range(about.num_columns if most_bytes is not None else 0):
            chunk, path = about.column(leaf), self.schema.column(leaf).path
            if path in columns:
                repeats = chunk.physical_type == "BYTE_ARRAY" and chunk.has_dictionary_page
                size += self._plain_bytes(number, path) if repeats else chunk.total_uncompressed_size
        if most_bytes is not None and size > most_bytes:
            raise ValueError(
                f"row group {number} has {size:,} bytes, more than {most_bytes:,}: write smaller row groups"
            )
        return self.read_row_group(number, list(columns))

    def _plain_bytes(self, group: int, path: str) -> int:
        """Return the bytes of a column's values, each counted as often as it comes."""
        size = 0
        with pq.ParquetFile(self._source, metadata=self.metadata, read_dictionary=[path], pre_buffer=False) as file:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[path]):
                name, *inner = path.split(".")
                values = pc.struct_field(batch.column(name), inner) if inner else batch.column(name)
                lengths = pc.binary_length(unwrapped(values.dictionary)).cast(pa.int64())
                size += pc.sum(lengths.take(values.indices)).as_py() or 0
        return size

    def _row_bytes(self, group: int, name: str, lenient: bool) -> int:
        """Return about how many bytes a row takes, at least the longest text of its dictionary; a ValueError if that is too long."""
        about = self.metadata.row_group(group)
        rows, size = max(1, about.num_rows), 1
        for leaf in range(about.num_columns):
            kind = self.schema.column(leaf)
            if kind.path == name or kind.path.startswith(f"{name}."):
                chunk = about.column(leaf)
                values = -(-chunk.num_values // rows)
                if values > MAX_DIMENSION:
                    raise ValueError(f"column {name!r} has {values:,} numbers a row, more than {MAX_DIMENSION:,}")
                longest = max(8, kind.length or 0)
                if chunk.physical_type == "BYTE_ARRAY" and chunk.has_dictionary_page:
                    whole = chunk.total_uncompressed_size
                    longest = whole if whole * rows <= BATCH_BYTES or kind.path != name else self._longest(group, name)
                    if longest > MAX_TEXT_BYTES and longest < whole and not lenient:
                        raise _too_long(name, longest)
                size += max(chunk.total_uncompressed_size // rows, values * longest)
        return size

    def _longest(self, group: int, name: str) -> int:
        """Return the length of the longest text of a column's dictionary, which comes with the first row."""
        with pq.ParquetFile(self._source, metadata=self.metadata, read_dictionary=[name], pre_buffer=False) as file:
            for batch in file.iter_batches(1, row_groups=[group], columns=[name]):
                lengths = pc.binary_length(unwrapped(batch.column(0).dictionary))
                return int(pc.max(lengths).as_py() or 0)
        return 0


def _bounded(values: pa.Array, name: str, lenient: bool) -> pa.Array:
    """Return a column, text in a plain layout; texts that are too long are replaced if it is lenient, else a ValueError."""
    if not _is(value_type(values.type), *_TEXT):
        return values
    plain = unwrapped(values)
    long = pc.greater(pc.binary_length(plain), MAX_TEXT_BYTES)
    if not pc.any(long).as_py():
        return plain
    if not lenient:
        raise _too_long(name, pc.max(pc.binary_length(plain)).as_py())
    return pc.if_else(long, pa.scalar(TOO_LONG, plain.type), plain)


def _too_long(name: str, size_bytes: int) -> ValueError:
    return ValueError(f"column {name!r} has a text of {size_bytes:,} bytes, more than {MAX_TEXT_BYTES:,}")


def open_table(source: Path | str | IO[bytes], columns: Sequence[str] = ()) -> UserTable:
    """Return an opened Parquet file; a ValueError if it does not have each of `columns` exactly once, DAMAGE if it cannot be read."""
    file = UserTable(source)
    names = file.schema_arrow.names
    for column in columns:
        if names.count(column) != 1:
            file.close()
            many = names.count(column)
            raise ValueError(f"it has {many} columns called {column!r}" if many else f"it has no column {column!r}")
    return file


@contextmanager
def table_at(path: str) -> Iterator[UserTable]:
    """Open a Parquet file at a path or URL; DAMAGE if it cannot be read."""
    with open_binary(path) as stream, open_table(stream) as file:
        yield file


def count_rows(path: Path | str) -> int:
    """Return the number of rows of a Parquet file; 0 if it cannot be read."""
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


def is_text(kind: pa.DataType) -> bool:
    """Return whether the values of a type are strings or bytes."""
    return _is(value_type(kind), *_TEXT)


def is_bytes(kind: pa.DataType) -> bool:
    """Return whether the values of a type are bytes of any length."""
    return _is(value_type(kind), "binary", "large_binary", "binary_view")


def is_vectors(kind: pa.DataType) -> bool:
    """Return whether the values of a type are lists of floats."""
    kind = value_type(kind)
    lists = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
    return _is(kind, *lists) and pa.types.is_floating(kind.value_type)


def texts(values: pa.Array | pa.ChunkedArray, name: str, *, check: bool = True) -> pa.Array:
    """Return the column of a name as UTF-8 strings; whole numbers as their decimal digits.

    Values that are neither strings, UTF-8 bytes nor whole numbers are a ValueError. Bytes that are not UTF-8 pass without `check`.
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
    """Return uids as strings, as `texts`; 16 bytes become 32 hexadecimal digits."""
    plain = unwrapped(values)
    if _is(plain.type, "binary", "large_binary") and pc.all(pc.equal(pc.binary_length(plain), 16)).as_py() is not False:
        return pa.array([None if value is None else value.hex() for value in plain.to_pylist()], pa.string())
    return texts(values, name)


def numbers(values: pa.Array | pa.ChunkedArray, name: str) -> pa.Array:
    """Return a column of numbers, booleans, or decimal digits as float64; a ValueError for whole numbers that it cannot hold."""
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


def sides(column: pa.Array | pa.ChunkedArray, name: str) -> tuple[pa.Array, npt.NDArray[np.bool_]]:
    """Return `numbers` of pixels as int32 [n], null where a value is no whole number above 0; and where it is another one, bool [n]."""
    values = numbers(column, name).to_numpy(zero_copy_only=False)
    good = (values > 0) & (values < 2**31) & (values == np.floor(values))
    return pa.array(np.where(good, values, 0).astype(np.int32), mask=~good), ~good & ~np.isnan(values)


def score_columns(file: UserTable, but: Collection[str] = ()) -> tuple[list[str], dict[str, str]]:
    """Return the names of the user's numeric columns, sorted, and the reason for each of the others that cannot be used.

    Columns called as those in `but`, or so in lower case, are left out.
    """
    names = file.schema_arrow.names
    found, unfit = [], {}
    for name, kind in zip(names, map(value_type, file.schema_arrow.types), strict=True):
        if name in _BOOKKEEPING or {name, name.lower()} & {*but} or not _is(kind, "integer", "floating", "decimal"):
            continue
        try:
            if names.count(name) > 1:
                raise ValueError(f"it has {names.count(name)} columns called {name!r}")
            if _is(kind, "int64", "uint64", "decimal"):
                for batch in file.iter_batches(BATCH_ROWS, [name]):
                    numbers(batch.column(0), name)
            found.append(name)
        except ValueError as error:
            unfit[name] = str(error)
    return sorted(found), unfit
