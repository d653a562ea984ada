"""The Bernoulli draw (DynamiCS, section 3.3): each sample by itself, floor(r) copies and one more with probability frac(r)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tailwise.kernels.hashing import hash_at, stream_key
from tailwise.kernels.jit import jit

_S11 = np.uint64(11)
_UNIT = 2.0**-53


@jit
def _copies_by_rate(
    key: np.uint64, rows: npt.NDArray[np.int64], rates: npt.NDArray[np.float32], copies: npt.NDArray[np.uint8]
) -> None:
    for at in range(len(rows)):
        rate = np.float64(rates[at])
        whole = np.floor(rate)
        uniform = np.float64(hash_at(key, np.uint64(rows[at])) >> _S11) * _UNIT
        copies[at] = np.uint8(whole) + (uniform < rate - whole)


@jit
def _copies_by_cluster(
    key: np.uint64,
    rows: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int32],
    rates: npt.NDArray[np.float64],
    copies: npt.NDArray[np.uint8],
) -> None:
    for at in range(len(rows)):
        label = labels[at]
        if label >= 0:
            rate = rates[label]
            whole = np.floor(rate)
            uniform = np.float64(hash_at(key, np.uint64(rows[at])) >> _S11) * _UNIT
            copies[at] = np.uint8(whole) + (uniform < rate - whole)


def bernoulli_copies(
    seed: int,
    epoch: int,
    rows: npt.NDArray[np.int64],
    rates: npt.NDArray[np.float32] | npt.NDArray[np.float64],
    labels: npt.NDArray[np.int32] | None = None,
) -> npt.NDArray[np.uint8]:
    """Copies of rows in an epoch; a function of (seed, epoch, row) and the row's rate alone.

    Args:
        seed: of the plan.
        epoch: 0, 1, …
        rows: int64 [n], rows of the catalog.
        rates: expected copies per epoch, at most 255: of each row, float32 [n]; or, with labels, of each cluster, float64 [K].
        labels: int32 [n], cluster of each row; negative for rows that are never drawn.

    Returns:
        uint8 [n].
    """
    copies = np.zeros(len(rows), np.uint8)
    key = stream_key(seed, "bernoulli", epoch)
    if labels is None:
        _copies_by_rate(key, rows, rates.astype(np.float32, copy=False), copies)
    else:
        _copies_by_cluster(key, rows, labels, rates.astype(np.float64, copy=False), copies)
    return copies
