"""Counter-based randomness: a 64-bit hash of (seed, numbers), the same everywhere, for any subset of counters, in any order."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.kernels.jit import jit

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)


def stream_key(seed: int, purpose: str, *numbers: int) -> np.uint64:
    """The 64-bit key of one stream of random numbers: BLAKE2b of (seed, purpose, numbers)."""
    text = "\t".join([str(seed), purpose, *map(str, numbers)])
    key: np.uint64 = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), "<u8")[0]
    return key


@jit
def mix(value: np.uint64) -> np.uint64:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit numbers that looks random."""
    value = (value ^ (value >> _S30)) * _M1
    value = (value ^ (value >> _S27)) * _M2
    mixed: np.uint64 = value ^ (value >> _S31)
    return mixed


@jit
def hash_at(key: np.uint64, counter: np.uint64) -> np.uint64:
    """Number `counter` of the stream `key`: SplitMix64 at that position."""
    return mix(np.uint64(key + (counter + np.uint64(1)) * GOLDEN))


@jit
def _hash_range(key: np.uint64, first: np.uint64, out: npt.NDArray[np.uint64]) -> None:
    for at in range(len(out)):
        out[at] = hash_at(key, first + np.uint64(at))


def hash_range(key: np.uint64, first: int, count: int) -> npt.NDArray[np.uint64]:
    """Numbers first … first + count − 1 of a stream: uint64 [count]."""
    out = np.empty(count, np.uint64)
    _hash_range(key, np.uint64(first), out)
    return out


def random_below(key: np.uint64, first: int, bounds: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """One integer in [0, bound) for each bound (< 2⁶³), from the stream's numbers first, first + 1, …; the modulo bias is < bound/2⁶⁴."""
    return (hash_range(key, first, len(bounds)) % bounds.astype(np.uint64)).astype(np.int64)
