"""Replacements of rows that were removed or cannot be read, so that batches never shrink: a function of plan and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tailwise.catalog.removals import NOTHING_REMOVED, Removals
from tailwise.kernels.keyed import hash_range, stream_key
from tailwise.kernels.substitutes import match_left_out
from tailwise.plan.plan import Plan
from tailwise.storage.lru import LRUCache

ATTEMPTS = 64  # other shards that are tried; if none has a readable row, the pool is lost
KEPT_SHARDS = 64


class Substitutes:
    """Replacements of rows of a plan, by the seed of an order, never by removed rows."""

    def __init__(self, plan: Plan, seed: int, removals: Removals = NOTHING_REMOVED) -> None:
        self._plan, self._seed, self._removals = plan, seed, removals
        self._matches: LRUCache[tuple[int, int], npt.NDArray[np.int64]] = LRUCache(KEPT_SHARDS)

    def of(self, row: int, epoch: int) -> Iterator[int]:
        """Yield rows to try in place of `row`, best first.

        The first is a row of the same shard that the epoch did not draw, a different one for each row of the shard. The next are
        undrawn rows of other shards, chosen by hash; then any rows of such shards that can be drawn. Never-drawn rows (without a
        cluster, or of rate 0) and removed rows are not used as replacements.
        """
        offsets = self._plan.shard_offsets
        shard = int(self._plan.shards_of(np.array(row)))
        first = int(offsets[shard])
        match = int(self._match(epoch, shard)[row - first])
        if match >= 0:
            yield first + match
        shards = len(offsets) - 1
        key = stream_key(self._seed, "substitute", epoch, row)
        choices = (hash_range(key, 0, 2 * ATTEMPTS) >> np.uint64(1)).astype(np.int64)
        for spare_only in (True, False):
            for at in range(ATTEMPTS):
                other = int(choices[2 * at] % shards)
                spare, drawn = self._spare(epoch, other)
                candidates = np.flatnonzero(
                    spare if spare_only else spare | (drawn & self._removals.keeps(self._plan.rows_of(other)))
                )
                if len(candidates):
                    yield int(offsets[other] + candidates[choices[2 * at + 1] % len(candidates)])

    def _spare(self, epoch: int, shard: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Return which of a shard's rows are undrawn and may replace others, and which are drawn: bool [n] each."""
        plan = self._plan
        rows = plan.rows_of(shard)
        drawn = plan.draw(epoch, rows) > 0
        return plan.drawable(rows) & ~drawn & self._removals.keeps(rows), drawn

    def _match(self, epoch: int, shard: int) -> npt.NDArray[np.int64]:
        def match() -> npt.NDArray[np.int64]:
            spare, drawn = self._spare(epoch, shard)
            return match_left_out(drawn, spare)

        return self._matches.get((self._plan.drawn_epoch(epoch), shard), match)
