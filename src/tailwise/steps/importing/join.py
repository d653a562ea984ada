"""Joins: values that a file gives by uid or key, to the rows of a snapshot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.errors import UserError
from tailwise.execution.keys import ABSENT, AMBIGUOUS, KeyIndex
from tailwise.shards.columns import DAMAGE, numbers, open_table, texts, uid_texts
from tailwise.storage.delimited import key_of, read_rows

BATCH = 262_144
IDENTIFIERS = ("uid", "key", "image_path")
NO_KEY = "\n"  # stands for a missing identifier: no sample's key holds a line break
Batch = tuple[list[str], npt.NDArray[np.float64]]
Columns = Iterator[tuple[list[str], pa.Array]]  # identifiers and values


def read_columns(path: Path, column: str, what: str) -> tuple[str, Columns]:
    """Return which identifier a .tsv, .csv or Parquet file names samples by, and a column of it beside the identifiers, in batches.

    Args:
        path: of the file.
        column: whose values are wanted.
        what: the values are called, in errors: "rates", say.

    Raises:
        UserError: the file can't be read, lacks the column or an identifier, or has several of that name.
    """
    parquet = path.suffix.lower() not in {".tsv", ".csv"}
    try:
        names = _names(path) if parquet else next(read_rows(path), (0, [""]))[1]
    except DAMAGE as error:
        raise UserError(f"{path} can't be read as {'Parquet' if parquet else 'a table'}: {error}") from error
    identifier = next((name for name in IDENTIFIERS if name in names), None)
    if identifier is None or column not in names:
        raise UserError(
            f"{path} needs the column {column!r} and one of {', '.join(IDENTIFIERS)}; it has {', '.join(names)}"
        )
    for name in (identifier, column):
        if names.count(name) > 1:
            raise UserError(f"{path} has {names.count(name)} columns called {name!r}: give it one")

    def columns() -> Columns:
        try:
            for keys, values in (_parquet if parquet else _delimited)(path, identifier, column):
                named = pc.utf8_lower(uid_texts(keys)) if identifier == "uid" else texts(keys, identifier)
                yield named.fill_null(NO_KEY).to_pylist(), values
        except DAMAGE as error:
            raise UserError(f"the {what} in column {column!r} of {path} can't be read: {error}") from error

    return identifier, columns()


def _names(path: Path) -> list[str]:
    with open_table(path) as file:
        return list(file.schema_arrow.names)


def _parquet(path: Path, *columns: str) -> Iterator[list[pa.Array]]:
    with open_table(path) as file:
        for batch in file.iter_batches(BATCH, columns):
            yield [batch.column(name) for name in columns]


def _delimited(path: Path, identifier: str, column: str) -> Iterator[list[pa.Array]]:
    """Everything is text: keys such as 000123 are no numbers. Empty fields have no value. Keys are written as in a list of keys."""
    rows = read_rows(path)
    _, names = next(rows)
    at, other = names.index(identifier), names.index(column)
    while batch := list(islice(rows, BATCH)):
        keys = [key_of(row[at], number) if identifier == "key" else row[at] for number, row in batch]
        yield [
            pa.array([text or None for text in texts], pa.string())
            for texts in (keys, [row[other] for _, row in batch])
        ]


def read_numbers(path: Path, column: str, what: str) -> tuple[str, Iterator[Batch]]:
    """As `read_columns`, with the values as float64, NaN where there is none."""
    identifier, columns = read_columns(path, column, what)

    def batches() -> Iterator[Batch]:
        for keys, values in columns:
            try:
                found = numbers(values, column).to_numpy(zero_copy_only=False)
            except ValueError as error:
                raise UserError(f"the {what} in column {column!r} of {path} can't be read: {error}") from error
            yield keys, found

    return identifier, batches()


def join_values(
    catalog: Catalog,
    snapshot: Snapshot,
    identifier: str,
    batches: Iterable[Batch],
    target: npt.NDArray[np.float32],
    work: Path,
    what: str,
    max_rejected: float,
    check: Callable[[list[str], npt.NDArray[np.float64]], None] | None = None,
) -> int:
    """Fills in the value of every row that a file names.

    Args:
        catalog: with the samples.
        snapshot: whose rows.
        identifier: that the file names samples by: one of IDENTIFIERS.
        batches: identifiers and values.
        target: float32 [N], NaN; rows that no batch names stay so.
        work: a folder for an index, 32 bytes a row; must not exist yet.
        what: a value is called, in errors.
        max_rejected: share of the values that may belong to no sample where as great a share of the samples has no value. A file may
            name more samples than the pool has, or fewer; one that does both is of another pool.
        check: refuses bad values of a batch.

    Returns:
        How many values belong to no sample.

    Raises:
        UserError: a key belongs to several samples, a sample is given twice, or too little matches.
    """
    index = _index(catalog, snapshot, identifier, work)
    unknown, read, first = 0, 0, ""
    for keys, values in batches:
        read += len(keys)
        if check:
            check(keys, values)
        rows = index.find(keys)
        ambiguous = np.flatnonzero(rows == AMBIGUOUS)
        if ambiguous.size:
            raise UserError(
                f"the key {keys[ambiguous[0]]!r} belongs to several samples: name them by uid, in a Parquet file"
            )
        _check_given_once(keys, rows, target, what)
        absent = np.flatnonzero(rows == ABSENT)
        first = first or next((keys[at] for at in absent[:1]), "")
        unknown += len(absent)
        with np.errstate(over="ignore"):  # values beyond float32 become infinite
            target[rows[rows >= 0]] = values[rows >= 0]
    lacking = int(np.isnan(target).sum())
    if unknown > max_rejected * read and lacking > max_rejected * len(target):
        raise UserError(
            f"{unknown:,} of {read:,} rows ({unknown / read:.1%}) belong to no sample, such as {first!r}, and {lacking:,} of "
            f"{len(target):,} samples ({lacking / len(target):.1%}) have no {what}, both more than `max_rejected` {max_rejected:g}: give a "
            f"file of this pool, whose {identifier}s are the samples' own, or a greater `max_rejected`"
        )
    return unknown


def _text(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def _index(catalog: Catalog, snapshot: Snapshot, identifier: str, folder: Path) -> KeyIndex:
    index = KeyIndex(folder, snapshot.rows)
    column = "uid" if identifier == "uid" else "key"
    for part in catalog.parts(snapshot):
        values = catalog.samples(part, [column]).column(0).to_pylist()
        index.add(map(_text, values), np.arange(part.first_row, part.first_row + part.rows))
    index.seal()
    return index


def _check_given_once(keys: list[str], rows: npt.NDArray[np.int64], target: npt.NDArray[np.float32], what: str) -> None:
    hits = np.flatnonzero(rows >= 0)
    _, first = np.unique(rows[hits], return_index=True)
    again = np.setdiff1d(hits, hits[first[np.isnan(target[rows[hits[first]]])]])
    if again.size:
        raise UserError(f"the {what} of {keys[again[0]]!r} is given twice: give each sample one {what}")
