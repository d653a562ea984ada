"""Group: any column as the clustering of a plan: classes, languages, domains, cluster numbers made elsewhere (map and reduce)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.clusterings import ClusterFiles, Clustering, clustering_artifact
from tailwise.catalog.drops import Survivors
from tailwise.catalog.files import create_array, file_digest, scratch
from tailwise.errors import NotFoundError, UserError
from tailwise.kernels.ranks import appearance_ranks
from tailwise.progress import Track, silent
from tailwise.rejects import MAX_REJECTED, check_share
from tailwise.sources.columns import unwrapped
from tailwise.stages.join import Columns, join_values, read_columns

MAX_GROUPS = 5_000_000  # below 2²⁴, so that float32, which joins fill in, holds each group's number
PLACES = tuple(f"{member}_{what}" for member in ("image", "caption", "json") for what in ("offset", "bytes"))
IDENTITY = ("key", "uid", "caption", *PLACES)
MISSING = ("leave-out", "own-group")
NO_GROUP = -1
SUFFIXES = (".parquet", ".tsv", ".csv")


def write_grouping(
    catalog: Catalog,
    name: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    label_parts: Iterable[npt.NDArray[np.int32]],
    values: Sequence[str | None],
    track: Track = silent,
) -> Clustering:
    """Writes a grouping: a clustering without centroids and similarities. A finished one of the same identity is opened as it is.

    Args:
        catalog: with samples.
        name: of the clustering.
        config: all that decides it; "snapshot" (number) and "without" (names of drop lists) must be in it.
        inputs: name and hash of what it is made from; those of the snapshot and of the drop lists are added here.
        label_parts: int32 [rows] for each part of the snapshot, in [0, K); negative for rows of no group. What the drop lists drop
            is in no group whatever they say. Read only if the grouping isn't there yet.
        values: K names of groups; None is the group of the samples without a value.
        track: shows progress.

    Raises:
        UserError: another clustering has this name, there are too many groups, or no sample is in any.
        ValueError: labels don't fit the parts or the values.
    """
    return make_grouping(catalog, name, config, inputs, lambda _: Groups(values, label_parts), name, track)


def group(
    catalog: Catalog | str | Path,
    column: str,
    *,
    file: Path | None = None,
    max_rejected: float = MAX_REJECTED,
    name: str | None = None,
    missing: str = "leave-out",
    without: Sequence[str] = (),
    track: Track = silent,
) -> Clustering:
    """Makes the distinct values of a column the groups of the newest snapshot, in the place of clusters.

    Groups are numbered in the order of their values: by number where all of them are whole numbers, else by code point.

    Args:
        catalog: with samples.
        column: of strings, whole numbers or booleans.
        file: a .parquet, .tsv or .csv file that has the column, and uid, key or image_path; None for a column of the catalog.
        max_rejected: of the file, see `join_values`.
        name: of the clustering; the column's by default.
        missing: what becomes of samples without a value: "leave-out" (no group, so that no plan draws them) or "own-group".
        without: names of drop lists; what they drop belongs to no group.
        track: shows progress.

    Raises:
        UserError: there is no such column, it can't group, or it has more than MAX_GROUPS values.
    """
    catalog = Catalog.open(catalog)
    check_missing(missing)
    check_share(max_rejected)
    if file is not None and not file.is_file():
        raise NotFoundError(f"{file} is no file: give a .parquet, .tsv or .csv file")
    config = {
        "group_by": column,
        "missing": missing,
        "without": list(without),
        "snapshot": catalog.snapshot().number,
    }
    if file is None:
        _check_column(catalog, column)
    else:
        _open(file, column)  # refuses bad ones
    inputs = {} if file is None else {"file": file_digest(file)}

    def find(pool: Pool) -> Groups:
        return _of_catalog(pool, column) if file is None else _of_file(pool, file, column, max_rejected)

    return make_grouping(catalog, column if name is None else name, config, inputs, find, column, track)


def check_missing(missing: str) -> None:
    """Refuses what isn't in MISSING."""
    if missing not in MISSING:
        raise UserError(f"`missing` {missing!r}: use {' or '.join(MISSING)}")


