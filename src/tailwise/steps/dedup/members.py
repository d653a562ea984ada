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

from tailwise.catalog.catalog import Part
from tailwise.catalog.files import read_array, write_array
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, Task, Worker
from tailwise.execution.shuffle import RUN_BYTES, Shuffle, cluster_buckets
from tailwise.kernels.grid import row_chunks
from tailwise.kernels.similarity import DEVICE_COLUMNS, DEVICE_ROWS, SMALL
from tailwise.kernels.threads import map_in_order
from tailwise.steps.dedup.comparison import KEPT, NEW, Address, Comparison

RUNTIME_BYTES = 400 << 20
# An interruption loses at most one bucket: about BUCKET_ROWS rows, or a 256th of all; more if a cluster is larger.
BUCKET_ROWS = 1 << 18
BUCKETS = 256
RESULT = np.dtype([("row", "<i8"), ("other", "<i8"), ("similarity", "<f8")])
_RECORD = [("row", "<i8"), ("order", "<f8"), ("cluster", "<i4"), ("age", "u1")]


@dataclass(frozen=True)
class Members:
    """The members of one cluster: those decided before, kept ones first, then those to be judged; each in keep-order.

    Attributes:
        cluster: its number.
        rows: int64 [m], of the catalog.
        kept_before: bool [m_old]: whether those decided before are kept.
        x: float16 [m, d].
    """

    cluster: int
    rows: npt.NDArray[np.int64]
    kept_before: npt.NDArray[np.bool_]
    x: npt.NDArray[np.float16]


@dataclass(frozen=True)
class Layout:
    """How much is held in memory at a time.

    Attributes:
        bucket_rows: rows of a bucket, at most, unless a single cluster has more.
        gathers: whether embeddings are read where they lie.
    """

    bucket_rows: int
    gathers: bool


def plan_layout(sizes: npt.NDArray[np.int64], rows: int, dimension: int, max_memory_bytes: int) -> Layout:
    """Return the layout; the results don't depend on it.

    Args:
        sizes: int64 [K], members of each cluster.
        rows: N, of the whole column.
        dimension: d.
        max_memory_bytes: what may be used.

    Raises:
        UserError: the largest cluster needs more.
    """
    largest = int(sizes.max(initial=0))
    fixed = RUNTIME_BYTES + 3 * RUN_BYTES + DEVICE_ROWS * DEVICE_COLUMNS * 8
    side_by_side = min(largest, SMALL) * (torch.get_num_threads() + 1)
    comparing = max(largest, side_by_side) * (
        14 * dimension + 100
    )  # float16, its words, grid rows and unit rows in float32; indices
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
    """Some clusters of a comparison, in buckets.

    Attributes:
        compared: address of the comparison.
        wanted: bool [K], the clusters.
        buckets: int64 [K], bucket of each cluster.
        dimension: d of the embeddings that are regrouped along; 0: they are gathered.
        folder: of the files.
    """

    compared: Address
    wanted: npt.NDArray[np.bool_]
    buckets: npt.NDArray[np.int64]
    dimension: int
    folder: Path

    @property
    def shuffle(self) -> Shuffle:
        """The rows by bucket, one file a part."""
        along = [("x", "<f2", (self.dimension,))] if self.dimension else []
        return Shuffle(self.folder, np.dtype([*_RECORD, *along]), int(self.buckets.max(initial=0)) + 1, resumed=True)

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
            x = records["x"][mine] if self.dimension else gather(rows, compared.blocks)
            yield Members(int(clusters[start]), rows, ages[ages != NEW] == KEPT, x)


