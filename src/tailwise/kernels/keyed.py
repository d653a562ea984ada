"""Counter-based randomness: hashes, permutations, and the draws made of them. Integer arithmetic, the same on every machine.

All compiled functions that call each other stand in this one file, since numba's cache on disk notices only changes of the file that
a function is defined in: a stale callee would silently change an epoch.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.kernels.jit import jit

# --- hashes -----------------------------------------------------------------------------------------------------------

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_S11, _S20, _S27, _S30, _S31, _S32 = (np.uint64(shift) for shift in (11, 20, 27, 30, 31, 32))
_ONE = np.uint64(1)


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


@jit
def _hash_each(key: np.uint64, counters: npt.NDArray[np.int64], out: npt.NDArray[np.uint64]) -> None:
    for at in range(len(out)):
        out[at] = hash_at(key, np.uint64(counters[at]))


def hash_each(key: np.uint64, counters: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Return some numbers of a stream: uint64 [n], of counters int64 [n] of at least 0."""
    out = np.empty(len(counters), np.uint64)
    _hash_each(key, counters, out)
    return out


def random_below(key: np.uint64, first: int, bounds: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """One integer in [0, bound) for each bound (< 2⁶³), from the stream's numbers first, first + 1, …; the modulo bias is < bound/2⁶⁴."""
    return (hash_range(key, first, len(bounds)) % bounds.astype(np.uint64)).astype(np.int64)


# --- permutations -----------------------------------------------------------------------------------------------------
# Up to SMALL elements: by rank among keyed hashes. Above: a multiply-and-xor-shift round on the next power of two, then an affine map
# modulo the next prime, each walked along its cycle until the value falls below n (Black, Rogaway 2002). The affine map makes any two
# elements meet as often as in a uniform permutation; the round before it breaks the arithmetic progressions it would leave.
# With a prime of more than 32 bits, products have more than 64: they are made in two steps (`_affine`), of all bits of the hashes.

SMALL = 16
MAX_PERMUTED = 1_099_511_627_689  # the greatest prime below 2⁴⁰: see `_affine`
_LOW_20 = np.uint64((1 << 20) - 1)


@jit
def next_prime(n: int) -> int:
    """The least prime ≥ n, for 2 ≤ n < 2⁶²."""
    candidate = n
    while True:
        divisor = 2
        while divisor * divisor <= candidate and candidate % divisor:
            divisor += 1 if divisor == 2 else 2
        if divisor * divisor > candidate:
            return candidate
        candidate += 1


@jit
def _affine(value: np.uint64, multiplier: np.uint64, offset: np.uint64, modulus: np.uint64) -> np.uint64:
    """(value · multiplier + offset) mod `modulus`; all are below `modulus` < 2⁴⁰."""
    if modulus >> _S32:
        high = value * (multiplier >> _S20) % modulus
        product = (high << _S20) + value * (multiplier & _LOW_20)  # below 2⁶¹
    else:
        product = value * multiplier
    result: np.uint64 = (product + offset) % modulus
    return result


@jit
def permute(key: np.uint64, n: int, prime: int, index: int) -> int:
    """π(index) for the permutation of [0, n) that `key` names.

    0 ≤ index < n ≤ MAX_PERMUTED, and prime = next_prime(n) if n > SMALL.

    Any other index gives 0: the walk along its cycle might not end.
    """
    if not 0 <= index < n:
        return 0
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
    for shift in (1, 2, 4, 8, 16, 32):
        mask |= mask >> np.uint64(shift)
    half = _ONE
    while mask >> (half + half):
        half += _ONE
    limit, modulus = np.uint64(n), np.uint64(prime)
    unused = np.uint64(0) if modulus >> _S32 else _S32  # low bits of the hashes
    multiplier = _ONE + (hash_at(key, np.uint64(1)) >> unused) % (modulus - _ONE)
    offset = (hash_at(key, np.uint64(2)) >> unused) % modulus
    value = np.uint64(index)
    while True:
        value = (value * (factor | _ONE) + (factor >> _S32)) & mask
        value ^= value >> half
        value = (value * (factor | _ONE)) & mask
        value ^= value >> half
        if value < limit:
            break
    while True:
        value = _affine(value, multiplier, offset, modulus)
        if value < limit:
            return np.int64(value)  # type: ignore[no-any-return]  # int() would make numba mix signed and unsigned


@jit
def _permute_range(key: np.uint64, n: int, prime: int, first: int, out: npt.NDArray[np.int64]) -> None:
    for at in range(len(out)):
        out[at] = permute(key, n, prime, first + at)


def permute_range(key: np.uint64, n: int, first: int, count: int) -> npt.NDArray[np.int64]:
    """π(first) … π(first + count − 1) for the permutation of [0, n) that `key` names: int64 [count]."""
    out = np.empty(count, np.int64)
    _permute_range(key, n, next_prime(max(n, 2)), first, out)
    return out


def permutation(key: np.uint64, n: int) -> npt.NDArray[Any]:
    """All of π, int64 [n]: where each index goes."""
    return permute_range(key, n, 0, n)


# --- the stream draw: slots of members in the passes of their clusters (plan/stream.py) -----------------------------------

KEYS = np.uint64(1 << 40)  # counters of keys begin here; permutations use the small ones


@jit
def primes_of(sizes: npt.NDArray[np.int64], primes: npt.NDArray[np.int64]) -> None:
    """The prime that permutations of each size need; 0 for small sizes."""
    for at in range(len(sizes)):
        primes[at] = next_prime(sizes[at]) if sizes[at] > SMALL else 0


@jit
def keys_and_primes(
    base: np.uint64,
    epoch: int,
    cluster: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    tail_start: npt.NDArray[np.int64],
    head: npt.NDArray[np.int64],
    keys: npt.NDArray[np.uint64],
    primes: npt.NDArray[np.int64],
) -> None:
    """For each transition: its key, and the primes of the (at most two) permutations it consists of."""
    for at in range(len(cluster)):
        keys[at] = hash_at(hash_at(base, np.uint64(cluster[at])), KEYS + np.uint64(epoch))
        size, start, taken = sizes[at], tail_start[at], head[at]
        first = start if taken <= start else size - start
        primes[at, 0] = next_prime(max(first, 2)) if first > SMALL else 0
        second = size - taken if taken <= start else 0
        primes[at, 1] = next_prime(second) if second > SMALL else 0


@jit
def _next_slot(slot: int, size: int, tail_start: int, head: int, key: np.uint64, prime: int, second_prime: int) -> int:
    """The slot in the new pass of the member that held `slot` in the old one."""
    if head > tail_start:
        # More is taken than members are left: all who weren't in the tail, and some who were, fill the head.
        if slot < tail_start:
            return slot
        return tail_start + permute(key, size - tail_start, prime, slot - tail_start)
    if slot < tail_start:  # not in the tail: dealt again; the first go to the head
        slot = permute(key, tail_start, prime, slot)
        if slot < head:
            return slot
    return head + permute(hash_at(key, KEYS), size - head, second_prime, slot - head)


@jit
def first_slots(
    base: np.uint64,
    labels: npt.NDArray[np.int32],
    ranks: npt.NDArray[Any],
    sizes: npt.NDArray[np.int64],
    primes: npt.NDArray[np.int64],
    slots: npt.NDArray[Any],
) -> None:
    """The slot of each row in pass 0; ranks and slots are uint32 or uint64."""
    for row in range(len(labels)):
        label = labels[row]
        if label >= 0:
            slots[row] = permute(hash_at(base, np.uint64(label)), sizes[label], primes[label], np.int64(ranks[row]))


@jit
def advance_slots(
    labels: npt.NDArray[np.int32],
    sizes: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    tail_start: npt.NDArray[np.int64],
    head: npt.NDArray[np.int64],
    keys: npt.NDArray[np.uint64],
    primes: npt.NDArray[np.int64],
    slots: npt.NDArray[Any],
) -> None:
    """Applies to each row the transitions [offsets[label], offsets[label + 1]) of its cluster, in order."""
    for row in range(len(labels)):
        label = labels[row]
        if label >= 0:
            slot = np.int64(slots[row])
            for at in range(offsets[label], offsets[label + 1]):
                slot = _next_slot(slot, sizes[label], tail_start[at], head[at], keys[at], primes[at, 0], primes[at, 1])
            slots[row] = slot


@jit
def window_copies(
    labels: npt.NDArray[np.int32],
    old_slots: npt.NDArray[Any],
    new_slots: npt.NDArray[Any],
    start: npt.NDArray[np.int64],
    stop: npt.NDArray[np.int64],
    full: npt.NDArray[np.int64],
    head: npt.NDArray[np.int64],
    copies: npt.NDArray[np.uint8],
) -> None:
    """How often the window [start, stop) of the old pass, `full` passes and the head of the new one hold each row."""
    for row in range(len(labels)):
        label = labels[row]
        if label >= 0:
            slot = np.int64(old_slots[row])
            count = full[label]
            if start[label] <= slot < stop[label]:
                count += 1
            if np.int64(new_slots[row]) < head[label]:
                count += 1
            copies[row] = count


# --- the Bernoulli draw (plan/stream.py) -----------------------------------------------------------------------------

_UNIT = 2.0**-53


@jit
def copies_by_rate(
    key: np.uint64, rows: npt.NDArray[np.int64], rates: npt.NDArray[np.float32], copies: npt.NDArray[np.uint8]
) -> None:
    """floor(rate) copies of each row, and one more if its random number is below frac(rate)."""
    for at in range(len(rows)):
        rate = np.float64(rates[at])
        whole = np.floor(rate)
        uniform = np.float64(hash_at(key, np.uint64(rows[at])) >> _S11) * _UNIT
        copies[at] = np.uint8(whole) + (uniform < rate - whole)


@jit
def copies_by_cluster(
    key: np.uint64,
    rows: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int32],
    rates: npt.NDArray[np.float64],
    copies: npt.NDArray[np.uint8],
) -> None:
    """The same, by the rate of each row's cluster."""
    for at in range(len(rows)):
        label = labels[at]
        if label >= 0:
            rate = rates[label]
            whole = np.floor(rate)
            uniform = np.float64(hash_at(key, np.uint64(rows[at])) >> _S11) * _UNIT
            copies[at] = np.uint8(whole) + (uniform < rate - whole)


