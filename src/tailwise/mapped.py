"""Arrays that are mapped from files without keeping the files open: a catalog may have more parts than a process may open files."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


class _Mapping:
    """The bytes of one file. NumPy keeps it as the base of the arrays that it makes of it."""

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as source:  # the buffer outlives the open file; a numpy.memmap would keep it open
            self._buffer = source.read_buffer()
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (self._buffer.size,),
            "data": (self._buffer.address, True),
        }

    def release(self) -> None:
        """Give back the pages that were read."""
        if sys.platform == "linux":
            address, size = ctypes.c_void_p(self._buffer.address), ctypes.c_size_t(self._buffer.size)
            _libc().madvise(address, size, mmap.MADV_DONTNEED)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def map_file(path: Path, dtype: np.dtype[Any], offset: int, shape: tuple[int, ...], order: str) -> npt.NDArray[Any]:
    """Map an array of a file for reading, from a number of bytes on; its order is "C" or "F".

    The file is closed again, and must not become shorter. Raise an OSError if it can't be read.
    """
    flat = np.asarray(_Mapping(path))[offset:].view(dtype)
    return flat.reshape(shape, order=order)  # type: ignore[call-overload, no-any-return]


def release_pages(array: object) -> None:
    """Let go of the pages that were read of a mapped array (of `map_file`, or a numpy.memmap); does nothing to others.

    They stay in the system's cache, and no longer count as this process's.
    """
    mode = array.mode if isinstance(array, np.memmap) else ""
    while isinstance(array, np.ndarray):
        array = array.base
    if isinstance(array, _Mapping):
        array.release()
    elif isinstance(array, mmap.mmap) and mode and mode != "c":  # the changes of a copy-on-write map must stay
        array.madvise(mmap.MADV_DONTNEED)
