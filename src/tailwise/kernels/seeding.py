"""Where spherical k-means begins."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tailwise.kernels.assign import MISSING, NONE, TILE_CENTROIDS, TILE_ROWS, Assigner, resolve_device
from tailwise.kernels.grid import row_chunks, row_norms, to_grid, to_similarity_units, unit_rows_on_grid
from tailwise.kernels.jit import jit
from tailwise.kernels.keyed import random_below, stream_key
from tailwise.kernels.lloyd import CARRY_BYTES, CHUNK_ROWS, Lloyd, Sums, finish
from tailwise.kernels.nearest import decide
from tailwise.kernels.products import WrongProductError, multiply
from tailwise.kernels.screening import PAD, Coded, Screen, faster_precision, full_precision, scratch_for
from tailwise.kernels.threads import run_tiles

OVERSAMPLING = 2
SEEK_ROWS = 384
NEIGHBOURS = 8  # of a centroid, to merge it with
ROUND_SHARE = 2  # a round draws half as many rows as there are already, but
LEAST_ROUND = 32  # no fewer than a 32nd of all that will be drawn
_SAME = 2.0**-22  # rows nearer than this to a centroid count as equal to it


class TooFewDistinctRowsError(ValueError):
    """There are fewer distinct rows than centroids were asked for."""

    def __init__(self, distinct: int, asked: int) -> None:
        super().__init__(f"only {distinct} distinct rows for {asked} centroids")
        self.distinct = distinct


def seed_centroids(
    x: npt.NDArray[Any],
    k: int,
    *,
    seed: int,
    device: str = "auto",
    threads: int | None = None,
    carry_bytes: int = CARRY_BYTES,
) -> npt.NDArray[np.float32]:
    """k-means++ (Arthur, Vassilvitskii 2007) in rounds, each of which draws half as many rows as were drawn before.

    A row is drawn with probability proportional to its cosine distance to the nearest centroid so far. Rounds instead of single
    draws turn the work into matrix products (as k-means‖, Bahmani et al. 2012, does); within a round a row, or its copies, is drawn once.

    Args:
        x: [n, d], unit norm.
        k: number of centroids.
        seed: decides the draw.
        device: see `Assigner`.
        threads: see `Assigner`.
        carry_bytes: see `Lloyd`.

    Returns:
        float32 [k, d] on the grid.

    Raises:
        TooFewDistinctRowsError: fewer than k distinct rows.
    """
    key = stream_key(seed, "k-means++")
    wanted = OVERSAMPLING * k
    rows = [int(random_below(key, 0, np.array([len(x)]))[0])]
    nearest = _NearestSeed(x, wanted, device, threads)
    drawn, fresh = 1, rows
    while True:
        distance = 1 - nearest.add(_seed_rows(x, fresh))
        if len(rows) >= wanted:
            break
        weights = np.where(distance > _SAME, to_similarity_units(distance), 0)
        cumulative = np.cumsum(weights)
        if not cumulative[-1]:
            if len(rows) >= k:
                break
            raise TooFewDistinctRowsError(len(rows), k)
        size = min(max(-(-wanted // LEAST_ROUND), len(rows) // ROUND_SHARE), wanted - len(rows))
        targets = random_below(key, drawn, np.full(size, cumulative[-1]))
        drawn += size
        fresh = sorted({int(row) for row in np.searchsorted(cumulative, targets, side="right")})
        fresh = [
            fresh[at] for at in sorted(np.unique(_seed_rows(x, fresh), axis=0, return_index=True)[1])
        ]  # copies count once
        rows = rows + fresh
    seeds, centroids = nearest.centroids, unit_rows_on_grid(nearest.sums())
    del nearest

    def iterate(
        centroids: npt.NDArray[np.float32], times: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        lost = ~centroids.any(axis=1)  # nothing is nearest to them, or their rows cancel out
        centroids[lost] = seeds[: len(centroids)][lost]
        lloyd = Lloyd([x], len(centroids), device=device, threads=threads, carry_bytes=carry_bytes)
        for _ in range(times - 1):  # no sums are kept beside the next ones
            centroids, _ = finish(lloyd.partial(centroids), centroids)
        partial = lloyd.partial(centroids)
        return finish(partial, centroids)[0], partial.rows

    if len(rows) > k:
        centroids = unit_rows_on_grid(_merged(iterate(centroids, 2)[1], k, threads))
    return iterate(centroids, 1)[0]


def _merged(sums: npt.NDArray[np.int64], k: int, threads: int | None) -> npt.NDArray[np.int64]:
    """Merges clusters until k are left, those first whose merging costs the objective least.

    The sum of the cosines of a cluster's members to their centroid is the norm of the members' sum (Dhillon, Modha 2001), so that merging i
    and j costs ‖s_i‖ + ‖s_j‖ − ‖s_i + s_j‖. Pairs are sought among near neighbours; those of merged clusters become the pairs of the new
    one. At a time, disjoint pairs are merged that are among as many of the cheapest as are to be merged in all.
    """
    lost = np.flatnonzero(~sums.any(axis=1))[: max(len(sums) - k, 0)]
    sums = np.delete(sums, lost, axis=0)
    first, second = np.empty(0, np.int64), np.empty(0, np.int64)
    while len(sums) > k:
        if not len(first):
            first, second = _near_pairs(unit_rows_on_grid(sums), threads)
        cost = np.empty(len(first))
        _merging_costs(sums, first, second, cost)
        taken, pairs = np.zeros(len(sums), np.bool_), list[int]()
        for at in np.argsort(cost, kind="stable")[: len(sums) - k].tolist():
            if not taken[first[at]] and not taken[second[at]]:
                taken[[first[at], second[at]]] = True
                pairs.append(at)
        into, gone = first[pairs], second[pairs]
        sums[into] += sums[gone]
        number = np.cumsum(np.isin(np.arange(len(sums)), gone, invert=True)) - 1
        number[gone] = number[into]
        sums = np.delete(sums, gone, axis=0)
        first, second = _distinct_pairs(number[first], number[second], len(sums))
    return sums


def _distinct_pairs(
    first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pairs of different numbers below `count`, each once, the lower first."""
    pairs = np.unique(np.minimum(first, second) * count + np.maximum(first, second))
    first, second = np.divmod(pairs, count)
    return first[first != second], second[first != second]


