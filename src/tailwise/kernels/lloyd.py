"""Lloyd's iterations of spherical k-means over the same rows."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tailwise.kernels.assign import (
    MISSING,
    NONE,
    NORM_BOUND,
    TILE_CENTROIDS,
    TILE_ROWS,
    Assigner,
    Lists,
    no_lists,
    resolve_device,
)
from tailwise.kernels.grid import (
    GRID,
    SIMILARITY_UNIT,
    row_chunks,
    row_norms,
    to_grid,
    to_similarity_units,
    unit_rows_on_grid,
)
from tailwise.kernels.jit import jit
from tailwise.kernels.nearest import UP, decide_movers, recheck
from tailwise.kernels.products import WrongProductError, repeat_if_wrong
from tailwise.kernels.screening import Coded, Screen, full_precision
from tailwise.kernels.threads import run_tiles

CHUNK_ROWS = 65_536
CARRY_BYTES = 512 << 20
LIST = 32  # centroids that a row keeps an eye on
LISTED_BYTES = LIST * 8 + 28  # a row
CODED_BYTES = 28  # a row, beside its codes
WINDOW_ROWS = 256
LIST_REACH = 0.7
MOVER_SHARES = (0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
# What a row costs, in comparisons with one centroid: beside those with all of them, to make a list, to look through it, to code the row.
COMPARING, LISTING, RECHECKING, CODING = 400, 250, 350, 200


class Sums:
    """Sums of the members of each cluster: exact, so that threads may add in any order, and rows may be taken away again.

    Attributes:
        rows: int64 [K, d], in units of GRID; of at most 2³⁸ rows.
        sizes: int64 [K].
    """

    def __init__(self, clusters: int, dimension: int) -> None:
        self.rows, self.sizes = np.zeros((clusters, dimension), np.int64), np.zeros(clusters, np.int64)
        self._lock = threading.Lock()

    def move(self, x: npt.NDArray[np.float32], before: npt.NDArray[np.int32], labels: npt.NDArray[np.int32]) -> None:
        """Takes rows from the clusters that they had, MISSING for none, to those that they have now."""
        with self._lock:
            _move_rows(x, before, labels, self.rows, self.sizes)


@jit
def _move_rows(
    x: npt.NDArray[np.float32],
    before: npt.NDArray[np.int32],
    labels: npt.NDArray[np.int32],
    sums: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
) -> None:
    scale = np.float32(1 / GRID)  # int32 holds each number, and vector units make these from float32
    for row in range(x.shape[0]):
        old, new = before[row], labels[row]
        if old == new:
            continue
        if old >= 0:
            sizes[old] -= 1
            for axis in range(x.shape[1]):
                sums[old, axis] -= np.int32(x[row, axis] * scale)
        if new >= 0:
            sizes[new] += 1
            for axis in range(x.shape[1]):
                sums[new, axis] += np.int32(x[row, axis] * scale)


@dataclass(frozen=True)
class Partial:
    """Sums of one iteration over some of the rows; those of other rows may be added in any order."""

    rows: npt.NDArray[np.int64]  # int64 [K, d], the sum of each cluster's members, in units of GRID
    sizes: npt.NDArray[np.int64]  # int64 [K], the number of its members
    objective: int  # sum of the cosines of the rows to their centroids, in units of SIMILARITY_UNIT

    def __add__(self, other: Partial) -> Partial:
        """Return the sums over the rows of both. The sums are exact."""
        return Partial(self.rows + other.rows, self.sizes + other.sizes, self.objective + other.objective)


def finish(partial: Partial, centroids: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], float]:
    """Return new centroids from the sums over all rows, and the mean cosine of the rows to the old centroids, float32 [K, d].

    An empty cluster takes half of the largest one.
    """
    updated = unit_rows_on_grid(partial.rows)
    lost = ~updated.any(axis=1)
    updated[lost] = centroids[lost]
    mean = partial.objective * SIMILARITY_UNIT / max(int(partial.sizes.sum()), 1)
    return _reseed_empty(updated, partial.sizes), mean


class Lloyd:
    """Iterations that carry on what is known of rows, so that in time most aren't compared with all centroids again.

    A row keeps a list of the centroids nearest to it, and a bound on its inner product with all others. A centroid that has moved by δ
    changes an inner product by no more than δ (Cauchy-Schwarz): while the best of the list is above the bound, the row's nearest centroid
    is among the list. Elkan (2003) and Hamerly (2010) bound single distances so; lists are what makes such bounds pay in many dimensions,
    where the second nearest is hardly farther than the nearest. The few centroids that move most are compared with all rows, for else they
    would spoil every bound.

    Codes of rows (see screening.py) are carried too. As many rows carry something as memory allows; the others are coded and compared with
    all centroids in every iteration. The result is the same.
    """

    def __init__(
        self,
        blocks: Sequence[npt.NDArray[Any]],
        clusters: int,
        *,
        device: str = "auto",
        threads: int | None = None,
        rows: int = CHUNK_ROWS,
        carry_bytes: int = CARRY_BYTES,
    ) -> None:
        """Takes the rows.

        Args:
            blocks: of rows [n, d].
            clusters: K.
            device: see `Assigner`; nothing is carried on devices.
            threads: see `Assigner`.
            rows: at a time.
            carry_bytes: memory for what is carried, LISTED_BYTES a row, and CODED_BYTES + d where there is room left.
        """
        self._blocks, self._rows, self._carry_bytes = blocks, rows, carry_bytes
        self._device, self._threads = resolve_device(device), threads or torch.get_num_threads()
        self._shape = clusters, blocks[0].shape[1]
        self._forget()

    def _forget(self) -> None:
        total = sum(len(block) for block in self._blocks) if self._device == "cpu" else 0
        self._carried = min(total, self._carry_bytes // LISTED_BYTES)
        self._labels, self._dots = np.full(self._carried, MISSING, np.int32), np.empty(self._carried)
        self._lists, self._norms = no_lists(self._carried, LIST), np.empty(self._carried)
        room = (self._carry_bytes - self._carried * LISTED_BYTES) // (CODED_BYTES + self._shape[1])
        self._room = min(self._carried, room)  # rows whose codes are kept
        self._coded = Coded.memory_for(self._room, self._shape[1], "int8")
        self._members = Sums(*self._shape)  # of the rows that are carried
        self._centroids = np.empty((0, self._shape[1]), np.float32)
        self._listing = False  # whether lists were made in the last iteration
        self._broken = (
            False  # whether the last iteration ended with an error: then what is carried is half of two iterations
        )

    @repeat_if_wrong
    def partial(self, centroids: npt.NDArray[np.float32]) -> Partial:
        """Return the sums of one iteration over the rows.

        `centroids`: float32 [K, d] on the grid.

        Raises:
            ValueError: a row is neither zero nor of unit norm.
        """
        if self._broken:
            self._forget()
        self._broken = True
        self._begin(centroids)
        others = Sums(*self._shape)
        objective = 0
        for first, chunk in row_chunks(self._blocks, self._rows):
            known = min(max(self._carried - first, 0), len(chunk))
            objective += self._assign_carried(first, chunk[:known])
            _, dots, norms = self._assigner.inner_products(
                chunk[known:], lambda x, labels: others.move(x, np.full(len(x), MISSING, np.int32), labels)
            )
            objective += int(to_similarity_units(dots / np.where(norms > 0, norms, 1.0)).sum())
        self._broken = False
        others.rows += self._members.rows
        others.sizes += self._members.sizes
        return Partial(others.rows, others.sizes, objective)

    def _begin(self, centroids: npt.NDArray[np.float32]) -> None:
        """Finds out how far the centroids moved, and whether lists can be trusted, or should be made."""
        first_time = not len(self._centroids)
        if first_time and self._device == "cpu":
            self._screen = Screen(to_grid(centroids.mean(axis=0, dtype=np.float64)))
        self._assigner = Assigner(
            centroids,
            device=self._device,
            threads=self._threads,
            screen=self._screen if self._device == "cpu" else None,
        )
        self._movers, self._others, self._window, self._trusted = np.empty(0, np.int32), np.float32(0), 0.0, False
        self._first_time = first_time
        if not first_time and self._carried:
            moved = np.linalg.norm(centroids.astype(np.float64) - self._centroids, axis=1)
            self._drift = (NORM_BOUND * moved).astype(np.float32) + UP
            self._window = reach_of_lists(next(row_chunks(self._blocks, WINDOW_ROWS))[1], centroids)
            self._trusted = self._listing and self._choose_movers()
            # Lists pay when they reach further than nearly all centroids are going to move next.
            reached = float(np.quantile(self._drift, 0.9)) < LIST_REACH * self._window
            self._listing = self._trusted or reached
        moving = self._assigner.columns[self._movers.astype(np.int64)]
        self._moving = self._assigner.screen.tiles(moving, TILE_CENTROIDS, TILE_ROWS)
        self._centroids = centroids

    def _choose_movers(self) -> bool:
        """Chooses those to compare with all rows, by a sample of rows; whether this is cheaper than to compare all with all."""
        some = slice(None, None, max(1, self._carried // 4096))
        present = self._labels[some] >= 0
        margins = (self._dots[some] - self._lists[3][some])[present]
        if not margins.size:
            return False
        order = np.argsort(-self._drift, kind="stable")
        count = len(order)
        all_with_all = float(count + COMPARING)
        least = all_with_all
        for movers in sorted({int(share * count) for share in MOVER_SHARES}):
            others = self._drift[order[movers]]
            failing = float((margins < others).mean())
            cost = RECHECKING + (CODING + movers if movers else 0) + failing * (all_with_all + LISTING)
            if cost < least:
                least, self._others, self._movers = cost, others, np.sort(order[:movers]).astype(np.int32)
        return least < all_with_all

    def _assign_carried(self, first: int, chunk: npt.NDArray[Any]) -> int:
        """Assigns rows first … first + n − 1; the sum of their cosines, in units of SIMILARITY_UNIT."""
        labels, dots = self._labels[first : first + len(chunk)], self._dots[first : first + len(chunk)]
        before = labels.copy()
        tiles = [slice(start, min(start + TILE_ROWS, len(chunk))) for start in range(0, len(chunk), TILE_ROWS)]

        def compare(at: slice | npt.NDArray[np.int64], scratch: torch.Tensor) -> None:
            x = to_grid(chunk[at])
            self._compare(x, self._at(first, at), scratch)
            self._members.move(x, before[at], labels[at])

        def look_through(tile: slice, scratch: torch.Tensor) -> None:
            x = to_grid(chunk[tile])
            here = slice(first + tile.start, first + tile.stop)
            self._look_through(x, here, scratch)
            sure = self._is_sure(here)
            self._members.move(x[sure], before[tile][sure], labels[tile][sure])

        def scratch() -> torch.Tensor:
            return self._assigner.scratch(min(TILE_ROWS, len(chunk)))

        with full_precision():
            if self._trusted:
                run_tiles(look_through, tiles, self._threads, scratch)
                unsure = np.flatnonzero(~self._is_sure(slice(first, first + len(chunk))))
                run_tiles(
                    compare,
                    [unsure[start : start + TILE_ROWS] for start in range(0, len(unsure), TILE_ROWS)],
                    self._threads,
                    scratch,
                )
            else:
                run_tiles(compare, tiles, self._threads, scratch)
        present = labels >= 0
        return int(to_similarity_units(dots[present] / self._norms[first : first + len(chunk)][present]).sum())

    @staticmethod
    def _at(first: int, at: slice | npt.NDArray[np.int64]) -> slice | npt.NDArray[np.int64]:
        return slice(first + at.start, first + at.stop) if isinstance(at, slice) else first + at

    def _is_sure(self, at: slice) -> npt.NDArray[np.bool_]:
        """Return True for rows whose nearest centroid is certainly in their list, and for rows of zeros."""
        sure: npt.NDArray[np.bool_] = (self._labels[at] < 0) | (self._dots[at] > self._lists[3][at])
        return sure

    def _code(self, x: npt.NDArray[np.float32], at: slice | npt.NDArray[np.int64]) -> Coded:
        """The rows' codes, which are made in the first iteration where there is memory for them."""
        last = at.stop if isinstance(at, slice) else int(at[-1]) + 1
        if isinstance(at, slice) and at.start < self._room < at.stop:
            self._room = at.start  # a tile's codes are kept whole, or not at all
        if last > self._room or self._screen.precision == "float32":
            return self._screen.rows(x)
        return self._screen.rows(x, out=self._coded[at]) if self._first_time else self._coded[at]

    def _look_through(self, x: npt.NDArray[np.float32], at: slice, scratch: torch.Tensor) -> None:
        """Finds the nearest of each row's listed centroids and of the movers."""
        listed, near, bounds, rest = self._lists
        state = self._labels[at], self._dots[at], listed[at], near[at], bounds[at], rest[at]
        recheck(x, self._centroids, self._drift, self._others, *state)
        if not len(self._movers):
            return
        coded = self._code(x, at)
        for number, columns in enumerate(self._moving):
            movers = self._movers[number * TILE_CENTROIDS :][: len(columns.scale)]
            scores = self._screen.scores(coded, columns, scratch)
            if not decide_movers(*scores, x, self._centroids, movers, *state):
                raise WrongProductError

    def _compare(self, x: npt.NDArray[np.float32], at: slice | npt.NDArray[np.int64], scratch: torch.Tensor) -> None:
        """Compare rows with all centroids, and rebuild the lists of the nearest."""
        if self._first_time:
            self._norms[at] = row_norms(x, first=at.start if isinstance(at, slice) else int(at[0]))
        labels = self._labels[at]
        dots = self._dots[at] if self._trusted else np.where(self._norms[at] > 0, NONE, -NONE)  # zeros: no candidates
        fresh: Lists | None = no_lists(len(x), LIST) if self._listing else None
        self._assigner.decide(self._code(x, at), x, labels, dots, scratch, self._window, fresh)
        self._labels[at], self._dots[at] = labels, dots
        if fresh:
            for array, values in zip(self._lists, fresh, strict=True):
                array[at] = values


def reach_of_lists(x: npt.NDArray[Any], centroids: npt.NDArray[np.float32]) -> float:
    """How far below its best a row's list reaches, so that most lists are nearly full."""
    rows = to_grid(x)
    rows = rows[rows.any(axis=1)]
    if len(centroids) <= LIST or not len(rows):
        return 2.0  # all of them
    scores = np.asarray(torch.from_numpy(rows) @ torch.from_numpy(centroids).T)
    tops = -np.partition(-scores, (0, LIST - 2), axis=1)
    return float(np.median(tops[:, 0] - tops[:, LIST - 2]))


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
