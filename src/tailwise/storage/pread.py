"""Many reads of bytes at offsets, in one call without the interpreter lock."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types

from tailwise.kernels.jit import jit

CAN_ADVISE = hasattr(os, "posix_fadvise")
_WILL_NEED = 3  # POSIX_FADV_WILLNEED
_advise: Any = types.ExternalFunction(
    "posix_fadvise", types.intc(types.int32, types.int64, types.int64, types.int32)
)  # of the C library
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


@jit
def advise_many(handles: npt.NDArray[np.int32], starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> None:
    """Tells the kernel that bytes [start, stop) of each open file will be read, so that it fetches all of them at once.

    Only where CAN_ADVISE; arguments as `pread_many` has them.
    """
    for at in range(len(handles)):
        _advise(handles[at], starts[at], stops[at] - starts[at], _WILL_NEED)
