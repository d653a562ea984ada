"""The Bernoulli draw (DynamiCS, section 3.3): each sample gets floor(r) copies, and one more with probability frac(r)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tailwise.kernels.keyed import (
    copies_by_cluster,
    copies_by_rate,
    stream_key,
)


def bernoulli_copies(
    seed: int,
    epoch: int,
    rows: npt.NDArray[np.int64],
    rates: npt.NDArray[np.float32] | npt.NDArray[np.float64],
    labels: npt.NDArray[np.int32] | None = None,
) -> npt.NDArray[np.uint8]:
    """Return copies of rows in an epoch, uint8 [n]: a function of seed, epoch, row and the row's rate alone.

    Args:
        seed: seed of the plan.
        epoch: 0, 1, …
        rows: int64 [n], rows of the catalog.
        rates: expected copies per epoch, at most 255: of each row, float32 [n]; or, with labels, of each cluster, float64 [K].
        labels: int32 [n], cluster of each row; negative for rows that are never drawn.
    """
    copies = np.zeros(len(rows), np.uint8)
    key = stream_key(seed, "bernoulli", epoch)
    if labels is None:
        copies_by_rate(key, rows, rates.astype(np.float32, copy=False), copies)
    else:
        copies_by_cluster(key, rows, labels, rates.astype(np.float64, copy=False), copies)
    return copies
