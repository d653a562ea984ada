"""Column of the greatest inner product with each row, for columns of any norm, such as the means that a plain k-means leaves.

Products in float32 screen; `nearest.decide` decides by products in float64, ties by the lowest index. Needs no torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.kernels.grid import to_grid
from tailwise.kernels.nearest import TILE, decide

NONE = -1
_ROWS = 1024


def _powers(norms: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the powers of two that bring norms above 1 to between 0.5 and 1, and leave others."""
    return np.asarray(np.exp2(-np.ceil(np.log2(np.maximum(norms, 1.0)))), np.float32)


class InnerProducts:
    """Columns to compare rows with."""

    def __init__(self, columns: npt.NDArray[Any]) -> None:
        """Take finite columns, float [K, d], not all zero. One power of two scales all; they are rounded to multiples of 2⁻²⁴."""
        self.dimension = columns.shape[1]
        wide = columns.astype(np.float64)
        scale = np.exp2(-np.ceil(np.log2(np.linalg.norm(wide, axis=1).max())))
        self._columns = to_grid((wide * scale).astype(np.float32))

    def __call__(self, x: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
        """Return the column of each row, float [n, d]: int32 [n]; NONE for rows with NaN or infinite numbers.

        Memory is bounded. Neither the number of rows nor that of threads changes the result.
        """
        labels = np.full(len(x), NONE, np.int32)
        for start in range(0, len(x), _ROWS):
            rows = x[start : start + _ROWS].astype(np.float32)
            norms = np.linalg.norm(rows.astype(np.float64), axis=1)
            finite = np.isfinite(norms)
            rows = rows[finite] * _powers(norms[finite])[:, None]  # which decides nothing
            self._decide(rows, labels[start : start + _ROWS], finite)
        return labels

    def _decide(
        self, rows: npt.NDArray[np.float32], labels: npt.NDArray[np.int32], finite: npt.NDArray[np.bool_]
    ) -> None:
        count, dimension = rows.shape
        found, dots = np.full(count, NONE, np.int32), np.full(count, -np.inf)
        ones, zeros = np.ones(count, np.float32), np.zeros(count)
        error = np.full(count, 1.2 * (dimension + 2) * 2.0**-24, np.float32)  # of a product in float32
        for first in range(0, len(self._columns), TILE):
            columns = self._columns[first : first + TILE]
            scale, bias = np.ones(len(columns), np.float32), np.zeros(len(columns), np.float32)
            products = rows @ columns.T
            if not decide(products, ones, zeros, error, scale, bias, rows, self._columns, first, found, dots):
                raise ArithmeticError("NumPy's matrix products are wrong on this machine")
        labels[finite] = found
