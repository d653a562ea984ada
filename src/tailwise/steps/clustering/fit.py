"""Fit of the centroids: spherical k-means over a sample of the rows, whose sums workers make over ranges of rows."""

from __future__ import annotations

import operator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.catalog import Part
from tailwise.catalog.files import create_array, map_array
from tailwise.context import Context
from tailwise.execution.base import KERNEL, Task, Worker
from tailwise.kernels.grid import row_chunks
from tailwise.kernels.keyed import stream_key
from tailwise.kernels.kmeans import KMeansResult, chosen_rows, iterate, seeds
from tailwise.kernels.lloyd import Lloyd, Partial
from tailwise.kernels.screening import faster_precision
from tailwise.requests import ClusterRequest
from tailwise.steps.clustering.tasks import CHUNK_ROWS, PartTask
from tailwise.storage.local import in_place

Span = tuple[int, int]  # first row, and the row after the last


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


@dataclass(frozen=True)
class _Seed(Task[int, npt.NDArray[np.float32]]):
    """Find the first centroids. Item: their number."""

    training: TrainingRows
    seed: int
    device: str
    carry_bytes: int

    def run(self, item: int, worker: Worker) -> npt.NDArray[np.float32]:
        blocks = self.training.blocks(worker)
        return seeds(blocks, item, seed=self.seed, device=self.device, carry_bytes=self.carry_bytes)


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

    def partial(centroids: npt.NDArray[np.float32]) -> Partial:
        next(progress, None)
        task = _Sum(training, centroids, device, carry_bytes // count)
        return context.executor.reduce(task, spans, operator.add, KERNEL)

    (first,) = context.executor.map(_Seed(training, request.seed, device, carry_bytes), [k], KERNEL)
    try:
        return iterate(first, partial, request.iterations)
    finally:
        for _ in progress:  # ends the bar
            pass
