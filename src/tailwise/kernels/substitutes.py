"""Which left-out row stands in for a drawn row that can't be read."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tailwise.kernels.jit import jit


@jit
def match_left_out(drawn: npt.NDArray[np.bool_], spare: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Pairs each drawn row with a spare one of its own: the next spare row after it, round the end, that no nearer row has.

    As brackets are paired: drawn rows open, spare ones close.

    Args:
        drawn: bool [n].
        spare: bool [n], where `drawn` isn't.

    Returns:
        int64 [n]: the spare row of each drawn one; −1 for other rows, and for drawn ones where there are too few spare rows.
    """
    count = len(drawn)
    match = np.full(count, -1, np.int64)
    taken = np.zeros(count, np.bool_)
    waiting = np.empty(2 * count, np.int64)
    depth = 0
    for step in range(2 * count):
        row = step % count
        if drawn[row] and step < count:
            waiting[depth] = row
            depth += 1
        elif spare[row] and not taken[row] and depth:
            depth -= 1
            match[waiting[depth]] = row
            taken[row] = True
    return match
