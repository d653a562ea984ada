"""Many reads of bytes at offsets, in one call without the interpreter lock."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types

from tailwise.kernels.jit import jit

CAN_ADVISE = hasattr(os, "posix_fadvise")  # else `advise_many` cannot be called
_WILL_NEED = 3  # POSIX_FADV_WILLNEED
# Functions of the C library.
_advise: Any = types.ExternalFunction("posix_fadvise", types.intc(types.int32, types.int64, types.int64, types.int32))
_pread = types.ExternalFunction("pread", types.intp(types.int32, types.uintp, types.uintp, types.int64))


@jit
def pread_many(
    handles: npt.NDArray[np.int32],
    starts: npt.NDArray[np.int64],
    stops: npt.NDArray[np.int64],
    buffer: npt.NDArray[np.uint8],
) -> int:
    """Read bytes [start, stop) of each file into `buffer`, one after the other.

    Args:
        handles: int32 [n], file descriptors.
        starts: int64 [n].
        stops: int64 [n], ≥ starts.
        buffer: uint8 [Σ (stop − start)].

    Returns:
        Number of ranges that were read before the first one that fails or is cut off by the end of its file.
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
    """Announce to the kernel reads of bytes [start, stop) of each file, so that it fetches all of them at once; see `pread_many`."""
    for at in range(len(handles)):
        _advise(handles[at], starts[at], stops[at] - starts[at], _WILL_NEED)
