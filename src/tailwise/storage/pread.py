"""Files opened for reading at offsets; many such reads in one call, without the interpreter lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
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


class OpenFile:
    """A descriptor that is closed when it has no more references, so that no thread reads from a number that was reused."""

    __slots__ = ("handle", "touched")

    def __init__(self, path: str | Path) -> None:
        self.handle = -1
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.touched = 0.0

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        """Close it; `close` is bound early, since `os` may be gone when the interpreter ends."""
        if self.handle >= 0:
            close(self.handle)


@jit
def pread_many(
    handles: npt.NDArray[np.int32],
    starts: npt.NDArray[np.int64],
    stops: npt.NDArray[np.int64],
    buffer: npt.NDArray[np.uint8],
) -> int:
    """Read bytes [start, stop) of each file into `buffer`, one after the other, up to one that fails or is cut off by its file's end.

    `handles` are file descriptors, int32 [n]; `starts` and `stops`, int64 [n]; `buffer`, uint8 [Σ (stop − start)].
    Returns the number of ranges that were read.
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
