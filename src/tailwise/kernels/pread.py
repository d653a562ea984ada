"""Many reads of bytes at offsets, in one call without the interpreter lock."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import types

from tailwise.kernels.jit import jit

_pread = types.ExternalFunction(
    "pread", types.intp(types.int32, types.uintp, types.uintp, types.int64)
)  # of the C library


@jit
def pread_many(
    handles: npt.NDArray[np.int32],
    starts: npt.NDArray[np.int64],
    stops: npt.NDArray[np.int64],
    buffer: npt.NDArray[np.uint8],
) -> int:
    """Reads bytes [start, stop) of each open file, end to end, into `buffer`.

    Args:
        handles: int32 [n], file descriptors.
        starts: int64 [n].
        stops: int64 [n], ≥ starts.
        buffer: uint8 [Σ (stop − start)].

    Returns:
        How many of the n were read whole, from the first on: n, unless one failed or the file ended before it did.
    """
    place = np.int64(0)
    for at in range(len(handles)):
        length = stops[at] - starts[at]
        if _pread(handles[at], np.uintp(buffer.ctypes.data + place), np.uintp(length), starts[at]) != length:
            return at
        place += length
    return len(handles)
