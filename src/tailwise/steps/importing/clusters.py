"""Import: cluster ids that were made elsewhere become a grouping of the catalog, without centroids."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.files import digest, file_digest, read_array, write_array
from tailwise.errors import ConflictError, UserError, refuse_many
from tailwise.execution.base import Apply, Needs
from tailwise.sources.clip_retrieval import ClusterIds
from tailwise.steps.grouping.write import MAX_GROUPS, NO_GROUP, write_grouping
from tailwise.steps.importing.joining import INDEX, Join, Joining, JoinPlan, PartFiles, Wording
from tailwise.steps.importing.rows import RowFinder
from tailwise.storage.local import scratch

Ids = npt.NDArray[np.int64]


def check_cluster_ids(catalog: Catalog, name: str, files: list[ClusterIds], *, fresh: bool) -> bool:
    """Return True if a grouping of these files exists; called before anything is imported. `fresh`: the files come with new shards.

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


def import_clusters(joining: Joining, name: str, files: list[ClusterIds]) -> Clustering:
    """Make a grouping of the newest snapshot from files of cluster ids; open a finished one of the same files.

    Groups are numbered in the order of the ids; their values are the ids.

    `joining`: with a catalog that holds samples.

    Raises:
        UserError: too many rows are unusable, not one id belongs to a sample, or another clustering has this name.
    """
    catalog, given, context = joining.catalog, joining.given, joining.context
    folder = catalog.clusters_folder(name)
    snapshot = catalog.snapshot()
    config = {"group_by": "cluster ids", "without": [], "snapshot": snapshot.number}
    if given is not None and len(given) < snapshot.shards:
        config["shards"] = digest(sorted(given))
    inputs = {"cluster ids": _ids_digest(files)}
    if check_cluster_ids(catalog, name, files, fresh=False):
        return Clustering.open(catalog, name)
    parts, executor, needs = catalog.parts(snapshot), context.executor, Needs(workers=joining.workers)
    with scratch(folder.with_name(f".{name}.{layout.JOINING}")) as work:
        listed = layout.rejected_log(catalog.folder, layout.CLUSTER_IDS_LOG, name)
        with joining.rejections.writer(listed) as log, scratch(work / INDEX, own=True) as index:
            wording = Wording("cluster ids", "cluster id", "joining cluster ids")
            join = Join(parts, RowFinder(catalog, parts, index, given), work, log, wording)
            join.read_names(files, [given is not None] * len(files), None, context)
            reasons = ", ".join(f"{reason}: {rows:,}" for (_, reason), rows in sorted(join.log.counts.items()))
            if not join.matched:
                raise UserError(f"none of the cluster ids in {files[0].path.parent} belongs to a sample ({reasons})")
            refuse_many(join.faulty, join.read, joining.max_rejected, "{} rows of cluster ids{} can't be used", reasons)
            items = join.part_files(parts, files)
            found = executor.map(Apply(partial(_distinct, join.plan)), items, needs)
            distinct = np.empty(0, np.int64)
            for ids in found:
                distinct = np.union1d(distinct, ids)
                if len(distinct) > MAX_GROUPS:
                    many = f"the cluster ids for {name!r} are more than {MAX_GROUPS:,} different ones"
                    raise UserError(f"{many}: they are no clusters")
            if not len(distinct):
                raise UserError(f"no cluster id in {files[0].path.parent} is at least 0: there is nothing to group by")
        write_array(work / "distinct.npy", distinct)
        labels = executor.map(Apply(partial(_labels, join.plan, work / "distinct.npy")), items, needs)
        return write_grouping(catalog, name, config, inputs, labels, [str(item) for item in distinct.tolist()], context)


def _ids(plan: JoinPlan, item: PartFiles) -> Ids:
    """Return the id of each row of a part, negative for rows without a cluster: int64 [rows]."""
    values = [np.empty(0, np.int64), *(values[:, 0] for _, values in plan.values(item, 1, np.int64))]
    return np.where(plan.rows(item[0])["file"] < 0, NO_GROUP, np.concatenate(values))


def _distinct(plan: JoinPlan, item: PartFiles) -> Ids:
    ids = _ids(plan, item)
    return np.unique(ids[ids >= 0])


def _labels(plan: JoinPlan, distinct: Path, item: PartFiles) -> npt.NDArray[np.int32]:
    """Return the place of each id of a part among the distinct ids: int32 [rows]."""
    ids = _ids(plan, item)
    return np.where(ids < 0, NO_GROUP, np.searchsorted(read_array(distinct), ids)).astype(np.int32)