@dataclass(frozen=True)
class Pool:
    """Whose rows are grouped, and a folder for the work."""

    catalog: Catalog
    snapshot: Snapshot
    survivors: Survivors
    work: Path
    track: Track

    @cached_property
    def parts(self) -> list[Part]:
        """Of the snapshot."""
        return self.catalog.parts(self.snapshot)


@dataclass(frozen=True)
class Groups:
    """Groups of rows.

    Attributes:
        values: K names.
        label_parts: int32 [rows] of each part; negative for no group.
        figures: for the summary.
    """

    values: Sequence[str | None]
    label_parts: Iterable[npt.NDArray[np.int32]]
    figures: Mapping[str, Any] = field(default_factory=dict)

    def with_missing(self) -> Groups:
        """With a last group, for the rows of no group."""
        last = np.int32(len(self.values))
        return replace(
            self,
            values=[*self.values, None],
            label_parts=(np.where(labels < 0, last, labels) for labels in self.label_parts),
        )


def make_grouping(
    catalog: Catalog,
    name: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    find: Callable[[Pool], Groups],
    what: str,
    track: Track,
) -> Clustering:
    """As `write_grouping`, of groups that are found only if the grouping isn't there yet.

    Args:
        catalog: with samples.
        name: of the clustering.
        config: all that decides it; "snapshot" and "without" must be in it; "missing" may.
        inputs: name and hash of what it is made from.
        find: the groups of a pool's rows.
        what: the samples are grouped by, for errors.
        track: shows progress.
    """
    snapshot = catalog.snapshot(config["snapshot"])
    survivors = Survivors(catalog, config["without"], snapshot)
    inputs = {"snapshot": snapshot.id, **inputs, **survivors.inputs}
    with clustering_artifact(catalog, name, config, inputs) as artifact:
        if not artifact.done:
            with scratch(artifact.path(layout.JOINING)) as work:
                pool = Pool(catalog, snapshot, survivors, work, track)
                found = find(pool)
                groups = found.with_missing() if config.get("missing") == "own-group" else found
                summary = _write_files(pool, ClusterFiles(artifact.folder), groups, what)
            artifact.finish(summary)
    return Clustering.open(catalog, name)


def _write_files(pool: Pool, files: ClusterFiles, groups: Groups, what: str) -> dict[str, Any]:
    """Writes labels, ranks and the table; returns the summary."""
    _check_count(len(groups.values), what)
    seen = np.zeros(len(groups.values), np.int64)
    dropped = 0
    progress = pool.track(pool.parts, "grouping samples", len(pool.parts))
    for part, given in zip(progress, groups.label_parts, strict=True):
        if len(given) != part.rows or given.max(initial=NO_GROUP) >= len(seen):
            raise ValueError(
                f"{len(given)} labels up to {given.max(initial=NO_GROUP)}: {part.rows} below {len(seen)} fit"
            )
        kept = pool.survivors.keeps(part.span)
        labels = np.where(kept & (given >= 0), given, NO_GROUP).astype(np.int32)
        files.labels.write(part, labels)
        files.ranks.write(part, appearance_ranks(labels, seen))
        dropped += int((~kept).sum())
    grouped = int(seen.sum())
    if not grouped:
        raise UserError(f"not one sample has a value in {what!r}: there is nothing to group by")
    files.write_table(_table(groups.values, seen))
    return {
        "clusters": int((seen > 0).sum()),
        "empty": int((seen == 0).sum()),
        "samples": grouped,
        "dropped": dropped,
        "without_value": pool.snapshot.rows - grouped - dropped,
        **groups.figures,
    }


def _table(values: Sequence[str | None], sizes: npt.NDArray[np.int64]) -> pa.Table:
    """As a clustering's table, without distances, and with the value that each group stands for."""
    unknown = pa.nulls(len(sizes), pa.float64())
    return pa.table(
        {
            "cluster": pa.array(np.arange(len(sizes)), pa.int32()),
            "size": pa.array(sizes, pa.int64()),
            "d_intra": unknown,
            "d_inter": unknown,
            "value": pa.array(values, pa.string()),
        }
    )


