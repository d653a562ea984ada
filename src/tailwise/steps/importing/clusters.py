"""Import: cluster ids that were made elsewhere become a grouping of the catalog, without centroids."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.files import digest, file_digest
from tailwise.catalog.rejections import Rejections
from tailwise.context import Context
from tailwise.errors import MAX_REJECTED, ConflictError, UserError, refuse_many
from tailwise.sources.clip_retrieval import ClusterIds
from tailwise.steps.grouping.write import MAX_GROUPS, NO_GROUP, write_grouping
from tailwise.steps.importing.joining import CHUNK_ROWS, Join, Wording
from tailwise.steps.importing.rows import RowFinder
from tailwise.storage.local import scratch

Ids = npt.NDArray[np.int64]


def check_cluster_ids(catalog: Catalog, name: str, files: list[ClusterIds], *, fresh: bool) -> bool:
    """Return True if a grouping of these files exists; called before anything is imported.

    Args:
        catalog: where to.
        name: of the grouping.
        files: of cluster ids.
        fresh: whether shards come with them that the catalog doesn't have yet.

    Raises:
        UserError: another clustering has this name, or the grouping would lack the new shards.
    """
    found = Clustering.find(catalog, name)
    if found is None:
        return False
    same = found.inputs.get("cluster ids") == _ids_digest(files)
    if not same or fresh:
        what = "an earlier state of the pool" if same else "something else"
        raise ConflictError(
            f"the clustering {name!r} was made from {what}: name that of these cluster ids with `clustering`"
        )
    return True


def _ids_digest(files: list[ClusterIds]) -> str:
    return digest([file_digest(path) for file in files for path in (file.path, file.metadata) if path.exists()])


def import_clusters(
    catalog: Catalog,
    name: str,
    files: list[ClusterIds],
    given: frozenset[int] | None,
    rejections: Rejections,
    context: Context,
    max_rejected: float = MAX_REJECTED,
) -> Clustering:
    """Makes a grouping of the newest snapshot from files of cluster ids; a finished one of the same files is opened as it is.

    Groups are numbered in the order of the ids; their values are the ids.

    Args:
        catalog: where to; must hold samples.
        name: of the grouping.
        files: of cluster ids.
        given: shards that came with the files, which then belong to these alone; None if none came.
        rejections: takes what was left out.
        context: runs the tasks and shows progress.
        max_rejected: share of the files' rows that may be unusable. An id without a sample, or a second one, is not counted.

    Raises:
        UserError: too many rows are unusable, not one id belongs to a sample, or another clustering has this name.
    """
    folder = catalog.clusters_folder(name)
    snapshot = catalog.snapshot()
    config = {"group_by": "cluster ids", "without": [], "snapshot": snapshot.number}
    if given is not None and len(given) < snapshot.shards:
        config["shards"] = digest(sorted(given))
    inputs = {"cluster ids": _ids_digest(files)}
    if check_cluster_ids(catalog, name, files, fresh=False):
        return Clustering.open(catalog, name)
    parts = catalog.parts(snapshot)
    with scratch(folder.with_name(f".{name}.{layout.JOINING}")) as work:
        with rejections.writer(layout.rejected_log(catalog.folder, layout.CLUSTER_IDS_LOG, name)) as log:
            wording = Wording("cluster ids", "cluster id", "joining cluster ids")
            join = Join(parts, RowFinder(catalog, parts, work, given), work, log, wording)
            join.plan(files, [given is not None] * len(files), None, context)
            reasons = ", ".join(f"{reason}: {rows:,}" for (_, reason), rows in sorted(join.log.counts.items()))
            if not join.matched:
                raise UserError(f"none of the cluster ids in {files[0].path.parent} belongs to a sample ({reasons})")
            refuse_many(join.faulty, join.read, max_rejected, "{} rows of cluster ids{} can't be used", reasons)
            distinct = _distinct(join, parts, files, name)
        labels = (_labels(join, part, files, distinct) for part in parts)
        return write_grouping(catalog, name, config, inputs, labels, [str(item) for item in distinct.tolist()], context)


def _ids(join: Join, part: Part, files: list[ClusterIds]) -> Iterator[tuple[slice, npt.NDArray[np.bool_], Ids]]:
    """Chunks of a part, which of their rows have an id, and those ids."""
    sources = join.sources(part, files)
    span = join.span(part)
    file, position = join.file[span], join.position[span]
    for start in range(0, part.rows, CHUNK_ROWS):
        chunk = slice(start, min(start + CHUNK_ROWS, part.rows))
        ids = np.zeros(chunk.stop - start, np.int64)
        for number in np.unique(file[chunk]).tolist():
            if number >= 0:
                mine = np.flatnonzero(file[chunk] == number)
                ids[mine] = sources[number][position[chunk][mine]].ravel().astype(np.int64)
        has = (file[chunk] >= 0) & (ids >= 0)  # a negative one stands for no cluster
        yield chunk, has, ids[has]


def _distinct(join: Join, parts: list[Part], files: list[ClusterIds], name: str) -> Ids:
    """All ids that samples have, in order."""
    found = np.empty(0, np.int64)
    for part in parts:
        for _, _, ids in _ids(join, part, files):
            found = np.union1d(found, ids)
            if len(found) > MAX_GROUPS:
                raise UserError(
                    f"the cluster ids for {name!r} are more than {MAX_GROUPS:,} different ones: they are no clusters"
                )
    if not len(found):
        raise UserError(f"no cluster id in {files[0].path.parent} is at least 0: there is nothing to group by")
    return found


def _labels(join: Join, part: Part, files: list[ClusterIds], distinct: Ids) -> npt.NDArray[np.int32]:
    labels = np.full(part.rows, NO_GROUP, np.int32)
    for chunk, has, ids in _ids(join, part, files):
        labels[chunk][has] = np.searchsorted(distinct, ids)
    return labels
