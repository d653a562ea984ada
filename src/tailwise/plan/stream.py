"""The stream draw (METHODS: stream, steps 1 to 3): exact counts, and no second copy of a sample before every other has its first.

Each cluster deals its members like a deck of cards. A member holds a *slot* in the current pass; an epoch takes the next c slots.
An epoch that straddles two passes takes the rest of one, "the tail", and then the head of the next. The head is dealt from the members
that are not in the tail, so that no member repeats in an epoch that takes less than the whole cluster.
A slot in a pass follows from the slot in the pass before, by keyed permutations that are evaluated point by point: the copies of any
row can be computed alone, in any order. The cost grows with the number of passes, unless slots of an earlier epoch are given.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tailwise.kernels.keyed import (
    MAX_PERMUTED,
    advance_slots,
    first_slots,
    keys_and_primes,
    primes_of,
    stream_key,
    window_copies,
)
from tailwise.kernels.ranks import rank_dtype
from tailwise.plan.quotas import UNIT_BITS, UNITS

KEPT = 4  # windows and transitions; a draw needs two transitions
STEPS = 1 << 24  # permutations per call of compiled code, which does not answer signals: about half a second
K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class StreamPosition:
    """Position of each cluster's stream before an epoch."""

    epoch: int  # the next epoch
    taken: npt.NDArray[np.int64]  # copies given in all earlier epochs, int64 [K]
    deficit: npt.NDArray[np.int64]  # quotas minus copies so far, int64 [K], in units of 2⁻³⁰ samples; sums to 0

    @classmethod
    def start(cls, clusters: int) -> StreamPosition:
        """Return the position before epoch 0."""
        return cls(0, np.zeros(clusters, np.int64), np.zeros(clusters, np.int64))


def next_counts(
    position: StreamPosition, quotas: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], StreamPosition]:
    """Return the counts of one epoch, int64 [K], and the position after it.

    Each cluster gives the floor of its quota. The clusters with the largest accumulated deficit, ties by index, give one more, until counts
    sum to the budget. All is in integers, so that rounding never decides. Quotas may change from epoch to epoch.

    Args:
        position: position before the epoch.
        quotas: int64 [K], in units of 2⁻³⁰ samples; their sum is the budget, a whole number of samples.
    """
    counts = quotas >> UNIT_BITS
    deficit = position.deficit + (quotas & (UNITS - 1))
    extra, fraction = divmod(int(quotas.sum()) - (int(counts.sum()) << UNIT_BITS), UNITS)
    if fraction:
        raise ValueError(f"the quotas sum to {int(quotas.sum()) / UNITS} samples, not to a whole number")
    # A cluster with a whole quota never gives one more: that would exceed its quota, and perhaps its maximum.
    claim = np.where(quotas & (UNITS - 1), deficit, np.iinfo(np.int64).min)
    chosen = np.argsort(~claim, kind="stable")[:extra]
    counts[chosen] += 1
    deficit[chosen] -= UNITS
    return counts, StreamPosition(position.epoch + 1, position.taken + counts, deficit)


@dataclass(frozen=True)
class _Straddles:
    """The clusters whose window straddles two passes in one epoch."""

    epoch: int  # the epoch
    cluster: npt.NDArray[np.int64]  # int64 [m], ascending
    tail_start: npt.NDArray[np.int64]  # int64 [m]: slots [tail_start, n) of the old pass are the tail; in [0, n]
    head: npt.NDArray[np.int64]  # int64 [m]: slots [0, head) of the new pass are the head; in [1, n]


@dataclass(frozen=True)
class _Window:
    """The slots that one epoch takes of each cluster, all int64 [K]."""

    start: npt.NDArray[np.int64]  # first slot of the old pass
    stop: npt.NDArray[np.int64]  # one after its last slot (n where the epoch straddles)
    full: npt.NDArray[np.int64]  # whole passes between tail and head
    head: npt.NDArray[np.int64]  # slots of the new pass; 0 where the epoch does not straddle


