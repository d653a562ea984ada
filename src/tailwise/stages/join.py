"""Joins: values that a file gives by uid or key, to the rows of a snapshot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.catalog.keys import ABSENT, AMBIGUOUS, KeyIndex
from tailwise.errors import UserError

BATCH = 262_144
IDENTIFIERS = ("uid", "key", "image_path")
Batch = tuple[list[str], npt.NDArray[np.float64]]


def parquet_batches(path: Path, column: str, what: str) -> tuple[str, Iterator[Batch]]:
    """Which identifier a Parquet file names samples by, and a column of it in batches.

    Args:
        path: of the file.
        column: of numbers.
        what: they are called, in errors: "rate", say.

    Raises:
        UserError: the file can't be read, or lacks the column or an identifier.
    """
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} can't be read as Parquet: {error}") from error
    names = file.schema_arrow.names
    identifier = next((name for name in IDENTIFIERS if name in names), None)
    if identifier is None or column not in names:
        raise UserError(
            f"{path} needs the column {column!r} and one of {', '.join(IDENTIFIERS)}; it has {', '.join(names)}"
        )

    def batches() -> Iterator[Batch]:
        try:
            for batch in file.iter_batches(BATCH, columns=[identifier, column]):
                identifiers = [_text(value) for value in batch.column(identifier).to_pylist()]
                yield identifiers, batch.column(column).cast(pa.float64()).to_numpy(zero_copy_only=False)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"the {what}s in column {column!r} of {path} can't be read: {error}") from error

    return identifier, batches()


def join_values(
    catalog: Catalog,
    snapshot: Snapshot,
    identifier: str,
    batches: Iterable[Batch],
    target: npt.NDArray[np.float32],
    work: Path,
    what: str,
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
        check: refuses bad values of a batch.

    Returns:
        How many values belong to no sample.

    Raises:
        UserError: a key belongs to several samples, or a sample is given twice.
    """
    index = _index(catalog, snapshot, identifier, work)
    unknown = 0
    for keys, values in batches:
        if check:
            check(keys, values)
        rows = index.find(keys)
        ambiguous = np.flatnonzero(rows == AMBIGUOUS)
        if ambiguous.size:
            raise UserError(
                f"the key {keys[ambiguous[0]]!r} belongs to several samples: name them by uid, in a Parquet file"
            )
        _check_given_once(keys, rows, target, what)
        unknown += int((rows == ABSENT).sum())
        with np.errstate(over="ignore"):  # beyond float32 lies infinity
            target[rows[rows >= 0]] = values[rows >= 0]
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