def _check_column(catalog: Catalog, column: str) -> None:
    names = {name for part in catalog.parts() for name in _names(catalog, part)} - {*IDENTITY}
    if column in IDENTITY:
        raise UserError(
            f"`by` {column}: it tells samples apart, and can't group them; use one of {', '.join(sorted(names))}"
        )
    if column not in names:
        raise UserError(f"no samples have a column {column!r}: use one of {', '.join(sorted(names))}, or give `file`")


def _of_catalog(pool: Pool, column: str) -> Groups:
    def values(part: Part) -> pa.Array:
        if column not in _names(pool.catalog, part):
            return pa.nulls(part.rows, pa.large_string())
        return _groupable(pool.catalog.samples(part, [column]).column(0), column)

    kept = (values(part).filter(pa.array(pool.survivors.keeps(part.span))) for part in pool.parts)
    distinct = _distinct(pool.track(kept, f"values of {column}", len(pool.parts)), column)
    labels = (_labels(values(part), distinct) for part in pool.parts)
    return Groups(distinct.cast(pa.string()).to_pylist(), labels)


def _names(catalog: Catalog, part: Part) -> list[str]:
    names: list[str] = pq.read_schema(catalog.samples_path(part.number)).names
    return names


def _of_file(pool: Pool, path: Path, column: str, max_rejected: float) -> Groups:
    """Joins by uid or key; values that no sample has make no group."""
    identifier, _ = _open(path, column)
    distinct = _distinct(pool.track((values for _, values in _open(path, column)[1]), f"values of {column}"), column)
    labels = create_array(pool.work / "labels.npy", (pool.snapshot.rows,), np.float32)
    labels[:] = np.nan
    batches = (_present(keys, _labels(values, distinct)) for keys, values in _open(path, column)[1])
    strangers = join_values(
        pool.catalog,
        pool.snapshot,
        identifier,
        pool.track(batches, f"joining {column}"),
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
    return Groups(values, parts, {"values_without_sample": strangers})


def _whole(labels: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """As whole numbers; −1 for NaN."""
    return np.where(np.isnan(labels), -1, labels).astype(np.int64)


def _present(keys: list[str], labels: npt.NDArray[np.int32]) -> tuple[list[str], npt.NDArray[np.float64]]:
    """Those of a batch that have a value."""
    if labels.min(initial=0) >= 0:
        return keys, labels.astype(np.float64)
    chosen = np.flatnonzero(labels >= 0)
    return [keys[at] for at in chosen], labels[chosen].astype(np.float64)


def _open(path: Path, column: str) -> tuple[str, Columns]:
    """Which identifier a file names samples by, and identifiers and values in batches."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: groups are read from {', '.join(SUFFIXES)}")
    identifier, columns = read_columns(path, column, "groups")
    return identifier, ((keys, _groupable(values, column)) for keys, values in columns)


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
        _check_count(len(found), column)
    if found is None:
        raise UserError(f"not one sample has a value in {column!r}: there is nothing to group by")
    return found.take(pc.sort_indices(_order(found)))


def _order(values: pa.Array) -> pa.Array:
    """What values are sorted by: their numbers, if all of them are whole numbers as one writes them; else themselves."""
    try:
        numbers = values.cast(pa.int64())
    except pa.ArrowInvalid:
        return values
    return numbers if numbers.cast(values.type).equals(values) else values


def _check_count(groups: int, column: str) -> None:
    if groups > MAX_GROUPS:
        raise UserError(
            f"{column!r} has more than {MAX_GROUPS:,} different values: give a coarser column, or cluster the samples"
        )


def _labels(values: pa.Array, distinct: pa.Array) -> npt.NDArray[np.int32]:
    """The place of each value among the distinct ones: int32 [n], negative for nulls."""
    if values.type != distinct.type:  # a part where all are missing
        values = values.cast(distinct.type)
    found: npt.NDArray[np.int32] = pc.index_in(values, distinct).fill_null(NO_GROUP).to_numpy(zero_copy_only=False)
    return found