def _window(taken: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> _Window:
    start = np.where(taken > 0, (taken - 1) % np.maximum(sizes, 1) + 1, 0)
    beyond = counts - (sizes - start)
    straddles = beyond > 0
    full = np.where(straddles, (beyond - 1) // np.maximum(sizes, 1), 0)
    stop, head = np.where(straddles, sizes, start + counts), np.where(straddles, beyond - full * sizes, 0)
    return _Window(start, stop, full, head)


@dataclass(frozen=True)
class _Transitions:
    """The effect of consecutive epochs' straddles on slots, by cluster."""

    # int64 [K + 1]: transitions offsets[j] … offsets[j + 1] − 1 are cluster j's, by epoch
    offsets: npt.NDArray[np.int64]
    tail_start: npt.NDArray[np.int64]  # int64 [m], see _Straddles
    head: npt.NDArray[np.int64]  # int64 [m], see _Straddles
    keys: npt.NDArray[np.uint64]  # uint64 [m], of the permutations
    primes: npt.NDArray[np.int64]  # int64 [m, 2], of the permutations


class Stream:
    """The endless streams of all clusters of a plan. Threads may share one."""

    def __init__(self, sizes: npt.NDArray[np.int64], quotas: Callable[[int], npt.NDArray[np.int64]], seed: int) -> None:
        """Start the streams.

        Args:
            sizes: n, int64 [K], members of each cluster.
            quotas: epoch → int64 [K], in units of 2⁻³⁰ samples, summing to a whole number of samples; 0 for empty clusters.
            seed: seed of all permutations.

        Raises:
            ValueError: a cluster has more than MAX_PERMUTED members.
        """
        if sizes.max(initial=0) > MAX_PERMUTED:
            raise ValueError(f"a cluster has {sizes.max():,} members; at most {MAX_PERMUTED:,} are possible")
        self.sizes = sizes
        self._slot_type = rank_dtype(int(sizes.max(initial=0)))
        self._quotas = quotas
        self._base = stream_key(seed, "stream")
        self._primes = np.zeros(len(sizes), np.int64)
        primes_of(sizes, self._primes)
        self._lock = threading.Lock()
        # Lists of finished epochs: they only grow, and their items never change.
        self._positions = [StreamPosition.start(len(sizes))]
        self._straddles: list[_Straddles] = []
        self._kept: dict[tuple[int, int], _Transitions] = {}
        self._windows: dict[int, _Window] = {}

    def position(self, epoch: int) -> StreamPosition:
        """Return the position of the streams before `epoch`. It is computed once; 16 bytes per cluster and epoch stay in memory."""
        with self._lock:
            while len(self._positions) <= epoch:
                before = self._positions[-1]
                counts, after = next_counts(before, self._quotas(before.epoch))
                window = _window(before.taken, counts, self.sizes)
                cluster = np.flatnonzero(window.head)
                straddles = _Straddles(before.epoch, cluster, window.start[cluster], window.head[cluster])
                self._straddles.append(straddles)
                self._positions.append(after)
        return self._positions[epoch]

    def counts(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the copies that each cluster gives in an epoch: int64 [K], summing to the epoch's budget."""
        return self.position(epoch + 1).taken - self.position(epoch).taken

    def first_slots(self, labels: npt.NDArray[np.int32], ranks: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return slots of rows before epoch 0: [n], of the type of `rank_dtype`."""
        slots = np.zeros(len(labels), self._slot_type)
        for start in range(0, len(labels), STEPS):
            piece = slice(start, start + STEPS)
            first_slots(self._base, labels[piece], ranks[piece], self.sizes, self._primes, slots[piece])
        return slots

    def advance_slots(
        self, labels: npt.NDArray[np.int32], slots: npt.NDArray[Any], first: int, last: int
    ) -> npt.NDArray[Any]:
        """Return slots before epoch `last`, from those before epoch `first`: [n], of their type."""
        advanced = np.array(slots)
        if first < last:
            moves = self._transitions(first, last)
            rows = max(1, STEPS // max(1, int(np.diff(moves.offsets).max(initial=1))))
            for start in range(0, len(advanced), rows):
                piece = slice(start, start + rows)
                columns = (moves.offsets, moves.tail_start, moves.head, moves.keys, moves.primes)
                advance_slots(labels[piece], self.sizes, *columns, advanced[piece])
        return advanced

    def _window(self, epoch: int) -> _Window:
        """Return the window of an epoch, kept for the next rows of the same draw."""
        before, after = self.position(epoch).taken, self.position(epoch + 1).taken
        return self._keep(self._windows, epoch, lambda: _window(before, after - before, self.sizes))

    def _transitions(self, first: int, last: int) -> _Transitions:
        """Return the transitions of epochs first … last − 1, kept for the next rows of the same draw."""
        self.position(last)
        return self._keep(self._kept, (first, last), lambda: self._join(self._straddles[first:last]))

    def _keep(self, kept: dict[K, V], key: K, make: Callable[[], V]) -> V:
        with self._lock:
            if key not in kept:
                while len(kept) >= KEPT:
                    del kept[next(iter(kept))]
                kept[key] = make()
            return kept[key]

    def _join(self, straddles: list[_Straddles]) -> _Transitions:
        tables = []
        for item in straddles:
            keys = np.empty(len(item.cluster), np.uint64)
            primes = np.empty((len(item.cluster), 2), np.int64)
            sizes = self.sizes[item.cluster]
            keys_and_primes(self._base, item.epoch, item.cluster, sizes, item.tail_start, item.head, keys, primes)
            tables.append((item.cluster, item.tail_start, item.head, keys, primes))
        cluster, tail_start, head, keys, primes = (np.concatenate(column) for column in zip(*tables, strict=True))
        order = np.argsort(cluster, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(cluster, minlength=len(self.sizes)))])
        return _Transitions(offsets, tail_start[order], head[order], keys[order], primes[order])

    def copies(
        self,
        epoch: int,
        labels: npt.NDArray[np.int32],
        ranks: npt.NDArray[Any],
        slots: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Return copies of rows in an epoch, uint8 [n].

        Args:
            epoch: 0, 1, …
            labels: int32 [n], cluster of each row; negative for rows that are never drawn.
            ranks: uint32 or uint64 [n], in-cluster rank of each row.
            slots: of the type of `rank_dtype` [n], slots before this epoch; None replays all epochs before it.
        """
        if slots is None:
            slots = self.advance_slots(labels, self.first_slots(labels, ranks), 0, epoch)
        window = self._window(epoch)
        new_slots = self.advance_slots(labels, slots, epoch, epoch + 1)
        copies = np.zeros(len(labels), np.uint8)
        window_copies(labels, slots, new_slots, window.start, window.stop, window.full, window.head, copies)
        return copies
