"""Rows in a plane, for maps of embeddings: by principal component analysis, or by UMAP.

n: rows; d: dimension.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.errors import UnsupportedError

# Of values ≤ 1, products are multiples of 2⁻²⁴: float64 holds sums of 2²⁹ of them exactly, in any order.
COARSE = 2.0**-12
BLOCK_ROWS = 8192


def principal_axes(rows: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the mean and the two directions of largest variance of rows, for `(rows - mean) @ axes.T`.

    Values are rounded to multiples of 2⁻¹², so that the order of the rows and the number of threads do not matter.

    `rows`: float16 or float32 [n, d], finite, unit norm or zero.

    Returns:
        mean: float32 [d]; zeros without rows.
        axes: float32 [2, d], orthogonal, unit norm, largest variance first; the entry of largest magnitude is positive.
            Zeros for a direction that does not exist (d = 1).
    """
    dimension = rows.shape[1]
    total, products = np.zeros(dimension), np.zeros((dimension, dimension))
    for start in range(0, len(rows), BLOCK_ROWS):
        block = np.rint(rows[start : start + BLOCK_ROWS].astype(np.float64) / COARSE) * COARSE
        total += block.sum(axis=0)
        products += block.T @ block
    mean = total / max(len(rows), 1)
    vectors = np.linalg.eigh(products - len(rows) * np.outer(mean, mean))[1]
    axes = np.zeros((2, dimension))
    found = vectors[:, : -min(2, dimension) - 1 : -1].T
    largest = found[np.arange(len(found)), np.abs(found).argmax(axis=1)]
    axes[: len(found)] = found * np.sign(largest)[:, None]
    return mean.astype(np.float32), axes.astype(np.float32)


def umap_plane(rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return places of rows [n, d] in a plane by UMAP (McInnes, Healy, Melville 2018), by cosine: float32 [n, 2]; the same each time.

    Raise an UnsupportedError if umap-learn is not installed.
    """
    try:
        import umap  # noqa: PLC0415  (seconds; no extra has it)
    except ModuleNotFoundError as error:
        raise UnsupportedError("`projection` umap needs umap-learn: pip install umap-learn") from error
    neighbours = max(2, min(15, len(rows) - 1))
    reducer = umap.UMAP(n_neighbors=neighbours, metric="cosine", random_state=0, n_jobs=1)
    return np.asarray(reducer.fit_transform(rows), np.float32)
