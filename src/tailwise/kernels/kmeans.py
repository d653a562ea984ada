"""Spherical k-means, the same to the bit for any chunk size, thread count and order of summation (see grid.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tailwise.kernels.grid import as_rows, row_chunks, to_grid
from tailwise.kernels.keyed import hash_range, stream_key
from tailwise.kernels.lloyd import CARRY_BYTES, CHUNK_ROWS, Lloyd, Partial, finish
from tailwise.kernels.products import repeat_if_wrong
from tailwise.kernels.seeding import TooFewDistinctRowsError, seed_centroids

TOLERANCE = 1e-5
SEEDING_ROWS_PER_CENTROID = 8
SEEDING_PRODUCTS = 1 << 23  # of a row and a centroid: where centroids are few, more rows cost no more products,
SEEDING_ROWS = 1 << 17  # but no more than these


@dataclass(frozen=True)
class KMeansResult:
    """A fit."""

    centroids: npt.NDArray[np.float32]  # float32 [K, d], unit norm, on the grid
    objective: list[float]  # mean cosine of the rows to their centroid, before each update: one entry per iteration


def chosen_rows(first: int, count: int, share: float, key: np.uint64) -> npt.NDArray[np.bool_]:
    """Which of the rows first … first + count − 1 are among about `share` of all, by a hash of their index alone: bool [count]."""
    threshold = np.uint64(min(int(share * 2**64), 2**64 - 1))
    chosen: npt.NDArray[np.bool_] = hash_range(key, first, count) <= threshold
    return chosen


def seeding_rows(total: int, k: int) -> int:
    """How many rows k-means is seeded from: a sixteenth, but 4 to 8 a centroid, or more where centroids are few."""
    some = min(max(total // 16, 4 * k), SEEDING_ROWS_PER_CENTROID * k)
    return min(max(some, min(SEEDING_PRODUCTS // k, SEEDING_ROWS)), total)


def _seeding_sample(blocks: Sequence[npt.NDArray[Any]], wanted: int, seed: int) -> npt.NDArray[Any]:
    """Return about `wanted` rows, without rows of zeros."""
    total = sum(len(block) for block in blocks)
    share = wanted / max(total, 1)
    key = stream_key(seed, "seeding sample")
    while True:
        kept = []
        for first, chunk in row_chunks(blocks, CHUNK_ROWS):
            rows = chunk[chosen_rows(first, len(chunk), share, key)]
            kept.append(rows[to_grid(rows).any(axis=1)])
        present: npt.NDArray[Any] = np.concatenate(kept) if kept else np.empty((0, 1))
        if share >= 1 or len(present) >= 0.9 * wanted:
            return present
        share = min(2 * share, 1.0) if 2 * len(present) < wanted else 1.1 * share  # many rows are zeros


@repeat_if_wrong
def seeds(
    blocks: Sequence[npt.NDArray[Any]],
    k: int,
    *,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    carry_bytes: int = CARRY_BYTES,
) -> npt.NDArray[np.float32]:
    """Return the centroids that k-means begins with: k-means++ on a sample of the rows, float32 [k, d]; arguments as of `kmeans`.

    Raises:
        TooFewDistinctRowsError: fewer than k distinct rows.
    """
    total = sum(len(block) for block in blocks)
    wanted = seeding_rows(total, k)
    while True:
        sample = _seeding_sample(blocks, wanted, seed)
        if not len(sample):
            raise TooFewDistinctRowsError(0, k)
        try:
            return seed_centroids(sample, k, seed=seed, device=device, threads=threads, carry_bytes=carry_bytes)
        except TooFewDistinctRowsError:
            if wanted >= total:
                raise
            wanted = min(4 * wanted, total)  # most rows are copies of others: the sample has too few


def iterate(
    centroids: npt.NDArray[np.float32],
    partial: Callable[[npt.NDArray[np.float32]], Partial],
    iterations: int,
    tolerance: float = TOLERANCE,
    on_iteration: Callable[[int, float], None] | None = None,
) -> KMeansResult:
    """Repeat Lloyd's iteration until the objective hardly rises.

    Args:
        centroids: float32 [K, d], the first ones.
        partial: returns the sums of an iteration over all rows.
        iterations: maximum number.
        tolerance: see `kmeans`.
        on_iteration: see `kmeans`.
    """
    objective: list[float] = []
    for iteration in range(iterations):
        centroids, mean = finish(partial(centroids), centroids)
        objective.append(mean)
        if on_iteration:
            on_iteration(iteration + 1, mean)
        if len(objective) > 1 and objective[-1] - objective[-2] < tolerance:
            break
    return KMeansResult(centroids, objective)


def kmeans(
    x: npt.NDArray[Any] | torch.Tensor | Iterable[npt.NDArray[Any] | torch.Tensor],
    k: int,
    *,
    iterations: int = 30,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    device: str = "auto",
    threads: int | None = None,
    chunk_rows: int | None = None,
    carry_bytes: int = CARRY_BYTES,
    on_iteration: Callable[[int, float], None] | None = None,
) -> KMeansResult:
    """Spherical k-means (Dhillon, Modha 2001): maximises the mean cosine of rows to their centroid.

    Args:
        x: rows [N, d], or blocks of rows (memory-mapped, say); float16 or float32, unit norm, rows of zeros are left out.
        k: number of centroids.
        iterations: maximum number.
        seed: decides the seeding.
        tolerance: stop when an iteration raised the mean cosine by less.
        device: see `Assigner`; the result doesn't depend on it.
        threads: on the CPU; None for torch's number; the result doesn't depend on it.
        chunk_rows: rows in memory at a time; None for CHUNK_ROWS; the result doesn't depend on it.
        carry_bytes: memory for what is carried from one iteration to the next (see `Lloyd`); the result doesn't depend on it.
        on_iteration: called after each iteration with its number (from 1) and the mean cosine before.

    Returns:
        Centroids and the course of the objective. An empty cluster takes half of the largest one.

    Raises:
        TooFewDistinctRowsError: fewer than k distinct rows (whose cosine is below 1 − 2⁻²²).
        ValueError: k < 1, or rows that are neither zero nor of unit norm.
    """
    if k < 1:
        raise ValueError(f"k = {k}: must be at least 1")
    blocks = [as_rows(x)] if isinstance(x, (np.ndarray, torch.Tensor)) else [as_rows(block) for block in x]

    options: dict[str, Any] = {"device": device, "threads": threads, "carry_bytes": carry_bytes}
    first = seeds(blocks, k, seed=seed, **options)
    lloyd = Lloyd(blocks, k, rows=chunk_rows or CHUNK_ROWS, **options)
    return iterate(first, lloyd.partial, iterations, tolerance, on_iteration)
