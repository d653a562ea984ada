"""NormSim∞: the greatest magnitude of a cosine to a target set, exactly.

Approximate products screen (see screening.py); exact ones decide among the columns within their error of the greatest (see grid.py).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from tailwise.kernels.assign import TILE_CENTROIDS, TILE_ROWS
from tailwise.kernels.grid import row_norms, to_grid
from tailwise.kernels.nearest import raise_to_greatest
from tailwise.kernels.products import WrongProductError, repeat_if_wrong
from tailwise.kernels.screening import Precision, Screen, full_precision, scratch_for
from tailwise.kernels.threads import run_tiles

Half = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]


def greatest_cosines(image: Half, targets: Iterable[Half], *, precision: Precision | None = None) -> Wide:
    """NormSim∞: ‖X x_i‖_∞, the greatest magnitude of a cosine to any row of a target set X (Wang et al. 2024, section 3.2).

    Args:
        image: float16 [n, d], unit norm.
        targets: pieces of X, float16 [t, d], unit norm.
        precision: of the screening; None for the faster one. The result doesn't depend on it.

    Returns:
        float64 [n], NaN for rows of zeros. Takes the memory of `image` and of one piece in float32, and 2 MB a thread.
    """
    x, greatest = to_grid(image), np.zeros(len(image))
    for piece in targets:
        greatest = np.maximum(greatest, _greatest_products(x, to_grid(piece), precision))
    with np.errstate(invalid="ignore"):
        cosine: Wide = greatest / row_norms(x)
    return cosine


@repeat_if_wrong
def _greatest_products(x: Floats, targets: Floats, precision: Precision | None) -> Wide:
    """Return the greatest |inner product| of each row [n, d] with targets [t, d], over their norms: float64 [n]."""
    greatest = np.zeros(len(x))
    inverse = 1.0 / row_norms(targets)
    screen = Screen(to_grid(targets.mean(axis=0, dtype=np.float64)), precision)
    tiles = screen.tiles(screen.columns(targets, inverse.astype(np.float32)), TILE_CENTROIDS, TILE_ROWS)

    def work(start: int, scratch: torch.Tensor) -> None:
        rows = x[start : start + TILE_ROWS]
        coded = screen.rows(rows)
        for number, columns in enumerate(tiles):
            scores = screen.scores(coded, columns, scratch)
            own = greatest[start : start + TILE_ROWS]
            if not raise_to_greatest(*scores, rows, targets, inverse, number * TILE_CENTROIDS, own):
                raise WrongProductError

    def memory() -> torch.Tensor:
        return scratch_for(screen.precision, TILE_ROWS, TILE_CENTROIDS)

    with full_precision():
        run_tiles(work, range(0, len(x), TILE_ROWS), torch.get_num_threads(), memory)
    return greatest
