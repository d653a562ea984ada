"""The next nearest centroids of rows, after their nearest one, exactly.

n: rows; K: centroids; d: dimension.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tailwise.kernels.assign import MISSING, NONE, TILE_ROWS, Assigner, no_lists
from tailwise.kernels.grid import to_grid
from tailwise.kernels.jit import jit_any_order
from tailwise.kernels.lloyd import LIST, WINDOW_ROWS, reach_of_lists
from tailwise.kernels.nearest import inner_product
from tailwise.kernels.products import repeat_if_wrong
from tailwise.kernels.screening import full_precision
from tailwise.kernels.threads import run_tiles


@repeat_if_wrong
def next_nearest(
    x: npt.NDArray[Any], labels: npt.NDArray[np.int32], assigner: Assigner, count: int
) -> npt.NDArray[np.int32]:
    """Return the `count` nearest centroids of each row beside its own; ties go to the lowest index.

    Args:
        x: [n, d], float16 or float32, unit norm or zero.
        labels: int32 [n], the own centroid of each row; negative for rows that get none.
        assigner: holds the K centroids, on the CPU.
        count: fewer than LIST.

    Returns:
        int32 [n, count], nearest first; MISSING where there are no more, and for rows without an own centroid.
    """
    found = np.full((len(x), count), MISSING, np.int32)
    if not len(x) or len(assigner.centroids) < 2:
        return found
    window = reach_of_lists(x[:WINDOW_ROWS], assigner.centroids)

    def work(start: int, scratch: torch.Tensor) -> None:
        tile = slice(start, start + TILE_ROWS)
        rows, own = to_grid(x[tile]), labels[tile]
        nearest, dots = np.full(len(rows), MISSING, np.int32), np.where(own >= 0, NONE, -NONE)
        lists = no_lists(len(rows), LIST)
        assigner.decide(assigner.screen.rows(rows), rows, nearest, dots, scratch, window, lists)
        _choose(rows, assigner.centroids, own, *lists, found[tile])

    with full_precision():
        tiles = range(0, len(x), TILE_ROWS)
        run_tiles(work, tiles, assigner.threads, lambda: assigner.scratch(min(TILE_ROWS, len(x))))
    return found


@jit_any_order  # inner products of grid rows are exact in any order
def _choose(
    x: npt.NDArray[np.float32],
    centroids: npt.NDArray[np.float32],
    own: npt.NDArray[np.int32],
    listed: npt.NDArray[np.int32],
    near: npt.NDArray[np.int32],
    near_bound: npt.NDArray[np.float32],
    rest: npt.NDArray[np.float32],
    found: npt.NDArray[np.int32],
) -> None:
    """Decide among the listed centroids, or among all where one that is not listed may be nearer."""
    count = found.shape[1]
    dots = np.empty(count, np.float64)
    for row in range(len(x)):
        if own[row] < 0:
            continue
        for attempt in range(2):
            dots[:] = -8.0
            found[row, :] = -1
            candidates = listed[row] if attempt == 0 else len(centroids)
            for at in range(candidates):
                column = near[row, at] if attempt == 0 else np.int32(at)
                if column == own[row] or (attempt == 0 and near_bound[row, at] < dots[count - 1]):
                    continue
                dot = inner_product(x, row, centroids, column)
                place = count
                while place > 0 and (
                    dot > dots[place - 1] or (dot == dots[place - 1] and column < found[row, place - 1])
                ):
                    place -= 1
                if place < count:
                    for later in range(count - 1, place, -1):
                        dots[later], found[row, later] = dots[later - 1], found[row, later - 1]
                    dots[place], found[row, place] = dot, column
            if dots[count - 1] > rest[row]:  # of all others the inner product is at most this
                break
