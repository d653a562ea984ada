"""Regroup: the embeddings of whole clusters, cluster after cluster, in bounded memory.

Rows are spilled into buckets of consecutive clusters; each bucket's results are a file, so that an interrupted run goes on with the
next bucket. Embeddings are spilled along, unless the whole column fits in memory: then they are gathered from where they lie.

d: dimension; m: members of a cluster.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tailwise.catalog.files import read_array, read_json, write_array, write_json
from tailwise.errors import UserError
from tailwise.execution.shuffle import cluster_buckets
from tailwise.kernels.grid import row_chunks
from tailwise.kernels.places import by_value
from tailwise.kernels.similarity import DEVICE_COLUMNS, DEVICE_ROWS, SMALL
from tailwise.kernels.threads import map_in_order
from tailwise.progress import Track

CHUNK_ROWS = 65_536
RUNTIME_BYTES = 400 << 20
# A bucket is what an interruption loses at most: about so many rows, or a 256th of all; more where a cluster is larger.
BUCKET_ROWS = 1 << 18
BUCKETS = 256

KEPT, DROPPED, NEW = np.uint8(0), np.uint8(1), np.uint8(2)  # ages: decided before, and how; or to be judged
_RECORD = np.dtype([("row", "<i8"), ("order", "<f8"), ("cluster", "<i4"), ("age", "u1")])
RESULT = np.dtype([("row", "<i8"), ("other", "<i8"), ("similarity", "<f8")])


@dataclass(frozen=True)
class Columns:
    """What one part says of its rows.

    Attributes:
        first_row: of the part.
        clusters: int32 [n]; negative for rows that take no part.
        ages: uint8 [n]: KEPT, DROPPED or NEW.
        order: float64 [n]: rows come in ascending order, ties by row, NaN last.
        embeddings: float16 [n, d], mapped.
    """

    first_row: int
    clusters: npt.NDArray[np.int32]
    ages: npt.NDArray[np.uint8]
    order: npt.NDArray[np.float64]
    embeddings: npt.NDArray[np.float16]


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
    """Chooses the layout; the results don't depend on it.

    Args:
        sizes: int64 [K], members of each cluster.
        rows: N, of the whole column.
        dimension: d.
        max_memory_bytes: what may be used.

    Raises:
        UserError: the largest cluster needs more.
    """
    largest = int(sizes.max(initial=0))
    chunk = CHUNK_ROWS * (4 * dimension + 100)
    fixed = RUNTIME_BYTES + chunk + DEVICE_ROWS * DEVICE_COLUMNS * 8
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


def regroup_members(
    folder: Path,
    sizes: npt.NDArray[np.int64],
    columns: Callable[[], Iterable[Columns]],
    layout: Layout,
    blocks: Sequence[npt.NDArray[np.float16]],
    judge: Callable[[Members, int], npt.NDArray[Any]],
    track: Track,
    description: str,
) -> Iterator[npt.NDArray[Any]]:
    """Applies `judge` to every cluster; yields what it returns, a bucket at a time.

    Args:
        folder: for intermediate files; what an interrupted run with the same layout left there is used. The caller removes it
            once all is consumed.
        sizes: int64 [K], members of each cluster.
        columns: gives all parts, in order.
        layout: see plan_layout.
        blocks: the embeddings of all parts.
        judge: members, and threads that it may use → RESULT [·]; small clusters are judged side by side.
        track: shows progress.
        description: of the progress.
    """
    buckets = cluster_buckets(sizes, layout.bucket_rows)
    count = int(buckets[-1]) + 1 if sizes.sum() else 0
    made = {"bucket_rows": layout.bucket_rows, "gathers": layout.gathers}
    if not (folder / "spilled.json").exists() or read_json(folder / "spilled.json") != made:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for part in track(columns(), f"{description}: regrouping", len(blocks)):
            _spill(folder, buckets, part, layout.gathers)
        for path in folder.glob("*.r*"):
            with path.open("rb") as stream:
                os.fsync(stream.fileno())  # before it is noted that all is there
        write_json(folder / "spilled.json", made)
    firsts = np.cumsum([0, *map(len, blocks)])
    for bucket in track(range(count), description, count):
        path = folder / f"{bucket}.npy"
        if not path.exists():
            members = _read(folder, bucket, layout, blocks, firsts)
            found = map_in_order(judge, members, torch.get_num_threads(), lambda cluster: len(cluster.x) > SMALL)
            write_array(path, np.concatenate([np.empty(0, RESULT), *found]))
            for suffix in ("rows", "records"):
                (folder / f"{bucket}.{suffix}").unlink(missing_ok=True)
        yield np.asarray(read_array(path))


def _spill(folder: Path, buckets: npt.NDArray[np.int64], part: Columns, gathers: bool) -> None:
    for start, chunk in row_chunks([part.embeddings], CHUNK_ROWS):
        clusters = np.asarray(part.clusters[start : start + len(chunk)])
        members = np.flatnonzero(clusters >= 0)
        if not len(members):
            continue
        records = np.empty(len(members), _RECORD)
        records["row"], records["cluster"] = part.first_row + start + members, clusters[members]
        records["age"], records["order"] = part.ages[start + members], part.order[start + members]
        for bucket, mine in by_value(buckets[records["cluster"]]):
            _append(folder / f"{bucket}.records", records[mine])
            if not gathers:
                _append(folder / f"{bucket}.rows", chunk[members[mine]])


def _append(path: Path, rows: npt.NDArray[Any]) -> None:
    with path.open("ab") as stream:
        stream.write(rows.tobytes())


def _read(
    folder: Path,
    bucket: int,
    layout: Layout,
    blocks: Sequence[npt.NDArray[np.float16]],
    firsts: npt.NDArray[np.int64],
) -> Iterator[Members]:
    path = folder / f"{bucket}.records"
    if not path.exists():
        return
    records = np.fromfile(path, _RECORD)
    dimension = blocks[0].shape[1]
    spilled = None if layout.gathers else np.fromfile(path.with_suffix(".rows"), np.float16).reshape(-1, dimension)
    order = np.lexsort((records["row"], records["order"], records["age"], records["cluster"]))
    clusters = records["cluster"][order]
    bounds = [0, *(np.flatnonzero(np.diff(clusters)) + 1), len(order)]
    for start, stop in pairwise(bounds):
        mine = order[start:stop]
        rows, ages = records["row"][mine], records["age"][mine]
        x = gather(rows, blocks, firsts) if spilled is None else spilled[mine]
        yield Members(int(clusters[start]), rows, ages[ages != NEW] == KEPT, x)


def gather(
    rows: npt.NDArray[np.int64], blocks: Sequence[npt.NDArray[np.float16]], firsts: npt.NDArray[np.int64]
) -> npt.NDArray[np.float16]:
    """Embeddings of rows in any order, from the blocks of all parts: float16 [n, d].

    Args:
        rows: int64 [n], of the catalog.
        blocks: float16 [rows of the part, d].
        firsts: int64 [parts + 1], the first row of each part.
    """
    x = np.empty((len(rows), blocks[0].shape[1]), np.float16)
    part = np.searchsorted(firsts, rows, side="right") - 1
    for number in np.unique(part):
        mine = part == number
        x[mine] = blocks[number][rows[mine] - firsts[number]]
    return x
