"""Write a grouping: a clustering without centroids and similarities, of groups that a caller finds (map and reduce)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.clusterings import ClusterFiles, Clustering, clustering_artifact
from tailwise.catalog.drops import Survivors
from tailwise.catalog.files import digest
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.kernels.ranks import appearance_ranks
from tailwise.requests import GroupRequest
from tailwise.storage.local import scratch

MAX_GROUPS = 5_000_000  # below 2²⁴, so that float32, which joins fill in, holds each group's number
NO_GROUP = -1
SOURCE = "source"  # what the grouping is by, and its name


def write_grouping(
    catalog: Catalog,
    name: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    label_parts: Iterable[npt.NDArray[np.int32]],
    values: Sequence[str | None],
    context: Context | None = None,
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
        context: runs the tasks and shows progress.

    Raises:
        UserError: another clustering has this name, there are too many groups, or no sample is in any.
        ValueError: labels don't fit the parts or the values.
    """
    context = context or Context()
    return make_grouping(catalog, name, config, inputs, lambda _: Groups(values, label_parts), name, context)


@dataclass(frozen=True)
class Pool:
    """Whose rows are grouped, and a folder for the work."""

    catalog: Catalog
    snapshot: Snapshot
    survivors: Survivors
    work: Path
    context: Context

    @cached_property
    def parts(self) -> list[Part]:
        """Of the snapshot."""
        return self.catalog.parts(self.snapshot)


@dataclass(frozen=True)
class Groups:
    """Groups of rows."""

    values: Sequence[str | None]  # K names
    label_parts: Iterable[npt.NDArray[np.int32]]  # int32 [rows] of each part; negative for no group
    figures: Mapping[str, Any] = field(default_factory=dict)  # for the summary

    def with_missing(self) -> Groups:
        """With a last group, for the rows of no group."""
        last = np.int32(len(self.values))
        return replace(
            self,
            values=[*self.values, None],
            label_parts=(np.where(labels < 0, last, labels) for labels in self.label_parts),
        )


def config_of(group_by: str, request: GroupRequest, snapshot: Snapshot) -> dict[str, Any]:
    """Return the configuration of a grouping."""
    without = list(request.without)
    return {"group_by": group_by, "missing": request.missing, "without": without, "snapshot": snapshot.number}


def make_grouping(
    catalog: Catalog,
    name: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    find: Callable[[Pool], Groups],
    what: str,
    context: Context,
) -> Clustering:
    """Write a grouping as `write_grouping`; `find` finds the groups of a pool's rows, only if the grouping isn't there yet.

    With "missing": "own-group" in `config`, rows of no group make the last group. `what` names the groups in errors.
    """
    snapshot = catalog.snapshot(config["snapshot"])
    survivors = Survivors(catalog, config["without"], snapshot)
    inputs = {"snapshot": snapshot.id, **inputs, **survivors.inputs}
    with clustering_artifact(catalog, name, config, inputs) as artifact:
        if not artifact.done:
            with scratch(artifact.path(layout.JOINING), own=True) as work:
                pool = Pool(catalog, snapshot, survivors, work, context)
                found = find(pool)
                groups = found.with_missing() if config.get("missing") == "own-group" else found
                summary = _write_files(pool, ClusterFiles(artifact.folder), groups, what)
            artifact.finish(summary)
    return Clustering.open(catalog, name)


def _write_files(pool: Pool, files: ClusterFiles, groups: Groups, what: str) -> dict[str, Any]:
    """Writes labels, ranks and the table; returns the summary."""
    check_count(len(groups.values), what)
    seen = np.zeros(len(groups.values), np.int64)
    dropped = 0
    progress = pool.context.progress(pool.parts, "grouping samples", len(pool.parts))
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


def check_count(groups: int, column: str) -> None:
    """Refuse more than MAX_GROUPS groups."""
    if groups > MAX_GROUPS:
        raise UserError(
            f"{column!r} has more than {MAX_GROUPS:,} different values: give a coarser column, or cluster the samples"
        )


def sources_of(paths: Sequence[str]) -> list[str]:
    """Return the source of each shard: the first folder of its path below the folders that all paths share.

    A shard in the shared folder itself has the name of this folder. So /data/laion/0.tar and /data/cc12m/a/0.tar have the
    sources laion and cc12m.
    """
    folders = [path.split("/")[:-1] for path in paths]
    levels = itertools.takewhile(lambda names: len({*names}) == 1, zip(*folders, strict=False))
    shared = [names[0] for names in levels]
    own = next(filter(None, reversed(shared)), "pool")
    return [folder[len(shared)] if len(folder) > len(shared) else own for folder in folders]


def group_by_source(catalog: Catalog, request: GroupRequest, context: Context | None = None) -> Clustering:
    """Make groups of the newest snapshot by the sources of the shards (see `sources_of`), in the order of their names."""
    snapshot = catalog.snapshot()
    shards = catalog.shards(snapshot)
    found = sources_of(shards.column("path").to_pylist())
    values = sorted(set(found))
    config = config_of(SOURCE, request, snapshot)

    def find(pool: Pool) -> Groups:
        ids = shards.column("shard").to_numpy()
        numbers: npt.NDArray[np.int32] = np.full(int(ids.max(initial=-1)) + 1, NO_GROUP, np.int32)
        numbers[ids] = [values.index(source) for source in found]
        parts = (numbers[catalog.samples(part, ["shard"]).column(0).to_numpy()] for part in pool.parts)
        return Groups(values, parts)

    name = request.name or SOURCE
    return make_grouping(catalog, name, config, {"sources": digest(found)}, find, SOURCE, context or Context())
