"""Keyed pseudo-random permutations of [0, n), evaluated at single points.

Up to 16 elements: by rank among keyed hashes. Above: a multiply-and-xor-shift round on the next power of two, then an affine map
modulo the next prime, each walked along its cycle until the value falls below n (Black, Rogaway 2002). The affine map makes any two
elements meet as often as in a uniform permutation; the round before it breaks the arithmetic progressions it would leave.
All of it is integer arithmetic: the same on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.kernels.hashing import hash_at
from tailwise.kernels.jit import jit

SMALL = 16
_S32 = np.uint64(32)
_ONE = np.uint64(1)


@jit
def next_prime(n: int) -> int:
    """The least prime ≥ n, for 2 ≤ n < 2³²."""
    candidate = n
    while True:
        divisor = 2
        while divisor * divisor <= candidate and candidate % divisor:
            divisor += 1 if divisor == 2 else 2
        if divisor * divisor > candidate:
            return candidate
        candidate += 1


@jit
def permute(key: np.uint64, n: int, prime: int, index: int) -> int:
    """π(index) for the permutation of [0, n) that `key` names; 0 ≤ index < n < 2³², and prime = next_prime(n) if n > SMALL."""
    if n <= SMALL:
        own = hash_at(key, np.uint64(index))
        place = 0
        for other in range(n):
            value = hash_at(key, np.uint64(other))
            if value < own or (value == own and other < index):
                place += 1
        return place
    factor = hash_at(key, np.uint64(0))
    mask = np.uint64(n - 1)
    for shift in (1, 2, 4, 8, 16):
        mask |= mask >> np.uint64(shift)
    half = _ONE
    while mask >> (half + half):
        half += _ONE
    limit, modulus = np.uint64(n), np.uint64(prime)
    multiplier = _ONE + (hash_at(key, np.uint64(1)) >> _S32) % (modulus - _ONE)
    offset = (hash_at(key, np.uint64(2)) >> _S32) % modulus
    value = np.uint64(index)
    while True:
        value = (value * (factor | _ONE) + (factor >> _S32)) & mask
        value ^= value >> half
        value = (value * (factor | _ONE)) & mask
        value ^= value >> half
        if value < limit:
            break
    while True:
        value = (value * multiplier + offset) % modulus
        if value < limit:
            return np.int64(value)  # type: ignore[no-any-return]  # int() would make numba mix signed and unsigned


@jit
def _permutation(key: np.uint64, prime: int, out: npt.NDArray[np.int64]) -> None:
    for index in range(len(out)):
        out[index] = permute(key, len(out), prime, index)


def permutation(key: np.uint64, n: int) -> npt.NDArray[Any]:
    """All of π, int64 [n]: where each index goes."""
    out = np.empty(n, np.int64)
    _permutation(key, next_prime(max(n, 2)), out)
    return out