# --- the loader's order (loader/) ---------------------------------------------------------------------------------------


@jit
def count_copies(copies: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> None:
    """Rows of each shard with more than m copies, into counts [shards, 256]; shard s has copies[offsets[s]:offsets[s + 1]]."""
    for shard in range(len(offsets) - 1):
        for row in range(offsets[shard], offsets[shard + 1]):
            counts[shard, copies[row]] += 1
        at_least = 0
        for number in range(255, -1, -1):
            exactly = counts[shard, number]
            counts[shard, number] = at_least
            at_least += exactly


@jit
def lane_positions(
    base: np.uint64,
    lanes: npt.NDArray[np.int64],
    length: int,
    blocks: int,
    primes: npt.NDArray[np.int64],
    first: int,
    positions: npt.NDArray[np.int64],
) -> None:
    """Which samples of a section stand at positions first, first + 1, … of some of its lanes, into positions [lanes, n].

    Lane l holds samples l · length … (l + 1) · length − 1, cut into `blocks` blocks of nearly equal size (two sizes, primes[0] and
    primes[1] for the smaller and the greater); each is permuted in itself.
    """
    small = length // blocks
    for lane in range(len(lanes)):
        key = hash_at(base, np.uint64(lanes[lane]))
        for at in range(positions.shape[1]):
            position = first + at
            block = ((position + 1) * blocks - 1) // length
            start = block * length // blocks
            size = (block + 1) * length // blocks - start
            place = permute(hash_at(key, KEYS + np.uint64(block)), size, primes[size - small], position - start)
            positions[lane, at] = lanes[lane] * length + start + place
