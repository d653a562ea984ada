"""Nearest centroid, exactly.

Approximate products screen (see screening.py): a centroid within their error of a row's best is a candidate. Candidates are decided by
the exact inner product (see grid.py), ties by the lowest index.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tailwise.kernels.grid import as_rows, row_chunks, row_norms, to_grid
from tailwise.kernels.nearest import FAR, decide, decide_and_list
from tailwise.kernels.products import HALF_ERROR, WrongProductError, float32_error, multiply, repeat_if_wrong
from tailwise.kernels.screening import Coded, Precision, Screen, full_precision, scratch_for
from tailwise.kernels.threads import run_tiles

TILE_ROWS = 384
TILE_CENTROIDS = 1024  # products of a tile stay in a core's caches
MISSING = -1
DEVICE_ROWS, DEVICE_CENTROIDS = 16_384, 8192  # 256 MB of scores, and work enough for a GPU
NORM_BOUND = 1.05  # of rows and centroids
DEVICE_CANDIDATES = 1 << 18  # decided at a time on a device: bounds memory where many centroids are equally near
NONE = -4.0  # below every inner product of unit vectors
Lists = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32]]


def _resolve_torch(
    scores: torch.Tensor,
    x: torch.Tensor,
    centroids: torch.Tensor,
    first: int,
    error: torch.Tensor,
    labels: torch.Tensor,
    dots: torch.Tensor,
) -> None:
    """Do the work of `nearest.decide` in torch operations, for devices; scores are float16, `error` float64 [n]."""
    floor = torch.maximum(scores.amax(1).double() - 2 * error, dots - error)
    rows, columns = (scores >= (floor - HALF_ERROR).to(scores.dtype)[:, None]).nonzero(as_tuple=True)
    pieces = zip(torch.split(rows, DEVICE_CANDIDATES), torch.split(columns, DEVICE_CANDIDATES), strict=True)
    exact = torch.cat([(x[row].double() * centroids[first + column].double()).sum(1) for row, column in pieces])
    if bool(((scores[rows, columns].double() - exact).abs() > error[rows]).any()):
        raise WrongProductError
    best = dots.clone().scatter_reduce_(0, rows, exact, "amax")
    tied = exact == best[rows]
    # The lowest index among the candidates that reach the best; an earlier tile's centroid wins ties by being lower still.
    lowest = torch.full_like(labels, torch.iinfo(labels.dtype).max)
    lowest.scatter_reduce_(0, rows[tied], (first + columns[tied]).to(labels.dtype), "amin")
    better = best > dots
    labels[better] = lowest[better]
    dots.copy_(best)


def no_lists(rows: int, slots: int) -> Lists:
    """Empty lists of near centroids, which `nearest.decide_and_list` fills: how many, which, their bounds, that of all others."""
    return (
        np.zeros(rows, np.int32),
        np.empty((rows, slots), np.int32),
        np.empty((rows, slots), np.float32),
        np.full(rows, FAR, np.float32),
    )


class Assigner:
    """Finds nearest centroids; keeps what the products need of them."""

    def __init__(
        self,
        centroids: npt.NDArray[np.float32],
        *,
        device: str = "auto",
        threads: int | None = None,
        precision: Precision | None = None,
        screen: Screen | None = None,
    ) -> None:
        """Takes the centroids.

        Args:
            centroids: [K, d], unit norm; rounded to the grid.
            device: "auto" (CUDA if there, else CPU), "cpu", "cuda", "cuda:1", …
            threads: on the CPU; None for torch's number. Results don't depend on it.
            precision: of the screening on the CPU; None for the faster one. Results don't depend on it.
            screen: to code rows with, if it is there already; None for one about the centroids' mean.

        Raises:
            ValueError: a centroid is neither zero nor of unit norm.
        """
        self.device = torch.device(resolve_device(device))
        self.centroids = to_grid(centroids)
        row_norms(self.centroids)
        self.threads = threads or torch.get_num_threads()
        if screen is None:
            centre = to_grid(self.centroids.mean(axis=0, dtype=np.float64))
            screen = Screen(centre, precision if self.device.type == "cpu" else "float32")
        self.screen = screen
        self.columns = self.screen.columns(self.centroids)
        self._tiles = self.screen.tiles(self.columns, TILE_CENTROIDS, TILE_ROWS)

    @functools.cached_property
    def _on_device(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The centroids on the device, in float32 and float16, and the greatest norm of what float16 rounds away."""
        whole = torch.from_numpy(self.centroids).to(self.device)
        half = whole.half()
        return whole, half, float((whole - half.float()).norm(dim=1).max())

    @repeat_if_wrong
    def __call__(self, x: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
        """Assigns rows.

        `x`: [n, d], float16 or float32, unit norm or zero; float32 is rounded to the grid.

        Returns:
            labels: int32 [n], MISSING for rows of zeros.
            similarity: float64 [n], cosine to the centroid (to the centroid's own rounding), 0 for rows of zeros.

        Raises:
            ValueError: a row is neither zero nor of unit norm.
        """
        labels, dots, norms = self.inner_products(x)
        return labels, dots / np.where(norms > 0, norms, 1.0)

    def inner_products(
        self,
        x: npt.NDArray[Any],
        then: Callable[[npt.NDArray[np.float32], npt.NDArray[np.int32]], None] = lambda *_: None,
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Labels as above, the exact inner product of each row and its centroid, 0 for rows of zeros, and the rows' norms.

        `then` is called with the rows and labels of each tile as soon as they are there, in several threads.
        """
        labels = np.full(len(x), MISSING, np.int32)
        dots, norms = np.zeros(len(x)), np.zeros(len(x))
        assign_tile, tile_rows = (
            (self._assign_cpu, TILE_ROWS) if self.device.type == "cpu" else (self._assign_device, DEVICE_ROWS)
        )

        def work(start: int, scratch: torch.Tensor) -> None:
            tile = slice(start, start + tile_rows)
            rows = to_grid(x[tile])
            norms[tile] = row_norms(rows, first=start)
            present = norms[tile] > 0
            found = np.where(present, NONE, -NONE)  # so that rows of zeros have no candidates
            assign_tile(rows, labels[tile], found, scratch)
            dots[tile] = np.where(present, found, 0.0)
            then(rows, labels[tile])

        with full_precision():
            threads = self.threads if self.device.type == "cpu" else 1
            run_tiles(work, range(0, len(x), tile_rows), threads, lambda: self.scratch(min(tile_rows, len(x))))
        return labels, dots, norms

    def scratch(self, rows: int) -> torch.Tensor:
        """Return memory for the products of a tile of `rows` rows; none on devices."""
        if self.device.type != "cpu":
            return torch.empty(0)
        return scratch_for(self.screen.precision, rows, min(TILE_CENTROIDS, len(self.centroids)))

    def _assign_cpu(
        self,
        x: npt.NDArray[np.float32],
        labels: npt.NDArray[np.int32],
        dots: npt.NDArray[np.float64],
        scratch: torch.Tensor,
    ) -> None:
        self.decide(self.screen.rows(x), x, labels, dots, scratch)

    def decide(
        self,
        coded: Coded,
        x: npt.NDArray[np.float32],
        labels: npt.NDArray[np.int32],
        dots: npt.NDArray[np.float64],
        scratch: torch.Tensor,
        window: float = 0.0,
        lists: Lists | None = None,
    ) -> None:
        """Updates labels and inner products of a tile of rows, and their lists; see `nearest.decide`."""
        for number, columns in enumerate(self._tiles):
            scores = self.screen.scores(coded, columns, scratch)
            tile = *scores, x, self.centroids, number * TILE_CENTROIDS, labels, dots
            if not (decide_and_list(*tile, np.float32(window), *lists) if lists else decide(*tile)):
                raise WrongProductError

    def _assign_device(
        self,
        x: npt.NDArray[np.float32],
        labels: npt.NDArray[np.int32],
        dots: npt.NDArray[np.float64],
        _: torch.Tensor,
    ) -> None:
        centroids, half_centroids, rounded = self._on_device
        left = torch.from_numpy(x).to(self.device)
        half = left.half()
        error = (
            NORM_BOUND * ((left - half.float()).norm(dim=1).double() + rounded) + HALF_ERROR + float32_error(x.shape[1])
        )
        device_labels, device_dots = (torch.from_numpy(array).to(self.device) for array in (labels, dots))
        for first in range(0, len(self.centroids), DEVICE_CENTROIDS):
            columns = half_centroids[first : first + DEVICE_CENTROIDS]
            scores = multiply(half, columns, half.new_empty(len(half) * len(columns)))
            _resolve_torch(scores, left, centroids, first, error, device_labels, device_dots)
        labels[:], dots[:] = device_labels.cpu().numpy(), device_dots.cpu().numpy()


def count_nearest(
    centroids: npt.NDArray[np.float32], rows: Iterable[npt.NDArray[Any]], *, device: str = "auto"
) -> npt.NDArray[np.int64]:
    """Return of how many rows each centroid is the nearest: int64 [K].

    DataComp's image-based rule (arXiv 2304.14108, section 4) keeps the samples of the clusters whose count of target rows is above 0.

    Args:
        centroids: [K, d], unit norm.
        rows: pieces [n, d], float16 or float32, unit norm or zero. Rows of zeros do not count.
        device: see `Assigner`.
    """
    assigner, counts = Assigner(centroids, device=device), np.zeros(len(centroids), np.int64)
    for piece in rows:
        labels, _ = assigner(piece)
        counts += np.bincount(labels[labels >= 0], minlength=len(counts))
    return counts


def resolve_device(device: str) -> str:
    """Return "cuda" for "auto" if there is a CUDA device, else "cpu"; other names stay."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def assign(
    x: npt.NDArray[Any] | torch.Tensor | Iterable[npt.NDArray[Any] | torch.Tensor],
    centroids: npt.NDArray[np.float32] | torch.Tensor,
    *,
    device: str = "auto",
    threads: int | None = None,
    chunk_rows: int = 65_536,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """Nearest centroid of every row, and the cosine to it.

    Args:
        x: [N, d], or chunks of rows as they come; float16 or float32, unit norm or zero.
        centroids: [K, d], unit norm.
        device: see `Assigner`.
        threads: see `Assigner`.
        chunk_rows: at a time; neither this nor device and threads change the result.

    Returns:
        labels: int32 [N], MISSING for rows of zeros.
        similarity: float64 [N], 0 for rows of zeros.

    Raises:
        ValueError: a row is neither zero nor of unit norm.
    """
    assigner = Assigner(as_rows(centroids), device=device, threads=threads)
    blocks = [x] if isinstance(x, (np.ndarray, torch.Tensor)) else x
    pieces = [assigner(chunk) for block in blocks for _, chunk in row_chunks([as_rows(block)], chunk_rows)]
    if not pieces:
        return np.empty(0, np.int32), np.empty(0, np.float64)
    return np.concatenate([labels for labels, _ in pieces]), np.concatenate([similarity for _, similarity in pieces])
