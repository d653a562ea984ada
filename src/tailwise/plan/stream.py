"""The stream draw (METHODS: stream, steps 2 and 3): exact counts, and once before twice.

Each cluster deals its members like a deck of cards. A member holds a *slot* in the current pass; an epoch takes the next c slots.
Where it straddles two passes it takes the rest of one, "the tail", and then the head of the next, which is dealt from the members
that were not in the tail, so that nobody comes twice in an epoch that takes less than the whole cluster.
The slot in a pass follows from the slot in the pass before, by keyed permutations that are evaluated point by point: any row's copies
can be computed alone, in any order, at a cost that grows with the number of passes gone by, unless slots of an earlier epoch are given.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tailwise.kernels.keyed import (
    advance_slots,
    first_slots,
    keys_and_primes,
    primes_of,
    stream_key,
    window_copies,
)
from tailwise.plan.counts import StreamPosition, next_counts

KEPT_TRANSITIONS = 4  # a draw needs two; the next epoch shares none of them
STEPS = 1 << 24  # permutations evaluated without a look at signals
MAX_CLUSTER = 4_294_967_291  # the greatest prime below 2³²: permutations work modulo a prime of 32 bits


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


@dataclass(frozen=True)
class _Transitions:
    """What the straddles of some consecutive epochs do to slots, by cluster.

    Attributes:
        offsets: int64 [K + 1]: transitions offsets[j] … offsets[j + 1] − 1 are cluster j's, by epoch.
        tail_start: int64 [m], see _Straddles.
        head: int64 [m], see _Straddles.
        keys: uint64 [m], of the permutations.
        primes: int64 [m, 2], of the permutations.
    """

    offsets: npt.NDArray[np.int64]
    tail_start: npt.NDArray[np.int64]
    head: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint64]
    primes: npt.NDArray[np.int64]


class Stream:
    """The endless streams of all clusters of a plan. Threads may share one."""

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
        primes_of(sizes, self._primes)
        self._lock = threading.Lock()
        # Epochs once computed: these only grow, and what they hold never changes.
        self._positions = [StreamPosition.start(len(sizes))]
        self._straddles: list[_Straddles] = []
        self._kept: dict[tuple[int, int], _Transitions] = {}
        self._windows: dict[int, _Window] = {}

    def position(self, epoch: int) -> StreamPosition:
        """Where the streams stand before `epoch`. Computed once, from the epochs before it: 16 bytes a cluster and epoch are kept."""
        with self._lock:
            while len(self._positions) <= epoch:
                before = self._positions[-1]
                counts, after = next_counts(before, self._quotas(before.epoch))
                self._straddles.append(self._straddles_of(before.epoch, _window(before.taken, counts, self.sizes)))
                self._positions.append(after)
        return self._positions[epoch]

    def _straddles_of(self, epoch: int, window: _Window) -> _Straddles:
        cluster = np.flatnonzero(window.head)
        return _Straddles(epoch, cluster, window.start[cluster], window.head[cluster])

    def counts(self, epoch: int) -> npt.NDArray[np.int64]:
        """Copies that each cluster gives in an epoch: int64 [K], summing to the epoch's budget."""
        return self.position(epoch + 1).taken - self.position(epoch).taken

    def first_slots(self, labels: npt.NDArray[np.int32], ranks: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        """Slots of rows before epoch 0: uint32 [n]."""
        slots = np.zeros(len(labels), np.uint32)
        for start in range(0, len(labels), STEPS):
            piece = slice(start, start + STEPS)
            first_slots(self._base, labels[piece], ranks[piece], self.sizes, self._primes, slots[piece])
        return slots

    def advance_slots(
        self, labels: npt.NDArray[np.int32], slots: npt.NDArray[np.uint32], first: int, last: int
    ) -> npt.NDArray[np.uint32]:
        """Slots before epoch `last`, from those before epoch `first`: uint32 [n]."""
        advanced: npt.NDArray[np.uint32] = np.array(slots)
        if first < last:
            moves = self._transitions(first, last)
            # In pieces of about half a second: compiled code does not answer signals.
            rows = max(1, STEPS // max(1, int(np.diff(moves.offsets).max(initial=1))))
            for start in range(0, len(advanced), rows):
                piece = slice(start, start + rows)
                columns = (moves.offsets, moves.tail_start, moves.head, moves.keys, moves.primes)
                advance_slots(labels[piece], self.sizes, *columns, advanced[piece])
        return advanced

    def _window(self, epoch: int) -> _Window:
        """What an epoch takes, kept for the next rows of the same draw."""
        before, after = self.position(epoch).taken, self.position(epoch + 1).taken
        with self._lock:
            if epoch not in self._windows:
                while len(self._windows) >= KEPT_TRANSITIONS:
                    del self._windows[next(iter(self._windows))]
                self._windows[epoch] = _window(before, after - before, self.sizes)
            return self._windows[epoch]

    def _transitions(self, first: int, last: int) -> _Transitions:
        """Those of epochs first … last − 1, kept for the next rows of the same draw."""
        self.position(last)
        with self._lock:
            if (first, last) not in self._kept:
                while len(self._kept) >= KEPT_TRANSITIONS:
                    del self._kept[next(iter(self._kept))]
                self._kept[first, last] = self._join(self._straddles[first:last])
            return self._kept[first, last]

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
        ranks: npt.NDArray[np.uint32],
        slots: npt.NDArray[np.uint32] | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Copies of rows in an epoch.

        Args:
            epoch: 0, 1, …
            labels: int32 [n], cluster of each row; negative for rows that are never drawn.
            ranks: uint32 [n], in-cluster rank of each row.
            slots: uint32 [n], slots before this epoch, if they are known; None replays all epochs before it.

        Returns:
            uint8 [n].
        """
        if slots is None:
            slots = self.advance_slots(labels, self.first_slots(labels, ranks), 0, epoch)
        window = self._window(epoch)
        new_slots = self.advance_slots(labels, slots, epoch, epoch + 1)
        copies = np.zeros(len(labels), np.uint8)
        window_copies(labels, slots, new_slots, window.start, window.stop, window.full, window.head, copies)
        return copies
