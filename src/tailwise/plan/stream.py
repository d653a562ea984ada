"""The stream draw (METHODS: stream, steps 2 and 3): exact counts, and once before twice.

Each cluster deals its members like a deck of cards. A member holds a *slot* in the current pass; an epoch takes the next c slots.
Where it straddles two passes it takes the rest of one, "the tail", and then the head of the next, which is dealt from the members
that were not in the tail, so that nobody comes twice in an epoch that takes less than the whole cluster.
The slot in a pass follows from the slot in the pass before, by keyed permutations that are evaluated point by point: any row's copies
can be computed alone, in any order, at a cost that grows with the number of passes gone by, unless slots of an earlier epoch are given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.kernels.hashing import hash_at, stream_key
from tailwise.kernels.jit import jit
from tailwise.kernels.permute import SMALL, next_prime, permute
from tailwise.plan.counts import StreamPosition, next_counts

MAX_CLUSTER = 4_294_967_291  # the greatest prime below 2³²: permutations work modulo a prime of 32 bits
_KEYS = np.uint64(1 << 40)  # counters of keys begin here; permutations use the small ones


@dataclass(frozen=True)
class _Straddles:
    """The clusters whose window straddled two passes in one epoch.

    Attributes:
        epoch: which epoch.
        cluster: int64 [m], ascending.
        tail_start: int64 [m]: slots [tail_start, n) of the old pass are the tail; in [0, n].
        head: int64 [m]: slots [0, head) of the new pass are the head; in [1, n].
    """

    epoch: int
    cluster: npt.NDArray[np.int64]
    tail_start: npt.NDArray[np.int64]
    head: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Window:
    """What one epoch takes of each cluster, all int64 [K].

    Attributes:
        start: first slot of the old pass.
        stop: one after its last slot (n where the epoch straddles).
        full: whole passes between tail and head.
        head: slots of the new pass; 0 where the epoch doesn't straddle.
    """

    start: npt.NDArray[np.int64]
    stop: npt.NDArray[np.int64]
    full: npt.NDArray[np.int64]
    head: npt.NDArray[np.int64]


def _window(taken: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> _Window:
    start = np.where(taken > 0, (taken - 1) % np.maximum(sizes, 1) + 1, 0)
    beyond = counts - (sizes - start)
    straddles = beyond > 0
    full = np.where(straddles, (beyond - 1) // np.maximum(sizes, 1), 0)
    return _Window(
        start, np.where(straddles, sizes, start + counts), full, np.where(straddles, beyond - full * sizes, 0)
    )


@jit
def _keys_and_primes(
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
        keys[at] = hash_at(hash_at(base, np.uint64(cluster[at])), _KEYS + np.uint64(epoch))
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
    if slot < tail_start:  # not in the tail: dealt anew; the first go to the head
        slot = permute(key, tail_start, prime, slot)
        if slot < head:
            return slot
    return head + permute(hash_at(key, _KEYS), size - head, second_prime, slot - head)


@jit
def _first_slots(
    base: np.uint64,
    labels: npt.NDArray[np.int32],
    ranks: npt.NDArray[np.uint32],
    sizes: npt.NDArray[np.int64],
    primes: npt.NDArray[np.int64],
    slots: npt.NDArray[np.uint32],
) -> None:
    for row in range(len(labels)):
        label = labels[row]
        if label >= 0:
            slots[row] = permute(hash_at(base, np.uint64(label)), sizes[label], primes[label], np.int64(ranks[row]))


@jit
def _advance_slots(
    labels: npt.NDArray[np.int32],
    sizes: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    tail_start: npt.NDArray[np.int64],
    head: npt.NDArray[np.int64],
    keys: npt.NDArray[np.uint64],
    primes: npt.NDArray[np.int64],
    slots: npt.NDArray[np.uint32],
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
def _window_copies(
    labels: npt.NDArray[np.int32],
    old_slots: npt.NDArray[np.uint32],
    new_slots: npt.NDArray[np.uint32],
    start: npt.NDArray[np.int64],
    stop: npt.NDArray[np.int64],
    full: npt.NDArray[np.int64],
    head: npt.NDArray[np.int64],
    copies: npt.NDArray[np.uint8],
) -> None:
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


@jit
def _primes(sizes: npt.NDArray[np.int64], primes: npt.NDArray[np.int64]) -> None:
    for at in range(len(sizes)):
        primes[at] = next_prime(sizes[at]) if sizes[at] > SMALL else 0


class Stream:
    """The endless streams of all clusters of a plan."""

    def __init__(self, sizes: npt.NDArray[np.int64], quotas: Callable[[int], npt.NDArray[np.int64]], seed: int) -> None:
        """Begins the streams.

        Args:
            sizes: n, int64 [K], members of each cluster.
            quotas: epoch → int64 [K], in units of 2⁻³⁰ samples, summing to a whole number of samples; 0 for empty clusters.
            seed: decides all permutations.

        Raises:
            ValueError: a cluster has more than MAX_CLUSTER members.
        """
        if sizes.max(initial=0) > MAX_CLUSTER:
            raise ValueError(f"a cluster has {sizes.max():,} members; at most {MAX_CLUSTER:,} are possible")
        self.sizes = sizes
        self._quotas = quotas
        self._base = stream_key(seed, "stream")
        self._primes = np.zeros(len(sizes), np.int64)
        _primes(sizes, self._primes)
        self._position = StreamPosition.start(len(sizes))
        self._straddles: list[_Straddles] = []

    def position(self, epoch: int) -> StreamPosition:
        """Where the streams stand before `epoch`; computed from the epochs before it, kept for the next call."""
        if epoch < self._position.epoch:
            self._position, self._straddles = StreamPosition.start(len(self.sizes)), []
        while self._position.epoch < epoch:
            before = self._position
            counts, self._position = next_counts(before, self._quotas(before.epoch))
            self._straddles.append(self._straddles_of(before.epoch, _window(before.taken, counts, self.sizes)))
        return self._position

    def _straddles_of(self, epoch: int, window: _Window) -> _Straddles:
        cluster = np.flatnonzero(window.head)
        return _Straddles(epoch, cluster, window.start[cluster], window.head[cluster])

    def counts(self, epoch: int) -> npt.NDArray[np.int64]:
        """Copies that each cluster gives in an epoch: int64 [K], summing to the epoch's budget."""
        return next_counts(self.position(epoch), self._quotas(epoch))[0]

    def first_slots(self, labels: npt.NDArray[np.int32], ranks: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        """Slots of rows before epoch 0: uint32 [n]."""
        slots = np.zeros(len(labels), np.uint32)
        _first_slots(self._base, labels, ranks, self.sizes, self._primes, slots)
        return slots

    def advance_slots(
        self, labels: npt.NDArray[np.int32], slots: npt.NDArray[np.uint32], first: int, last: int
    ) -> npt.NDArray[np.uint32]:
        """Slots before epoch `last`, from those before epoch `first`: uint32 [n]."""
        self.position(last)
        return self._apply(labels, slots, self._straddles[first:last])

    def _apply(
        self, labels: npt.NDArray[np.int32], slots: npt.NDArray[np.uint32], straddles: list[_Straddles]
    ) -> npt.NDArray[np.uint32]:
        advanced: npt.NDArray[np.uint32] = slots.copy()
        if not straddles:
            return advanced
        tables: list[tuple[npt.NDArray[Any], ...]] = []
        for item in straddles:
            keys = np.empty(len(item.cluster), np.uint64)
            primes = np.empty((len(item.cluster), 2), np.int64)
            sizes = self.sizes[item.cluster]
            _keys_and_primes(self._base, item.epoch, item.cluster, sizes, item.tail_start, item.head, keys, primes)
            tables.append((item.cluster, item.tail_start, item.head, keys, primes))
        cluster, tail_start, head, keys, primes = (np.concatenate(column) for column in zip(*tables, strict=True))
        order = np.argsort(cluster, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(cluster, minlength=len(self.sizes)))])
        _advance_slots(
            labels, self.sizes, offsets, tail_start[order], head[order], keys[order], primes[order], advanced
        )
        return advanced

    def copies(
        self,
        epoch: int,
        labels: npt.NDArray[np.int32],
        ranks: npt.NDArray[np.uint32],
        slots: npt.NDArray[np.uint32] | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Copies of rows in an epoch.

        Args:
            epoch: 0, 1, …
            labels: int32 [n], cluster of each row; negative for rows that are never drawn.
            ranks: uint32 [n], in-cluster rank of each row.
            slots: uint32 [n], slots before this epoch, if they are known.

        Returns:
            uint8 [n].
        """
        if slots is None:
            slots = self.advance_slots(labels, self.first_slots(labels, ranks), 0, epoch)
        window = _window(self.position(epoch).taken, self.counts(epoch), self.sizes)
        new_slots = self._apply(labels, slots, [self._straddles_of(epoch, window)])
        copies = np.zeros(len(labels), np.uint8)
        _window_copies(labels, slots, new_slots, window.start, window.stop, window.full, window.head, copies)
        return copies
