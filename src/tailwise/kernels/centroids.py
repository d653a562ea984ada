"""Relations between centroids: merging of near ones, and distance to neighbours."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

NEIGHBOURS = 20  # of d_inter, as in DBP
BLOCK_ROWS = 1024


def merge_centroids(
    centroids: npt.NDArray[np.float32], threshold: float, *, block_rows: int = BLOCK_ROWS
) -> npt.NDArray[np.int64]:
    """Greedy merging of near-duplicate centroids (DynamiCS, section 3.1).

    In index order, a centroid is kept unless its cosine to an already kept one is ≥ threshold.

    Args:
        centroids: [K, d], unit norm, on the grid.
        threshold: cosine in (−1, 1].
        block_rows: centroids that are compared at a time; the result does not depend on it.

    Returns:
        Indices of the kept centroids, int64, ascending.
    """
    wide = centroids.astype(np.float64)
    kept: list[int] = []
    for start in range(0, len(wide), block_rows):
        block = wide[start : start + block_rows]
        free = np.ones(len(block), np.bool_)
        for first in range(0, len(kept), block_rows):
            free &= ~(block @ wide[kept[first : first + block_rows]].T >= threshold).any(axis=1)
        near = block @ block.T >= threshold
        for at in np.flatnonzero(free):
            if free[at]:
                kept.append(start + int(at))
                free[at + 1 :] &= ~near[at, at + 1 :]
    return np.array(kept, np.int64)


def neighbour_distance(
    centroids: npt.NDArray[np.float32], neighbours: int = NEIGHBOURS, *, block_rows: int = BLOCK_ROWS
) -> npt.NDArray[np.float64]:
    """d_inter: mean cosine distance of each centroid to its nearest other centroids (DBP, section 3.2).

    Args:
        centroids: [K, d], unit norm, on the grid.
        neighbours: how many (all others, if there are fewer).
        block_rows: as in `merge_centroids`.

    Returns:
        float64 [K]; zeros if K = 1.
    """
    wide = centroids.astype(np.float64)
    count = min(neighbours, len(wide) - 1)
    distance = np.zeros(len(wide), np.float64)
    if not count:
        return distance
    for start in range(0, len(wide), block_rows):
        similarity = wide[start : start + block_rows] @ wide.T
        own = np.arange(len(similarity))
        similarity[own, start + own] = -np.inf
        nearest = -np.sort(-np.partition(similarity, -count, axis=1)[:, -count:], axis=1)
        distance[start : start + len(similarity)] = 1 - nearest.sum(axis=1) / count
    return distance
