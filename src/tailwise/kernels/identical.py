"""Which rows equal an earlier row, to the bit but for the sign of zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.kernels.jit import jit

_OFFSET = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x00000100000001B3)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)
_MINUS_ZERO = np.uint16(0x8000)  # the bits of −0, which equals 0


@jit
def _hash_words(words: npt.NDArray[np.unsignedinteger[Any]], hashes: npt.NDArray[np.uint64]) -> None:
    """FNV-1a over words of whatever width, four at a time, mixed so that the low bits depend on all."""
    whole = words.shape[1] - words.shape[1] % 4
    for row in range(words.shape[0]):
        a = b = c = d = _OFFSET  # four chains, for each product waits for the one before it
        for axis in range(0, whole, 4):
            a = (a ^ (a >> _HALF) ^ np.uint64(words[row, axis])) * _PRIME
            b = (b ^ (b >> _HALF) ^ np.uint64(words[row, axis + 1])) * _PRIME
            c = (c ^ (c >> _HALF) ^ np.uint64(words[row, axis + 2])) * _PRIME
            d = (d ^ (d >> _HALF) ^ np.uint64(words[row, axis + 3])) * _PRIME
        for axis in range(whole, words.shape[1]):
            a = (a ^ (a >> _HALF) ^ np.uint64(words[row, axis])) * _PRIME
        value = _OFFSET
        for chain in (a, b, c, d):
            value = (value ^ chain ^ (chain >> _HALF)) * _GOLDEN
        hashes[row] = value ^ (value >> _HALF)


@jit
def _first_of_identical(
    words: npt.NDArray[np.unsignedinteger[Any]],
    hashes: npt.NDArray[np.uint64],
    table: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
) -> None:
    """Fills `first` with the help of a hash table, all −1, whose length is a power of two above the number of rows."""
    last = len(table) - 1
    for row in range(len(first)):
        slot = np.int64(hashes[row] & np.uint64(last))
        first[row] = row
        while table[slot] >= 0:
            other = table[slot]
            if hashes[other] == hashes[row] and np.array_equal(words[other], words[row]):
                first[row] = other
                break
            slot = (slot + 1) & last
        if first[row] == row:
            table[slot] = row


def first_of_identical(x: npt.NDArray[np.float16]) -> npt.NDArray[np.int64]:
    """The first row that equals each row of x [m, d], in expected linear time: int64 [m]."""
    bits = np.ascontiguousarray(x).view(np.uint16)
    if (minus := bits == _MINUS_ZERO).any():
        bits = np.where(minus, np.uint16(0), bits)
    words = bits.view(np.uint64 if x.shape[1] % 4 == 0 else np.uint16)
    hashes = np.empty(len(x), np.uint64)
    _hash_words(words, hashes)
    first = np.empty(len(x), np.int64)
    table = np.full(1 << (2 * len(x)).bit_length(), -1, np.int64)
    _first_of_identical(words, hashes, table, first)
    return first
