"""Regroup: the embeddings of whole clusters, cluster after cluster, in bounded memory.

Rows are regrouped into buckets of consecutive clusters; the results of each bucket are a file, so that an interrupted run goes on with the
next bucket. Embeddings are regrouped along, unless the whole column fits in memory: then they are gathered from where they lie.

d: dimension; m: members of a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Part
from tailwise.catalog.columns import PlainColumn, RowsByPart
from tailwise.catalog.comparisons import Neighbours, comparison_artifact
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, Task, Worker
from tailwise.execution.shuffle import RUN_BYTES, Shuffle, cluster_buckets
from tailwise.kernels.grid import row_chunks
from tailwise.kernels.nearest import KEPT
from tailwise.kernels.similarity import DEVICE_COLUMNS, DEVICE_ROWS, NOTHING_EARLIER, SMALL, most_similar_earlier
from tailwise.kernels.threads import map_in_order
from tailwise.steps.dedup.comparison import NEW, Address, Comparison
from tailwise.storage.local import remove_folder

RUNTIME_BYTES = 400 << 20
# An interruption loses at most one bucket: about BUCKET_ROWS rows, or a 256th of all; more if a cluster is larger.
BUCKET_ROWS = 1 << 18
BUCKETS = 256
RESULT = np.dtype([("row", "<i8"), ("other", "<i8"), ("similarity", "<f8"), ("waits", "?")])
_RECORD = [("row", "<i8"), ("order", "<f8"), ("cluster", "<i4"), ("age", "u1")]


@dataclass(frozen=True)
class Members:
    """The samples that are compared in one cluster: those decided before, kept ones first, then those to be judged; each in keep-order."""

    cluster: int
    rows: npt.NDArray[np.int64]  # int64 [m], of the catalog
    kept_before: npt.NDArray[np.bool_]  # bool [m_old]: whether those decided before are kept
    x: npt.NDArray[np.float16]  # float16 [m, d]


@dataclass(frozen=True)
class Layout:
    """How much is held in memory at a time."""

    bucket_rows: int  # rows of a bucket, at most, unless a single cluster has more
    gathers: bool  # whether embeddings are read where they lie


def plan_layout(sizes: npt.NDArray[np.int64], rows: int, dimension: int, max_memory_bytes: int) -> Layout:
    """Return the layout; the results don't depend on it.

    `sizes`: int64 [K], members of each cluster. `rows`: N, of the whole column.

    Raises:
        UserError: the largest cluster needs more.
    """
    largest = int(sizes.max(initial=0))
    fixed = RUNTIME_BYTES + 3 * RUN_BYTES + DEVICE_ROWS * DEVICE_COLUMNS * 8
    side_by_side = min(largest, SMALL) * (torch.get_num_threads() + 1)
    # float16, its words, grid rows and unit rows in float32; indices
    comparing = max(largest, side_by_side) * (14 * dimension + 100)
    per_row = 2 * dimension + 100
    need = fixed + comparing + largest * per_row
    if need > max_memory_bytes:
        raise UserError(
            f"the largest cluster has {largest:,} members of {dimension} dimensions: comparing them needs about {need / 1e9:.3g} GB, "
            f"`max_memory` allows {max_memory_bytes / 1e9:.3g} GB: raise it, or cluster into more clusters for this"
        )
    column = rows * dimension * 2
    gathers = need + column <= max_memory_bytes
    free = max_memory_bytes - fixed - comparing - (column if gathers else 0)
    wanted = max(BUCKET_ROWS, int(sizes.sum()) // BUCKETS)
    return Layout(max(largest, min(wanted, free // per_row)), gathers)


@dataclass(frozen=True, eq=False)
class Buckets:
    """Some clusters of a comparison, in buckets."""

    compared: Address
    wanted: npt.NDArray[np.bool_]  # bool [K], the clusters
    buckets: npt.NDArray[np.int64]  # int64 [K], bucket of each cluster
    count: int  # number of buckets
    parts: int  # of the snapshot
    dimension: int  # d of the embeddings that are regrouped along; 0: they are gathered
    folder: Path  # of the files

    @property
    def shuffle(self) -> Shuffle:
        """The rows by bucket, one file a part."""
        along = [("x", "<f2", (self.dimension,))] if self.dimension else []
        return Shuffle(self.folder, np.dtype([*_RECORD, *along]), self.count, resumed=True)

    @property
    def results(self) -> Shuffle:
        """The results by part, one file a bucket."""
        return Shuffle(self.folder / "results", RESULT, self.parts, resumed=True)

    def results_of(self, part: Part) -> npt.NDArray[Any]:
        """Return the results of the rows of a part, RESULT [·]."""
        return self.results.read([*map(str, range(self.count))], part.number)

    def members(self, bucket: int, worker: Worker) -> Iterator[Members]:
        """Yield the clusters of a bucket."""
        compared = self.compared.open(worker)
        records = self.shuffle.read([part.name for part in compared.parts], bucket)
        order = np.lexsort((records["row"], records["order"], records["age"], records["cluster"]))
        clusters = records["cluster"][order]
        bounds = [0, *(np.flatnonzero(np.diff(clusters)) + 1), len(order)] if len(order) else [0]
        for start, stop in pairwise(bounds):
            mine = order[start:stop]
            rows, ages = records["row"][mine], records["age"][mine]
            x = records["x"][mine] if self.dimension else compared.x[rows]
            yield Members(int(clusters[start]), rows, ages[ages != NEW] == KEPT, x)


@dataclass(frozen=True, eq=False)
class _Spill(Task[Part, None]):
    to: Buckets

    def files(self, item: Part) -> Sequence[Path]:
        return (self.to.shuffle.index(item.name),)

    def run(self, item: Part, worker: Worker) -> None:
        compared = self.to.compared.open(worker)
        places = compared.places(item)
        places[(places >= 0) & ~self.to.wanted[places]] = -1
        ages, order, block = compared.ages(item), compared.order(item), compared.embeddings(item)
        shuffle = self.to.shuffle

        def chunks() -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]:
            for start, chunk in row_chunks([block], max(1, RUN_BYTES // shuffle.dtype.itemsize // places.shape[1])):
                members, probes = np.nonzero(places[start : start + len(chunk)] >= 0)
                rows = start + members
                records = np.empty(len(members), shuffle.dtype)
                records["row"], records["cluster"] = item.first_row + rows, places[rows, probes]
                records["age"], records["order"] = ages[rows], order[rows]
                if self.to.dimension:
                    records["x"] = chunk[members]
                yield self.to.buckets[records["cluster"]], records

        shuffle.write(item.name, chunks())


@dataclass(frozen=True, eq=False)
class Judge(Task[int, None]):
    """Judge the clusters of a bucket. Small clusters are judged side by side. Item: the number of the bucket."""

    of: Buckets

    def judge(self, members: Members, threads: int, worker: Worker) -> npt.NDArray[Any]:
        """Return the result of each member of a cluster, RESULT [·]; uses `threads` threads."""
        raise NotImplementedError

    def files(self, item: int) -> Sequence[Path]:
        """Return the file of a bucket's results."""
        return (self.of.results.index(str(item)),)

    def run(self, item: int, worker: Worker) -> None:
        """Write the results of a bucket."""
        found = map_in_order(
            lambda members, threads: self.judge(members, threads, worker),
            self.of.members(item, worker),
            torch.get_num_threads(),
            lambda cluster: len(cluster.x) > SMALL,
        )
        results = np.concatenate([np.empty(0, RESULT), *found])
        parts = RowsByPart(self.of.compared.open(worker).parts)
        self.of.results.write(str(item), [(parts.numbers_of(results["row"]), results)])


