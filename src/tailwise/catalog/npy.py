"""The header of a `.npy` file, checked against the size of the file before anything is mapped or allocated."""

from __future__ import annotations

import math
import os
import threading
import tokenize
import warnings
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

# What NumPy, and the Python parser that it calls, raise on damaged headers.
_FAULTS = (
    *(ValueError, TypeError, LookupError, AttributeError, NameError, ArithmeticError),
    *(SyntaxError, tokenize.TokenError, RecursionError, MemoryError),
)
_parsing = (
    threading.Lock()
)  # Python's parser, which reads the header, fails at times in several threads (CPython gh-106905)
os.register_at_fork(before=_parsing.acquire, after_in_parent=_parsing.release, after_in_child=_parsing.release)
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class Header:
    """The header of one array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # never object
    fortran: bool  # True if the array is stored column by column
    offset: int  # bytes before the data


def read_header(stream: IO[bytes], size_bytes: int) -> Header:
    """Return the header of the `.npy` file that `stream` begins with.

    Args:
        stream: at the first byte of the file.
        size_bytes: size of the file, which must be that of header and data together.

    Raises:
        ValueError: it is no `.npy`, its header is damaged, it is pickled, or its data has another size than its header states.
        OSError: it can't be read.
    """
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _READERS:
            raise ValueError(f".npy version {version} is not supported")
        with _parsing, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about the text of a damaged header
            shape, fortran, dtype = _READERS[version](stream)
    except _FAULTS as error:
        raise ValueError(f"its .npy header is damaged: {' '.join(str(error).split())[:200]}") from error
    if dtype.hasobject:
        raise ValueError("it is a pickled array; unpickling a file would run its code")
    if not dtype.itemsize or dtype.subdtype or not all(0 <= length < 1 << 63 for length in shape):
        raise ValueError(f"its .npy header states {dtype} {list(shape)}")
    offset = stream.tell()
    stated = math.prod(shape) * dtype.itemsize
    if size_bytes - offset != stated:
        raise ValueError(f"it has {size_bytes - offset:,} bytes of data, its header states {stated:,}")
    return Header(tuple(map(int, shape)), dtype, fortran, offset)
