"""How densely the space round a centroid is filled: the samples within a fixed cosine of it, exactly.

k-means gives clusters of nearly equal size, since it puts more centroids where more samples are. The number of samples in a ball of one
radius round each centroid has no such defect: it is a density estimate with a uniform kernel (Rosenblatt 1956; Parzen 1962), taken at the
centroids. A float32 matrix product screens, as in assign.py; exact dot products decide the rows within its error of the radius.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tailwise.kernels.assign import DEVICE_CANDIDATES, resolve_device
from tailwise.kernels.grid import row_norms, to_grid
from tailwise.kernels.products import WrongProductError, float32_error, multiply, repeat_if_wrong
from tailwise.kernels.screening import full_precision

TILE_ROWS = TILE_CENTROIDS = 2048
RADIUS_STEP = 1e-3  # a radius that is found, not given, is a multiple of this
STEPS = 1000


class NeighbourCounter:
    """Counts the rows round each centroid; keeps the centroids where the matrix products run."""

    def __init__(self, centroids: npt.NDArray[np.float32], radius: float, *, device: str = "auto") -> None:
        """Takes the centroids.

        Args:
            centroids: [K, d], unit norm; rounded to the grid.
            radius: the least cosine of a neighbour, in (0, 1].
            device: see `Assigner`; the result doesn't depend on it.
        """
        self.device = torch.device(resolve_device(device))
        self.radius = radius
        self.error = float32_error(centroids.shape[1])
        self._centroids = torch.from_numpy(to_grid(centroids)).to(self.device)

    @repeat_if_wrong
    def __call__(self, x: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Counts.

        `x`: [n, d], float16 or float32, unit norm or zero; float32 is rounded to the grid.

        Returns:
            int64 [K]: rows whose cosine to the centroid (to the centroid's own rounding) is at least the radius.

        Raises:
            ValueError: a row is neither zero nor of unit norm.
        """
        rows = np.ascontiguousarray(to_grid(x))
        norms = row_norms(rows)
        rows, norms = rows[norms > 0], norms[norms > 0]
        counts = torch.zeros(len(self._centroids), dtype=torch.int64, device=self.device)
        with full_precision():
            for start in range(0, len(rows), TILE_ROWS):
                tile = slice(start, start + TILE_ROWS)
                left, scale = (torch.from_numpy(array[tile]).to(self.device) for array in (rows, norms))
                for first in range(0, len(counts), TILE_CENTROIDS):
                    counts[first : first + TILE_CENTROIDS] += self._count(left, scale, first)
        counted: npt.NDArray[np.int64] = counts.cpu().numpy()
        return counted

    def _count(self, left: torch.Tensor, norms: torch.Tensor, first: int) -> torch.Tensor:
        """The counts of one tile of rows for one tile of centroids."""
        right = self._centroids[first : first + TILE_CENTROIDS]
        scores = multiply(left, right, left.new_empty(len(left) * len(right))).double()
        if bool(((left[0].double() @ right.double().T - scores[0]).abs() > self.error).any()):  # a cheap sample
            raise WrongProductError
        excess = scores - (self.radius * norms)[:, None]
        counts = (excess > self.error).sum(0)
        rows, columns = (excess.abs() <= self.error).nonzero(as_tuple=True)
        pieces = zip(torch.split(rows, DEVICE_CANDIDATES), torch.split(columns, DEVICE_CANDIDATES), strict=True)
        for row, column in pieces:
            dots = (left[row].double() * right[column].double()).sum(1)
            counts += torch.bincount(column[dots / norms[row] >= self.radius], minlength=len(counts))
        return counts


def similarity_steps(similarity: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """A histogram of similarities in steps of RADIUS_STEP, int64 [STEPS + 1]: negative ones count as 0."""
    steps = np.floor(np.clip(similarity.astype(np.float64), 0, 1) / RADIUS_STEP).astype(np.int64)
    return np.bincount(steps, minlength=STEPS + 1)


def radius_that_holds(histogram: npt.NDArray[np.int64], share: float) -> float:
    """The largest multiple of RADIUS_STEP (at least one) that `share` of the similarities in a histogram reach.

    Args:
        histogram: of `similarity_steps`, which may be summed over pieces.
        share: in [0, 1].
    """
    reaching = np.cumsum(histogram[::-1])[::-1]
    step = int(np.flatnonzero(reaching >= share * reaching[0])[-1])
    return max(step, 1) / STEPS