@dataclass(frozen=True, eq=False)
class _Spill(Task[Part, None]):
    """Write the rows of a part by bucket."""

    to: Buckets

    def files(self, item: Part) -> Sequence[Path]:
        return (self.to.shuffle.index(item.name),)

    def run(self, item: Part, worker: Worker) -> None:
        compared = self.to.compared.open(worker)
        clusters = compared.labels(item)
        clusters[(clusters >= 0) & ~self.to.wanted[clusters]] = -1
        ages, order, block = compared.ages(item), compared.order(item), compared.embeddings(item)
        shuffle = self.to.shuffle

        def chunks() -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]:
            for start, chunk in row_chunks([block], max(1, RUN_BYTES // shuffle.dtype.itemsize)):
                members = np.flatnonzero(clusters[start : start + len(chunk)] >= 0)
                rows = start + members
                records = np.empty(len(members), shuffle.dtype)
                records["row"], records["cluster"] = item.first_row + rows, clusters[rows]
                records["age"], records["order"] = ages[rows], order[rows]
                if self.to.dimension:
                    records["x"] = chunk[members]
                yield self.to.buckets[records["cluster"]], records

        shuffle.write(item.name, chunks())


@dataclass(frozen=True, eq=False)
class Judge(Task[int, None]):
    """Judge the clusters of a bucket. Small clusters are judged side by side. Item: the number of the bucket.

    Attributes:
        of: the buckets.
    """

    of: Buckets

    def judge(self, members: Members, threads: int, worker: Worker) -> npt.NDArray[Any]:
        """Return the result of each member of a cluster, RESULT [·]; uses `threads` threads."""
        raise NotImplementedError

    def files(self, item: int) -> Sequence[Path]:
        """Return the file of a bucket's results."""
        return (self.of.folder / f"bucket-{item}.npy",)

    def run(self, item: int, worker: Worker) -> None:
        """Write the results of a bucket."""
        found = map_in_order(
            lambda members, threads: self.judge(members, threads, worker),
            self.of.members(item, worker),
            torch.get_num_threads(),
            lambda cluster: len(cluster.x) > SMALL,
        )
        write_array(self.files(item)[0], np.concatenate([np.empty(0, RESULT), *found]))


def regroup(
    compared: Comparison,
    folder: Path,
    wanted: npt.NDArray[np.bool_],
    judge: Callable[[Buckets], Judge],
    max_memory_bytes: int,
    description: str,
) -> Iterator[npt.NDArray[Any]]:
    """Judge some clusters; yield the results, RESULT [·], a bucket at a time.

    Args:
        compared: the comparison.
        folder: of intermediate files, which an interrupted run with the same layout uses again. The caller removes it in the end.
        wanted: bool [K], the clusters.
        judge: returns the task of some buckets.
        max_memory_bytes: refuse what needs more.
        description: of the progress.

    Raises:
        UserError: the largest cluster needs more memory.
    """
    sizes = np.where(wanted, compared.sizes.sum(axis=1), 0)
    dimension = compared.dimension
    layout = plan_layout(sizes, compared.snapshot.rows, dimension, max_memory_bytes)
    place = folder / f"{layout.bucket_rows}{'-gathers' * layout.gathers}"
    along = 0 if layout.gathers else dimension
    buckets = Buckets(compared.address, wanted, cluster_buckets(sizes, layout.bucket_rows), along, place)
    task, every = judge(buckets), range(buckets.shuffle.buckets if sizes.sum() else 0)
    if not all(map(task.is_done, every)):
        compared.context.run(_Spill(buckets), compared.parts, f"{description}: regrouping", KERNEL)
        compared.context.run(task, every, description, KERNEL)
    return (np.asarray(read_array(path)) for bucket in every for path in task.files(bucket))


def gather(rows: npt.NDArray[np.int64], blocks: Sequence[npt.NDArray[np.float16]]) -> npt.NDArray[np.float16]:
    """Return the embeddings of rows in any order, float16 [n, d].

    Args:
        rows: int64 [n], of the catalog.
        blocks: float16 [rows of the part, d], of all parts.
    """
    firsts = np.cumsum([0, *map(len, blocks)])
    x = np.empty((len(rows), blocks[0].shape[1]), np.float16)
    part = np.searchsorted(firsts, rows, side="right") - 1
    for number in np.unique(part):
        mine = part == number
        x[mine] = blocks[number][rows[mine] - firsts[number]]
    return x