def most_similar(results: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the result of greatest similarity of each row, RESULT [·] by row; ties go to the lowest other row."""
    results = np.take(results, np.lexsort((results["other"], -results["similarity"], results["row"])))
    first: npt.NDArray[np.bool_] = np.diff(results["row"], prepend=-1) != 0
    return results[first]


def regroup(
    compared: Comparison,
    folder: Path,
    wanted: npt.NDArray[np.bool_],
    judge: Callable[[Buckets], Judge],
    max_memory_bytes: int,
    description: str,
) -> Buckets:
    """Judge some clusters; return their buckets, which hold the results.

    `folder`: of intermediate files, which an interrupted run with the same layout uses again. The caller removes it in the end. `wanted`:
    bool [K], the clusters.

    Raises:
        UserError: the largest cluster needs more memory.
    """
    sizes = np.where(wanted, compared.compared_sizes.sum(axis=1), 0)
    dimension = compared.dimension
    layout = plan_layout(sizes, compared.snapshot.rows, dimension, max_memory_bytes)
    place = folder / f"{layout.bucket_rows}{'-gathers' * layout.gathers}"
    along = 0 if layout.gathers else dimension
    of_cluster = cluster_buckets(sizes, layout.bucket_rows)
    count = int(of_cluster.max(initial=0)) + 1 if sizes.any() else 0
    buckets = Buckets(compared.address, wanted, of_cluster, count, len(compared.parts), along, place)
    task = judge(buckets)
    if not all(map(task.is_done, range(count))):
        compared.context.run(_Spill(buckets), compared.parts, f"{description}: regrouping", KERNEL)
        compared.context.run(task, range(count), description, KERNEL)
    return buckets


def make_neighbours(comparison: Comparison, *, max_memory_bytes: int, device: str = "auto") -> Neighbours:
    """Find the neighbours of all samples, or open them if they exist.

    `device`: of the matrix products; the result doesn't depend on it.

    Raises:
        UserError: the largest cluster needs more memory.
    """
    with comparison_artifact(comparison.catalog, comparison.config, comparison.inputs) as artifact:
        if not artifact.done:
            _compare(comparison, artifact, max_memory_bytes, device)
            remove_folder(artifact.path(layout.WORK))
            artifact.finish({"samples": comparison.new})
        return Neighbours(comparison.catalog, artifact.folder)


@dataclass(frozen=True, eq=False)
class _Nearest(Judge):
    """Find the most similar earlier member of each member."""

    device: str  # runs the matrix products

    def judge(self, members: Members, threads: int, worker: Worker) -> npt.NDArray[Any]:  # noqa: ARG002
        old = len(members.kept_before)
        similarity, earlier = most_similar_earlier(members.x, judged_from=old, device=self.device, threads=threads)
        found = np.flatnonzero(earlier >= 0)
        result = np.zeros(len(found), RESULT)
        result["row"], result["other"] = members.rows[found], members.rows[earlier[found]]
        result["similarity"] = similarity[found]
        return result


@dataclass(frozen=True, eq=False)
class _Collect(Task[Part, None]):
    of: Buckets  # buckets of the judged clusters
    similarities: PlainColumn  # float64, to write
    rows: PlainColumn  # int64, to write

    def files(self, item: Part) -> Sequence[Path]:
        return self.similarities.path(item), self.rows.path(item)

    def run(self, item: Part, worker: Worker) -> None:  # noqa: ARG002
        similarity, row = np.full(item.rows, NOTHING_EARLIER), np.full(item.rows, -1, np.int64)
        results = most_similar(self.of.results_of(item))
        at = results["row"] - item.first_row
        similarity[at], row[at] = results["similarity"], results["other"]
        self.similarities.write(item, similarity)
        self.rows.write(item, row)


def _compare(comparison: Comparison, artifact: Artifact, max_memory_bytes: int, device: str) -> None:
    columns = [PlainColumn(artifact.folder, name) for name in (layout.SIMILARITY, layout.NEAREST_ROW)]
    if all(column.path(part).exists() for column in columns for part in comparison.parts):
        return  # an interruption came after that
    comparison.find_places()
    new, old = comparison.compared_sizes.T
    buckets = regroup(
        comparison,
        artifact.path(layout.WORK),
        (new > 0) & (new + old > 1),
        lambda members: _Nearest(members, device),
        max_memory_bytes,
        "comparing inside clusters",
    )
    comparison.context.run(_Collect(buckets, *columns), comparison.parts, "writing neighbours", KERNEL)
