"""Joins: values that a file gives by uid, key, url or hash, to the rows of a snapshot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.errors import UserError
from tailwise.shards.columns import BATCH_BYTES, DAMAGE, open_table, texts, uid_texts
from tailwise.steps.importing.names import Matched, NameIndex, match_names, sample_name
from tailwise.storage.delimited import key_of, read_objects, read_rows

BATCH = 262_144
IDENTIFIERS = ("uid", "key", "image_path", "sha256", "md5", "url")
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
            for keys, values in read_table_columns(path, [identifier, column], lenient=kind is not None):
                uids = (kind or identifier) == "uid"
                named = pc.utf8_lower(uid_texts(keys, identifier)) if uids else texts(keys, identifier)
                yield named.fill_null(NO_KEY).to_pylist(), values
        except DAMAGE as error:
            raise UserError(f"the {what} in column {column!r} of {path} can't be read: {error}") from error

    return identifier, columns()


def _names(path: Path) -> list[str]:
    with open_table(path) as file:
        return list(file.schema_arrow.names)


def read_table_columns(path: Path, columns: Sequence[str], *, lenient: bool = False) -> Iterator[list[pa.Array]]:
    """Yield some columns of a table (see `column_names`), in batches; the values of the last one may be too long if `lenient`.

    Raises DAMAGE if the table cannot be read.
    """
    return _form(path).read(path, columns, lenient)


def _parquet(path: Path, columns: Sequence[str], lenient: bool) -> Iterator[list[pa.Array]]:
    with open_table(path) as file:
        for batch in file.iter_batches(BATCH, list(dict.fromkeys(columns)), columns[-1:] if lenient else ()):
            yield [batch.column(name) for name in columns]


def _delimited(path: Path, columns: Sequence[str], lenient: bool) -> Iterator[list[pa.Array]]:  # noqa: ARG001
    """Everything is text: keys such as 000123 are no numbers. Empty fields have no value. Keys are written as in a list of keys."""
    rows = read_rows(path)
    _, names = next(rows)
    places = [names.index(name) for name in columns]
    for batch in batched((number, [row[at] for at in places]) for number, row in rows):
        for at, name in enumerate(columns):
            if name == "key":
                for number, row in batch:
                    row[at] = key_of(row[at], number)
        yield [pa.array([row[at] or None for _, row in batch], pa.string()) for at in range(len(columns))]


def _objects(path: Path, columns: Sequence[str], lenient: bool) -> Iterator[list[pa.Array]]:  # noqa: ARG001
    for batch in batched((0, [item.get(name) for name in columns]) for item in read_objects(path)):
        yield [pa.array([row[at] for _, row in batch]) for at in range(len(columns))]


Row = TypeVar("Row", bound=Sequence[Any])


def batched(rows: Iterable[tuple[int, Row]]) -> Iterator[list[tuple[int, Row]]]:
    """Yield lists of numbered rows, of at most BATCH rows and about BATCH_BYTES characters."""
    batch, size = list[tuple[int, Row]](), 0
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
    title: str  # in errors
    names: Callable[[Path], list[str]]  # of its columns
    # path, columns, whether long texts of the last one are replaced
    read: Callable[[Path, Sequence[str], bool], Iterator[list[pa.Array]]]


_TABLE = _Form("a table", lambda path: next(read_rows(path), (0, [""]))[1], _delimited)
_FORMS = {
    **dict.fromkeys((".tsv", ".csv"), _TABLE),
    ".jsonl": _Form("JSON lines", lambda path: list(next(read_objects(path), {"": None})), _objects),
}


def _form(path: Path) -> _Form:
    return _FORMS.get(path.suffix.lower(), _Form("Parquet", _names, _parquet))


def join_values(
    catalog: Catalog,
    snapshot: Snapshot,
    path: Path,
    batches: Callable[[str], Iterable[Batch]],
    target: npt.NDArray[np.float32],
    work: Path,
    what: str,
    max_rejected: float,
) -> int:
    """Fill in the value of every row that a file names, by the identifier that fits best (see `match_names`).

    Args:
        catalog: with the samples.
        snapshot: whose rows.
        path: of the file, a table with some of IDENTIFIERS. A key may belong to one sample only.
        batches: returns the identifiers of a kind, and values.
        target: float32 [N], NaN; rows that no batch names stay so.
        work: a folder for indexes, about 50 bytes a name; must not exist yet.
        what: a value is called, in errors.
        max_rejected: share of the values that may belong to no sample where as great a share of the samples has no value. A file may
            name more samples than the pool has, or fewer; one that does both is of another pool.

    Returns:
        How many values belong to no sample.

    Raises:
        UserError: a key belongs to several samples, a sample is given twice, or too little matches.
    """
    there = column_names(path)
    matched = match_names(catalog, snapshot, [name for name in IDENTIFIERS if name in there], batches, work)
    fill(catalog, matched, target, what)
    refuse_other_pool(matched.kind, matched.index, target, what, max_rejected)
    return matched.index.unknown


def fill(catalog: Catalog, matched: Matched, target: npt.NDArray[np.float32], what: str | None) -> None:
    """Fill in the value of every row that has a name; a UserError if a sample has two values.

    `what` is None for values that count how often a name is given.
    """
    index = matched.index
    for part, places in matched.rows():
        hits = np.flatnonzero(places >= 0)
        for at in hits[index.copies[places[hits]] > 1][:1] if what else ():
            name = sample_name(catalog, part, int(at), matched.kind)
            raise UserError(f"the {what} of {name!r} is given twice: give each sample one {what}")
        with np.errstate(over="ignore"):  # values beyond float32 become infinite
            target[part.first_row + hits] = index.values[places[hits]]


def refuse_other_pool(
    identifier: str, index: NameIndex, target: npt.NDArray[np.float32], what: str, max_rejected: float
) -> None:
    """Raise a UserError if a greater share of the names has no sample, and of the samples no value; see `join_values`."""
    lacking = int(np.isnan(target).sum())
    if index.unknown > max_rejected * index.count and lacking > max_rejected * len(target):
        example = f", such as {index.example!r}" if index.example is not None else ""
        raise UserError(
            f"{index.unknown:,} of {index.count:,} rows ({index.unknown / index.count:.1%}) belong to no sample{example}, and "
            f"{lacking:,} of {len(target):,} samples ({lacking / len(target):.1%}) have no {what}, both more than `max_rejected` "
            f"{max_rejected:g}: give a file of this pool, whose {identifier}s are the samples' own, or a greater `max_rejected`"
        )
