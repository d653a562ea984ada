"""Nearest centroid, exactly.

A float32 matrix product screens: it can be off by at most (d + 2) · 2⁻²⁴ per unit-norm pair, whatever its order of summation, so
every centroid within twice that of a row's best score is a candidate. Candidates are decided by the exact dot product
(see grid.py), ties by the lowest index.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tailwise.kernels.grid import row_chunks, row_norms, to_grid
from tailwise.kernels.jit import jit_any_order, split_threads

TILE_ROWS = 2048
TILE_CENTROIDS = 2048
MISSING = -1
DEVICE_CANDIDATES = 1 << 18  # decided at a time on a device: bounds memory where many centroids are equally near
_IMPRECISE = (
    "a float32 matrix product is less precise than float32: some setting lets it run in TF32 or bfloat16 "
    "(DNNL_DEFAULT_FPMATH_MODE, say); switch that off"
)
_NONE = -4.0  # below every dot product of unit vectors


def screening_error(dimension: int) -> float:
    """Bound on |float32 score − exact dot product| for rows and centroids of norm ≤ 1.05."""
    return 1.2 * (dimension + 2) * 2.0**-24


@jit_any_order  # dot products of grid rows are exact in any order; the maximum is indifferent to it
def _resolve_rows(
    scores: npt.NDArray[np.float32],
    x: npt.NDArray[np.float32],
    centroids: npt.NDArray[np.float32],
    first: int,
    error: float,
    labels: npt.NDArray[np.int32],
    dots: npt.NDArray[np.float64],
    start: int,
    stop: int,
) -> bool:
    """Updates labels and dots of rows [start, stop) with centroids first, first + 1, …; False if a score is too far off."""
    for row in range(start, stop):
        best_score = scores[row, 0]
        for column in range(1, scores.shape[1]):
            best_score = max(best_score, scores[row, column])
        floor = dots[row] - error
        if best_score < floor:
            continue
        floor = max(floor, best_score - 2 * error)
        for column in range(scores.shape[1]):
            if scores[row, column] >= floor:
                dot = 0.0
                for axis in range(x.shape[1]):
                    dot += np.float64(x[row, axis]) * np.float64(centroids[first + column, axis])
                if abs(dot - scores[row, column]) > error:
                    return False
                if dot > dots[row]:
                    dots[row] = dot
                    labels[row] = first + column
    return True


def _resolve_torch(
    scores: torch.Tensor,
    x: torch.Tensor,
    centroids: torch.Tensor,
    first: int,
    error: float,
    labels: torch.Tensor,
    dots: torch.Tensor,
) -> None:
    """The same as _resolve_rows, in torch operations, for devices."""
    floor = torch.maximum(scores.amax(1).double() - 2 * error, dots - error)
    rows, columns = (scores >= floor[:, None]).nonzero(as_tuple=True)
    pieces = zip(torch.split(rows, DEVICE_CANDIDATES), torch.split(columns, DEVICE_CANDIDATES), strict=True)
    exact = torch.cat([(x[row].double() * centroids[first + column].double()).sum(1) for row, column in pieces])
    if bool(((scores[rows, columns].double() - exact).abs() > error).any()):
        raise ArithmeticError(_IMPRECISE)
    best = dots.clone().scatter_reduce_(0, rows, exact, "amax")
    tied = exact == best[rows]
    # The lowest index among the candidates that reach the best; an earlier tile's centroid wins ties by being lower still.
    lowest = torch.full_like(labels, torch.iinfo(labels.dtype).max)
    lowest.scatter_reduce_(0, rows[tied], (first + columns[tied]).to(labels.dtype), "amin")
    better = best > dots
    labels[better] = lowest[better]
    dots.copy_(best)


class Assigner:
    """Finds nearest centroids; keeps the centroids where the matrix products run."""

    def __init__(self, centroids: npt.NDArray[np.float32], *, device: str = "auto", threads: int | None = None) -> None:
        """Takes the centroids.

        Args:
            centroids: [K, d], unit norm; rounded to the grid.
            device: "auto" (CUDA if there, else CPU), "cpu", "cuda", "cuda:1", …
            threads: of the candidates' loop on the CPU; None for torch's number. Results don't depend on it.
        """
        self.device = torch.device(resolve_device(device))
        self.centroids = to_grid(centroids)
        self.threads = threads or torch.get_num_threads()
        self.error = screening_error(centroids.shape[1])
        self._on_device = torch.from_numpy(self.centroids).to(self.device)

    def __call__(self, x: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
        """Assigns rows.

        Args:
            x: [n, d], float16 or float32, unit norm or zero; float32 is rounded to the grid.

        Returns:
            labels: int32 [n], MISSING for rows of zeros.
            similarity: float64 [n], cosine to the centroid (to the centroid's own rounding), 0 for rows of zeros.

        Raises:
            ValueError: a row is neither zero nor of unit norm.
            ArithmeticError: matrix products are less precise than float32.
        """
        rows = np.ascontiguousarray(to_grid(x))
        norms = row_norms(rows)
        labels = np.full(len(rows), MISSING, np.int32)
        missing = norms == 0
        dots = np.where(
            missing, -_NONE, _NONE
        )  # so that rows of zeros, to which every centroid is equal, have no candidates
        assign_tile = self._assign_cpu if self.device.type == "cpu" else self._assign_device
        with full_precision():
            for start in range(0, len(rows), TILE_ROWS):
                tile = slice(start, start + TILE_ROWS)
                assign_tile(rows[tile], labels[tile], dots[tile])
        return labels, np.where(missing, 0.0, dots / np.where(missing, 1.0, norms))

    def _assign_cpu(
        self, x: npt.NDArray[np.float32], labels: npt.NDArray[np.int32], dots: npt.NDArray[np.float64]
    ) -> None:
        left = torch.from_numpy(x)
        for first in range(0, len(self.centroids), TILE_CENTROIDS):
            scores = torch.mm(left, self._on_device[first : first + TILE_CENTROIDS].T).numpy()

            def resolve(start: int, stop: int, scores: npt.NDArray[np.float32] = scores, first: int = first) -> None:
                if not _resolve_rows(scores, x, self.centroids, first, self.error, labels, dots, start, stop):
                    raise ArithmeticError(_IMPRECISE)

            split_threads(resolve, len(x), self.threads)

    def _assign_device(
        self, x: npt.NDArray[np.float32], labels: npt.NDArray[np.int32], dots: npt.NDArray[np.float64]
    ) -> None:
        left = torch.from_numpy(x).to(self.device)
        device_labels, device_dots = (torch.from_numpy(array).to(self.device) for array in (labels, dots))
        for first in range(0, len(self.centroids), TILE_CENTROIDS):
            scores = left @ self._on_device[first : first + TILE_CENTROIDS].T
            _resolve_torch(scores, left, self._on_device, first, self.error, device_labels, device_dots)
        labels[:], dots[:] = device_labels.cpu().numpy(), device_dots.cpu().numpy()


@contextmanager
def full_precision() -> Iterator[None]:
    """Keeps matrix products in float32, whatever the user allows elsewhere: TF32 or bfloat16 would break the screening's error bound."""
    if not hasattr(torch.backends, "fp32_precision"):  # torch < 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    backends = (
        torch.backends.cuda.matmul,
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    )  # the older switch can't be read once these were set
    precisions = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision


def resolve_device(device: str) -> str:
    """What "auto" means: "cuda" if there is one, else "cpu"; other names stay."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def assign(
    x: npt.NDArray[Any], centroids: npt.NDArray[np.float32], *, device: str = "auto", chunk_rows: int = 65_536
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """Nearest centroid of every row, and the cosine to it. See `Assigner`; the result doesn't depend on `chunk_rows` or `device`."""
    assigner = Assigner(centroids, device=device)
    pieces = [assigner(chunk) for _, chunk in row_chunks([x], chunk_rows)]
    if not pieces:
        return np.empty(0, np.int32), np.empty(0, np.float64)
    return np.concatenate([labels for labels, _ in pieces]), np.concatenate([similarity for _, similarity in pieces])
