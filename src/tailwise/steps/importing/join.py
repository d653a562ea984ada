"""Joins: values that a file gives by uid or key, to the rows of a snapshot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.errors import UserError
from tailwise.execution.keys import ABSENT, AMBIGUOUS, KeyIndex
from tailwise.shards.columns import BATCH_BYTES, DAMAGE, numbers, open_table, texts, uid_texts
from tailwise.storage.delimited import key_of, read_objects, read_rows

BATCH = 262_144
IDENTIFIERS = ("uid", "key", "image_path")
NO_KEY = "\n"  # stands for a missing identifier: no sample's key holds a line break
Batch = tuple[list[str], npt.NDArray[np.float64]]
Columns = Iterator[tuple[list[str], pa.Array]]  # identifiers and values


def column_names(path: Path) -> list[str]:
    """Return the names of the columns of a .tsv, .csv, .jsonl or Parquet file; raise a UserError if it cannot be read."""
    form = _form(path)
    try:
        return form.names(path)
    except DAMAGE as error:
        raise UserError(f"{path} can't be read as {form.title}: {error}") from error


def read_columns(
    path: Path, column: str, what: str, identifier: str | None = None, kind: str | None = None
) -> tuple[str, Columns]:
    """Return which identifier a table (see `column_names`) names samples by, and a column of it beside the identifiers, in batches.

    Args:
        path: of the file.
        column: whose values are wanted.
        what: the values are called, in errors: "rates", say.
        identifier: column of the identifiers; None for the first of IDENTIFIERS that the file has.
        kind: of the identifiers, where the column has another name: "uid", say. Then values may be too long, see `UserTable`.

    Raises:
        UserError: the file can't be read, lacks the column or an identifier, or has several of that name.
    """
    names = column_names(path)
    known = IDENTIFIERS if identifier is None else (identifier,)
    identifier = next((name for name in known if name in names), None)
    if identifier is None or column not in names:
        raise UserError(f"{path} needs the column {column!r} and one of {', '.join(known)}; it has {', '.join(names)}")
    for name in (identifier, column):
        if names.count(name) > 1:
            raise UserError(f"{path} has {names.count(name)} columns called {name!r}: give it one")

    def columns() -> Columns:
        try:
            for keys, values in _form(path).read(path, identifier, column, kind is not None):
                uids = (kind or identifier) == "uid"
                named = pc.utf8_lower(uid_texts(keys, identifier)) if uids else texts(keys, identifier)
                yield named.fill_null(NO_KEY).to_pylist(), values
        except DAMAGE as error:
            raise UserError(f"the {what} in column {column!r} of {path} can't be read: {error}") from error

    return identifier, columns()


def _names(path: Path) -> list[str]:
    with open_table(path) as file:
        return list(file.schema_arrow.names)


def _parquet(path: Path, identifier: str, column: str, lenient: bool) -> Iterator[list[pa.Array]]:
    with open_table(path) as file:
        columns = list(dict.fromkeys([identifier, column]))
        for batch in file.iter_batches(BATCH, columns, [column] * lenient):
            yield [batch.column(name) for name in (identifier, column)]


def _delimited(path: Path, identifier: str, column: str, lenient: bool) -> Iterator[list[pa.Array]]:  # noqa: ARG001
    """Everything is text: keys such as 000123 are no numbers. Empty fields have no value. Keys are written as in a list of keys."""
    rows = read_rows(path)
    _, names = next(rows)
    at, other = names.index(identifier), names.index(column)
    for batch in _batches((number, (row[at], row[other])) for number, row in rows):
        keys = [key_of(row[0], number) if identifier == "key" else row[0] for number, row in batch]
        pairs = keys, [row[1] for _, row in batch]
        yield [pa.array([text or None for text in texts], pa.string()) for texts in pairs]


def _objects(path: Path, identifier: str, column: str, lenient: bool) -> Iterator[list[pa.Array]]:  # noqa: ARG001
    pairs = ((0, (item.get(identifier), item.get(column))) for item in read_objects(path))
    for batch in _batches(pairs):
        yield [pa.array([pair[at] for _, pair in batch]) for at in (0, 1)]


Pair = TypeVar("Pair", bound=tuple[Any, Any])


def _batches(rows: Iterable[tuple[int, Pair]]) -> Iterator[list[tuple[int, Pair]]]:
    """Yield lists of numbered pairs, of at most BATCH rows and about BATCH_BYTES characters."""
    batch, size = list[tuple[int, Pair]](), 0
    for row in rows:
        batch.append(row)
        size += sum(len(value) for value in row[1] if isinstance(value, str))
        if len(batch) == BATCH or size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class _Form:
    """A kind of table."""

    title: str  # in errors
    names: Callable[[Path], list[str]]  # of its columns
    # path, two columns, whether long texts are replaced
    read: Callable[[Path, str, str, bool], Iterator[list[pa.Array]]]


_TABLE = _Form("a table", lambda path: next(read_rows(path), (0, [""]))[1], _delimited)
_FORMS = {
    **dict.fromkeys((".tsv", ".csv"), _TABLE),
    ".jsonl": _Form("JSON lines", lambda path: list(next(read_objects(path), {"": None})), _objects),
}


def _form(path: Path) -> _Form:
    return _FORMS.get(path.suffix.lower(), _Form("Parquet", _names, _parquet))


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
    index, replaced = KeyIndex(folder, snapshot.rows), catalog.replaced_rows(snapshot)
    column = "uid" if identifier == "uid" else "key"
    for part in catalog.parts(snapshot):
        rows = np.setdiff1d(np.arange(part.first_row, part.first_row + part.rows), replaced, assume_unique=True)
        values = catalog.samples(part, [column]).column(0).take(pa.array(rows - part.first_row)).to_pylist()
        index.add(map(_text, values), rows)
    index.seal()
    return index


def _check_given_once(keys: list[str], rows: npt.NDArray[np.int64], target: npt.NDArray[np.float32], what: str) -> None:
    hits = np.flatnonzero(rows >= 0)
    _, first = np.unique(rows[hits], return_index=True)
    again = np.setdiff1d(hits, hits[first[np.isnan(target[rows[hits[first]]])]])
    if again.size:
        raise UserError(f"the {what} of {keys[again[0]]!r} is given twice: give each sample one {what}")
