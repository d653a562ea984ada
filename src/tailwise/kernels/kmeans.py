"""Spherical k-means, the same to the bit for any chunk size, thread count and order of summation (see grid.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.kernels.assign import MISSING, Assigner
from tailwise.kernels.grid import SIMILARITY_UNIT, row_chunks, to_grid, unit_rows_on_grid
from tailwise.kernels.jit import jit, split_threads
from tailwise.kernels.keyed import hash_range, random_below, stream_key

SEEDING_ROWS_PER_CENTROID = 16
ROUND_SHARE = 4  # a seeding round picks a quarter as many centroids as there are
CHUNK_ROWS = 16_384
_SAME = 2.0**-22  # rows nearer than this to a centroid count as equal to it


class TooFewDistinctRowsError(ValueError):
    """There are fewer distinct rows than centroids were asked for."""

    def __init__(self, distinct: int, asked: int) -> None:
        """Takes the two numbers."""
        super().__init__(f"only {distinct} distinct rows for {asked} centroids")
        self.distinct = distinct


@dataclass(frozen=True)
class KMeansResult:
    """A fit.

    Attributes:
        centroids: float32 [K, d], unit norm, on the grid.
        objective: mean cosine of the rows to their centroid, before each update: one entry per iteration.
    """

    centroids: npt.NDArray[np.float32]
    objective: list[float]


@jit
def _add_rows(
    x: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int32],
    sums: npt.NDArray[np.float64],
    start: int,
    stop: int,
) -> None:
    """Adds columns [start, stop) of every row to its cluster's sum."""
    for row in range(x.shape[0]):
        label = labels[row]
        if label >= 0:
            for column in range(start, stop):
                sums[label, column] += x[row, column]


