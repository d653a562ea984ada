"""Tasks of a clustering, part by part: assignment, counts, density; and the fit of the centroids, over a sample of the rows."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.clusterings import ClusterFiles, Clustering
from tailwise.catalog.drops import Survivors
from tailwise.catalog.files import create_array, map_array, write_array
from tailwise.context import Context
from tailwise.errors import DamagedError
from tailwise.execution.base import KERNEL, Task, WithWorker, Worker
from tailwise.kernels.assign import MISSING, Assigner
from tailwise.kernels.density import NeighbourCounter, similarity_steps
from tailwise.kernels.grid import row_chunks, to_similarity_units
from tailwise.kernels.keyed import stream_key
from tailwise.kernels.kmeans import KMeansResult, chosen_rows, iterate, seeds
from tailwise.kernels.lloyd import Lloyd, Partial
from tailwise.kernels.screening import faster_precision
from tailwise.requests import ClusterRequest
from tailwise.storage.local import in_place

CHUNK_ROWS = 65_536
Result = TypeVar("Result")
Span = tuple[int, int]  # first row, and the row after the last


@dataclass(frozen=True)
class Rows:
    """Address of the rows that take part in a step: an embedding column of a snapshot, less drop lists and removals."""

    catalog: Path  # its folder
    column: str  # name of the embedding column
    snapshot: int  # its number
    without: tuple[str, ...]  # names of the drop lists

    def survivors(self, worker: Worker) -> Survivors:
        """Return the rows that drop lists and removals leave."""
        catalog = Catalog.open(self.catalog)
        return worker.cached(self, lambda: Survivors(catalog, self.without, catalog.snapshot(self.snapshot)))

    def embeddings(self, part: Part) -> npt.NDArray[np.float16]:
        """Return the embeddings of a part, mapped: float16 [n, d]."""
        return Catalog.open(self.catalog).embedding(self.column, part)


@dataclass(frozen=True)
class PartTask(Task[Part, Result]):
    """A task on the rows of a part."""

    rows: Rows
    folder: Path  # of the clustering

    @property
    def made(self) -> ClusterFiles:
        """Files of the clustering."""
        return ClusterFiles(self.folder)


@dataclass(frozen=True)
class Assign(PartTask[None]):
    """Write label and similarity of each row."""

    device: str  # runs the matrix products
    base: str | None  # a clustering with the same centroids; rows that it assigned keep their cluster. None: assign all

    def files(self, item: Part) -> Sequence[Path]:
        """Return the files of a part."""
        return self.made.labels.path(item), self.made.similarities.path(item)

    def _open_base(self) -> Clustering | None:
        return None if self.base is None else Clustering.open(Catalog.open(self.rows.catalog), self.base)

    def run(self, item: Part, worker: Worker) -> None:
        """Assign the rows of a part."""
        assigner = worker.cached(self, lambda: Assigner(self.made.centroids, device=self.device))
        kept = self.rows.survivors(worker).keeps(item.span)
        labels = np.full(item.rows, MISSING, np.int32)
        similarity = np.zeros(item.rows, np.float32)
        base = worker.cached((self, "base"), self._open_base)
        if base is not None and item.number < base.snapshot.parts:
            known = kept & (base.labels.read(item) >= 0)
            labels[known] = base.labels.read(item)[known]
            similarity[known] = base.similarities.read(item)[known]
        for start, chunk in row_chunks([self.rows.embeddings(item)], CHUNK_ROWS):
            mine = slice(start, start + len(chunk))
            wanted = start + np.flatnonzero(kept[mine] & (labels[mine] < 0))
            if len(wanted):
                labels[wanted], similarity[wanted] = assigner(chunk[wanted - start])
        self.made.labels.write(item, labels)
        self.made.similarities.write(item, similarity)


@dataclass(frozen=True)
class Counts:
    """Counts of a part."""

    sizes: npt.NDArray[np.int64]  # [K], members of each cluster
    similarities: npt.NDArray[np.int64]  # [K], sum of their similarities, in units of SIMILARITY_UNIT
    dropped: int  # number of rows that drop lists and removals leave out


@dataclass(frozen=True)
class Count(PartTask[Counts]):
    """Count the members of each cluster."""

    def run(self, item: Part, worker: Worker) -> Counts:
        """Return the counts of a part."""
        clusters = len(self.made.centroids)
        labels = np.asarray(self.made.labels.read(item))
        if labels.max(initial=MISSING) >= clusters:  # written by an interrupted run, and not hashed yet
            raise DamagedError(
                f"{self.made.labels.path(item)} is damaged: delete {self.folder}, then repeat this command"
            )
        members = labels[labels >= 0]
        similarity = self.made.similarities.read(item)[labels >= 0].astype(np.float64)
        sums = np.zeros(clusters, np.int64)
        np.add.at(sums, members, to_similarity_units(similarity))
        dropped = int((~self.rows.survivors(worker).keeps(item.span)).sum())
        return Counts(np.bincount(members, minlength=clusters), sums, dropped)


def similarity_histogram(made: ClusterFiles, part: Part) -> npt.NDArray[np.int64]:
    """Return the number of rows of a part by steps of the similarity to their centroid, int64."""
    return similarity_steps(made.similarities.read(part)[made.labels.read(part) >= 0])


@dataclass(frozen=True)
class CountNeighbours(PartTask[None]):
    """Count the samples within a radius of each centroid."""

    radius: float  # least cosine
    device: str  # runs the matrix products

    def files(self, item: Part) -> Sequence[Path]:
        """Return the file of a part."""
        return (self.folder / layout.DENSITY / f"{item.name}{layout.ARRAY}",)

    def run(self, item: Part, worker: Worker) -> None:
        """Write the counts of a part, int64 [K]."""
        counter = worker.cached(self, lambda: NeighbourCounter(self.made.centroids, self.radius, device=self.device))
        member = self.made.labels.read(item) >= 0
        counts = np.zeros(len(self.made.centroids), np.int64)
        for start, chunk in row_chunks([self.rows.embeddings(item)], CHUNK_ROWS):
            counts += counter(chunk[member[start : start + len(chunk)]])
        write_array(self.files(item)[0], counts)

    def read(self, item: Part) -> npt.NDArray[np.int64]:
        """Return the counts of a part, int64 [K]."""
        return map_array(self.files(item)[0])


@dataclass(frozen=True)
class DrawRows(PartTask[None]):
    """Copy a share of the rows, drawn by a hash of their number."""

    share: float  # of the rows
    seed: int  # decides the draw

    def path(self, item: Part) -> Path:
        """Return the file of a part. A rerun writes it again, so that it need not be flushed to disk."""
        return self.folder / layout.TRAINING / f"{item.name}{layout.ARRAY}"

    def run(self, item: Part, worker: Worker) -> None:
        """Write the rows of a part, float16 [n, d]."""
        block = self.rows.embeddings(item)
        key = stream_key(self.seed, "training rows")
        chosen = self.rows.survivors(worker).keeps(item.span)
        for start, chunk in row_chunks([block], CHUNK_ROWS):
            chosen[start : start + len(chunk)] &= chosen_rows(item.first_row + start, len(chunk), self.share, key)
        with in_place(self.path(item)) as path:
            target = create_array(path, (int(chosen.sum()), block.shape[1]), np.float16)
            first = 0
            for start, chunk in row_chunks([block], CHUNK_ROWS):
                rows = chunk[chosen[start : start + len(chunk)]]
                target[first : first + len(rows)] = rows
                first += len(rows)


@dataclass(frozen=True)
class TrainingRows:
    """Rows that k-means is fitted on."""

    paths: tuple[Path, ...]  # of `.npy` files, float16 [n, d], in order

    def blocks(self, worker: Worker) -> list[npt.NDArray[Any]]:
        """Return the rows, mapped, file by file."""
        return worker.cached(self, self._open)

    def _open(self) -> list[npt.NDArray[Any]]:
        with ThreadPoolExecutor() as pool:  # opening hashes a file
            return list(pool.map(map_array, self.paths))

    def seeds(self, seed: int, device: str, carry_bytes: int, count: int, worker: Worker) -> npt.NDArray[np.float32]:
        """Return the first centroids, float32 [count, d]."""
        return seeds(self.blocks(worker), count, seed=seed, device=device, carry_bytes=carry_bytes)


@dataclass(frozen=True, eq=False)
class _Sum(Task[Span, Partial]):
    """Sum the rows of each centroid. What Lloyd's iterations carry for a range of rows stays with the worker."""

    training: TrainingRows
    centroids: npt.NDArray[np.float32]
    device: str
    carry_bytes: int

    def run(self, item: Span, worker: Worker) -> Partial:
        lloyd = worker.cached((self.training, len(self.centroids), item), lambda: self._begin(item, worker))
        return lloyd.partial(self.centroids)

    def _begin(self, item: Span, worker: Worker) -> Lloyd:
        first, blocks = 0, []
        for block in self.training.blocks(worker):
            mine = block[max(item[0] - first, 0) : max(item[1] - first, 0)]
            blocks += [mine] if len(mine) else []
            first += len(block)
        return Lloyd(blocks, len(self.centroids), device=self.device, carry_bytes=self.carry_bytes)