@jit
def _merging_costs(
    sums: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    second: npt.NDArray[np.int64],
    costs: npt.NDArray[np.float64],
) -> None:
    for pair in range(len(first)):
        one = other = joined = 0.0
        for axis in range(sums.shape[1]):
            a, b = np.float64(sums[first[pair], axis]), np.float64(sums[second[pair], axis])
            one += a * a
            other += b * b
            joined += (a + b) * (a + b)
        costs[pair] = np.sqrt(one) + np.sqrt(other) - np.sqrt(joined)


def _near_pairs(
    centroids: npt.NDArray[np.float32], threads: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pairs of centroids near one another, each once: int64 [p] twice, the first below the second.

    Which pairs these are decides the seeding. So they are sought by products of codes that are whole numbers: exact in int8 as in float32,
    hence the same on every machine.
    """
    count, dimension = centroids.shape
    steps = min(127, math.isqrt((1 << 24) // dimension))  # sums that float32 holds exactly
    whole = np.zeros((-(-count // PAD) * PAD, dimension), np.int8)
    whole[:count] = np.rint(centroids * (np.float64(steps) / np.abs(centroids).max()))
    precision = faster_precision()
    codes = torch.from_numpy(whole) if precision == "int8" else torch.from_numpy(whole).float()
    slots = min(NEIGHBOURS, count)
    near = np.empty((count, slots), np.int32)

    def work(start: int, scratch: torch.Tensor) -> None:
        tile = near[start : start + SEEK_ROWS]
        greatest = np.full(tile.shape, np.iinfo(np.int32).min, np.int32)
        for first in range(0, count, TILE_CENTROIDS):
            left, right = codes[start : start + SEEK_ROWS], codes[first : first + TILE_CENTROIDS]
            products = multiply(left, right, scratch).numpy()
            _keep_greatest(products, first, min(TILE_CENTROIDS, count - first), greatest, tile)

    with full_precision():
        run_tiles(
            work,
            range(0, count, SEEK_ROWS),
            threads or torch.get_num_threads(),
            lambda: scratch_for(precision, SEEK_ROWS, TILE_CENTROIDS),
        )
    one, other = np.repeat(np.arange(count), slots), near.ravel().astype(np.int64)
    return _distinct_pairs(one, other, count)


@jit
def _keep_greatest(
    products: npt.NDArray[Any], first: int, count: int, greatest: npt.NDArray[np.int32], near: npt.NDArray[np.int32]
) -> None:
    """Keeps each row's greatest products, in descending order, ties by the lowest column."""
    slots = greatest.shape[1]
    for row in range(near.shape[0]):
        for column in range(count):
            product = np.int32(products[row, column])
            if product <= greatest[row, slots - 1]:
                continue
            slot = slots - 1
            while slot > 0 and greatest[row, slot - 1] < product:
                greatest[row, slot], near[row, slot] = greatest[row, slot - 1], near[row, slot - 1]
                slot -= 1
            greatest[row, slot], near[row, slot] = product, first + column


class _NearestSeed:
    """The nearest of a growing set of centroids, for every row; rows are coded once."""

    def __init__(self, x: npt.NDArray[Any], centroids: int, device: str, threads: int | None) -> None:
        """Takes the rows, and how many centroids there will be at most."""
        self._x, self._device, self._threads = x, resolve_device(device), threads or torch.get_num_threads()
        self._dots, self._norms = np.full(len(x), NONE), np.empty(len(x))
        self._labels = np.full(len(x), MISSING, np.int32)
        self._centroids, self._lengths = np.zeros((centroids, x.shape[1]), np.float32), np.empty(centroids)
        self._count = 0
        self._tiles = range(0, len(x), TILE_ROWS)
        total = sum(
            (chunk.sum(axis=0, dtype=np.float64) for _, chunk in row_chunks([x], CHUNK_ROWS)),
            start=np.zeros(x.shape[1]),
        )
        self._screen = Screen(to_grid(total / len(x)))
        self._coded: dict[int, Coded] = {}
        if self._device == "cpu":
            run_tiles(self._code, self._tiles, self._threads, lambda: None)

    def _code(self, start: int, _: None) -> None:
        rows = to_grid(self._x[start : start + TILE_ROWS])
        self._norms[start : start + TILE_ROWS] = row_norms(rows, first=start)
        self._coded[start] = self._screen.rows(rows)

    def add(self, centroids: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Takes more centroids; the cosine of each row to its nearest one (to the centroid's own rounding: 1 for itself), float64 [n]."""
        base = self._count
        self._count += len(centroids)
        self._centroids[base : self._count], self._lengths[base : self._count] = centroids, row_norms(centroids)
        if self._device != "cpu":
            labels, dots, self._norms = Assigner(centroids, device=self._device).inner_products(self._x)
            nearer = dots > self._dots
            self._labels[nearer], self._dots[nearer] = base + labels[nearer], dots[nearer]
            return self._cosines()
        tiles = self._screen.tiles(self._screen.columns(centroids), TILE_CENTROIDS, TILE_ROWS)

        def work(start: int, scratch: torch.Tensor) -> None:
            tile = slice(start, start + TILE_ROWS)
            rows, labels, dots = to_grid(self._x[tile]), self._labels[tile], self._dots[tile]
            for number, columns in enumerate(tiles):
                scores = self._screen.scores(self._coded[start], columns, scratch)
                args = (*scores, rows, self._centroids, base + number * TILE_CENTROIDS, labels, dots)
                if not decide(*args):
                    raise WrongProductError

        with full_precision():
            size = min(TILE_ROWS, len(self._x)), min(TILE_CENTROIDS, len(centroids))
            run_tiles(work, self._tiles, self._threads, lambda: scratch_for(self._screen.precision, *size))
        return self._cosines()

    def _cosines(self) -> npt.NDArray[np.float64]:
        cosines: npt.NDArray[np.float64] = self._dots / (self._norms * self._lengths[self._labels])
        return cosines

    @property
    def centroids(self) -> npt.NDArray[np.float32]:
        """All that were taken, float32 [centroids so far, d]."""
        return self._centroids[: self._count]

    def sums(self) -> npt.NDArray[np.int64]:
        """Sums of the rows nearest to each centroid, in units of GRID: int64 [centroids so far, d]."""
        sums = Sums(self._count, self._x.shape[1])
        for first, chunk in row_chunks([self._x], CHUNK_ROWS):
            labels = self._labels[first : first + len(chunk)]
            sums.move(to_grid(chunk), np.full(len(chunk), MISSING, np.int32), labels)
        return sums.rows


def _seed_rows(x: npt.NDArray[Any], rows: list[int]) -> npt.NDArray[np.float32]:
    return unit_rows_on_grid(x[rows].astype(np.float64))
