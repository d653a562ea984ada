"""Group: any column as the clustering of a plan: classes, languages, domains, cluster numbers made elsewhere (map and reduce)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.files import create_array, file_digest
from tailwise.catalog.noted import HASH_COLUMNS
from tailwise.context import Context
from tailwise.errors import MAX_REJECTED, NotFoundError, UserError, check_share
from tailwise.execution.base import KERNEL, Apply
from tailwise.requests import GroupRequest, refuse_given
from tailwise.shards.columns import unwrapped
from tailwise.steps.grouping.entries import group_by_concept, group_by_entry
from tailwise.steps.grouping.write import (
    NO_GROUP,
    SOURCE,
    Groups,
    Pool,
    check_count,
    config_of,
    group_by_source,
    make_grouping,
)
from tailwise.steps.importing.join import Batch, Columns, join_values, read_columns

PLACES = tuple(f"{member}_{what}" for member in ("image", "caption", "json") for what in ("offset", "bytes"))
IDENTITY = ("key", "uid", "caption", *HASH_COLUMNS.values(), *PLACES)
MISSING = ("leave-out", "own-group")
SUFFIXES = (".parquet", ".tsv", ".csv")


def group(catalog: Catalog | str | Path, request: GroupRequest, context: Context | None = None) -> Clustering:
    """Make groups of the newest snapshot, in the place of clusters: by a column, or by the rarest entry or concept of each sample.

    Groups by column are numbered in the order of their values: by number where all of them are whole numbers, else by code point.

    Args:
        catalog: or its path; with samples.
        request: what is asked for.
        context: runs the tasks and shows progress.

    Raises:
        UserError: there is no such column, it can't group, or it has more than MAX_GROUPS values; the list can't be read, or no caption
            or too few captions hold an entry.
    """
    context = context or Context()
    catalog = Catalog.open(catalog)
    if request.suggest:
        raise UserError("`suggest` makes no groups: call tailwise.steps.grouping.suggest.suggest_entries")
    if request.missing not in MISSING:
        raise UserError(f"`missing` {request.missing!r}: use {' or '.join(MISSING)}")
    if request.entries is not None:
        return group_by_entry(catalog, request.entries, request, context)
    if request.concepts is not None:
        return group_by_concept(catalog, request, context)
    if request.file is None:
        refuse_given(request, {"max_rejected"}, "without `file`")
    if request.by == SOURCE and request.file is None and SOURCE not in _columns(catalog):
        return group_by_source(catalog, request, context)
    return _by_column(catalog, str(request.by), request, context)


def _by_column(catalog: Catalog, column: str, request: GroupRequest, context: Context) -> Clustering:
    file = request.file
    max_rejected = MAX_REJECTED if request.max_rejected is None else request.max_rejected
    check_share(max_rejected)
    if file is not None and not file.is_file():
        raise NotFoundError(f"{file} is no file: give a .parquet, .tsv or .csv file")
    config = config_of(column, request, catalog.snapshot())
    if file is None:
        _check_column(catalog, column)
    else:
        _open(file, column)  # refuses bad ones
    inputs = {} if file is None else {"file": file_digest(file)}

    def find(pool: Pool) -> Groups:
        return _of_catalog(pool, column) if file is None else _of_file(pool, file, column, max_rejected)

    return make_grouping(catalog, request.name or column, config, inputs, find, column, context)


def _check_column(catalog: Catalog, column: str) -> None:
    names = _columns(catalog) - {*IDENTITY} | {SOURCE}
    if column in IDENTITY:
        raise UserError(
            f"`by` {column}: it identifies samples, and can't group them; use one of {', '.join(sorted(names))}"
        )
    if column not in names:
        raise UserError(f"no samples have a column {column!r}: use one of {', '.join(sorted(names))}, or give `file`")


def _columns(catalog: Catalog) -> set[str]:
    """Return the names of the columns of all samples."""
    return {name for part in catalog.parts() for name in _names(catalog, part)}


def _of_catalog(pool: Pool, column: str) -> Groups:
    run, folder = pool.context.executor.map, pool.catalog.folder
    kept = ((part, pool.survivors.keeps(part.span)) for part in pool.parts)
    found = run(Apply(partial(_distinct_of_part, folder, column)), kept, KERNEL)
    distinct = _distinct(pool.context.progress(found, f"values of {column}", len(pool.parts)), column)
    labels = run(Apply(partial(_labels_of_part, folder, column, distinct)), pool.parts, KERNEL)
    return Groups(distinct.cast(pa.string()).to_pylist(), labels)


def _distinct_of_part(folder: Path, column: str, item: tuple[Part, npt.NDArray[np.bool_]]) -> pa.Array:
    part, kept = item
    return _values_of_part(folder, column, part).filter(pa.array(kept)).unique()


def _labels_of_part(folder: Path, column: str, distinct: pa.Array, part: Part) -> npt.NDArray[np.int32]:
    return _labels(_values_of_part(folder, column, part), distinct)


def _values_of_part(folder: Path, column: str, part: Part) -> pa.Array:
    catalog = Catalog.open(folder)
    if column not in _names(catalog, part):
        return pa.nulls(part.rows, pa.large_string())
    return _groupable(catalog.samples(part, [column]).column(0), column)


def _names(catalog: Catalog, part: Part) -> list[str]:
    names: list[str] = pq.read_schema(catalog.samples_path(part.number)).names
    return names


def _of_file(pool: Pool, path: Path, column: str, max_rejected: float) -> Groups:
    """Join by names of samples; values that no sample has make no group."""
    distinct = _distinct(
        pool.context.progress((values for _, values in _open(path, column)), f"values of {column}"), column
    )
    labels = create_array(pool.work / "labels.npy", (pool.snapshot.rows,), np.float32)
    labels[:] = np.nan

    def batches(identifier: str) -> Iterator[Batch]:
        opened = pool.context.progress(_open(path, column, identifier), f"joining {column}")
        return (_present(keys, _labels(values, distinct)) for keys, values in opened)

    without_sample = join_values(
        pool.catalog,
        pool.snapshot,
        path,
        batches,
        labels,
        pool.work / "keys",
        f"value of {column}",
        max_rejected=max_rejected,
    )
    sizes = np.zeros(len(distinct), np.int64)
    for part in pool.parts:
        found = labels[part.span][pool.survivors.keeps(part.span)]
        sizes += np.bincount(found[~np.isnan(found)].astype(np.int64), minlength=len(sizes))
    numbers = np.where(sizes > 0, np.cumsum(sizes > 0) - 1, NO_GROUP).astype(np.int32)
    values = distinct.filter(pa.array(sizes > 0)).cast(pa.string()).to_pylist()
    parts = (np.append(numbers, np.int32(NO_GROUP))[_whole(labels[part.span])] for part in pool.parts)
    return Groups(values, parts, {"values_without_sample": without_sample})


def _whole(labels: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """As whole numbers; −1 for NaN."""
    return np.where(np.isnan(labels), -1, labels).astype(np.int64)


def _present(keys: list[str], labels: npt.NDArray[np.int32]) -> tuple[list[str], npt.NDArray[np.float64]]:
    """Those of a batch that have a value."""
    if labels.min(initial=0) >= 0:
        return keys, labels.astype(np.float64)
    chosen = np.flatnonzero(labels >= 0)
    return [keys[at] for at in chosen], labels[chosen].astype(np.float64)


def _open(path: Path, column: str, identifier: str | None = None) -> Columns:
    """Return identifiers, by default of the first kind that a file has, and values, in batches."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: groups are read from {', '.join(SUFFIXES)}")
    _, columns = read_columns(path, column, "groups", identifier)
    return ((keys, _groupable(values, column)) for keys, values in columns)


