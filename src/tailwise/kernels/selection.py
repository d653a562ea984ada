"""Order statistics of float32 values that are read in pieces, exactly, in two passes and bounded memory.

The bits of a float32, flipped so that they sort as the numbers do, are counted by their upper halves first, then, inside the halves that
the wanted ranks fall into, by their lower ones (a radix selection).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

HALF = 1 << 16
_SIGN = np.uint32(1 << 31)
Pieces = Callable[[], Iterable[npt.NDArray[np.float32]]]


def ordered_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """The bits of float32 values, none NaN, as uint32 that sort in the same order; −0 and 0 are the same."""
    bits: npt.NDArray[np.uint32] = (values + np.float32(0)).view(np.uint32)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def from_ordered_bits(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32]:
    """Return the numbers that `ordered_bits` was made from."""
    return np.where(bits & _SIGN, bits ^ _SIGN, ~bits).view(np.float32)


def order_statistics(pieces: Pieces, ranks: Sequence[int]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """The values at some ranks of all pieces' values in ascending order.

    Args:
        pieces: gives the same values, none NaN, whenever it is called; it is called twice.
        ranks: from 0, below the number of values.

    Returns:
        values: float32 [ranks].
        below: int64 [ranks], how many values are less than each of them.
    """
    upper = np.zeros(HALF, np.int64)
    for piece in pieces():
        upper += np.bincount(ordered_bits(piece) >> 16, minlength=HALF)
    before = np.cumsum(upper) - upper
    halves = np.searchsorted(np.cumsum(upper), ranks, side="right")
    lower = {half: np.zeros(HALF, np.int64) for half in halves.tolist()}
    for piece in pieces():
        bits = ordered_bits(piece)
        for half, counts in lower.items():
            np.add(counts, np.bincount(bits[bits >> 16 == half] & (HALF - 1), minlength=HALF), out=counts)
    found = np.empty(len(ranks), np.uint32)
    below = np.empty(len(ranks), np.int64)
    for at, (rank, half) in enumerate(zip(ranks, halves.tolist(), strict=True)):
        ends = np.cumsum(lower[half])
        low = int(np.searchsorted(ends, rank - before[half], side="right"))
        found[at] = (half << 16) | low
        below[at] = before[half] + ends[low] - lower[half][low]
    return from_ordered_bits(found), below