def to_similarity_units(similarity: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Similarities as integers of 2⁻³⁰, so that their sums are exact in any order."""
    return np.rint(similarity / SIMILARITY_UNIT).astype(np.int64)


def _update(
    blocks: Sequence[npt.NDArray[Any]], centroids: npt.NDArray[np.float32], device: str, threads: int | None, rows: int
) -> tuple[npt.NDArray[np.float32], float]:
    """One Lloyd iteration: new centroids, and the mean cosine to the old ones."""
    assigner = Assigner(centroids, device=device, threads=threads)
    sums = np.zeros(centroids.shape, np.float64)
    sizes = np.zeros(len(centroids), np.int64)
    objective = members = 0
    for _, chunk in row_chunks(blocks, rows):
        labels, similarity = assigner(chunk)
        x = to_grid(chunk)

        def add(start: int, stop: int, x: npt.NDArray[np.float32] = x, labels: npt.NDArray[np.int32] = labels) -> None:
            _add_rows(x, labels, sums, start, stop)

        split_threads(add, x.shape[1], assigner.threads, grain=16)
        present = labels != MISSING
        sizes += np.bincount(labels[present], minlength=len(centroids))
        objective += int(to_similarity_units(similarity[present]).sum())
        members += int(present.sum())
    updated = unit_rows_on_grid(sums)
    lost = ~updated.any(axis=1)
    updated[lost] = centroids[lost]
    return _reseed_empty(updated, sizes), objective * SIMILARITY_UNIT / max(members, 1)


def _reseed_empty(centroids: npt.NDArray[np.float32], sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Splits the largest clusters in two, one for each empty cluster, by a small perturbation of both halves' centroids."""
    empty = np.flatnonzero(sizes == 0)
    donors = np.argsort(-sizes, kind="stable")[: len(empty)]
    dimension = centroids.shape[1]
    tilt = np.where(np.arange(dimension) % 2 == 0, 1.0, -1.0) * 2.0**-10 / np.sqrt(dimension)
    for target, donor in zip(empty, donors, strict=True):
        if sizes[donor] > 1:
            original = centroids[donor].astype(np.float64)
            centroids[[target, donor]] = unit_rows_on_grid(np.stack([original + tilt, original - tilt]))
    return centroids


def chosen_rows(first: int, count: int, share: float, key: np.uint64) -> npt.NDArray[np.bool_]:
    """Which of the rows first … first + count − 1 are among about `share` of all, by a hash of their index alone: bool [count]."""
    threshold = np.uint64(min(int(share * 2**64), 2**64 - 1))
    chosen: npt.NDArray[np.bool_] = hash_range(key, first, count) <= threshold
    return chosen


def _seeding_sample(blocks: Sequence[npt.NDArray[Any]], k: int, seed: int) -> npt.NDArray[Any]:
    """About 16 rows a centroid, all rows if there are few; without rows of zeros."""
    wanted = SEEDING_ROWS_PER_CENTROID * k
    share = wanted / max(sum(len(block) for block in blocks), 1)
    key = stream_key(seed, "seeding sample")
    while True:
        kept = []
        for first, chunk in row_chunks(blocks, CHUNK_ROWS):
            rows = chunk[chosen_rows(first, len(chunk), share, key)]
            kept.append(rows[rows.any(axis=1)])
        present: npt.NDArray[Any] = np.concatenate(kept) if kept else np.empty((0, 1))
        if share >= 1 or len(present) >= 0.9 * wanted:
            return present
        share = min(2 * share, 1.0) if 2 * len(present) < wanted else 1.1 * share  # many rows are zeros


def seed_centroids(
    x: npt.NDArray[Any], k: int, *, seed: int, device: str = "auto", threads: int | None = None
) -> npt.NDArray[np.float32]:
    """k-means++ (Arthur, Vassilvitskii 2007) in rounds: each round draws a quarter as many rows as were drawn before.

    A row is drawn with probability proportional to its cosine distance to the nearest centroid so far. Rounds instead of single
    draws turn the work into matrix products (as k-means‖, Bahmani et al. 2012, does); within a round a row, or its copies, is drawn once.

    Args:
        x: [n, d], unit norm.
        k: number of centroids.
        seed: decides the draw.
        device: see `Assigner`.
        threads: see `Assigner`.

    Returns:
        float32 [k, d] on the grid.

    Raises:
        TooFewDistinctRowsError: fewer than k distinct rows.
    """
    key = stream_key(seed, "k-means++")
    rows = [int(random_below(key, 0, np.array([len(x)]))[0])]
    distance = np.full(len(x), np.inf)
    drawn, fresh = 1, rows
    while True:
        _, similarity = Assigner(_seed_rows(x, fresh), device=device, threads=threads)(x)
        distance = np.minimum(distance, 1 - similarity)
        if len(rows) >= k:
            return _seed_rows(x, rows)
        weights = np.where(distance > _SAME, to_similarity_units(distance), 0)
        cumulative = np.cumsum(weights)
        if not cumulative[-1]:
            raise TooFewDistinctRowsError(len(rows), k)
        wanted = min(max(1, len(rows) // ROUND_SHARE), k - len(rows))
        targets = random_below(key, drawn, np.full(wanted, cumulative[-1]))
        drawn += wanted
        fresh = sorted({int(row) for row in np.searchsorted(cumulative, targets, side="right")})
        fresh = [fresh[at] for at in sorted(np.unique(x[fresh], axis=0, return_index=True)[1])]  # duplicates count once
        rows = rows + fresh


def _seed_rows(x: npt.NDArray[Any], rows: list[int]) -> npt.NDArray[np.float32]:
    return unit_rows_on_grid(x[rows].astype(np.float64))


def kmeans(
    x: npt.NDArray[Any] | Sequence[npt.NDArray[Any]],
    k: int,
    *,
    iterations: int = 20,
    seed: int = 0,
    tolerance: float = 1e-5,
    device: str = "auto",
    threads: int | None = None,
    chunk_rows: int | None = None,
    on_iteration: Callable[[int, float], None] | None = None,
) -> KMeansResult:
    """Spherical k-means (Dhillon, Modha 2001): maximises the mean cosine of rows to their centroid.

    Args:
        x: rows [N, d], or blocks of rows (memory-mapped, say); float16 or float32, unit norm, rows of zeros are left out.
        k: number of centroids.
        iterations: at most so many.
        seed: decides the seeding.
        tolerance: stop when an iteration raised the mean cosine by less.
        device: see `Assigner`; the result doesn't depend on it.
        threads: on the CPU; None for torch's number; the result doesn't depend on it.
        chunk_rows: rows in memory at a time; None for CHUNK_ROWS; the result doesn't depend on it.
        on_iteration: called after each iteration with its number (from 1) and the mean cosine before its update.

    Returns:
        Centroids and the course of the objective. An empty cluster takes half of the largest one.

    Raises:
        TooFewDistinctRowsError: fewer than k distinct rows (in the seeding's sample of 16 per centroid).
        ValueError: k < 1, or rows that are neither zero nor of unit norm.
    """
    if k < 1:
        raise ValueError(f"k = {k}: must be at least 1")
    blocks = [x] if isinstance(x, np.ndarray) else x
    sample = _seeding_sample(blocks, k, seed)
    if not len(sample):
        raise TooFewDistinctRowsError(0, k)
    centroids = seed_centroids(sample, k, seed=seed, device=device, threads=threads)
    objective: list[float] = []
    for iteration in range(iterations):
        centroids, mean = _update(blocks, centroids, device, threads, chunk_rows or CHUNK_ROWS)
        objective.append(mean)
        if on_iteration:
            on_iteration(iteration + 1, mean)
        if len(objective) > 1 and objective[-1] - objective[-2] < tolerance:
            break
    return KMeansResult(centroids, objective)