def _groupable(values: pa.Array | pa.ChunkedArray, column: str) -> pa.Array:
    """Values as int64 or large_string, missing ones null.

    Raises:
        UserError: they are neither text, whole numbers nor booleans.
    """
    given, values = values.type, unwrapped(values)
    kind = values.type
    if (
        pa.types.is_null(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
    ):
        return values.cast(pa.large_string())
    if pa.types.is_floating(kind):  # as sidecar columns are stored, counts among them
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, kind), values)
    elif not pa.types.is_integer(kind):
        raise UserError(f"`by` {column}: groups are text, whole numbers or booleans, not {given}")
    try:
        return values.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise UserError(f"`by` {column}: groups are text, whole numbers or booleans: {error}") from error


def _distinct(arrays: Iterable[pa.Array], column: str) -> pa.Array:
    """The distinct values of all arrays, without nulls, in order."""
    found: pa.Array | None = None
    for array in arrays:
        fresh = array.unique().drop_null()
        if not len(fresh):
            continue
        found = fresh if found is None else pa.concat_arrays([found, fresh]).unique()
        check_count(len(found), column)
    if found is None:
        raise UserError(f"not one sample has a value in {column!r}: there is nothing to group by")
    return found.take(pc.sort_indices(_order(found)))


def _order(values: pa.Array) -> pa.Array:
    """Return the sort keys of values: numbers if all are whole numbers in their usual form, else the values."""
    try:
        numbers = values.cast(pa.int64())
    except pa.ArrowInvalid:
        return values
    return numbers if numbers.cast(values.type).equals(values) else values


def _labels(values: pa.Array, distinct: pa.Array) -> npt.NDArray[np.int32]:
    """The place of each value among the distinct ones: int32 [n], negative for nulls."""
    if values.type != distinct.type:  # a part where all are missing
        values = values.cast(distinct.type)
    found: npt.NDArray[np.int32] = pc.index_in(values, distinct).fill_null(NO_GROUP).to_numpy(zero_copy_only=False)
    return found