def fit(
    context: Context, training: TrainingRows, rows: int, k: int, request: ClusterRequest, device: str, carry_bytes: int
) -> KMeansResult:
    """Return the centroids of spherical k-means, as `kernels.kmeans` does, and the course of the objective.

    Args:
        context: runs the tasks.
        training: the rows.
        rows: their number.
        k: number of centroids.
        request: its `seed` decides the seeding; `iterations` is their maximum number.
        device: runs the matrix products; the result does not depend on it.
        carry_bytes: memory for what is carried from one iteration to the next, of all workers.

    Raises:
        TooFewDistinctRowsError: fewer than k distinct rows.
    """
    slots = context.executor.slots(KERNEL)
    count = min(2 * slots if slots > 1 else 1, max(rows, 1))
    spans = [(rows * at // count, rows * (at + 1) // count) for at in range(count)]
    made_by = f"{faster_precision()} products" if device == "cpu" else device
    progress = iter(context.progress(range(request.iterations), f"k-means, {made_by}", request.iterations))

    def summed(centroids: npt.NDArray[np.float32]) -> Partial:
        next(progress, None)
        task = _Sum(training, centroids, device, carry_bytes // count)
        return context.executor.reduce(task, spans, operator.add, KERNEL)

    seeding = WithWorker(partial(training.seeds, request.seed, device, carry_bytes))
    (first,) = context.executor.map(seeding, [k], KERNEL)
    try:
        return iterate(first, summed, request.iterations)
    finally:
        for _ in progress:  # ends the bar
            pass
